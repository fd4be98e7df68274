"""What the rules share: the checked config, its plan, resources and params."""

import copy
import dataclasses
import math
import os
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

# The library of this clone takes precedence over an installed one.
sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from qwt_mmdet.config import read_file, resolve
from qwt_mmdet.config.export import GPU_RUNTIMES
from qwt_mmdet.devices import count_gpus
from qwt_mmdet.errors import QwtError
from qwt_mmdet.files import write_json
from qwt_mmdet.plan import Failure, Plan, Stopped, Variant
from qwt_mmdet.plan.files import DOCUMENT, EXPORTS_TABLE, REPORT, TABLE, UNFINISHED
from qwt_mmdet.plan.settings import Settings
from qwt_mmdet.reporting.terminal import last_error, run_summary
from qwt_mmdet.resources import ESTIMATE, JOBS, memory_mb, minutes, read_estimate
from qwt_mmdet.runtime import COMMAND, explain, unusable
from qwt_mmdet.staleness import (
    changed_files,
    file_state,
    share_with_scripts,
    source_hash,
)

share_with_scripts()

# Steps record the command of the user. Jobs read the workflow again with another command line, so an existing
# value is kept.
os.environ.setdefault(COMMAND, shlex.join(["snakemake", *sys.argv[1:]]))

STARTED = time.time()


def in_plain_words(check, *arguments):
    """Return ``check(*arguments)``; if it raises a QwtError, exit with its message."""
    try:
        return check(*arguments)
    except QwtError as error:
        files = ", ".join(map(str, workflow.configfiles)) or "config/config.yaml"
        sys.exit(f"Error in the configuration ({files}):\n{error}")


if set(str(workflow.basedir)) & set("{}"):
    sys.exit(
        f"The workflow is in {workflow.basedir}. Snakemake reads the braces as wildcards; move or rename the folder."
    )

# Snakemake shows a traceback for a broken config file, so the file is read here first. This is too late only for
# files on the command line that Snakemake cannot read at all.
for path in workflow.overwrite_configfiles or ["config/config.yaml"]:
    in_plain_words(read_file, path)

# A config file named on the command line replaces the default one. Otherwise Snakemake would merge both, and also
# compute the models and targets of the default.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


GIVEN_CONFIG = copy.deepcopy(config)
config = in_plain_words(resolve, config)
MEASURED = in_plain_words(read_estimate, ESTIMATE)
# Environment variable of the run that summarizes the finished results of a failed run. Its rows differ from those
# of a successful run, so the next run makes the summary again.
SUMMARIZING = "QWT_MMDET_UNFINISHED"
PLAN = Plan(config, Stopped.read(UNFINISHED) if SUMMARIZING in os.environ else None)
SETTINGS = Settings(PLAN)


def any_of(names):
    """Return a pattern of these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


# From the second repeat on, names of quantizations and of their images have its number: `w4a4@2` is calibrated on
# `calibration@2`.
REPEAT = r"(@[1-9]\d*)?"


wildcard_constraints:
    part=f"calibration{REPEAT}|evaluation",
    dataset=any_of(config["datasets"]),
    model=any_of(config["models"]),
    quantization=f"({any_of(config['quantization'])}){REPEAT}",
    measurement=f"({any_of(PLAN.measurements)}){REPEAT}",
    compensation=any_of(config["compensation"]),
    evaluated=f"baseline|({any_of(config['quantization'])}){REPEAT}/({any_of(['quantized', *config['compensation']])})",
    shard=r"[1-9]\d*",
    shards=r"[1-9]\d*",
    variant=any_of(["baseline", *(Variant(*row).name for row in PLAN.exports)]),
    runtime=any_of({r: None for e in PLAN.exports.values() for r in e.runtime}),


def end_progress():
    """Wait until the loggers, which have a thread of their own, have shown all, and let them end their bar."""
    manager = workflow.logger_manager
    if manager.queue_listener:
        manager.queue_listener.stop()
        manager.queue_listener.start()
    for handler in manager.get_log_handlers():
        handler.flush()


def runs_here():
    """Whether jobs run on this machine, not on a cluster."""
    return workflow.local_exec and not workflow.remote_exec


def detector_gpu(wildcards):
    """Resources function: number of GPUs of a step that runs a detector, 1 or 0.

    It is 0 on a machine without a GPU: else `--resources gpu=1` would allow only one step at a time on its CPU.
    """
    if config["device"] != "auto":
        return int(config["device"] != "cpu")
    return 0 if runs_here() and not count_gpus() else 1


def all_cores(wildcards):
    """Threads function: all cores of this machine; 1 on a cluster, whose nodes are unknown."""
    if not runs_here():
        return 1
    return min(workflow.resource_settings.cores or 1, os.cpu_count())


def summary_threads(wildcards):
    """Threads function: up to 8, for the bootstrap."""
    return min(8, all_cores(wildcards))


def detector_threads(wildcards):
    """Threads function: cores of a job that runs a detector, while several such jobs run in parallel.

    Jobs with one thread each use the cores best. A job gets more threads only if cores would be idle.
    """
    at_once = (
        len(PLAN.combinations) * config["repeats"] * int(wildcards.get("shards", 1))
    )
    return max(1, min(8, all_cores(wildcards) // min(at_once, detector_jobs())))


def detector_jobs():
    """Return the number of parallel jobs that run a detector, on this machine or the cluster.

    Jobs read the workflow again, perhaps on nodes with other numbers of cores, so an existing number is kept.
    """
    if JOBS in os.environ:
        return int(os.environ[JOBS])
    if not runs_here():
        return workflow.resource_settings.nodes
    limit = workflow.global_resources.get("gpu")
    jobs = workflow.resource_settings.cores or 1
    if limit is not None and detector_gpu(None):
        jobs = min(jobs, limit.value or jobs)
    return jobs


def calibrated(wildcards):
    """Return the name of a quantization or measurement, perhaps with the number of a repeat; None without."""
    return wildcards.get("quantization") or wildcards.get("measurement")


def runtime_gpu(wildcards):
    """Resources function: GPUs of a job that runs an exported file in a runtime."""
    return int(wildcards.runtime in GPU_RUNTIMES)


def step_resources(step, gpu=detector_gpu):
    """Return the resources of a step that runs a detector, from what `qwt-mmdet estimate` measured."""

    def megabytes(wildcards, attempt):
        measured = MEASURED.get((wildcards.get("model"), step))
        cache_gb = SETTINGS.cache_gb(step, calibrated(wildcards))
        return memory_mb(measured, attempt, cache_gb=cache_gb)

    def limit(wildcards, attempt):
        measured = MEASURED.get((wildcards.get("model"), step))
        return measured and minutes(
            measured, SETTINGS.images_of(step, wildcards.model), attempt
        )

    return {"gpu": gpu, "mem_mb": megabytes, "runtime": limit}


def table_mb(wildcards, input, threads, attempt):
    """Resources function: megabytes of a job in which each process reads one predictions file at a time."""
    largest = max(input.size_files_mb, default=0)
    return math.ceil((1000 + 10 * largest * threads) * 2 ** (attempt - 1))


def report_mb(wildcards, input, attempt):
    """Resources function: megabytes of a job that reads the predictions of several variants."""
    return math.ceil((1000 + 10 * input.size_mb) * 2 ** (attempt - 1))


def from_wildcards(function, *names, **fixed):
    """Return an input or params function that calls ``function`` with these wildcards; missing ones are None."""

    def ask(wildcards):
        named = {name: wildcards.get(name) for name in names}
        return in_plain_words(partial(function, **fixed, **named))

    return ask


def noted(pattern):
    """Params function: the file in which jobs note files that they read or wrote, and a text that changes with those."""

    def note(wildcards):
        path = pattern.format(**wildcards)
        return {"note": path, "seen": changed_files(path)}

    return note


def detector_input(part):
    """Return the input files of a step that runs a model on a part of its dataset."""

    def images(wildcards):
        return SETTINGS.images(part, wildcards.model, calibrated(wildcards))

    return {"checkpoint": "results/{model}/checkpoint.pth", "annotations": images}


def detector_params(step):
    """Return the params that all steps that run a model share."""
    return {
        "config": from_wildcards(
            SETTINGS.entry, "model", section="models", key="config"
        ),
        "config_options": from_wildcards(
            SETTINGS.entry, "model", section="models", key="config_options"
        ),
        "config_state": lambda wildcards: file_state(
            config["models"][wildcards.model]["config"]
        ),
        "read": noted("results/{model}/config_files.json"),
        "seed": config["seed"],
        "code": source_hash(step),
    }


def plain(rows):
    """Return rows of the plan as params."""
    return [dataclasses.asdict(row) for row in rows]


os.environ[JOBS] = str(detector_jobs())

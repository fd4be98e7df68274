"""Everything that the rules share: the checked config and the plan of it, resources, and params."""

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

# The library beside this workflow, not one that happens to be installed.
sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from qwt_mmdet.config import read_file, resolve
from qwt_mmdet.devices import count_gpus
from qwt_mmdet.errors import QwtError
from qwt_mmdet.files import write_json
from qwt_mmdet.plan import Failure, Plan, Stopped, Variant
from qwt_mmdet.plan.files import DOCUMENT, EXPORTS_TABLE, REPORT, TABLE, UNFINISHED
from qwt_mmdet.plan.settings import Settings
from qwt_mmdet.reporting.text import last_error, run_summary
from qwt_mmdet.resources import ESTIMATE, JOBS, memory_mb, minutes, read_estimate
from qwt_mmdet.runtime import COMMAND, explain, unusable
from qwt_mmdet.staleness import (
    changed_files,
    file_state,
    share_with_scripts,
    source_hash,
)

share_with_scripts()

# Jobs record the command. They read the workflow again, with a command line of their own, so the first
# one stays.
os.environ.setdefault(COMMAND, shlex.join(["snakemake", *sys.argv[1:]]))

STARTED = time.time()


def in_plain_words(check, *arguments):
    """Return what ``check`` returns; end with a plain message if it finds something wrong."""
    try:
        return check(*arguments)
    except QwtError as error:
        files = ", ".join(map(str, workflow.configfiles)) or "config/config.yaml"
        sys.exit(f"Error in the configuration ({files}):\n{error}")


if set(str(workflow.basedir)) & set("{}"):
    sys.exit(
        f"The workflow lies in {workflow.basedir}, whose braces Snakemake reads as its own signs; move or "
        "rename the folder."
    )

# Snakemake has no plain words for a broken file, so it is read here first, as far as possible: those
# named on the command line Snakemake has read by now.
for path in workflow.overwrite_configfiles or ["config/config.yaml"]:
    in_plain_words(read_file, path)

# A config file named on the command line replaces the default one. Snakemake would merge the two, and models and
# targets of the default would be computed as well.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


GIVEN_CONFIG = copy.deepcopy(config)
config = in_plain_words(resolve, config)
MEASURED = in_plain_words(read_estimate, ESTIMATE)
# The run that summarizes what a failed one has finished has this variable, and other rows than a run that
# succeeds, so that the next one makes the summary again.
SUMMARIZING = "QWT_MMDET_UNFINISHED"
PLAN = Plan(config, Stopped.read(UNFINISHED) if SUMMARIZING in os.environ else None)
SETTINGS = Settings(PLAN)


def any_of(names):
    """Return a pattern of these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


# A quantization that is calibrated anew has the number of the repeat in its name, as have its images:
# `w4a4@2` comes of `calibration@2`.
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


def runs_here():
    """Whether jobs run on this machine, not on a cluster's."""
    return workflow.local_exec and not workflow.remote_exec


def detector_gpu(wildcards):
    """Resources function: the GPU that a step wants, 0 where it runs here and there is none.

    Asking for one all the same would let `--resources gpu=1` run one step at a time on a CPU.
    """
    if config["device"] != "auto":
        return int(config["device"] != "cpu")
    return 0 if runs_here() and not count_gpus() else 1


def all_cores(wildcards):
    """Threads function: all cores of this machine; one on a cluster, whose nodes nobody knows here."""
    if not runs_here():
        return 1
    return min(workflow.resource_settings.cores or 1, os.cpu_count())


def summary_threads(wildcards):
    """Threads function: as many as the bootstrap has use for."""
    return min(8, all_cores(wildcards))


def detector_threads(wildcards):
    """Threads function: cores for one run of a detector, of which several run side by side.

    One thread each keeps the cores busiest; only cores that would be idle give a job more.
    """
    at_once = (
        len(PLAN.combinations) * config["repeats"] * int(wildcards.get("shards", 1))
    )
    return max(1, min(8, all_cores(wildcards) // min(at_once, detector_jobs())))


def detector_jobs():
    """Return how many runs of a detector this machine or the cluster computes side by side.

    Jobs read the workflow again, on nodes with other numbers of cores, so the first reading's number stays.
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
    """Return the name of a quantization or of a measurement, which may have the number of a repeat; None without."""
    return wildcards.get("quantization") or wildcards.get("measurement")


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
    """Resources function: megabytes of a job each of whose processes reads one file of predictions at a time."""
    largest = max(input.size_files_mb, default=0)
    return math.ceil((1000 + 10 * largest * threads) * 2 ** (attempt - 1))


def report_mb(wildcards, input, attempt):
    """Resources function: megabytes of a job that reads the predictions of several variants."""
    return math.ceil((1000 + 10 * input.size_mb) * 2 ** (attempt - 1))


def of(function, *names, **fixed):
    """Return an input or params function: what a function says of the wildcards of these names, None for missing ones."""

    def ask(wildcards):
        named = {name: wildcards.get(name) for name in names}
        return in_plain_words(partial(function, **fixed, **named))

    return ask


def noted(pattern):
    """Params function: where jobs note which files they read, or left beside their output, and what tells changes."""

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
    """Return the params that all steps have which run a model."""
    return {
        "config": of(SETTINGS.entry, "model", section="models", key="config"),
        "config_options": of(
            SETTINGS.entry, "model", section="models", key="config_options"
        ),
        "config_state": lambda wildcards: file_state(
            config["models"][wildcards.model]["config"]
        ),
        "read": noted("results/{model}/config_files.json"),
        "seed": config["seed"],
        "code": source_hash(step),
    }


def kept(path, keep):
    """Return an output file that stays, or that goes once nothing needs it any more."""
    return path if keep else temp(path)


def plain(rows):
    """Return rows of the plan as params."""
    return [dataclasses.asdict(row) for row in rows]


os.environ[JOBS] = str(detector_jobs())

"""Everything that the rules share: the checked config, targets and helpers of rules."""

import copy
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

# The library beside this workflow, not one that happens to be installed.
sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from qwt_mmdet.config import (
    Search,
    combinations,
    exports,
    is_question,
    of_repeat,
    read_file,
    resolve,
    searched_settings,
)
from qwt_mmdet.data.sources import number_of_images, open_source
from qwt_mmdet.devices import count_gpus
from qwt_mmdet.errors import QwtError
from qwt_mmdet.files import is_url, write_json
from qwt_mmdet.reporting.text import UNFINISHED, last_error, run_summary
from qwt_mmdet.resources import (
    ESTIMATE,
    JOBS,
    default_shards,
    memory_mb,
    minutes,
    read_estimate,
)
from qwt_mmdet.runtime import COMMAND, REFITS, explain
from qwt_mmdet.staleness import (
    changed_files,
    count_shards,
    file_state,
    share_with_scripts,
    shards_note,
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

# A config file named on the command line replaces the default one; merged, it would drag the
# default's models and targets along.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


GIVEN_CONFIG = copy.deepcopy(config)
config = in_plain_words(resolve, config)
COMBINATIONS = combinations(config)
EXPORTS = exports(config)
MEASURED = in_plain_words(read_estimate, ESTIMATE)


def any_of(names):
    """Return a pattern of these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def export_variant(combination):
    """Return the folder, in that of its model, of an exported combination: `w4a4/qwt`."""
    return "/".join(filter(None, combination[1:]))


# A quantization that is calibrated anew has the number of the repeat in its name, as have its images:
# `w4a4@2` comes of `calibration@2`.
REPEAT = r"(@[1-9]\d*)?"


wildcard_constraints:
    part=f"calibration{REPEAT}|evaluation",
    dataset=any_of(config["datasets"]),
    model=any_of(config["models"]),
    quantization=f"({any_of(config['quantization'])}){REPEAT}",
    compensation=any_of(config["compensation"]),
    evaluated=f"baseline|({any_of(config['quantization'])}){REPEAT}/({any_of(['quantized', *config['compensation']])})",
    shard=r"[1-9]\d*",
    shards=r"[1-9]\d*",
    variant=any_of(["baseline", *map(export_variant, EXPORTS)]),
    runtime="onnxruntime|openvino",


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
    at_once = len(COMBINATIONS) * config["repeats"] * int(wildcards.get("shards", 1))
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


def step_resources(step, gpu=detector_gpu):
    """Return the resources of a step that runs a detector, from what `qwt-mmdet estimate` measured."""
    part = "evaluation" if step.startswith("evaluate") else "calibration"

    def measured(wildcards):
        return MEASURED.get((wildcards.get("model"), step))

    def megabytes(wildcards, attempt):
        caches = step == "fit_compensation" or (
            step in REFITS and question_settings(wildcards)["refit"] != "none"
        )
        cache_gb = config["activation_cache"]["memory_gb"] if caches else 0
        return memory_mb(measured(wildcards), attempt, cache_gb=cache_gb)

    def limit(wildcards, attempt):
        if measured(wildcards) is None:
            return None
        dataset = config["models"][wildcards.model]["dataset"]
        count = config["datasets"][dataset][part]["images"]
        as_measured = count == "all" or step == "measure_candidates"
        images = None if as_measured else count
        return minutes(measured(wildcards), images, attempt)

    return {"gpu": gpu, "mem_mb": megabytes, "runtime": limit}


def table_mb(wildcards, input, threads, attempt):
    """Resources function: megabytes of a job each of whose processes reads one file of predictions at a time."""
    largest = max(input.size_files_mb, default=0)
    return math.ceil((1000 + 10 * largest * threads) * 2 ** (attempt - 1))


def report_mb(wildcards, input, attempt):
    """Resources function: megabytes of a job that reads the predictions of several variants."""
    return math.ceil((1000 + 10 * input.size_mb) * 2 ** (attempt - 1))


def existing(path, key):
    """Return ``path``; end with a plain message if there is no such file."""
    if not os.path.isfile(path):
        sys.exit(f"{key} is {str(path)!r}, but there is no such file; check the path.")
    return path


def entry(section, wildcard):
    """Params function: the config entry that a wildcard names, whatever the repeat."""
    return lambda wildcards: config[section][without_repeat(wildcards[wildcard])]


def plain_settings(wildcards):
    """Params function: the settings of a quantization; None where it is a question, which a recipe answers."""
    entry = config["quantization"][without_repeat(wildcards.quantization)]
    return None if is_question(entry) else entry


def question_settings(wildcards):
    """Params function: the settings of which all but the bits holds in the answer to a question."""
    name = without_repeat(wildcards.quantization)
    return searched_settings(config["quantization"], name)


def candidates(wildcards):
    """Params function: what is measured for a question."""
    search = Search(**config["quantization"][without_repeat(wildcards.quantization)])
    return {
        "weight_bits": sorted(set(search.candidates)),
        "activation_bits": search.activation_candidates(),
        "images": search.images,
    }


def chosen_recipe(wildcards):
    """Input function: the answer to a quantization that is a question."""
    if plain_settings(wildcards) is not None:
        return []
    return f"results/{wildcards.model}/{wildcards.quantization}/recipe.yaml"


def without_repeat(name):
    """Return the name of a quantization without the number of its repeat."""
    return name.partition("@")[0]


def repeats(combination):
    """Return a combination for each repeat: that itself, then those whose quantization has a number."""
    return [combination] + [
        combination._replace(quantization=f"{combination.quantization}@{number}")
        for number in range(2, config["repeats"] + 1)
    ]


def model_setting(key):
    """Params function: one setting of the model."""
    return lambda wildcards: config["models"][wildcards.model][key]


def data_source(wildcards):
    """Return where the dataset of a rule comes from, and the part that the rule's files are named after."""
    name = wildcards.dataset
    settings, part = of_repeat(config["datasets"][name], wildcards.part)
    return open_source(settings, f"results/datasets/{name}"), part


def part_settings(wildcards):
    """Params function: what decides which images of a part are chosen."""
    source, part = data_source(wildcards)
    return source.choice_settings(part)


def part_source(wildcards):
    """Params function: what decides the annotations of a part, before images are chosen."""
    source, part = data_source(wildcards)
    return source.annotation_settings(part)


def source_file(wildcards):
    """Input function: where the annotations of a part are; repeats share them unless they are generated."""
    source, part = data_source(wildcards)
    first = open_source(config["datasets"][wildcards.dataset], "")
    shared = first.annotation_settings(part) == source.annotation_settings(part)
    name = part if shared else wildcards.part
    return f"results/datasets/{wildcards.dataset}/{name}_source.json"


def files_note(wildcards):
    """Params function: where it is noted how the chosen image files were."""
    return f"results/datasets/{wildcards.dataset}/{wildcards.part}_files.json"


def images_since(wildcards):
    """Params function: tells chosen images that were changed or removed from those that were not."""
    return changed_files(files_note(wildcards))


# Files of the user are no inputs: Snakemake would read {x} and <x> in their names as its own signs.
def local_checkpoint(wildcards):
    """Params function: the state of the model's checkpoint if it is a file here."""
    location = config["models"][wildcards.model]["checkpoint"]
    if is_url(location):
        return None
    return file_state(existing(location, f"models.{wildcards.model}.checkpoint"))


def local_annotations(wildcards):
    """Params function: the state of the annotation file of a part of a dataset that is a folder here."""
    source, part = data_source(wildcards)
    path = source.local_annotations(part)
    if path is None:
        return None
    key = f"The annotation file of datasets.{wildcards.dataset}.{part}"
    return file_state(existing(path, key))


def supplied_warmup(wildcards):
    """Params function: the warmup file that the config supplies, if any, and its state."""
    path = config["models"][wildcards.model]["warmup"].get(wildcards.quantization)
    if path is None:
        return {"path": None}
    key = f"models.{wildcards.model}.warmup.{wildcards.quantization}"
    return {"path": existing(path, key), "state": file_state(path)}


def noted(pattern):
    """Params function: where jobs note which files they read, or left beside their output, and what tells changes."""

    def note(wildcards):
        path = pattern.format(**wildcards)
        return {"note": path, "seen": changed_files(path)}

    return note


def detector_input(part):
    """Return the input files of a step that runs a model on a part of its dataset."""
    return {
        "checkpoint": "results/{model}/checkpoint.pth",
        "annotations": images(part),
    }


def detector_params(step):
    """Return the params that all steps have which run a model."""
    return {
        "config": model_setting("config"),
        "config_options": model_setting("config_options"),
        "config_state": lambda wildcards: file_state(
            config["models"][wildcards.model]["config"]
        ),
        "read": noted("results/{model}/config_files.json"),
        "seed": config["seed"],
        "code": source_hash(step),
    }


def shards(wildcards):
    """Input function: what the shards of an evaluation detect; nothing where one job evaluates all images."""
    count = count_shards(config, shards_by_default(wildcards), **wildcards)
    folder = os.path.dirname(shards_note(config, **wildcards)[0])
    numbers = range(1, count + 1) if count > 1 else ()
    return [f"{folder}/shards/{number}-of-{count}.json" for number in numbers]


def shards_by_default(wildcards):
    """Return into how many jobs the evaluations of a model are split where the config leaves it open."""
    evaluations = len(result_files("metrics.json"))
    jobs = detector_jobs()
    if jobs < 2 * evaluations:
        return 1  # without counting images
    dataset = config["datasets"][config["models"][wildcards.model]["dataset"]]
    return default_shards(number_of_images(dataset, "evaluation"), evaluations, jobs)


def shard_input(wildcards):
    """Input function: warmup and compensation of the variant that a shard belongs to, as far as it has them."""
    quantization, _, compensation = wildcards.evaluated.partition("/")
    folder = f"results/{wildcards.model}/{quantization}"
    files = {} if quantization == "baseline" else {"warmup": f"{folder}/warmup.pth"}
    if compensation not in ("", "quantized"):
        files["compensation"] = f"{folder}/{compensation}/compensation.pth"
    return files


os.environ[JOBS] = str(detector_jobs())


def evaluated_folders(combination):
    """Result folders of the variants of a combination; None for what is not evaluated."""
    model, quantization, compensation = combination
    folders = {
        "baseline": f"results/{model}/baseline",
        "quantized": f"results/{model}/{quantization}/quantized",
        "compensated": compensation
        and f"results/{model}/{quantization}/{compensation}",
    }
    for variant in ("baseline", "quantized"):
        if f"evaluate_{variant}" in config["skip"]:
            folders[variant] = None
    return folders


def export_input(wildcards):
    """Input function: warmup, compensation and metrics of a variant that is exported, as far as it has them."""
    quantization, _, compensation = wildcards.variant.partition("/")
    folder = f"results/{wildcards.model}/{quantization}"
    files = {"warmup": f"{folder}/warmup.pth"}
    kind = "quantized"
    if quantization == "baseline":
        files, kind = {}, "baseline"
    elif compensation:
        files["compensation"] = f"{folder}/{compensation}/compensation.pth"
        kind = "compensated"
    evaluated = evaluated_folders((wildcards.model, quantization, compensation))[kind]
    return files | ({"metrics": f"{evaluated}/metrics.json"} if evaluated else {})


def export_settings(wildcards):
    """Params function: how the files of a model are exported."""
    entry = next(e for row, e in EXPORTS.items() if row.model == wildcards.model)
    return {"opset": entry.opset, "input": entry.input}


def kept(path, keep):
    """Return an output file that stays, or that goes once nothing needs it any more."""
    return path if keep else temp(path)


def images(part):
    """Input function: annotation file of the model's images, for calibration those of the rule's repeat."""

    def path(wildcards):
        repeat = "".join(wildcards.get("quantization", "").partition("@")[1:])
        chosen = part + (repeat if part == "calibration" else "")
        dataset = config["models"][wildcards.model]["dataset"]
        return f"results/datasets/{dataset}/{chosen}.json"

    return path


# Of a run that failed, what is finished is summarized by a run of its own; see `summarize_finished`.
# It has other rows than a run that succeeds, so that the next one makes the summary again.
if "QWT_MMDET_UNFINISHED" in os.environ:
    STOPPED = json.loads(Path(UNFINISHED).read_text(encoding="utf-8"))
else:
    STOPPED = {"failed": [], "pending": []}


def finished(path, *names):
    """Return a path; None if a run that failed has not made it, or a file of these names in it."""
    files = [f"{path}/{name}" for name in names] or [path]
    return None if set(files) & set(STOPPED["pending"]) else path


def causes(row):
    """Sentences about the failed steps that a result row needs."""
    return [
        f"{failed['step']}: {failed['sentence']}"
        for failed in STOPPED["failed"]
        if all(
            row.get(key, name) in (name, without_repeat(name))
            for key, name in failed["wildcards"].items()
        )
    ]


def result_row(combination):
    """Names, settings and result folders of a combination: what summary and report read."""
    model, quantization, compensation = combination
    dataset = config["models"][model]["dataset"]
    wanted = [evaluated_folders(repeat) for repeat in repeats(combination)]
    made = [
        {
            variant: folder and finished(folder, "metrics.json")
            for variant, folder in folders.items()
        }
        for folders in wanted
    ]
    missing = [
        folder
        for of_repeat, found in zip(wanted, made, strict=True)
        for variant, folder in of_repeat.items()
        if folder != found[variant]
    ]
    evaluated = {
        variant: next(filter(None, (found[variant] for found in made)), None)
        for variant in made[0]
    }
    names = {**combination._asdict(), "dataset": dataset, "variant": None}
    return {
        **combination._asdict(),
        "dataset": dataset,
        "failed": missing and (causes(names) or ["the run stopped before it"]),
        "settings": searched_settings(config["quantization"], quantization),
        "recipe": is_question(config["quantization"][quantization])
        and finished(f"results/{model}/{quantization}/recipe.json")
        or None,
        "limit": config["quantization"][quantization].get("smallest"),
        "compensation_settings": config["compensation"].get(compensation),
        "annotations": finished(f"results/datasets/{dataset}/evaluation.json"),
        **evaluated,
        "repeats": {
            variant: list(
                dict.fromkeys(filter(None, (found[variant] for found in made)))
            )
            for variant in made[0]
        },
        "warmup": finished(f"results/{model}/{quantization}/warmup.pth"),
    }


RESULT_ROWS = [result_row(combination) for combination in COMBINATIONS]


def export_row(combination, runtime):
    """Names and files of an exported detector in a runtime: what summary and report read."""
    variant = export_variant(combination)
    folder = f"results/{combination.model}/{variant}/{runtime}"
    evaluated = evaluated_folders(combination)
    simulated = evaluated["compensated" if combination.compensation else "quantized"]
    names = {**combination._asdict(), "runtime": runtime}
    files = {
        "exported": finished(folder, "metrics.json"),
        "benchmark": finished(f"{folder}/benchmark.json"),
    }
    about = {
        **names,
        "variant": variant,
        "dataset": config["models"][combination.model]["dataset"],
    }
    return {
        **names,
        **files,
        "simulated": simulated and finished(simulated, "metrics.json"),
        "failed": None in files.values()
        and (causes(about) or ["the run stopped before it"]),
    }


EXPORT_ROWS = [
    export_row(combination, runtime)
    for combination, about in EXPORTS.items()
    for runtime in about.runtime
]


def result_files(*names, variants=("baseline", "quantized", "compensated")):
    """Return the files of these names in all result folders, each once."""
    return list(
        dict.fromkeys(
            f"{folder}/{name}"
            for row in RESULT_ROWS
            for variant in variants
            for folder in row["repeats"][variant]
            for name in names
        )
    )


def row_files(key):
    """Return the files that all result rows name under a key, each once."""
    return list(dict.fromkeys(row[key] for row in RESULT_ROWS if row[key] is not None))


def export_files():
    """Return what summary and report read of exported detectors."""
    files = []
    for row in EXPORT_ROWS:
        if row["exported"] is not None:
            files += [
                f"{row['exported']}/{name}"
                for name in ("metrics.json", "predictions.json")
            ]
        files += [row["benchmark"]] if row["benchmark"] is not None else []
    return files


def exported_models():
    """Return the files of all exported detectors, with those in full precision that they are compared with."""
    variants = {(row.model, export_variant(row)): None for row in EXPORTS}
    variants |= {(row.model, "baseline"): None for row in EXPORTS}
    return [
        f"results/{model}/{variant}/model.{suffix}"
        for model, variant in variants
        for suffix in ("onnx", "json")
    ]


def annotation_files():
    """Return the annotation files of the chosen images of all datasets that are evaluated on."""
    return [
        path
        for folder in map(os.path.dirname, row_files("annotations"))
        for part in ("calibration", "evaluation")
        if (path := finished(f"{folder}/{part}.json"))
    ]


def warmup_summaries():
    """Return the files with what the warmup files say of themselves."""
    return [f"{os.path.splitext(path)[0]}.json" for path in row_files("warmup")]


def all_results():
    """Return all files that the config asks for, so that one that is gone is made again."""
    return [
        "results/summary.csv",
        "results/summary.json",
        "results/report.html",
        *annotation_files(),
        *result_files("metrics.json", "predictions.json"),
        *result_files(
            "compensation.pth",
            "compensation.json",
            "blocks.csv",
            variants=["compensated"],
        ),
        *(["results/exports.csv"] if EXPORTS else []),
        *row_files("recipe"),
        *(f"{os.path.splitext(path)[0]}.yaml" for path in row_files("recipe")),
        *exported_models(),
        *export_files(),
        *warmup_summaries(),
        *(row_files("warmup") if config["keep_warmup"] else []),
    ]


def forget_failures():
    """Remove the note of the failures of an earlier run."""
    try:
        Path(UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        sys.exit(explain(error))


def summarize_finished():
    """Note what failed in this run and why; summarize and report what is finished.

    A run of the last two rules alone does that, in the same environments as ever.
    """
    failed = [
        job
        for entry in workflow.scheduler.failed
        for job in (entry if entry.is_group() else [entry])
    ]
    if not failed:  # the user stopped it
        return
    pending = [str(path) for job in workflow.dag.needrun_jobs() for path in job.output]
    note = {
        "failed": [
            {
                "step": " ".join([job.rule.name, *job.wildcards_dict.values()]),
                "wildcards": job.wildcards_dict,
                "log": job.log[0],
                "sentence": last_error(job.log[0], since=STARTED),
            }
            for job in sorted(failed, key=str)
        ],
        "pending": pending,
    }
    try:
        write_json(UNFINISHED, note, indent=1)
    except OSError as error:
        print(f"\nThe results cannot be summarized. {explain(error)}")
        return
    targets = [
        path
        for path in ("results/summary.csv", "results/report.html")
        if path in pending
    ]
    steps = {job.rule.name for job in failed}
    if targets and not steps & {"summarize_results", "render_report"}:
        given = Path(".snakemake") / "given_config.yaml"
        given.write_text(json.dumps(GIVEN_CONFIG), encoding="utf-8")
        methods = [
            method.name.lower().replace("_", "-")
            for method in workflow.deployment_settings.deployment_method
        ]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "snakemake", *targets),
                *("--snakefile", str(workflow.main_snakefile), "--configfile", given),
                *("--directory", os.getcwd(), "--cores", str(all_cores(None))),
                *("--allowed-rules", "summarize_results", "render_report"),
                *("--nolock", "--notemp", "--no-hooks", "--quiet", "all"),
                *(["--software-deployment-method", *methods] if methods else []),
            ],
            env={**os.environ, "QWT_MMDET_UNFINISHED": "1"},
            check=False,
        )
        if done.returncode:
            print("What is finished could not be summarized; the message stands above.")
    print(f"\n{run_summary()}")

"""The command `qwt-mmdet`: the workflow without a config file, and what its files are good for."""

import enum
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from tabulate import tabulate
from tqdm import tqdm

from . import __version__
from .config import QuantizationSettings, combinations, read_file, resolve
from .config.quantization import Scope
from .errors import QwtError
from .files import is_url
from .reporting.text import UNFINISHED, duration, megabytes, number, percent, run_summary

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

RECIPES: dict[str, dict[str, Any]] = {
    "qwt": {},
    "paper": {"target": "block", "ridge": 0, "gate": "fit", "holdout_fraction": 0},
    "affine": {"kind": "affine"},
    "lowrank": {"kind": "lowrank"},
    "bias": {"kind": "bias"},
    "auto": {"kind": "auto"},
}
"""Compensations by name; what each leaves out has the default of ``CompensationSettings``."""

PROVENANCE_SHOWN = ("images", "seed", "device", "cpu_capability", "threads", "tf32")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize trained MMDetection detectors and recover accuracy with QwT.",
)


class Exif(enum.StrEnum):
    """What is done with the EXIF orientation of images."""

    apply = "apply"
    ignore = "ignore"


class Device(enum.StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _choices(name: str, values: Sequence[str]) -> Any:
    return enum.StrEnum(name, {value: value for value in values})


Recipe = _choices("Recipe", [*RECIPES, "none"])


@contextmanager
def _plain_errors() -> Iterator[None]:
    """End with one sentence, and status 1 or after Ctrl-C 130, where the cause is no bug of ours."""
    from .runtime import known_cause, termination_interrupts

    try:
        with termination_interrupts():
            yield
    except (Exception, KeyboardInterrupt) as error:
        said = known_cause(error)
        if said is None:
            raise
        typer.secho(f"Error: {said}", err=True, fg="red")
        raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwt-mmdet {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _samples(value: str) -> int | str:
    if value == "all":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise QwtError(f"A number of samples is {value!r}; give a whole number from 1, or all.")
    return int(value)


def _absolute(path: str) -> str:
    """A path that means the same in the output folder; an address or a zoo name stays."""
    return str(Path(path).resolve()) if not is_url(path) and Path(path).exists() else path


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise QwtError(f"--cfg-options has {pair!r}; write key=value, such as a.b=0.5.")
        values[key] = yaml.safe_load(value)
    return values


def quantization_entry(
    weight_bits: int, activation_bits: int, **settings: Any
) -> tuple[str, dict[str, Any]]:
    """Name and settings of a quantization; the name tells what differs from the defaults.

    Raises:
        QwtError: a setting is outside of what is allowed.
    """
    QuantizationSettings(weight_bits, activation_bits, **settings)
    default = QuantizationSettings(weight_bits, activation_bits)
    other = {key: value for key, value in settings.items() if value != getattr(default, key)}
    words = [
        value if isinstance(value, str) else f"{'' if value else 'no-'}{key.replace('_', '-')}"
        for key, value in other.items()
    ]
    name = "-".join([f"w{weight_bits}a{activation_bits}", *words]).replace("+", "-")
    return name, {"weight_bits": weight_bits, "activation_bits": activation_bits, **other}


def _bit_pairs(weight_bits: Sequence[int], activation_bits: Sequence[int]) -> list[tuple[int, int]]:
    if len(activation_bits) not in (1, len(weight_bits)):
        raise QwtError(
            f"--w-bit is given {len(weight_bits)} times and --a-bit {len(activation_bits)} times; "
            "give --a-bit once, or once for each --w-bit."
        )
    return list(zip_longest(weight_bits, activation_bits, fillvalue=activation_bits[0]))


@app.command()
def run(
    config: Annotated[
        str,
        typer.Option(help="Model config: a name in MMDetection's zoo, or a path."),
    ],
    checkpoint: Annotated[str, typer.Option(help="Trained weights: a path or an http(s) address.")],
    coco_root: Annotated[
        Path,
        typer.Option(help="Folder in COCO's layout: annotations/, train2017/, val2017/."),
    ],
    output_dir: Annotated[
        Path, typer.Option(help="Where results, logs and the workflow's config go.")
    ] = Path("qwt_output"),
    calibration_samples: Annotated[
        str, typer.Option(help="Images for ranges and compensation; a number or all.")
    ] = "512",
    eval_samples: Annotated[
        str, typer.Option(help="Images for AP; a number or all. A few hundred are noisy.")
    ] = "100",
    calibration_split: Annotated[
        str, typer.Option(help="Split of the calibration images.")
    ] = "train2017",
    eval_split: Annotated[str, typer.Option(help="Split of the evaluation images.")] = "val2017",
    exif: Annotated[
        Exif,
        typer.Option(help="Turn images as their EXIF orientation says, or read them as stored."),
    ] = Exif.apply,
    allow_outside_root: Annotated[
        bool, typer.Option("--allow-outside-root", help="Read images that links or .. lead to.")
    ] = False,
    w_bit: Annotated[list[int], typer.Option(help="Bits of weights, 2 to 8; repeatable.")] = [4],  # noqa: B006
    a_bit: Annotated[list[int], typer.Option(help="Bits of activations; once, or per --w-bit.")] = [  # noqa: B006
        4
    ],
    scope: Annotated[Scope, typer.Option(help="Part that is quantized.")] = "backbone",
    weight_range: Annotated[
        str | None, typer.Option(help="Estimator of the weights' ranges.")
    ] = None,
    activation_range: Annotated[
        str | None, typer.Option(help="Estimator of the activations' ranges.")
    ] = None,
    rounding: Annotated[str | None, typer.Option(help="Rounding of weights.")] = None,
    migrate_scales: Annotated[
        bool | None,
        typer.Option(
            "--migrate-scales/--no-migrate-scales",
            help="Scales per channel for convolutions' inputs.",
        ),
    ] = None,
    bias_correction: Annotated[
        bool | None, typer.Option("--bias-correction/--no-bias-correction", help="Of each layer.")
    ] = None,
    compensation: Annotated[
        list[Recipe], typer.Option(help="Recipe of compensation; repeatable.")
    ] = [Recipe.qwt],  # noqa: B006
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = (
        Device.auto
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images and all else.")] = 0,
    warmup_checkpoint: Annotated[
        Path | None, typer.Option(help="Warmup file to use instead of calibrating.")
    ] = None,
    save_warmup: Annotated[
        bool, typer.Option("--save-warmup/--no-save-warmup", help="Keep the warmup file.")
    ] = True,
    skip_baseline: Annotated[
        bool, typer.Option("--skip-baseline", help="Do not evaluate the full-precision model.")
    ] = False,
    skip_quantized_eval: Annotated[
        bool, typer.Option("--skip-quantized-eval", help="Do not evaluate without compensation.")
    ] = False,
    cfg_options: Annotated[
        list[str], typer.Option(help="Change of the model config, a.b=value; repeatable.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps only.")] = False,
) -> None:
    """Quantize one model, compensate it, and measure what both did.

    Writes the workflow's config into the output folder and runs the workflow there; what is already
    computed is used again. For example:

        qwt-mmdet run --config yolox/yolox_nano_8xb8-300e_coco.py --checkpoint yolox_nano.pth
        --coco-root /data/coco --w-bit 4 --a-bit 8 --eval-samples all
    """
    with _plain_errors():
        given = {
            "weight_range": weight_range,
            "activation_range": activation_range,
            "rounding": rounding,
            "migrate_scales": migrate_scales,
            "bias_correction": bias_correction,
        }
        settings = {key: value for key, value in given.items() if value is not None}
        entries = [
            quantization_entry(*bits, scope=scope, **settings) for bits in _bit_pairs(w_bit, a_bit)
        ]
        names = [name for name, _ in entries]
        model = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(config).stem)
        content = {
            "seed": seed,
            "datasets": {
                "coco": {
                    "type": "coco",
                    "seed": seed,
                    "root": str(coco_root.resolve()),
                    "exif": exif.value,
                    "allow_outside_root": allow_outside_root,
                    "calibration": {
                        "split": calibration_split,
                        "images": _samples(calibration_samples),
                    },
                    "evaluation": {"split": eval_split, "images": _samples(eval_samples)},
                }
            },
            "models": {
                model: {
                    "config": _absolute(config),
                    "checkpoint": _absolute(checkpoint),
                    "dataset": "coco",
                    "config_options": _options(cfg_options),
                    "warmup": dict.fromkeys(names, str(warmup_checkpoint.resolve()))
                    if warmup_checkpoint
                    else {},
                }
            },
            "quantization": dict(entries),
            "compensation": {
                recipe.value: RECIPES[recipe.value] for recipe in compensation if recipe != "none"
            },
            "skip": [
                step
                for step, skipped in (
                    ("evaluate_baseline", skip_baseline),
                    ("evaluate_quantized", skip_quantized_eval),
                )
                if skipped
            ],
            "keep_warmup": save_warmup,
            "calibration": {"batch_size": batch_size, "workers": workers},
            "evaluation": {"batch_size": batch_size, "workers": workers},
        }
        if warmup_checkpoint and len(names) > 1:
            raise QwtError(
                "--warmup-checkpoint is for one bit width; give --w-bit and --a-bit once."
            )
        run_workflow(content, output_dir, device=device.value, cores=cores, dry_run=dry_run)


def run_workflow(
    content: dict[str, Any], folder: Path, *, device: str, cores: int | None, dry_run: bool = False
) -> None:
    """Write a workflow config into a folder, run it there and print the table of results.

    Raises:
        QwtError: the config is wrong, or a step failed; says why.
    """
    if not (ROOT / "Snakefile").is_file():
        raise QwtError(
            f"There is no Snakefile in {ROOT}: the command runs the workflow of the clone that it was "
            "installed from; install it with `make env` (pip install --editable) in a clone."
        )
    resolve(content)
    _check_files(content)
    if device == "cuda":
        _check_cuda()
    if folder.exists() and not folder.is_dir():
        raise QwtError(f"--output-dir is {str(folder)!r}, which is no folder; name another.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(
        "# Written by `qwt-mmdet run`; `snakemake --configfile` takes it as well.\n"
        + yaml.safe_dump(content, sort_keys=False),
        encoding="utf-8",
    )
    command = [
        *(sys.executable, "-m", "snakemake", "--nocolor"),
        *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(path), "--cores", str(cores or "all")),
        *("--resources", f"gpu={0 if device == 'cpu' else 1}", "--rerun-incomplete"),
        *(["--dry-run", "--quiet", "rules"] if dry_run else []),
    ]
    environment = {**os.environ, "QWT_MMDET_COMMAND": " ".join(["qwt-mmdet", *sys.argv[1:]])}
    if dry_run:
        raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
    note = folder / UNFINISHED
    note.unlink(missing_ok=True)  # of an earlier run
    try:
        _follow(command, environment)
    except QwtError:
        if note.is_file():
            typer.echo(f"\n{run_summary(folder)}")
        raise
    typer.echo(f"\n{run_summary(folder)}")


def _follow(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run Snakemake; show what our steps say and how many are done, and nothing of its own.

    Raises:
        QwtError: it failed; with what the failed steps said, or else the end of its output.
    """
    said: list[str] = []
    output: list[str] = []
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    terminal = sys.stderr.isatty()
    with (
        _ended(process),
        tqdm(desc="Steps", unit="step", disable=not terminal, dynamic_ncols=True) as bar,
    ):
        for line in process.stdout:
            output.append(line.rstrip())
            if match := re.match(r"(\d+) of (\d+) steps", line):
                bar.total = int(match[2])
                bar.update(int(match[1]) - bar.n)
                if not terminal:
                    typer.echo(line.rstrip(), err=True)
            elif re.match(r"\[[a-z]+_[a-z]+[^]]*\] ", line):
                said.append(line.rstrip())
                bar.write(line.rstrip(), file=sys.stderr)
    if process.wait():
        if said:
            raise QwtError(
                "A step failed; what it said stands above, more in its file under logs/."
            )
        raise QwtError("The workflow could not run:\n" + "\n".join(output[-20:]))


@contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """End Snakemake with us: at SIGINT it stops its jobs, removes what is unfinished and unlocks."""
    try:
        yield
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.communicate()
        raise


def _read_config(path: Path) -> dict[str, Any]:
    """A config file, checked and with defaults."""
    return resolve(read_file(path))


def _check_files(content: dict[str, Any]) -> None:
    """Raise QwtError for a checkpoint, a data set or a warmup file that is not there."""
    for name, model in content["models"].items():
        files = [("checkpoint", model["checkpoint"])]
        files += [(f"warmup.{key}", path) for key, path in model.get("warmup", {}).items()]
        for key, path in files:
            if not is_url(path) and not os.path.isfile(path):
                raise QwtError(
                    f"models.{name}.{key} is {path!r}, but there is no such file; check the path."
                )
    for name, dataset in content["datasets"].items():
        root = dataset.get("root")
        if root is not None and not os.path.isdir(root):
            raise QwtError(f"datasets.{name}.root is {root!r}, but there is no such folder.")


def _check_cuda() -> None:
    from .devices import gpu_fault

    fault = gpu_fault()
    if fault is not None:
        raise QwtError(f"--device is cuda, but {fault}; or use --device cpu.")


@app.command()
def validate(
    config: Annotated[Path, typer.Argument(help="A config of the workflow.")],
) -> None:
    """Check a config of the workflow, its models and its local files; run nothing.

    Each model is built, with the checkpoint if that is here, and its classes are compared with those
    of the annotations.
    """
    with _plain_errors():
        from .data.annotations import read_annotations
        from .detectors.build import load_detector, random_detector
        from .detectors.classes import category_ids

        resolved = _read_config(config)
        _check_files(resolved)
        evaluated = {}
        for name, dataset in resolved["datasets"].items():
            if "root" in dataset:
                for part in ("calibration", "evaluation"):
                    path = Path(dataset["root"], dataset[part]["annotations"])
                    evaluated[name] = read_annotations(path, labelled=part == "evaluation")
        for name, model in resolved["models"].items():
            options = model["config_options"]
            try:
                if is_url(model["checkpoint"]):
                    built = random_detector(model["config"], options)
                else:
                    built = load_detector(
                        model["config"], model["checkpoint"], config_options=options
                    )
                if model["dataset"] in evaluated:
                    category_ids(built.dataset_meta["classes"], evaluated[model["dataset"]])
            except QwtError as error:
                raise QwtError(f"models.{name}: {error}") from error
        rows = combinations(resolved)
        typer.echo(tabulate(rows, ("model", "quantization", "compensation")))
        typer.echo(f"\n{config} is sound: {len(rows)} combinations.")


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="A config of the workflow.")],
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = (
        Device.auto
    ),
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores; default: all.")] = None,
) -> None:
    """Tell what a run of a config would take on this machine; needs neither weights nor images.

    Each model is tried on a few generated images, one step at a time, which takes minutes. Downloads,
    summary and report are not in it.
    """
    with _plain_errors():
        from .devices import choose_device
        from .estimate import estimate_run

        content = _read_config(config)
        if device == Device.cuda:
            _check_cuda()
        chosen = choose_device(0 if device == Device.cpu else 1)
        cores = cores or os.cpu_count()
        threads = cores if chosen == "cuda" else 1
        found = estimate_run(content, device=chosen, threads=threads)
        rows = [
            (
                entry.model,
                entry.step,
                entry.jobs,
                entry.images,
                f"{entry.cost.seconds_per_image:.2f} s",
                duration(entry.cost.seconds),
                duration(entry.seconds),
                f"{entry.cost.gigabytes:.1f} GB",
                number(entry.cost.device_gigabytes, 1),
            )
            for entry in found
        ]
        headers = (
            "model", "step", "jobs", "images", "an image", "once", "all jobs", "memory", "GPU memory",
        )  # fmt: skip
        if chosen == "cpu":
            rows, headers = [row[:-1] for row in rows], headers[:-1]
        typer.echo(tabulate(rows, headers, disable_numparse=True))
        total = sum(entry.seconds for entry in found)
        typer.echo(
            f"\nOne after the other: {duration(total)}, on {chosen}, {threads} threads each."
        )
        if chosen == "cpu" and cores > 1:
            typer.echo(f"{cores} at a time (--cores {cores}): about {duration(total / cores)}.")
        cache = content["activation_cache"]["memory_gb"]
        typer.echo(
            f"Each fit of a compensation takes up to {cache:g} GB more (activation_cache.memory_gb)."
        )


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A warmup.pth or compensation.pth.")],
) -> None:
    """Tell what is in a warmup or compensation file."""
    with _plain_errors():
        from .archives import COMPENSATION_FORMAT, WARMUP_FORMAT, load_archive

        kinds = {"warmup": WARMUP_FORMAT, "compensation": COMPENSATION_FORMAT}
        for kind, expected in kinds.items():
            try:
                content = load_archive(file, expected, kind)
                break
            except QwtError as error:
                problem = error
        else:
            raise problem
        lines = [("file", f"{kind}, format {content['format']!r}")]
        lines += [(f"fingerprint: {key}", value) for key, value in content["fingerprint"].items()]
        lines += [(key, value) for key, value in content["settings"].items()]
        source = content["provenance"]
        lines += [(key, source[key]) for key in PROVENANCE_SHOWN if key in source]
        lines += [
            (key, value)
            for key, value in content["summary"].items()
            if not isinstance(value, list | dict)
        ]
        typer.echo(tabulate(lines, tablefmt="plain", disable_numparse=True))
        if kind == "compensation":
            rows = [
                (
                    block["name"],
                    block["kind"],
                    block["decision"],
                    number(block["fit_r2"]),
                    number(block["holdout_r2"]),
                    megabytes(block["bytes"]),
                    percent(block["multiply_adds_percent"] / 100),
                )
                for block in content["blocks"]
            ]
            headers = (
                "block", "kind", "decision", "r² fit", "r² held out", "size", "multiply-adds",
            )  # fmt: skip
            typer.echo("\n" + tabulate(rows, headers, disable_numparse=True))
        else:
            skipped = content["summary"]["not_quantized"]
            typer.echo(f"\n{len(skipped)} modules in full precision")
            for entry in islice(skipped, 20):
                typer.echo(f"  {entry['name']} ({entry['type']}): {entry['reason']}")


@app.command()
def apply(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    config: Annotated[str, typer.Option(help="Model config: a zoo name or a path.")],
    checkpoint: Annotated[Path, typer.Option(help="The weights that were quantized.")],
    warmup: Annotated[Path | None, typer.Option(help="warmup.pth; none: full precision.")] = None,
    compensation: Annotated[Path | None, typer.Option(help="compensation.pth.")] = None,
    output_dir: Annotated[Path, typer.Option(help="For pictures and results.")] = Path("qwt_apply"),
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = (
        Device.auto
    ),
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score that is drawn.")] = 0.3,
    cfg_options: Annotated[
        list[str], typer.Option(help="Change of the model config, a.b=value; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Run a quantized, compensated detector on images; save drawings and COCO-format results."""
    with _plain_errors():
        paths = _image_paths(images)
        if compensation is not None and warmup is None:
            raise QwtError("--compensation needs the --warmup that it was fitted for.")
        if device == Device.cuda:
            _check_cuda()
        from .devices import choose_device
        from .inference import run_on_images
        from .steps.load import load_quantized

        model = load_quantized(
            config,
            checkpoint,
            warmup=warmup,
            compensation=compensation,
            device=choose_device(0 if device == Device.cpu else 1),
            config_options=_options(cfg_options),
        )
        count = run_on_images(model, paths, output_dir, score=score)
        typer.echo(
            f"{count} detections on {len(paths)} images\nPictures: {output_dir / 'pictures'}\n"
            f"COCO results: {output_dir / 'predictions.json'} (images: {output_dir / 'images.json'})"
        )


def _image_paths(places: Sequence[Path]) -> list[Path]:
    paths = []
    for place in places:
        if place.is_dir():
            paths += sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif place.is_file():
            paths.append(place)
        else:
            raise QwtError(f"There is no image or folder {place}; check the path.")
    if not paths:
        raise QwtError(f"There are no images in {', '.join(map(str, places))}.")
    return paths

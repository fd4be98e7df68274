"""`qwt-mmdet run`: one model through the whole workflow, without a config file."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from ..config import PRESETS, QuantizationSettings, Search, as_entry, resolve
from ..config.datasets import Coco, CocoCalibration, CocoEvaluation
from ..config.export import SYMMETRIC_RUNTIMES, Export, OwnRuntime
from ..config.models import Model
from ..config.quantization import Grids
from ..config.workflow import Configuration, Evaluation, Loading, Targets
from ..devices import count_gpus
from ..errors import QwtError, suggestion
from ..files import is_url, write_atomically
from ..plan.files import UNFINISHED, snakefile
from ..reporting.terminal import run_summary
from ..runtime import COMMAND
from ..staleness import share_with_scripts
from .common import (
    CoresOption,
    Device,
    DeviceOption,
    DryRunOption,
    OutputOption,
    check_cuda,
    check_files,
    config_options,
    count_or_all,
    plain_errors,
)
from .options import Key, Table, Values, choices, options_named, with_options

NO_COMPENSATION = "none"

OPTIONS: Table = {
    Model: {
        "config": Key("config"),
        "checkpoint": Key("checkpoint"),
        "cfg_options": Key("config_options"),
    },
    Coco: {
        "seed": Key("seed"),
        "coco_root": Key("root", default=...),  # the only source of images of this command
        "exif": Key("exif"),
        "allow_outside_root": Key("allow_outside_root"),
    },
    CocoCalibration: {
        "calibration_samples": Key("images"),
        "calibration_split": Key("split"),
    },
    CocoEvaluation: {
        "eval_samples": Key("images", default="100"),  # a first look; all of COCO takes hours
        "eval_split": Key("split"),
    },
    QuantizationSettings: {
        "w_bit": Key("weight_bits", default=[4]),
        "a_bit": Key("activation_bits", default=[4]),
        "scope": Key("scope"),
        "weight_range": Key("weight_range"),
        "activation_range": Key("activation_range"),
        "rounding": Key("rounding"),
        "migrate_scales": Key("migrate_scales"),
        "bias_correction": Key("bias_correction"),
        "refit": Key("refit"),
        "refit_weighting": Key("refit_weighting"),
        "grids": Key("grids"),
    },
    Loading: {
        "batch_size": Key("batch_size"),
        "workers": Key("workers"),
    },
    Configuration: {
        "seed": Key("seed"),
        "repeats": Key("repeats"),
        "save_warmup": Key("keep_warmup"),
    },
}
"""The options that set a key of the configuration, with defaults that differ from the key's."""

FURTHER = {
    "compensation": "--compensation",
    "runtime": "--export",
    "skip": "--skip-baseline or --skip-quantized-eval",
    "warmup": "--warmup-checkpoint",
}
"""Options that a command declares itself, by the key that they set."""


@with_options(OPTIONS)
def run(
    values: Values,
    context: typer.Context,
    output_dir: OutputOption = Path("qwt_output"),
    compensation: Annotated[
        list[str],
        typer.Option(
            metavar="|".join([*PRESETS, NO_COMPENSATION]),
            help="Preset; repeatable. `paper` is QwT as published, for --refit none.",
        ),
    ] = ["auto"],  # noqa: B006
    export: Annotated[
        list[str],
        typer.Option(
            metavar=choices(OwnRuntime, str),
            help="Write the quantized detector as an ONNX file, with its compensation if it has one, and "
            "evaluate and time it in this runtime; repeatable.",
        ),
    ] = [],  # noqa: B006
    device: DeviceOption = "auto",
    cores: CoresOption = None,
    warmup_checkpoint: Annotated[
        Path | None, typer.Option(help="Warmup file to use instead of calibrating.")
    ] = None,
    skip_baseline: Annotated[
        bool, typer.Option("--skip-baseline", help="Do not evaluate the full-precision model.")
    ] = False,
    skip_quantized_eval: Annotated[
        bool, typer.Option("--skip-quantized-eval", help="Do not evaluate without compensation.")
    ] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Quantize one model, compensate it, and evaluate both.

    Writes the workflow's config into the output folder and runs the workflow there; results of an earlier run are
    used again. For example:

        qwt-mmdet run --config yolox/yolox_nano_8xb8-300e_coco.py --checkpoint yolox_nano.pth
        --coco-root /data/coco --w-bit 4 --a-bit 8 --eval-samples all
    """
    with plain_errors():
        skipped: dict[Evaluation, bool] = {
            "evaluate_baseline": skip_baseline,
            "evaluate_quantized": skip_quantized_eval,
        }
        with options_named(OPTIONS, **FURTHER):
            bits = values[QuantizationSettings]
            source = context.get_parameter_source("grids")
            if export and source is not None and source.name == "DEFAULT":
                bits["grids"] = grids_for(export)
            pairs = _bit_pairs(bits.pop("weight_bits"), bits.pop("activation_bits"))
            quantizations = [QuantizationSettings(*pair, **bits) for pair in pairs]
            configuration = make_configuration(
                values,
                {quantization_name(settings): settings for settings in quantizations},
                presets=compensation,
                runtimes=export,
                warmup=warmup_checkpoint,
                skip=tuple(step for step, wanted in skipped.items() if wanted),
            )
            run_workflow(configuration, output_dir, device=device, cores=cores, dry_run=dry_run)


def grids_for(runtimes: Sequence[str]) -> Grids:
    """The grids of what is exported for runtimes, unless the user says otherwise: those that their kernels take."""
    return "symmetric" if set(runtimes) <= SYMMETRIC_RUNTIMES else "integer"


def make_configuration(
    values: Values,
    quantization: Mapping[str, QuantizationSettings | Search],
    *,
    presets: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    warmup: Path | None = None,
    skip: tuple[Evaluation, ...] = (),
    targets: tuple[Targets, ...] | None = None,
) -> Configuration:
    """The configuration of one model on one data set.

    Args:
        values: of the options in ``OPTIONS``; those of the quantization are not used.
        quantization: settings by name. presets: names of compensations. runtimes: of exported files.
        warmup: file to use instead of calibrating; for a single quantization.
    """
    model, data = values[Model], values[Coco]
    if warmup and len(quantization) > 1:
        raise QwtError("--warmup-checkpoint is for one bit width; give --w-bit and --a-bit once.")
    known = [*PRESETS, NO_COMPENSATION]
    for preset in presets:
        if preset not in known:
            hint = suggestion(preset, known) or "."
            raise QwtError(f"--compensation is {preset!r}{hint} Known: {', '.join(known)}.")
    parts = {
        section: {**values[section], "images": count_or_all(values[section]["images"])}
        for section in (CocoCalibration, CocoEvaluation)
    }
    loading = Loading(**values[Loading])
    compensations = {name: PRESETS[name] for name in presets if name != NO_COMPENSATION}
    exports: tuple[Export, ...] = ()
    if runtimes:
        named: dict[str, Any] = {"runtime": tuple(runtimes)}  # text, which the section checks
        exports = (Export(compensation=tuple(compensations) or None, **named),)
    return Configuration(
        datasets={
            "coco": Coco(
                type="coco",
                calibration=CocoCalibration(**parts[CocoCalibration]),
                evaluation=CocoEvaluation(**parts[CocoEvaluation]),
                **{**data, "root": str(Path(data["root"]).resolve())},
            )
        },
        models={
            re.sub(r"[^A-Za-z0-9_.-]", "_", Path(model["config"]).stem): Model(
                config=_absolute(model["config"]),
                checkpoint=_absolute(model["checkpoint"]),
                dataset="coco",
                config_options=config_options(model["config_options"]),
                warmup=dict.fromkeys(quantization, str(warmup.resolve())) if warmup else {},
            )
        },
        quantization=dict(quantization),
        compensation=compensations,
        export=exports,
        targets=targets,
        skip=skip,
        calibration=loading,
        evaluation=loading,
        **values[Configuration],
    )


def quantization_name(settings: QuantizationSettings) -> str:
    """Name of a quantization: its bits, and settings that differ from the defaults."""
    other = as_entry(settings)
    bits = f"w{other.pop('weight_bits')}a{other.pop('activation_bits')}"
    return "-".join([bits, *(_word(*entry) for entry in other.items())]).replace("+", "-")


def _word(key: str, value: Any) -> str:
    key = key.replace("_", "-")
    if isinstance(value, str) and value != "none":
        return value
    if isinstance(value, float):
        return f"{key}-{value:g}"
    return f"no-{key}" if value in (False, "none") else key


def _bit_pairs(weight_bits: Sequence[int], activation_bits: Sequence[int]) -> list[tuple[int, int]]:
    if len(activation_bits) not in (1, len(weight_bits)):
        raise QwtError(
            f"--w-bit is given {len(weight_bits)} times and --a-bit {len(activation_bits)} times; "
            "give --a-bit once, or once for each --w-bit."
        )
    return list(zip_longest(weight_bits, activation_bits, fillvalue=activation_bits[0]))


def _absolute(path: str) -> str:
    """An absolute path, which is also valid in the output folder; addresses and zoo names do not change."""
    return str(Path(path).resolve()) if not is_url(path) and Path(path).exists() else path


def run_workflow(
    configuration: Configuration,
    folder: Path,
    *,
    device: Device,
    cores: int | None = None,
    dry_run: bool = False,
    files: Sequence[str] = (),
) -> None:
    """Write a configuration into a folder, run the workflow there and print the table of results.

    Args:
        files: of the workflow, to make these alone and print no table.
    """
    workflow = snakefile()
    content = as_entry(configuration)
    check_files(resolve(content))
    if device == "cuda":
        check_cuda()
    if folder.exists() and not folder.is_dir():
        raise QwtError(f"--output-dir is {str(folder)!r}, which is no folder; name another.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    note = "# Written by `qwt-mmdet run`; `snakemake --configfile` takes it as well.\n"
    with write_atomically(path) as partial:
        partial.write_text(note + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "snakemake", "--nocolor"),
        *("--snakefile", str(workflow), "--directory", str(folder)),
        *("--workflow-profile", "none", "--configfile", str(path), "--cores", str(cores or "all")),
        *("--resources", f"gpu={0 if device == 'cpu' else max(1, count_gpus())}"),
        "--rerun-incomplete",
        *files,
        *(["--dry-run", "--quiet", "rules"] if dry_run else ["--logger", "qwt"]),
    ]
    share_with_scripts()
    environment = {**os.environ, COMMAND: " ".join(["qwt-mmdet", *sys.argv[1:]])}
    if dry_run:
        raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
    failures = folder / UNFINISHED
    failures.unlink(missing_ok=True)  # of an earlier run
    status = _follow(command, environment)
    if failures.is_file() or (status == 0 and not files):
        typer.echo(f"\n{run_summary(folder)}")
    if failures.is_file():
        raise QwtError("A step failed; see the message above and its file under logs/.")
    if status:
        raise QwtError("The workflow could not run; see Snakemake's message above.")


def _follow(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run Snakemake, show its messages and those of the steps, and return its exit status.

    In a terminal, Snakemake writes there itself, so that it can draw its bar.
    At Ctrl-C, wait until Snakemake has stopped its jobs, removed unfinished files and unlocked the folder.
    """
    terminal = sys.stderr.isatty()
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=None if terminal else subprocess.PIPE,
        text=True,
    ) as process:

        def stop(*_: object) -> NoReturn:
            if terminal:
                process.send_signal(signal.SIGINT)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            for line in process.stderr or ():
                typer.echo(line, nl=False, err=True)
            return process.wait()
        except KeyboardInterrupt:
            if not terminal:  # which sends Ctrl-C to Snakemake, too; it does not stand it twice
                process.send_signal(signal.SIGINT)
            process.communicate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

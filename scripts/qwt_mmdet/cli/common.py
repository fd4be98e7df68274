"""Shared by the commands: options, checks before anything runs, errors as plain sentences."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ..config.models import Model
from ..data.sources import open_source
from ..devices import let_threads_sleep
from ..errors import QwtError, reason
from ..files import is_url
from ..plan.settings import existing
from .options import Key, Table, Values

Device = Literal["auto", "cpu", "cuda"]
DeviceOption = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")]
CheckpointOption = Annotated[Path, typer.Option(help="The weights that were quantized.")]
WarmupOption = Annotated[Path | None, typer.Option(help="warmup.pth; none: full precision.")]
CompensationOption = Annotated[Path | None, typer.Option(help="compensation.pth.")]
MODEL: Table = {Model: {"config": Key("config"), "cfg_options": Key("config_options")}}
"""The options that :func:`load_model` reads."""
OutputOption = Annotated[
    Path, typer.Option(help="Where results, logs and the workflow's config go.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the steps only.")]
CoresOption = Annotated[int | None, typer.Option(min=1, help="CPU cores; default: all.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Inside: an expected error ends the command with a sentence and status 1, Ctrl-C with status 130."""
    from ..runtime import known_cause, termination_interrupts

    let_threads_sleep()
    try:
        with termination_interrupts():
            yield
    except (Exception, KeyboardInterrupt) as error:
        said = known_cause(error)
        if said is None:
            raise
        typer.secho(f"Error: {said}", err=True, fg="red")
        raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def config_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["a.b=0.5"]`` as ``{"a.b": 0.5}``; values are YAML."""
    values = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise QwtError(f"--cfg-options has {pair!r}; write key=value, such as a.b=0.5.")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise QwtError(
                f"--cfg-options has {pair!r:.200}, whose value is not valid YAML: {reason(error)}."
            ) from error
    return values


def count_or_all(text: str) -> int | str:
    """A number of images, or the text itself, such as ``all``."""
    return int(text) if text.isdecimal() else text


def check_files(content: Mapping[str, Any]) -> None:
    """Check that the local checkpoints, warmup files and data sets of a config exist."""
    for name, model in content["models"].items():
        files = [("checkpoint", model["checkpoint"])]
        files += [(f"warmup.{key}", path) for key, path in model.get("warmup", {}).items()]
        for key, path in files:
            if not is_url(path):
                existing(path, f"models.{name}.{key}")
    for name, dataset in content["datasets"].items():
        root = open_source(dataset, "").root
        if root is not None and not os.path.isdir(root):
            raise QwtError(f"datasets.{name}.root is {root!r}, but there is no such folder.")


def check_cuda() -> None:
    """Check that a GPU can be used, for ``--device cuda``."""
    from ..devices import gpu_fault

    if fault := gpu_fault():
        raise QwtError(f"--device is cuda, but {fault}; or use --device cpu.")


def chosen_device(wanted: Device) -> str:
    """Return the device to compute on, ``"cuda:1"`` or ``"cpu"``; see ``devices.choose_device``."""
    from ..devices import choose_device

    if wanted == "cuda":
        check_cuda()
    return choose_device(1, wanted)


def load_model(
    values: Values,
    checkpoint: Path,
    warmup: Path | None,
    compensation: Path | None,
    device: str = "cpu",
) -> Any:
    """Load the detector that the options of a command name (in ``values``, those of :data:`MODEL`)."""
    if compensation is not None and warmup is None:
        raise QwtError("--compensation needs the --warmup that it was fitted for.")
    from ..steps.inputs import load_quantized

    return load_quantized(
        values[Model]["config"],
        checkpoint,
        warmup=warmup,
        compensation=compensation,
        device=device,
        config_options=config_options(values[Model]["config_options"]),
    )

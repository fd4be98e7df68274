"""`qwt-mmdet shrink`: mixed-precision search for a limit of loss or of size, with an exported file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..config import Best, Configuration, QuantizationSettings, Search, Smallest
from ..config.datasets import CocoCalibration, CocoEvaluation
from ..config.export import OwnRuntime
from ..config.quantization import FLOAT_BITS
from ..config.workflow import Targets
from ..errors import QwtError
from ..files import read_json
from ..plan import Variant
from ..plan.files import DOCUMENT
from ..reporting.summary import read_summary
from ..reporting.text import file_sentences, percent, predicted_loss
from .common import CoresOption, Device, DeviceOption, DryRunOption, OutputOption, plain_errors
from .options import Key, Table, Values, choices, options_named, with_options
from .run import FURTHER, OPTIONS, make_configuration, run_workflow

SHRINK_OPTIONS: Table = {
    **OPTIONS,
    QuantizationSettings: {
        "scope": Key("scope", default="detector"),
        "grids": Key("grids", default="integer"),  # the file is to be fast, too
    },
    Search: {
        "storage": Key("storage", default="onnx"),  # sizes are those of the file
        "search_images": Key("images"),
        "rounds": Key("rounds"),
    },
}
"""The options that set a key of the configuration."""

ACTIVATIONS = (8, FLOAT_BITS)
"""Bits of activations, of which the faster ones are taken."""

LIMITS = {
    "max_drop": "--max-drop",
    "max_size_mb": "--max-size-mb",
    "average_weight_bits": "--average-bits",
}
"""Options of the limits, by key."""

ACTIVATION_KEYS = dict.fromkeys(("activation_bits", "max_activation_bits"), "--a-bit")
"""The option of the bits of activations, by key."""


@with_options(SHRINK_OPTIONS)
def shrink(
    values: Values,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest loss of AP: 0.01 is one point.")
    ] = None,
    metric: Annotated[
        Literal["bbox", "segm"], typer.Option(help="The AP that is limited: of boxes or masks.")
    ] = "bbox",
    max_size_mb: Annotated[
        float | None, typer.Option(help="Instead: size of all weights in megabytes.")
    ] = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Instead: bits per weight, on average.")
    ] = None,
    a_bit: Annotated[
        int | None,
        typer.Option(
            help="Bits of activations: 2 to 8, or 32 for floating point. Default: 8 or 32, whichever is faster in the first "
            "runtime of --export."
        ),
    ] = None,
    export: Annotated[
        list[str],
        typer.Option(
            metavar=choices(OwnRuntime, str),
            help="Runtime that evaluates and times the ONNX file; repeatable.",
        ),
    ] = ["onnxruntime"],  # noqa: B006
    output_dir: OutputOption = Path("qwt_output"),
    device: DeviceOption = "auto",
    cores: CoresOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Search the bits of each layer for a small detector, and export it.

    Give one limit: the loss of AP, or the size. The bits are searched on calibration images. Then the loss is
    measured on evaluation images. For example:

        qwt-mmdet shrink --config yolox/yolox_nano_8xb8-300e_coco.py --checkpoint yolox_nano.pth
        --coco-root /data/coco --max-drop 0.01 --eval-samples all
    """
    with plain_errors():
        given = [limit is not None for limit in (max_drop, max_size_mb, average_bits)]
        if sum(given) != 1:
            raise QwtError(f"Give one limit of {', '.join(LIMITS.values())}.")
        with options_named(SHRINK_OPTIONS, **FURTHER, **LIMITS, **ACTIVATION_KEYS):
            name = "best" if max_drop is None else "smallest"

            def configured(activations: int) -> Configuration:
                plain = QuantizationSettings(8, activations, **values[QuantizationSettings])
                search = Search(
                    smallest=None if max_drop is None else Smallest(max_drop, metric),
                    best=Best(average_bits, max_size_mb) if max_drop is None else None,
                    like=f"w8a{activations}",  # whose bits the search replaces
                    max_activation_bits=activations,
                    **values[Search],
                )
                return make_configuration(
                    values,
                    {f"w8a{activations}": plain, name: search},
                    runtimes=export,
                    targets=(Targets(quantization=(name,)),),
                )

            configuration = configured(ACTIVATIONS[0] if a_bit is None else a_bit)
            grids = values[QuantizationSettings]["grids"]
            if a_bit is None and not dry_run and grids != "symmetric":  # which has no other bits
                configuration = configured(
                    faster_activations(
                        values, export[0], output_dir / "forms", device=device, cores=cores
                    )
                )
            run_workflow(configuration, output_dir, device=device, cores=cores, dry_run=dry_run)
        if not dry_run:
            (model,) = configuration.models
            variant = Variant(model, name)
            recipe = output_dir / variant.calibrated("recipe.yaml")
            graph = output_dir / variant.exported / "model.onnx"
            loss = read_json(recipe.with_suffix(".json"))["loss"]
            told = [predicted_loss(loss)] if loss else []
            told += file_sentences(read_summary(output_dir / DOCUMENT))
            typer.echo("\n".join(["", f"Recipe: {recipe}", f"File: {graph}", *told]))


def faster_activations(
    values: Values, runtime: str, folder: Path, *, device: Device, cores: int | None
) -> int:
    """The bits of activations whose files are faster in a runtime, of :data:`ACTIVATIONS`.

    Files of both are made in a folder, from few images, and timed beside full precision.
    """
    settings = {**values[QuantizationSettings], "refit": "none"}
    trial: Values = {
        **values,
        CocoCalibration: {**values[CocoCalibration], "images": "4"},
        CocoEvaluation: {**values[CocoEvaluation], "images": "1"},
        Configuration: {**values[Configuration], "repeats": 1},
    }
    names = {bits: f"w8a{bits}" for bits in ACTIVATIONS}
    configuration = make_configuration(
        trial,
        {name: QuantizationSettings(8, bits, **settings) for bits, name in names.items()},
        runtimes=[runtime],
        skip=("evaluate_baseline",),
    )
    (model,) = configuration.models
    typer.echo(
        f"First, files with activations of {' and of '.join(map(str, ACTIVATIONS))} bits are made of a few images and timed in "
        f"{runtime}; then the search begins (--a-bit leaves this out)."
    )
    files = {
        bits: f"{Variant(model, name).exported}/{runtime}/benchmark.json"
        for bits, name in names.items()
    }
    run_workflow(configuration, folder, device=device, cores=cores, files=[*files.values()])
    timed = {bits: read_json(folder / file) for bits, file in files.items()}
    ratios = {bits: found["processor_ratio"] for bits, found in timed.items()}
    chosen = min(ratios, key=lambda bits: ratios[bits])
    told = ", ".join(
        f"with activations of {bits} bits {percent(ratio)}" for bits, ratio in ratios.items()
    )
    typer.echo(
        f"Of full precision's time in {timed[chosen]['title']}, files take {told}. So activations have {chosen} bits "
        "(--a-bit chooses others)."
    )
    return chosen

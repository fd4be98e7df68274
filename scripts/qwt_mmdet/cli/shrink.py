"""`qwt-mmdet shrink`: mixed-precision search for a limit of loss or of size, with an exported file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..config import Best, QuantizationSettings, Search, Smallest
from ..config.export import OwnRuntime
from ..config.workflow import Targets
from ..errors import QwtError
from ..files import read_json
from ..plan import Variant
from ..plan.files import DOCUMENT
from ..reporting.summary import read_summary
from ..reporting.text import file_sentences, predicted_loss
from .common import CoresOption, DeviceOption, DryRunOption, OutputOption, plain_errors
from .options import Key, Table, Values, choices, options_named, with_options
from .run import FURTHER, OPTIONS, make_configuration, run_workflow

SHRINK_OPTIONS: Table = {
    **OPTIONS,
    QuantizationSettings: {
        "scope": Key("scope", default="detector"),
        "grids": Key("grids", default="integer"),  # the file is to be fast, too
    },
    Search: {
        "a_bit": Key("max_activation_bits"),
        "storage": Key("storage", default="onnx"),  # sizes are those of the file
        "search_images": Key("images"),
        "rounds": Key("rounds"),
    },
}
"""The options that set a key of the configuration."""

LIMITS = {
    "max_drop": "--max-drop",
    "max_size_mb": "--max-size-mb",
    "average_weight_bits": "--average-bits",
}
"""Options of the limits, by key."""


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
        with options_named(SHRINK_OPTIONS, **FURTHER, **LIMITS):
            activations = values[Search]["max_activation_bits"]
            plain = QuantizationSettings(8, activations, **values[QuantizationSettings])
            smallest = Smallest(max_drop, metric) if max_drop is not None else None
            best = Best(average_bits, max_size_mb) if smallest is None else None
            name = "best" if smallest is None else "smallest"
            like = f"w8a{activations}"  # whose bits the search replaces
            search = Search(smallest=smallest, best=best, like=like, **values[Search])
            configuration = make_configuration(
                values,
                {like: plain, name: search},
                runtimes=export,
                targets=(Targets(quantization=(name,)),),
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

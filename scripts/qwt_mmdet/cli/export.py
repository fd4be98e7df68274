"""`qwt-mmdet export`: a detector as an ONNX file with integer weights."""

from pathlib import Path
from typing import Annotated

import typer

from ..config.export import Export
from .common import (
    MODEL,
    CheckpointOption,
    CompensationOption,
    WarmupOption,
    load_model,
    plain_errors,
)
from .options import Key, Values, with_options


@with_options({**MODEL, Export: {"opset": Key("opset")}})
def export(
    values: Values,
    checkpoint: CheckpointOption,
    warmup: WarmupOption = None,
    compensation: CompensationOption = None,
    output: Annotated[
        Path, typer.Option(help="The file to write; its description gets the ending .json.")
    ] = Path("model.onnx"),
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width of images; default: those of the model config."),
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(help="Whether images of other sizes can come; default: as the model config."),
    ] = None,
    nms: Annotated[
        bool, typer.Option("--nms", help="Let a one-stage detector's graph return boxes itself.")
    ] = False,
) -> None:
    """Write a detector, quantized and compensated or not, as an ONNX file."""
    with plain_errors():
        model = load_model(values, checkpoint, warmup, compensation)
        from ..export.description import exported_bytes, read_description
        from ..export.onnx_file import export_onnx

        export_onnx(model, output, size=size, dynamic=dynamic, nms=nms, **values[Export])
        megabytes = exported_bytes(output, read_description(output)) / 1e6
        typer.echo(f"{output}: {megabytes:.2f} MB (description: {output.with_suffix('.json')})")

"""`qwt-mmdet export`: a detector as an ONNX file with integer weights."""

from pathlib import Path
from typing import Annotated

import typer

from ..config.models import Model
from ..errors import QwtError
from .common import config_options, plain_errors
from .options import Key, Values, with_options


@with_options({Model: {"config": Key("config"), "cfg_options": Key("config_options")}})
def export(
    values: Values,
    checkpoint: Annotated[Path, typer.Option(help="The weights that were quantized.")],
    warmup: Annotated[Path | None, typer.Option(help="warmup.pth; none: full precision.")] = None,
    compensation: Annotated[Path | None, typer.Option(help="compensation.pth.")] = None,
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
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = 21,
) -> None:
    """Write a detector, quantized and compensated or not, as an ONNX file."""
    with plain_errors():
        if compensation is not None and warmup is None:
            raise QwtError("--compensation needs the --warmup that it was fitted for.")
        from ..export.onnx_file import export_onnx
        from ..steps.inputs import load_quantized

        model = load_quantized(
            values[Model]["config"],
            checkpoint,
            warmup=warmup,
            compensation=compensation,
            config_options=config_options(values[Model]["config_options"]),
        )
        export_onnx(model, output, size=size, dynamic=dynamic, opset=opset)
        megabytes = output.stat().st_size / 1e6
        typer.echo(f"{output}: {megabytes:.2f} MB (description: {output.with_suffix('.json')})")

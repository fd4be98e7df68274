"""`qwt-mmdet apply`: a quantized, compensated detector on images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..config.models import Model
from ..errors import QwtError
from .common import DeviceOption, chosen_device, config_options, plain_errors
from .options import Key, Values, with_options

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@with_options({Model: {"config": Key("config"), "cfg_options": Key("config_options")}})
def apply(
    values: Values,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    checkpoint: Annotated[Path, typer.Option(help="The weights that were quantized.")],
    warmup: Annotated[Path | None, typer.Option(help="warmup.pth; none: full precision.")] = None,
    compensation: Annotated[Path | None, typer.Option(help="compensation.pth.")] = None,
    output_dir: Annotated[Path, typer.Option(help="For pictures and results.")] = Path("qwt_apply"),
    device: DeviceOption = "auto",
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score that is drawn.")] = 0.3,
) -> None:
    """Run a quantized, compensated detector on images; save drawings and COCO-format results."""
    with plain_errors():
        paths = _image_paths(images)
        if compensation is not None and warmup is None:
            raise QwtError("--compensation needs the --warmup that it was fitted for.")
        from ..inference import run_on_images
        from ..steps.inputs import load_quantized

        model = load_quantized(
            values[Model]["config"],
            checkpoint,
            warmup=warmup,
            compensation=compensation,
            device=chosen_device(device),
            config_options=config_options(values[Model]["config_options"]),
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

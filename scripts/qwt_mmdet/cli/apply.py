"""`qwt-mmdet apply`: run a quantized, compensated detector on images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import QwtError
from .common import (
    MODEL,
    CheckpointOption,
    CompensationOption,
    DeviceOption,
    WarmupOption,
    chosen_device,
    load_model,
    plain_errors,
)
from .options import Values, with_options

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@with_options(MODEL)
def apply(
    values: Values,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    checkpoint: CheckpointOption,
    warmup: WarmupOption = None,
    compensation: CompensationOption = None,
    output_dir: Annotated[Path, typer.Option(help="For pictures and results.")] = Path("qwt_apply"),
    device: DeviceOption = "auto",
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score that is drawn.")] = 0.3,
) -> None:
    """Run a quantized, compensated detector on images; save drawings and COCO-format results."""
    with plain_errors():
        paths = _image_paths(images)
        model = load_model(values, checkpoint, warmup, compensation, chosen_device(device))
        from ..inference import run_on_images

        count = run_on_images(model, paths, output_dir, score=score)
        typer.echo(
            f"{count} detections on {len(paths)} images\nPictures: {output_dir / 'pictures'}\n"
            f"COCO results: {output_dir / 'predictions.json'} (images: {output_dir / 'images.json'})"
        )


def _image_paths(given: Sequence[Path]) -> list[Path]:
    paths = []
    for path in given:
        if path.is_dir():
            paths += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            paths.append(path)
        else:
            raise QwtError(f"There is no image or folder {path}; check the path.")
    if not paths:
        raise QwtError(f"There are no images in {', '.join(map(str, given))}.")
    return paths

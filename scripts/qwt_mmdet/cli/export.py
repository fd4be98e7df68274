"""`qwt-mmdet export`: write a detector as an ONNX file with integer weights."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..archives import WARMUP_FORMAT, load_archive
from ..config import as_entry
from ..config.datasets import Coco, CocoCalibration, CocoEvaluation
from ..config.export import Export
from ..errors import QwtError
from ..files import read_json, sha256_file
from ..plan.run import EXPORT_IMAGES
from .common import (
    MODEL,
    CheckpointOption,
    CompensationOption,
    WarmupOption,
    count_or_all,
    load_model,
    plain_errors,
)
from .options import Key, Table, Values, options_named, with_options
from .run import OPTIONS

EXPORT_OPTIONS: Table = {
    **MODEL,
    Export: {"opset": Key("opset"), "weights": Key("weights")},
    Coco: {**OPTIONS[Coco], "coco_root": Key("root")},
    CocoCalibration: OPTIONS[CocoCalibration],
    CocoEvaluation: {"eval_split": Key("split")},
}
"""The options that set a key of the configuration; those of images are as of `qwt-mmdet run`."""


@with_options(EXPORT_OPTIONS)
def export(
    values: Values,
    checkpoint: CheckpointOption,
    warmup: WarmupOption = None,
    compensation: CompensationOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="The calibration images of a run, results/datasets/NAME/calibration.json. Alternative: --coco-root "
            "with the options that choose images."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The file to write; its description gets the ending .json.")
    ] = Path("model.onnx"),
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width of images; default: those of the model config."),
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(help="Whether images may have other sizes; default: as the model config."),
    ] = None,
    nms: Annotated[
        bool, typer.Option("--nms", help="Let a one-stage detector's graph return boxes itself.")
    ] = False,
    ncnn: Annotated[
        bool,
        typer.Option(
            "--ncnn",
            help="Also write ncnn's files, .param and .bin, of a detector with grids: symmetric.",
        ),
    ] = False,
) -> None:
    """Write a detector, quantized and compensated or not, as an ONNX file.

    With the calibration images of a run, the file equals the workflow's, byte for byte. Its description has no
    provenance and no AP.
    """
    with plain_errors(), tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
        if values[Coco]["root"] is not None:
            if calibration is not None:
                raise QwtError("Give --calibration or --coco-root, not both.")
            calibration = choose_images(values, Path(folder))
        elif calibration is not None and warmup is not None:
            warn_of_other_images(warmup, calibration)
        model = load_model(values, checkpoint, warmup, compensation)
        from ..data.loaders import make_loader
        from ..export.description import exported_bytes, read_description
        from ..export.onnx_file import export_onnx

        images: Iterable[dict[str, Any]] = ()
        if calibration is not None:
            images = make_loader(model.cfg, calibration, images=slice(EXPORT_IMAGES))
        export_onnx(
            model,
            output,
            size=size,
            dynamic=dynamic,
            nms=nms,
            calibration=images,
            **values[Export],
        )
        megabytes = exported_bytes(output, read_description(output)) / 1e6
        typer.echo(f"{output}: {megabytes:.2f} MB (description: {output.with_suffix('.json')})")
        if ncnn:
            write_ncnn_files(output)


def write_ncnn_files(output: Path) -> None:
    """Write ncnn's files beside an ONNX file, from it."""
    import onnx_ir as ir

    from ..export.description import read_description
    from ..export.ncnn import write_ncnn

    if read_description(output)["region_heads"]:
        raise QwtError("A detector with two stages has no file for ncnn; export it without --ncnn.")
    files = [output.with_suffix(suffix) for suffix in (".param", ".bin")]
    write_ncnn(ir.load(output), files[0])
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    typer.echo(f"{files[0]}, {files[1].name}: {megabytes:.2f} MB")


def warn_of_other_images(warmup: Path, calibration: Path) -> None:
    """Warn if a warmup file was calibrated on other images than the given ones."""
    read_json(calibration, what="annotation file", remedy="give another one")  # it must exist
    made = load_archive(warmup, WARMUP_FORMAT, "warmup")["provenance"].get("annotations_sha256")
    if made not in (None, sha256_file(calibration)):
        typer.secho(
            f"Warning: {warmup} was calibrated on other images than those of {calibration}, so the file may differ "
            "from what the workflow writes.",
            err=True,
            fg="yellow",
        )


def choose_images(values: Values, folder: Path) -> Path:
    """Choose the calibration images that `qwt-mmdet run` chooses; return their annotation file in ``folder``."""
    from ..steps.prepare import prepare_dataset
    from ..steps.select import select_images

    part = {**values[CocoCalibration], "images": count_or_all(values[CocoCalibration]["images"])}
    with options_named(EXPORT_OPTIONS):
        dataset = Coco(
            type="coco",
            calibration=CocoCalibration(**part),
            evaluation=CocoEvaluation(**values[CocoEvaluation], images=1),
            **values[Coco],
        )
    settings, source, chosen = as_entry(dataset), folder / "source.json", folder / "images.json"
    prepare_dataset(settings, "calibration", folder=folder, output=source)
    select_images(
        settings,
        "calibration",
        name="coco",
        source=source,
        folder=folder,
        annotations=chosen,
        files=folder / "files.json",
    )
    return chosen

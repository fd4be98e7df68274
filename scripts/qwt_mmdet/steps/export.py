"""Export a detector."""

from collections.abc import Mapping
from typing import Any

from ..config.export import Storage
from ..data.loaders import make_loader
from ..export.description import graph_files, read_description
from ..export.onnx_file import export_onnx
from ..files import read_json, sha256_file, write_json
from ..staleness import file_note
from .inputs import Inputs, Pathlike


def export(
    inputs: Inputs,
    *,
    output: Pathlike,
    opset: int,
    weights: Storage,
    images: int,
    input_size: str | None = None,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
    metrics: Pathlike | None = None,
    graphs: Mapping[str, str],
) -> None:
    """Write a detector as ``output`` (.onnx) with its description beside it (.json).

    Args:
        opset, weights: as :func:`..export.onnx_file.export_onnx` takes them.
        images: number of calibration images that it gets.
        input_size: ``fixed`` or ``dynamic``; None: as of the model's test pipeline.
        metrics: of an evaluation of the same detector, for the AP in the description.
        graphs: ``note``: the file to write about further graphs beside ``output``, which no rule can name
            beforehand, so that a missing one is noticed; ``seen``: the result of :func:`.staleness.changed_files`.
    """
    model = inputs.load(warmup=warmup, compensation=compensation)
    details: dict[str, Any] = {
        "provenance": inputs.provenance(
            warmup=None if warmup is None else sha256_file(warmup),
            compensation=None if compensation is None else sha256_file(compensation),
        )
        | inputs.job.account()
    }
    if metrics is not None:
        known = read_json(metrics, what="metrics file")
        details["ap"] = {
            "measured": "with PyTorch, where quantization is simulated, before the export",
            "images": known["provenance"]["images"],
            **{
                iou_type: known[iou_type]["AP"]
                for iou_type in ("bbox", "segm")
                if iou_type in known
            },
        }
    dynamic = None if input_size is None else input_size == "dynamic"
    loader = make_loader(
        model.cfg, inputs.annotations, workers=inputs.workers, images=slice(images)
    )
    export_onnx(
        model, output, dynamic=dynamic, opset=opset, weights=weights, calibration=loader, details=details
    )  # fmt: skip
    _, *heads = map(str, graph_files(output, read_description(output)))
    write_json(graphs["note"], file_note(heads, seen=graphs["seen"], how="size"))

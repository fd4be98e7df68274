"""Evaluate an exported detector."""

from ..export.loading import load_exported
from ..export.runtimes import runtime_by_name
from ..files import sha256_file
from .evaluate import write_evaluation
from .inputs import Inputs, Pathlike


def evaluate_exported(
    inputs: Inputs, *, graph: Pathlike, runtime: str, metrics: Pathlike, predictions: Pathlike
) -> None:
    """Evaluate an exported file as the detector that it was made from; see ``evaluate.evaluate``."""
    write_evaluation(
        inputs,
        load_exported(graph, runtime).model,
        metrics=metrics,
        predictions=predictions,
        exported=sha256_file(graph),
        runtime=f"{runtime} {runtime_by_name(runtime).version}",
    )

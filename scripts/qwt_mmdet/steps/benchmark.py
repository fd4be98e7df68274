"""Time an exported detector."""

import os

from ..export.benchmark import benchmark
from ..files import write_json
from ..runtime import Job


def benchmark_exported(
    job: Job,
    *,
    quantized: str | os.PathLike[str],
    full_precision: str | os.PathLike[str],
    runtime: str,
    output: str | os.PathLike[str],
) -> None:
    """Time an exported file beside the same model's in full precision; writes ``output`` (.json)."""
    write_json(output, benchmark(quantized, full_precision, runtime) | job.account(), indent=1)

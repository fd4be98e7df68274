"""Paths of the files of a run, relative to the folder that it runs in."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import QwtError

TABLE = "results/summary.csv"
DOCUMENT = "results/summary.json"
REPORT = "results/report.html"
EXPORTS_TABLE = "results/exports.csv"
UNFINISHED = "results/unfinished.json"
"""The failed jobs and missing files of a failed run; see :class:`.rows.Stopped`."""
BASELINE, QUANTIZED = "baseline", "quantized"
"""Names of folders; they cannot be names of quantizations or compensations."""


def snakefile() -> Path:
    """The Snakefile of the clone that the library is used from."""
    path = Path(__file__).resolve().parents[3] / "Snakefile"
    if not path.is_file():
        raise QwtError(
            f"There is no Snakefile in {path.parent}: the command runs the workflow of the clone that it was "
            "installed from; install it with `make env` (pip install --editable) in a clone."
        )
    return path


def dataset_folder(dataset: str) -> str:
    """Folder of a data set's generated, downloaded and chosen files."""
    return f"results/datasets/{dataset}"


def chosen_images(dataset: str, part: str) -> str:
    """Annotation file of the chosen images of a part (``calibration@2``: of the second repeat)."""
    return f"{dataset_folder(dataset)}/{part}.json"


def repeated(quantization: str, repeat: int) -> str:
    """Name of a quantization in a repeat: ``w4a4``, ``w4a4@2``."""
    return quantization if repeat == 1 else f"{quantization}@{repeat}"


def without_repeat(quantization: str) -> str:
    """Name of a quantization, or of a measurement, without the number of its repeat."""
    return quantization.partition("@")[0]


def measured(model: str, measurement: str) -> str:
    """File of a measurement (of a repeat: ``…@2``) that searches choose their recipes from."""
    return f"results/{model}/candidates/{measurement}.json"


def tradeoff(model: str) -> str:
    """Table of a model's AP against its costs."""
    return f"results/{model}/tradeoff.csv"


@dataclass(frozen=True)
class Variant:
    """A detector in full precision, quantized (perhaps with the number of a repeat), or compensated, too."""

    model: str
    quantization: str | None = None
    compensation: str | None = None

    @classmethod
    def named(cls, model: str, name: str) -> "Variant":
        """The variant of a name or a folder: ``baseline``, ``w4a4``, ``w4a4/quantized`` or ``w4a4/qwt``."""
        quantization, _, compensation = name.partition("/")
        if quantization == BASELINE:
            return cls(model)
        return cls(model, quantization, None if compensation in ("", QUANTIZED) else compensation)

    @property
    def name(self) -> str:
        """``baseline``, ``w4a4`` or ``w4a4/qwt``."""
        return "/".join(filter(None, (self.quantization or BASELINE, self.compensation)))

    @property
    def kind(self) -> str:
        """``baseline``, ``quantized`` or ``compensated``, as in the name of the step that evaluates it."""
        if self.quantization is None:
            return BASELINE
        return "compensated" if self.compensation else QUANTIZED

    @property
    def exported(self) -> str:
        """Folder of its graph, and of a folder for each runtime."""
        return f"results/{self.model}/{self.name}"

    @property
    def evaluated(self) -> str:
        """Folder of its metrics and predictions."""
        return f"{self.exported}/{QUANTIZED}" if self.kind == QUANTIZED else self.exported

    def calibrated(self, name: str) -> str:
        """Path of a file of its quantization; its compensations share the file."""
        return f"results/{self.model}/{self.quantization}/{name}"

    def parts(self) -> dict[str, str]:
        """``warmup`` and ``compensation``: the files that it consists of, besides the checkpoint."""
        files = {} if self.quantization is None else {"warmup": self.calibrated("warmup.pth")}
        if self.compensation:
            files["compensation"] = f"{self.evaluated}/compensation.pth"
        return files

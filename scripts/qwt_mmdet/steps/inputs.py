"""The inputs of a step (a detector, images, how to run it), and the provenance of its results."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mmcv
import mmdet
import mmengine
import numpy as np
import torch
from mmdet.models import BaseDetector
from torch.utils.data import DataLoader

from .. import __version__
from ..compensation.state import load_compensation
from ..data.annotations import read_annotations
from ..data.loaders import make_loader
from ..data.sources import open_source
from ..detectors.build import load_detector
from ..detectors.classes import check_annotations
from ..files import read_json, sha256_file
from ..quantization.state import load_warmup
from ..runtime import Job
from ..staleness import file_note, recorded_files

Pathlike = str | os.PathLike[str]

LARGEST_READ_AHEAD = 10**8
"""Most bytes of an annotation file that is read only for an early check; five times COCO's val2017."""
_VARIABLE = re.compile(r"\{\{['\"]?\s*(\$\w+)")
"""An environment variable in an MMDetection config: ``{{$NAME:default}}``."""


def load_quantized(
    config: str,
    checkpoint: Pathlike,
    *,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
    device: str = "cpu",
    config_options: Mapping[str, Any] | None = None,
) -> BaseDetector:
    """Load a detector; with a warmup file quantize it, with a compensation file compensate it.

    Raises:
        QwtError: a file cannot be read, or does not belong to the others.
    """
    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    if warmup is not None:
        load_warmup(model, warmup)
    if compensation is not None:
        load_compensation(model, compensation)
    return model


def _evaluated_on(config: Mapping[str, Any], model: str) -> str | None:
    """The annotation file from which a model's evaluation images are chosen; None if missing or very large.

    It is no input of the rule: calibration does not depend on it, and must not run again if it changes.
    """
    dataset = config["models"][model]["dataset"]
    source = open_source(config["datasets"][dataset], f"results/datasets/{dataset}")
    path = source.place("evaluation").annotations
    there = os.path.isfile(path) and os.path.getsize(path) < LARGEST_READ_AHEAD
    return path if there else None


@dataclass(frozen=True)
class Inputs:
    """The detector and the images of a step, and how it runs them.

    Args:
        annotations: COCO annotation file of the images.
        evaluated_on: the annotation file from which the evaluation images are chosen, for an early check.
        job: the job that runs the step; it has the device.
        batch_size: number of images that run at a time.
        workers: number of processes that read images.
    """

    config: str
    config_options: Mapping[str, Any]
    checkpoint: Pathlike
    annotations: Pathlike
    job: Job
    seed: int
    batch_size: int
    workers: int
    evaluated_on: Pathlike | None = None

    @classmethod
    def of(cls, snakemake: Any, job: Job, section: str) -> "Inputs":
        """The inputs of a script's rule.

        Args:
            section: of the config, for batch_size and workers: ``calibration`` or ``evaluation``.
        """
        loading = snakemake.config[section]
        return cls(
            config=snakemake.params.config,
            config_options=snakemake.params.config_options,
            checkpoint=snakemake.input.checkpoint,
            annotations=snakemake.input.annotations,
            job=job,
            seed=snakemake.params.get("seed", 0),
            batch_size=loading["batch_size"],
            workers=min(loading["workers"], snakemake.threads),
            evaluated_on=_evaluated_on(snakemake.config, snakemake.wildcards.model)
            if section == "calibration"
            else None,
        )

    def load(
        self, *, warmup: Pathlike | None = None, compensation: Pathlike | None = None
    ) -> BaseDetector:
        """Return the detector (see :func:`load_quantized`); add the files that it depends on to ``job.files``."""
        ours = [path for path in (self.checkpoint, warmup, compensation) if path is not None]
        with recorded_files(self.job.files, without=ours):
            model: Any = load_quantized(
                self.config,
                self.checkpoint,
                warmup=warmup,
                compensation=compensation,
                device=self.job.device,
                config_options=self.config_options,
            )
        variables = file_note(_VARIABLE.findall(model.cfg.text), how="content")["files"]
        self.job.files.update(variables)
        return model

    def check_evaluation(self, model: BaseDetector) -> None:
        """Check that the detector can be evaluated later, before hours of work.

        Raises:
            QwtError: it cannot; see :func:`.classes.check_annotations`.
        """
        if self.evaluated_on is not None:
            check_annotations(model, read_annotations(self.evaluated_on))

    def loader(self, model: BaseDetector) -> DataLoader:
        """Return a loader of the images in batches, with the model's test pipeline."""
        with recorded_files(self.job.files, without=[self.annotations]):
            return make_loader(
                model.cfg, self.annotations, batch_size=self.batch_size, workers=self.workers
            )

    def provenance(self, **settings: Any) -> dict[str, Any]:
        """Provenance of a result: settings, seed, versions, hashes, device and number of images.

        It is the same for equal inputs on one machine; ``Job.account`` has values that vary.

        Args:
            settings: that the result depends on, besides the detector's config.
        """
        cuda = self.job.device.startswith("cuda")
        options = dict(self.config_options)
        return {
            "settings": {"config": self.config, "config_options": options, **settings},
            "seed": self.seed,
            "versions": {
                "qwt_mmdet": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),  # a class of its own, which archives must not hold
                "mmdet": mmdet.__version__,
                "mmcv": mmcv.__version__,
                "mmengine": mmengine.__version__,
                "pycocotools": version("pycocotools"),
                "numpy": np.__version__,
            },
            "checkpoint_sha256": sha256_file(self.checkpoint),
            "annotations_sha256": sha256_file(self.annotations),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
            "images": len(read_json(self.annotations, what="annotation file")["images"]),
        }

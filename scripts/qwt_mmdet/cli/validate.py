"""`qwt-mmdet validate`: a check of a config."""

from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from ..config import configuration, read_file, resolve
from ..config.datasets import PARTS
from ..data.sources import open_source
from ..errors import QwtError
from ..files import is_url
from .common import check_files, plain_errors


def validate(
    config: Annotated[Path, typer.Argument(help="A config of the workflow.")],
) -> None:
    """Check a config of the workflow, its models and its local files; run nothing.

    Each model is built, with its checkpoint if that is a local file. Its classes are compared with those of local
    annotations.
    """
    with plain_errors():
        from ..data.annotations import read_annotations
        from ..detectors.build import load_detector, random_detector
        from ..detectors.classes import check_annotations

        resolved = resolve(read_file(config))
        check_files(resolved)
        evaluated = {}
        for name, dataset in resolved["datasets"].items():
            source = open_source(dataset, "")
            for part in PARTS:
                path = source.local_annotations(part)
                if path is not None:
                    evaluated[name] = read_annotations(path, labelled=part == "evaluation")
        for name, model in resolved["models"].items():
            options = model["config_options"]
            try:
                if is_url(model["checkpoint"]):
                    built = random_detector(model["config"], options)
                else:
                    built = load_detector(
                        model["config"], model["checkpoint"], config_options=options
                    )
                if model["dataset"] in evaluated:
                    check_annotations(built, evaluated[model["dataset"]])
            except QwtError as error:
                raise QwtError(f"models.{name}: {error}") from error
        rows = configuration(resolved).combinations()
        typer.echo(tabulate(rows, ("model", "quantization", "compensation")))
        typer.echo(f"\n{config} is valid: {len(rows)} combinations.")

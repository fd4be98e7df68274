"""The command `qwt-mmdet`: runs the workflow without a config file, and uses its results.

Each subcommand is in its own file.
"""

import logging
from typing import Annotated

import typer

from .. import __version__
from . import apply, estimate, export, run, show, shrink, validate

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize trained MMDetection detectors and recover accuracy with QwT.",
)
for command in (
    run.run,
    shrink.shrink,
    validate.validate,
    estimate.estimate,
    show.show,
    apply.apply,
    export.export,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwt-mmdet {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

"""The same as `qwt-mmdet run`, for those who type it from habit."""

import typer
from qwt_mmdet.cli.run import run

if __name__ == "__main__":
    typer.run(run)

"""`qwt-mmdet show`: the content of a warmup or compensation file."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from ..reporting.text import megabytes, number, percent
from .common import plain_errors

PROVENANCE_SHOWN = ("images", "seed", "device", "cpu_capability", "threads", "tf32")


def show(
    file: Annotated[Path, typer.Argument(help="A warmup.pth or compensation.pth.")],
) -> None:
    """Show the content of a warmup or compensation file."""
    with plain_errors():
        from ..archives import COMPENSATION_FORMAT, WARMUP_FORMAT, load_any_archive

        formats = {WARMUP_FORMAT: "warmup", COMPENSATION_FORMAT: "compensation"}
        content = load_any_archive(file, formats)
        content_type = formats[content["format"]]
        lines = [("file", f"{content_type}, format {content['format']!r}")]
        lines += [(f"fingerprint: {key}", value) for key, value in content["fingerprint"].items()]
        lines += [(key, value) for key, value in content["settings"].items()]
        source = content["provenance"]
        lines += [(key, source[key]) for key in PROVENANCE_SHOWN if key in source]
        lines += [
            (key, value)
            for key, value in content["summary"].items()
            if not isinstance(value, list | dict)
        ]
        typer.echo(tabulate(lines, tablefmt="plain", disable_numparse=True))
        if content_type == "compensation":
            rows = [
                {
                    "block": block["name"],
                    "kind": block["kind"],
                    "decision": block["decision"],
                    "r² fit": number(block["fit"]["r2"]),
                    "r² held out": number(block["holdout"]["r2"]),
                    "size": megabytes(block["bytes"]),
                    "multiply-adds": percent(block["multiply_adds_percent"] / 100),
                }
                for block in content["blocks"]
            ]
            typer.echo("\n" + tabulate(rows, headers="keys", disable_numparse=True))
        else:
            skipped = content["summary"]["not_quantized"]
            typer.echo(f"\n{len(skipped)} modules in full precision")
            for entry in islice(skipped, 20):
                typer.echo(f"  {entry['name']} ({entry['type']}): {entry['reason']}")

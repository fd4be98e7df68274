"""The JSON schema and the tables of config/README.md, made from the sections.

``python -m qwt_mmdet.config.documentation`` writes both; with ``--check`` it only compares.
"""

import dataclasses
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

from . import compensation, datasets, export, models, quantization, search, workflow
from .section import default_of

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
PAGE = ROOT / "config" / "README.md"

TABLES: dict[str, type] = {
    "dataset": datasets.Coco,
    "images": datasets.CocoCalibration,
    "model": models.Model,
    "quantization": quantization.QuantizationSettings,
    "override": quantization.Override,
    "search": search.Search,
    "smallest": search.Smallest,
    "best": search.Best,
    "compensation": compensation.CompensationSettings,
    "max_cost": compensation.MaxCost,
    "targets": workflow.Targets,
    "export": export.Export,
    "configuration": workflow.Configuration,
    "loading": workflow.Loading,
    "activation_cache": workflow.ActivationCache,
    "sensitivity": workflow.Sensitivity,
    "bootstrap": workflow.Bootstrap,
}
"""Section of each table of the page, by the name in its markers."""

HEADER = """\
# Written by `make config-docs` from scripts/qwt_mmdet/config/; for editors and other tools.
"""


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of the configuration."""
    made = TypeAdapter(workflow.Configuration).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_without_titles(made),
        "title": "Configuration of the workflow",
    }


def _without_titles(value: Any) -> Any:
    """The schema without the titles of pydantic, which repeat the keys; a key may be called title, too."""
    if isinstance(value, Mapping):
        return {
            key: _without_titles(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


def _default(section: Any, field: dataclasses.Field) -> str:
    factory = section.__pydantic_fields__[field.name].default_factory
    if factory is not None:
        return "see below" if factory is not dict else "none"
    value = default_of(section, field.name)
    if value is PydanticUndefined:
        return "required"
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) else str(value).lower()


def limits(described: Mapping[str, Any]) -> str:
    """The allowed range of numbers as a sentence; empty without limits."""
    choices = [described, *described.get("anyOf", ())]
    for choice in choices:
        low = choice.get("minimum", choice.get("exclusiveMinimum"))
        high = choice.get("maximum", choice.get("exclusiveMaximum"))
        if low is not None:
            to = "" if high is None else f" to {'below ' * ('maximum' not in choice)}{high}"
            return f" From {low}{to}."
    return ""


def table(section: Any) -> str:
    """The keys of a section as a table in Markdown."""
    described = TypeAdapter(section).json_schema()["properties"]
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(section):
        meaning = section.__pydantic_fields__[field.name].description
        text = " ".join(meaning.split()).replace("|", "\\|") + limits(described[field.name])
        rows.append(f"| `{field.name}` | {_default(section, field)} | {text} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with all tables generated again, between ``<!-- keys: NAME -->`` and ``<!-- end of keys -->``."""

    def renew(match: re.Match) -> str:
        return f"{match[1]}\n{table(TABLES[match[2]])}\n{match[3]}"

    pattern = r"(<!-- keys: (\w+) -->).*?(<!-- end of keys -->)"
    return re.sub(pattern, renew, text, flags=re.DOTALL)


def made() -> dict[Path, str]:
    """The generated content of each file."""
    return {
        SCHEMA: HEADER + yaml.safe_dump(schema(), sort_keys=False, width=100, allow_unicode=True),
        PAGE: page(PAGE.read_text(encoding="utf-8")),
    }


def main(arguments: typing.Sequence[str]) -> int:
    stale = [path for path, text in made().items() if path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not as the sections say; run `make config-docs`.")
        return bool(stale)
    for path in stale:
        path.write_text(made()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

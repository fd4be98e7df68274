"""What the documentation says about the configuration, and the API reference."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from qwt_mmdet.config import load_schema

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "config" / "README.md").read_text()
SCHEMA = load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")


def keys(schema: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every key of the configuration with its schema, at any depth."""
    if isinstance(schema, Mapping):
        yield from (schema.get("properties") or {}).items()
        for value in schema.values():
            yield from keys(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keys(value)


@pytest.mark.parametrize("key", sorted({key for key, _ in keys(SCHEMA)}))
def test_the_page_on_the_configuration_names_every_key(key: str):
    assert re.search(rf"(`|\b){re.escape(key)}\b[:`.]", PAGE), f"config/README.md lacks {key}"


def test_the_page_tells_the_defaults_of_the_schema():
    told = dict(re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", PAGE, re.MULTILINE))
    assert len(told) > 10
    for section in ("quantization", "compensation"):
        for key, described in SCHEMA["$defs"][section]["properties"].items():
            if key in told and "default" in described:
                default = described["default"]
                text = str(default).lower() if isinstance(default, bool) else str(default)
                assert told[key] == text or default in ([], {}), key


@pytest.mark.slow
def test_the_api_reference_is_written(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "reference.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    assert "load_detector" in (tmp_path / "qwt_mmdet.html").read_text()
    assert "load_detector" in (tmp_path / "qwt_mmdet" / "detectors" / "build.html").read_text()
    assert (tmp_path / "qwt_mmdet" / "quantization" / "timm_models.html").is_file()

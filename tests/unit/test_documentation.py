"""What the documentation says about the configuration, and the API reference."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from qwt_mmdet.config import documentation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "config" / "README.md").read_text()


def test_schema_and_page_are_as_the_sections_say(capsys):
    assert documentation.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_noticed(monkeypatch, capsys):
    text = documentation.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(
        documentation,
        "made",
        lambda: {documentation.PAGE: text.replace("| `scope` |", "| `skope` |")},
    )
    assert documentation.main(["--check"]) == 1
    assert "config/README.md is not as the sections say" in capsys.readouterr().out


@pytest.mark.parametrize("section", documentation.TABLES.values())
def test_every_key_is_described(section):
    described = section.__pydantic_fields__
    assert set(described) == {field.name for field in dataclasses.fields(section)}
    for key, field in described.items():
        assert (field.description or "").strip(), key


def test_every_section_has_a_table_on_the_page():
    assert set(re.findall(r"<!-- keys: (\w+) -->", PAGE)) == set(documentation.TABLES)


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

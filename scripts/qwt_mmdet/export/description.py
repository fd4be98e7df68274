"""The JSON file beside an exported detector, and a check that both belong together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..archives import read_summary, summary_path
from ..errors import QwtError
from ..files import sha256_file

EXPORT_FORMAT = "qwt-mmdet export 1"


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description (.json) of an exported detector, and check that it is of this .onnx file.

    Raises:
        QwtError: a file is missing, truncated or does not belong to the others.
    """
    if summary_path(path) == Path(path):
        raise QwtError(
            f"{path} is the description of an exported file; give the .onnx file itself."
        )
    if not Path(path).is_file():
        raise QwtError(f"The exported file {path} does not exist; check the path.")
    if not summary_path(path).is_file():
        raise QwtError(
            f"The description {summary_path(path)} of the exported file {path} does not exist; it lies beside it "
            "where that was written, so copy both, or export again."
        )
    description = read_summary(path, EXPORT_FORMAT, "exported")
    entries = [description, *description["region_heads"].values()]
    for file, entry in zip(graph_files(path, description), entries, strict=True):
        if not file.is_file():
            raise QwtError(f"The exported file {file} does not exist; check the path.")
        if sha256_file(file) != entry["sha256"]:
            raise QwtError(
                f"{file} is not the file that {summary_path(path)} describes (another sha256); one of them "
                "is truncated or from another export, so export both again."
            )
    return description


def graph_files(path: str | os.PathLike[str], description: Mapping[str, Any]) -> list[Path]:
    """All graphs of the exported detector ``path``, that file first."""
    regions = description["region_heads"].values()
    return [Path(path), *(Path(path).with_name(entry["file"]) for entry in regions)]


def exported_bytes(path: str | os.PathLike[str], description: Mapping[str, Any]) -> int:
    """Bytes of all graphs of an exported detector."""
    return sum(file.stat().st_size for file in graph_files(path, description))


def as_json(node: Any) -> Any:
    """A part of an mmdet config for JSON: tuples as ``{"tuple": […]}``, classes as their names."""
    if isinstance(node, Mapping):
        return {str(key): as_json(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        entries = [as_json(value) for value in node]
        return {"tuple": entries} if isinstance(node, tuple) else entries
    return f"{node.__module__}.{node.__qualname__}" if isinstance(node, type) else node


def from_json(node: Any) -> Any:
    """The inverse of :func:`as_json`, except that classes stay names, which mmengine accepts."""
    if isinstance(node, list):
        return [from_json(value) for value in node]
    if not isinstance(node, dict):
        return node
    if list(node) == ["tuple"]:
        return tuple(from_json(node["tuple"]))
    return {key: from_json(value) for key, value in node.items()}

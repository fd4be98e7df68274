"""What each step depends on: its code, the files of a model's config, the images that were chosen.

Light on purpose (no torch, no mmdet): Snakemake asks whenever it reads the workflow.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent

# Parts of the library (modules or packages) whose code decides the result of each step.
_DETECTOR = (
    "annotations",
    "checkpoints",
    "compat",
    "detectors",
    "devices",
    "fingerprint",
    "loaders",
    "pipeline",
    "timm_backbone",
    "unpickling",
)
_EVALUATION = ("evaluation.coco", "evaluation.predict")
_REPORT = tuple(
    f"reporting.{part}" for part in ("figures", "html", "pictures", "templates", "text")
)
STEP_PARTS = {
    "fetch_checkpoint": ("checkpoints", "download", "unpickling"),
    "prepare_dataset": ("annotations", "datasets", "download", "images", "shapes"),
    "select_images": ("annotations", "datasets", "download", "images", "shapes"),
    "evaluate_baseline": (*_DETECTOR, *_EVALUATION),
    "quantize_model": (*_DETECTOR, "quantization"),
    "evaluate_quantized": (*_DETECTOR, *_EVALUATION, "quantization"),
    "rank_layers": (*_DETECTOR, "quantization"),
    "fit_compensation": (*_DETECTOR, "quantization", "compensation"),
    "evaluate_compensated": (*_DETECTOR, *_EVALUATION, "quantization", "compensation"),
    "summarize_results": (
        "annotations",
        "compat",
        "evaluation.bootstrap",
        "evaluation.coco",
        "quantization",
        "reporting.tables",
    ),
    "render_report": ("annotations", "evaluation.coco", "images", *_REPORT),
    "train_demo": ("compat", "shapes"),
}


def _base_names(path: Path) -> list[str]:
    """Names in the ``_base_`` of an mmengine config, read without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []  # building the detector reports what is wrong with the file
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_base_" for target in node.targets
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                return []
            return [value] if isinstance(value, str) else list(value)
    return []


def config_files(location: str) -> list[str]:
    """Return the local files that an MMDetection config consists of, following ``_base_``.

    Empty for a config that MMDetection ships.
    """
    files: dict[str, None] = {}
    pending = [Path(location)]
    while pending:
        path = pending.pop()
        if path.is_file() and str(path) not in files:
            files[str(path)] = None
            pending += [Path(os.path.normpath(path.parent / base)) for base in _base_names(path)]
    return list(files)


def part_files(part: str, package: Path = PACKAGE) -> list[Path]:
    """Return the source files of a module (``evaluation.coco``) or package of the library."""
    base = package.joinpath(*part.split("."))
    module = base.with_suffix(".py")
    if module.is_file():
        return [module]
    return sorted(path for path in base.rglob("*") if path.suffix in (".py", ".j2"))


def source_hash(step: str, package: Path = PACKAGE) -> str:
    """Return a hash of the library code that decides the result of a step.

    Snakemake notices that a script was edited, but not a module which that script imports.

    Args:
        step: name of a rule.
    """
    digest = hashlib.sha256()
    for part in STEP_PARTS[step]:
        for path in part_files(part, package):
            digest.update(json.dumps(str(path.relative_to(package).as_posix())).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _state(path: str) -> list[int] | None:
    """Size in bytes and time of the last change in ns; None for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def image_files(root: str, names: Iterable[str], seen: str = "") -> dict[str, Any]:
    """Note how image files are, for :func:`changed_images`.

    Args:
        names: relative to the folder ``root``.
        seen: what :func:`changed_images` said when they were chosen.
    """
    return {
        "image_root": root,
        "seen": seen,
        "files": {name: _state(os.path.join(root, name)) for name in names},
    }


def changed_images(path: str | os.PathLike[str]) -> str:
    """Tell images that are as they were when they were chosen from images that are not.

    Snakemake compares the answer with that of the last run, so it stays the same as long as the
    images do, also once a change was dealt with.

    Args:
        path: where the note of :func:`image_files` is, or will be.

    Returns:
        ``seen`` of the note if no file was changed or removed since, nothing if there is no note,
        else a hash of how the files are now.
    """
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        now = image_files(note["image_root"], note["files"], note["seen"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError):
        return "unreadable"  # as after a disk that was full; the images are chosen again
    if now == note:
        return note["seen"]
    return hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]

"""What each step depends on: its code, the files of a model's config, the images that were chosen.

Light on purpose (no torch, no mmdet): Snakemake asks whenever it reads the workflow.
"""

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent

# Modules and packages of the library whose code decides the result of each step. Those of the
# configuration are none: what they decide is in the params of a rule.
_DETECTOR = (
    "data.annotations",
    "data.batches",
    "data.images",
    "detectors",
    "devices",
    "fingerprint",
    "data.loaders",
    "data.trial",
    "record",
    "steps.inputs",
)
_EVALUATION = (*_DETECTOR, "evaluation.coco", "evaluation.predict", "steps.evaluate")
_QUANTIZATION = ("archives", "quantization", "replay")
_SOURCES = ("data.annotations", "data.download", "data.images", "data.sources", "demo.shapes")
_REPORT = tuple(
    f"reporting.{module}"
    for module in ("figures", "html", "pictures", "summary", "templates", "text")
)
_RUNTIMES = (
    "archives",
    "export.description",
    "export.kernels",
    "export.passes",
    "export.runtimes",
)
STEP_MODULES = {
    "fetch_checkpoint": (
        "data.download",
        "detectors.checkpoint",
        "detectors.unpickling",
        "detectors.weights",
        "steps.fetch",
    ),
    "prepare_dataset": (*_SOURCES, "steps.prepare"),
    "select_images": (*_SOURCES, "data.sampling", "steps.select"),
    "evaluate_baseline": _EVALUATION,
    "evaluate_shard": (*_EVALUATION, *_QUANTIZATION, "compensation"),
    "measure_candidates": (*_DETECTOR, *_QUANTIZATION, "search", *_EVALUATION, "steps.search"),
    "choose_recipe": (*_DETECTOR, *_QUANTIZATION, "search", *_EVALUATION, "steps.search"),
    "quantize_model": (*_DETECTOR, *_QUANTIZATION, "steps.quantize"),
    "evaluate_quantized": (*_EVALUATION, *_QUANTIZATION),
    "rank_layers": (*_DETECTOR, *_QUANTIZATION, "search.sensitivity", "steps.rank"),
    "fit_compensation": (
        *_DETECTOR,
        *_QUANTIZATION,
        "compensation",
        "steps.compensate",
    ),
    "evaluate_compensated": (*_EVALUATION, *_QUANTIZATION, "compensation"),
    "export_model": (
        *_DETECTOR,
        *_QUANTIZATION,
        "compensation",
        *_RUNTIMES,
        "export.detections",
        "export.nodes",
        "export.onnx_file",
        "export.outputs",
        "export.cut",
        "export.processing",
        "steps.export",
    ),
    "evaluate_exported": (
        *_EVALUATION,
        *_RUNTIMES,
        "export.loading",
        "export.cut",
        "steps.exported",
    ),
    "benchmark_exported": (*_RUNTIMES, "export.benchmark", "export.profile", "steps.benchmark"),
    "summarize_results": (
        "data.annotations",
        "archives",
        "evaluation.bootstrap",
        "evaluation.coco",
        "evaluation.estimates",
        "reporting.summary",
        "reporting.tables",
    ),
    "render_report": (
        "archives",
        "data.annotations",
        "evaluation.coco",
        "evaluation.estimates",
        "data.images",
        *_REPORT,
    ),
    "train_demo": ("demo",),
}


def _assigned(tree: ast.Module, name: str) -> Any:
    """Value of a variable of an mmengine config, or None where it is no literal."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            value = node.value
            try:
                if isinstance(value, ast.Call):  # dict(imports=[…])
                    return {k.arg: ast.literal_eval(k.value) for k in value.keywords}
                return ast.literal_eval(value)
            except ValueError:
                return None
    return None


def _names(value: Any) -> list[str]:
    """A text, or the texts in a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, str)]


def _base_files(path: Path, value: Any) -> list[Path]:
    """Files that a ``_base_`` names."""
    names = [
        re.sub(r"{{\s*fileDirname\s*}}", str(path.parent.absolute()), name)
        for name in _names(value)
    ]
    return [path.parent / name for name in names]


def _module_files(name: str) -> list[Path]:
    """Files of a module and of the packages around it, found without running any of them."""
    first, *others = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return []
    found = []
    for depth in range(len(others) + 1):
        if spec is None:
            break
        if spec.has_location and spec.origin:
            found.append(Path(spec.origin))
        if depth < len(others) and spec.submodule_search_locations is not None:
            full_name = ".".join([first, *others[: depth + 1]])
            locations = list(spec.submodule_search_locations)
            spec = importlib.machinery.PathFinder.find_spec(full_name, locations)
        else:
            spec = None
    return found


def _imported_files(path: Path, tree: ast.Module) -> list[Path]:
    """Files that the import statements of a file name; ``read_base()`` makes bases of them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [file for alias in node.names for file in _module_files(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parent.joinpath(*[".."] * (node.level - 1))
            module = folder.joinpath(*(node.module or "").split("."))
            for base in (module, *(module / alias.name for alias in node.names)):
                found += [base.with_name(f"{base.name}.py"), base / "__init__.py"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [file for name in names for file in _module_files(name)]
    return found


def _used_files(path: Path) -> list[Path]:
    """Files that an mmengine config, or a module, names; read without running it."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            content: Any = yaml.safe_load(text)  # JSON is YAML
            content = content if isinstance(content, dict) else {}
            bases, modules, imported = content.get("_base_"), content.get("custom_imports"), []
        else:
            tree = ast.parse(text)
            bases, modules = _assigned(tree, "_base_"), _assigned(tree, "custom_imports")
            imported = _imported_files(path, tree)
    except (OSError, SyntaxError, ValueError, yaml.YAMLError):
        return []  # building the detector reports what is wrong with the file
    imports = modules.get("imports") if isinstance(modules, dict) else None
    return [
        *_base_files(path, bases),
        *(file for name in _names(imports) for file in _module_files(name)),
        *imported,
    ]


def _is_installed(path: Path) -> bool:
    """Whether a file is Python's, an installed package's (provenance has versions) or our own."""
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return any(path.resolve().is_relative_to(p.resolve()) for p in (*places, PACKAGE))


def config_files(location: str) -> list[str]:
    """Return the local files that an MMDetection config consists of.

    It follows ``_base_``, ``read_base()``, ``custom_imports`` and import statements, but not into
    installed packages. Empty for a config that MMDetection ships.
    """
    return _local_files([Path(location)])


def source_files(type_: str) -> list[str]:
    """Return the local files of the module that registers a data set's type (``mylab.voc``).

    It follows import statements as :func:`config_files` does. Empty for a type of the library.
    """
    module = type_.rpartition(".")[0]
    return _local_files(_module_files(module) if module else [])


def _local_files(pending: list[Path]) -> list[str]:
    """Return the files in ``pending`` and those that they name, without installed ones."""
    files: dict[str, None] = {}
    while pending:
        path = Path(os.path.normpath(pending.pop()))
        with contextlib.suppress(ValueError):  # one file has one name, whatever leads to it
            path = path.relative_to(Path.cwd())
        if path.is_file() and str(path) not in files and not _is_installed(path):
            files[str(path)] = None
            pending += _used_files(path)
    return list(files)


def share_with_scripts() -> None:
    """Make the processes that this one starts import the same copy of the library."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def module_files(module: str, package: Path = PACKAGE) -> list[Path]:
    """Return the source files of a module (``evaluation.coco``) or package of the library."""
    base = package.joinpath(*module.split("."))
    file = base.with_suffix(".py")
    if file.is_file():
        return [file]
    return sorted(path for path in base.rglob("*") if path.suffix in (".py", ".j2"))


def source_hash(step: str, package: Path = PACKAGE) -> str:
    """Return a hash of the library code that decides the result of a step.

    Snakemake notices that a script was edited, but not a module which that script imports.

    Args:
        step: name of a rule.
    """
    digest = hashlib.sha256()
    for module in STEP_MODULES[step]:
        for path in module_files(module, package):
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


def shards_note(
    config: Mapping[str, Any],
    model: str,
    quantization: str | None = None,
    compensation: str | None = None,
) -> tuple[str, str]:
    """Where it is noted in how many shards an evaluation was run, and a hash of what that holds for.

    Args:
        config: resolved config of the workflow.
        quantization: perhaps with the number of a repeat.
    """
    entry = config["models"][model]
    decides = [
        entry,
        config["datasets"][entry["dataset"]],
        quantization and config["quantization"][quantization.partition("@")[0]],
        compensation and config["compensation"][compensation],
        config["seed"],
        config["evaluation"]["batch_size"],
        source_hash("evaluate_shard"),
    ]
    parts = [model, quantization or "baseline"]
    parts += [compensation or "quantized"] if quantization else []
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return f"results/{'/'.join(parts)}/shards.json", digest


def count_shards(config: Mapping[str, Any], default: int, **wildcards: str) -> int:
    """In how many shards an evaluation is run: as the config says, or as it was, where nothing else changed.

    Snakemake runs a step again when its input files are others, so the shards of what is done stay.

    Args:
        default: how many where the config leaves it open.
    """
    path, current = shards_note(config, **wildcards)
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        if note["of"] == current:
            return int(note["shards"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, or it is cut off
    chosen = config["evaluation"]["shards"]
    return default if chosen == "auto" else int(chosen)

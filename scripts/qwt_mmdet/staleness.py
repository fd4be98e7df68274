"""Dependencies of each step besides its inputs: its code, files of a model's config, the chosen images.

It imports neither torch nor mmdet, since Snakemake imports it whenever it reads the workflow.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from .files import write_json

PACKAGE = Path(__file__).resolve().parent

# Modules without effect on results: messages, logs, and reading of configs, whose values are params of rules.
_WITHOUT_EFFECT = {"cli", "config", "errors", "files", "imports", "progress", "runtime"}
_WITHOUT_EFFECT |= {"plan", "staleness"}
# Modules that a step, or a module, imports but does not use: shared code loads warmups and compensations, which
# these steps do not have.
_UNUSED = {
    "evaluate_baseline": {"archives", "compensation", "quantization"},
    "evaluate_exported": {"compensation", "quantization"},
    "choose_recipe": {"compensation"},
    "evaluate_quantized": {"compensation"},
    "measure_candidates": {"compensation"},
    "quantize_model": {"compensation"},
    "rank_layers": {"compensation"},
    "steps.inputs": {"data.sources"},  # for an early check of the evaluation images
}
_SHARED_SCRIPTS = dict.fromkeys(
    ("evaluate_baseline", "evaluate_quantized", "evaluate_compensated"), "evaluate_detector"
)
_TEMPLATES = {"reporting.html": "reporting/templates"}
# A pattern, since parsing the whole library takes a second at each start of Snakemake.
_IMPORT = re.compile(
    r"^[ \t]*from (\.+|qwt_mmdet\b)\.?([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE
)


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python, to an installed package (provenance has versions) or to this library."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return any(path.resolve().is_relative_to(p.resolve()) for p in (*folders, PACKAGE))


def _is_users(path: Path) -> bool:
    """Whether a file that a process read is the user's own."""
    return (
        path.is_file()
        and path.suffix != ".pyc"
        and path.parts[1:2] not in (("proc",), ("sys",), ("dev",))
        and not any(part.endswith((".egg-info", ".dist-info")) for part in path.parts)
        and not _is_installed(path)
    )


_recorders: list[tuple[set[str], set[str]]] = []  # paths that are read, and that are written


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook of the process: add the files that it opens to all recorders."""
    if event != "open" or not _recorders or isinstance(arguments[0], int):
        return
    path, mode, flags = arguments
    written = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
    for read_files, written_files in _recorders:
        (written_files if written else read_files).add(os.path.abspath(os.fsdecode(path)))


_install_hook = functools.cache(lambda: sys.addaudithook(_record))  # it cannot be removed


def _states(paths: Iterable[str]) -> dict[str, Any]:
    """The state of each file of the user, by its path."""
    names = [
        os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
        for path in sorted(paths)
        if _is_users(Path(path))
    ]
    return {name: file_state(name) for name in names}


def imported_files(known: Collection[str]) -> dict[str, Any]:
    """States of the user's modules that are imported and not in ``known``, by path."""
    new = [module for name, module in sys.modules.items() if name not in known]
    return _states({str(getattr(module, "__file__", None)) for module in new})


@contextlib.contextmanager
def recorded_files(
    files: dict[str, Any], without: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[None]:
    """Inside: record the user's files that are read (opened, or imported as modules).

    A config of MMDetection may name files in many ways, so they are recorded when it is read.

    Args:
        files: the state of each file is added, by its path (relative if below the current folder). Existing
            entries do not change.
        without: paths of files to ignore.
    """
    _install_hook()
    opened: tuple[set[str], set[str]] = (set(), set())
    known = set(sys.modules)
    _recorders.append(opened)
    try:
        yield
    finally:
        _recorders.remove(opened)
    found = _states(opened[0] - opened[1] - set(map(os.path.abspath, without)))
    files |= {**found, **imported_files(known), **files}


def share_with_scripts() -> None:
    """Make child processes import the same copy of the library."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@functools.cache
def _modules(package: Path) -> dict[str, Path]:
    """File of each module and package of the library, by its dotted name."""
    files = {
        ".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


@functools.cache
def _imported(path: Path, package: Path) -> set[str]:
    """Modules of the library that a file imports, also inside of functions, and their parent packages."""
    inside = path.relative_to(package).parent.parts if path.is_relative_to(package) else ()
    names: set[str] = set()
    for dots, module, imported in _IMPORT.findall(path.read_text(encoding="utf-8")):
        base = inside[: len(inside) + 1 - len(dots)] if dots.startswith(".") else ()
        parts = [*base, *filter(None, module.split("."))]
        names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        imported = re.sub(r"#.*| as \w+", "", imported)
        names |= {".".join([*parts, name]) for name in re.findall(r"\w+", imported)}
    return names & _modules(package).keys()


def step_files(step: str, package: Path = PACKAGE) -> list[Path]:
    """Return the files of the library that the result of a step depends on.

    These are the modules that its script imports, directly or not, except those without effect on the result.

    Args:
        step: name of a rule.
        package: the library's folder, beside the scripts.
    """
    modules = _modules(package)
    without = _WITHOUT_EFFECT | _UNUSED.get(step, set())
    found: set[str] = set()
    pending = {"": package.parent / f"{_SHARED_SCRIPTS.get(step, step)}.py"}
    while pending:
        importer, file = pending.popitem()
        left_out = without | _UNUSED.get(importer, set())
        names = _imported(file, package) - found
        new = {n for n in names if not any(f"{n}.".startswith(f"{out}.") for out in left_out)}
        found |= new
        pending |= {name: modules[name] for name in new}
    templates = [package / _TEMPLATES[name] for name in found & _TEMPLATES.keys()]
    files = [modules[name] for name in found]
    return sorted([*files, *(path for folder in templates for path in folder.iterdir())])


@functools.cache
def source_hash(step: str, package: Path = PACKAGE) -> str:
    """Return a hash of the library code that the result of a step depends on (see :func:`step_files`).

    Snakemake notices changes of a script, but not of the modules that it imports.

    Args:
        step: name of a rule.
    """
    states = {str(p.relative_to(package)): _digest(p) for p in step_files(step, package)}
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


LARGEST_READ = 2**20
"""Bytes of the largest file whose content is compared; of larger files it is size and time."""

How = Literal["time", "content", "size"]


def file_state(path: str, how: How = "content") -> Any:
    """The state of a file, to compare it later; None if it is missing.

    Args:
        path: of the file, or ``$NAME`` for an environment variable.
        how: the state: the size alone, size and time of the last change, or the content.
    """
    if path.startswith("$"):
        value = os.environ.get(path[1:])
        return value and hashlib.sha256(value.encode()).hexdigest()
    try:
        status = os.stat(path)
        if how == "size":
            return status.st_size
        if how == "content" and status.st_size <= LARGEST_READ:
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def file_note(names: Iterable[str], *, root: str = "", seen: str = "", how: How) -> dict[str, Any]:
    """A note of the states of files, for :func:`changed_files`.

    Args:
        names: relative to the folder ``root``; ``$NAME`` is an environment variable.
        seen: the result of :func:`changed_files` when they were used.
        how: see :func:`file_state`.
    """
    files = {name: file_state(os.path.join(root, name), how) for name in names}
    return {"root": root, "how": how, "seen": seen, "files": files}


def changed_files(path: str | os.PathLike[str]) -> str:
    """A text that changes if files change after they were used.

    Snakemake compares it with the text of the last run. It stays the same as long as the files do, also after a
    rerun because of a change.

    Args:
        path: of the note by :func:`file_note`, which may not exist yet.

    Returns:
        ``seen`` of the note if no file was changed or removed since; empty without a note; else a hash of the
        current states.
    """
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        now = file_note(note["files"], root=note["root"], seen=note["seen"], how=note["how"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError):
        return "unreadable"  # for example after a full disk; causes a rerun
    if now == note:
        return note["seen"]
    return hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]


def add_to_note(path: str | os.PathLike[str], seen: str, files: Mapping[str, Any]) -> None:
    """Add files that a job has read to the note that it shares with others.

    Files in the note keep their state, which is that when another job read them.

    Args:
        seen: the result of :func:`changed_files` when the job began. A note with another ``seen`` is replaced.
        files: states by path, as of :func:`recorded_files`.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # there is none, or it is cut off
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        known = note["files"] if note["seen"] == seen else {}
    if files.keys() - known.keys():
        write_json(path, {"root": "", "how": "content", "seen": seen, "files": {**files, **known}})

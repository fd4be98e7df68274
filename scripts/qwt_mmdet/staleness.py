"""What each step depends on: its code, the files that it reads of a model, the images that were chosen.

Light on purpose (no torch, no mmdet): Snakemake asks whenever it reads the workflow.
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

# What decides no result: messages and logs; what reads a config, whose values are in the params of a rule.
_DECIDE_NOTHING = {"cli", "config", "errors", "files", "imports", "progress", "runtime"}
_DECIDE_NOTHING |= {"plan", "staleness"}
# What a step, or a module, imports for other steps: code that several share loads warmups and compensations,
# and these steps are given none.
_FOR_OTHERS = {
    "evaluate_baseline": {"archives", "compensation", "quantization"},
    "evaluate_exported": {"compensation", "quantization"},
    "choose_recipe": {"compensation"},
    "evaluate_quantized": {"compensation"},
    "measure_candidates": {"compensation"},
    "quantize_model": {"compensation"},
    "rank_layers": {"compensation"},
    "steps.inputs": {"data.sources"},  # to look ahead at the images of the evaluation
}
_SHARED_SCRIPTS = dict.fromkeys(
    ("evaluate_baseline", "evaluate_quantized", "evaluate_compensated"), "evaluate_detector"
)
_TEMPLATES = {"reporting.html": "reporting/templates"}
# Parsing the whole library takes a second, and Snakemake asks at each start.
_IMPORT = re.compile(
    r"^[ \t]*from (\.+|qwt_mmdet\b)\.?([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE
)


def _is_installed(path: Path) -> bool:
    """Whether a file is Python's, an installed package's (provenance has versions) or our own."""
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return any(path.resolve().is_relative_to(p.resolve()) for p in (*places, PACKAGE))


def _is_users(path: Path) -> bool:
    """Whether a file that a process read is the user's, who may edit it."""
    return (
        path.is_file()
        and path.suffix != ".pyc"
        and path.parts[1:2] not in (("proc",), ("sys",), ("dev",))
        and not any(part.endswith((".egg-info", ".dist-info")) for part in path.parts)
        and not _is_installed(path)
    )


_recorders: list[tuple[set[str], set[str]]] = []  # of files that are read, and that are written


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook of the process: note the files that it opens, as long as somebody wants to know."""
    if event != "open" or not _recorders or isinstance(arguments[0], int):
        return
    path, mode, flags = arguments
    written = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
    for read_files, written_files in _recorders:
        (written_files if written else read_files).add(os.path.abspath(os.fsdecode(path)))


_install_hook = functools.cache(lambda: sys.addaudithook(_record))  # it cannot be removed


def _states(paths: Iterable[str]) -> dict[str, Any]:
    """The state of each file that is the user's, by its name."""
    names = [
        os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
        for path in sorted(paths)
        if _is_users(Path(path))
    ]
    return {name: file_state(name) for name in names}


def imported_files(known: Collection[str]) -> dict[str, Any]:
    """The user's modules that were imported besides those whose names are known: path to state."""
    new = [module for name, module in sys.modules.items() if name not in known]
    return _states({str(getattr(module, "__file__", None)) for module in new})


@contextlib.contextmanager
def recorded_files(
    files: dict[str, Any], without: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[None]:
    """Record which of the user's files are read inside of the context: opened, or imported as modules.

    A config of MMDetection may name files in many ways; whoever reads it knows them all.

    Args:
        files: gets the state of each file, by its path, which is relative in the current folder. One that
            is in it stays as it is.
        without: paths of files that do not count.
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
    """Make the processes that this one starts import the same copy of the library."""
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
    """Modules of the library that a file imports, also inside of its functions, and the packages that hold them."""
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
    """Return the files of the library whose code decides the result of a step.

    They are all that its script imports, directly or not, but for what decides nothing.

    Args:
        step: name of a rule.
        package: the library's folder, which lies beside the scripts.
    """
    modules = _modules(package)
    without = _DECIDE_NOTHING | _FOR_OTHERS.get(step, set())
    found: set[str] = set()
    pending = {"": package.parent / f"{_SHARED_SCRIPTS.get(step, step)}.py"}
    while pending:
        importer, file = pending.popitem()
        left_out = without | _FOR_OTHERS.get(importer, set())
        names = _imported(file, package) - found
        new = {n for n in names if not any(f"{n}.".startswith(f"{out}.") for out in left_out)}
        found |= new
        pending |= {name: modules[name] for name in new}
    templates = [package / _TEMPLATES[name] for name in found & _TEMPLATES.keys()]
    files = [modules[name] for name in found]
    return sorted([*files, *(path for folder in templates for path in folder.iterdir())])


@functools.cache
def source_hash(step: str, package: Path = PACKAGE) -> str:
    """Return a hash of the library code that decides the result of a step (see :func:`step_files`).

    Snakemake notices that a script was edited, but not a module which that script imports.

    Args:
        step: name of a rule.
    """
    states = {str(p.relative_to(package)): _digest(p) for p in step_files(step, package)}
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


LARGEST_READ = 2**20
"""Bytes of a file whose content is compared; of a larger one, as the time of its last change."""

How = Literal["time", "content", "size"]


def file_state(path: str, how: How = "content") -> Any:
    """How a file is, to be compared with how it is later; None if it is not there.

    Args:
        path: of the file, or ``$NAME`` for an environment variable.
        how: what is compared: the size alone, size and time of the last change, or the content.
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
    """Note how files are, for :func:`changed_files`.

    Args:
        names: relative to the folder ``root``; ``$NAME`` is an environment variable.
        seen: what :func:`changed_files` said when they were used.
        how: see :func:`file_state`.
    """
    files = {name: file_state(os.path.join(root, name), how) for name in names}
    return {"root": root, "how": how, "seen": seen, "files": files}


def changed_files(path: str | os.PathLike[str]) -> str:
    """Tell files that are as they were when they were used from files that are not.

    Snakemake compares the answer with that of the last run, so it stays the same as long as the
    files do, also once a change was dealt with.

    Args:
        path: where the note of :func:`file_note` is, or will be.

    Returns:
        ``seen`` of the note if no file was changed or removed since, nothing if there is no note,
        else a hash of how the files are now.
    """
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        now = file_note(note["files"], root=note["root"], seen=note["seen"], how=note["how"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError):
        return "unreadable"  # as after a disk that was full; the files are used again
    if now == note:
        return note["seen"]
    return hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]


def add_to_note(path: str | os.PathLike[str], seen: str, files: Mapping[str, Any]) -> None:
    """Add files that a job has read to the note that it shares with others.

    A file that is in it already keeps its state: what another job has read decides as well.

    Args:
        seen: what :func:`changed_files` said when the job began. A note that was made before that
            change is replaced.
        files: path to state, as :func:`recorded_files` gives it.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # there is none, or it is cut off
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        known = note["files"] if note["seen"] == seen else {}
    if files.keys() - known.keys():
        write_json(path, {"root": "", "how": "content", "seen": seen, "files": {**files, **known}})

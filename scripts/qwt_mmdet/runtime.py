"""The frame of every script of the workflow, around its one library call: log, device, seeds, errors.

``snakemake`` is the object that Snakemake passes to a script. This module does not import Snakemake.
"""

import contextlib
import errno
import gc
import io
import logging
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .devices import choose_device, let_threads_sleep, seed_everything, set_up_torch
from .errors import QwtError
from .staleness import add_to_note, imported_files

logger = logging.getLogger(__name__)

GARBAGE_THRESHOLD = 50_000
"""Threshold of Python's garbage collector. With the default of 700, collections take a sixth of the time of
importing mmdet."""

COMMAND = "QWT_MMDET_COMMAND"
"""Environment variable with the user's command line, for the jobs of the workflow."""

REFITS = ("quantize_model", "measure_candidates", "choose_recipe")
"""Steps that may cache activations, with a ``refit`` other than ``none``."""
EVALUATIONS = (
    "evaluate_baseline",
    "evaluate_quantized",
    "evaluate_compensated",
    "evaluate_exported",
    "evaluate_shard",
)

CLEAR_LINE = "\r\x1b[2K"
"""Removes the bar of the workflow (which draws itself anew) from the line that a terminal writes on."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _LineWriter(io.TextIOBase):
    """Stream that logs the lines that are printed to it."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self._log.info("%s", line)
        return len(text)

    def flush(self) -> None:
        if self._rest.strip():
            self._log.info("%s", self._rest)
        self._rest = ""

    def isatty(self) -> bool:
        return False


class _LogFile(logging.FileHandler):
    """The log of a step. If it cannot be written any more, the terminal tells so once, and the step goes on."""

    _ended = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            self._end(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        if not self._ended:
            self._ended = True
            self.addFilter(lambda record: False)
            error.filename = self.baseFilename
            logger.warning("The log of this step ends here. %s", explain(error))


@contextlib.contextmanager
def _logging_to(path: Path, name: str) -> Iterator[None]:
    """Inside: log everything to a file, and our warnings and all errors also to the terminal.

    What Python code prints is logged, too, so that it does not get between the lines of progress of the workflow.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = _LogFile(path, mode="w", encoding="utf-8")
    to_file.setFormatter(logging.Formatter(LOG_FORMAT))
    to_terminal = logging.StreamHandler(sys.stderr)
    line = CLEAR_LINE if sys.stderr.isatty() else ""
    to_terminal.setFormatter(logging.Formatter(f"{line}[{name}] %(message)s"))
    to_terminal.setLevel(logging.WARNING)
    to_terminal.addFilter(
        lambda record: record.name.startswith("qwt_mmdet") or record.levelno >= logging.ERROR
    )
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for handler in (to_file, to_terminal):
        root.addHandler(handler)
    logging.captureWarnings(True)
    printed, complained = (_LineWriter(logging.getLogger(name)) for name in ("stdout", "stderr"))
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            yield
    finally:
        printed.flush()
        complained.flush()
        logging.captureWarnings(False)
        to_file.close()
        for handler in (to_file, to_terminal):
            root.removeHandler(handler)
        root.setLevel(level)


STAYS = {
    "fit_compensation": "finished blocks",
    "measure_candidates": "finished numbers of bits",
    "choose_recipe": "finished rounds",
}
"""Intermediate results that an interrupted step keeps."""

_FULL = "The disk or the quota of {place} is full; free some space and run again."
DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "A file in {place} got larger than it may be; raise the limit (ulimit -f) and run again.",
    errno.EIO: "The disk of {place} cannot be read or written; check it and its connection, and run again.",
    errno.ESTALE: "The folder {place} was mounted anew while this ran; run again.",
}
"""Messages about faults of the disk, with a remedy, by error number."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _machine_fault(error: BaseException, rule: str) -> str | None:
    """A sentence about an error that the machine caused (memory, disk, limits); None for other errors."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        lower = "lower activation_cache.device_gb in the config"
        remedies = {"fit_compensation": lower}
        remedies |= dict.fromkeys(REFITS, f"end what else uses it, or with a refit {lower}")
        remedies |= dict.fromkeys(EVALUATIONS, "lower evaluation.batch_size in the config")
        return (
            f"The GPU ran out of memory; {remedies.get(rule, 'end what else uses it')}, or run on the "
            "CPU with --resources gpu=0."
        )
    number = error.errno if isinstance(error, OSError) else None
    killed = re.search(
        r"DataLoader worker \(pid.*\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)", text
    )
    if killed and killed[1] not in (None, "Killed", "Bus error"):
        return (
            f"A process that reads images was stopped ({killed[1]}); run again, with workers: 0 in the config "
            "if it happens anew, which tells where."
        )
    if (
        killed
        or isinstance(error, MemoryError)
        or number == errno.ENOMEM
        or re.search(
            "an't allocate memory|failed to map segment|bad_alloc|Insufficient memory", text
        )
    ):
        cache = "activation_cache.memory_gb and calibration.workers"
        remedies = dict.fromkeys(("fit_compensation", *REFITS), cache)
        remedies |= dict.fromkeys(EVALUATIONS, "batch_size and workers of evaluation")
        happened = "The machine ran out of memory"
        if killed:
            happened = "A process that reads images was killed, most likely because memory ran out"
            if killed[1] == "Bus error":
                happened = "A process that reads images ran out of shared memory (/dev/shm)"
        return (
            f"{happened}; lower {remedies.get(rule, 'calibration.workers')} in the "
            "config, run fewer jobs at a time with a smaller --cores, or raise the limit (ulimit -v, or "
            "that of the container or the cluster's job)."
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return (
            f"Too many files are open ({text}); raise the limit (ulimit -n), or lower the workers of "
            "calibration and evaluation in the config."
        )
    if "No usable temporary directory found" in text:
        return (
            f"There is no folder for temporary files ({text}); let TMPDIR name one with free space."
        )
    full = re.search(r"PytorchStreamWriter failed|inline_container.*unexpected pos", text)
    if number in DISK or full:
        place = f"{Path.cwd()} or {tempfile.gettempdir()}"
        if name := getattr(error, "filename", None):
            path = Path(name).absolute()
            place = str(path if path.is_dir() else path.parent)
        return DISK[number or errno.ENOSPC].format(place=place)
    return None


def known_cause(error: BaseException, rule: str = "") -> str | None:
    """Return a sentence about an error's cause and remedy; None for a bug of ours.

    Args:
        rule: of the failed step, for its remedy against a lack of memory.
    """
    if isinstance(error, KeyboardInterrupt):
        stays = "what is finished stays"
        if rule:
            own = f"and {STAYS[rule]} of this one" if rule in STAYS else "and this one starts anew"
            stays = f"finished steps stay, {own}"
        return f"Interrupted; run again to go on: {stays}."
    # The first cause matters: after a fault of the disk, torch raises a second error.
    for cause in reversed(list(_causes(error))):
        if fault := _machine_fault(cause, rule):
            return fault
    if isinstance(error, QwtError):
        return str(error)
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    missing = re.fullmatch(r"(\w+): implementation for device (\w+) not found.\s*", text)
    if missing:
        operator = missing[1].removesuffix("_impl")
        return (
            f"mmcv's operator {operator}, which this model runs, has no implementation for the device "
            f"{missing[2]}; run the model on "
            + ("a GPU." if missing[2] == "cpu" else "the CPU with --resources gpu=0.")
        )
    place = getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        change = "change the rights of the file and its folder"
        if number == errno.EROFS:
            change = "mount it for writing"
        return (
            f"{place or Path.cwd()} cannot be used ({os.strerror(number)}); {change}, or run in a folder that you "
            "may write to (--directory)."
        )
    return None


def explain(error: BaseException, rule: str = "") -> str:
    """Return a sentence about an error's cause and remedy (see :func:`known_cause`), also for bugs."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return known_cause(error, rule) or (
        f"Unexpected {text.rstrip('.')}. This is a bug or a broken installation; the log has the "
        "traceback."
    )


PROBE_BYTES = 2**16


def unusable(folders: Iterable[str | os.PathLike[str]]) -> str | None:
    """A sentence about the first folder in which no file can be written, and the remedy; None if there is none.

    In the place of a missing folder, its closest parent is tried.
    """
    for folder in map(Path, folders):
        place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        try:
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(bytes(PROBE_BYTES))
        except OSError as error:
            error.filename = str(place)
            return explain(error)
    return None


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside: SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def job_name(snakemake: Any) -> str:
    """Return the rule and its wildcards: ``quantize_model demo w4a4``."""
    return " ".join([snakemake.rule, *map(str, snakemake.wildcards)])


def hardware() -> str:
    """Processor, cores, memory and system of this machine."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor}, {os.cpu_count()} logical cores, {memory:.0f} GiB memory, "
        f"{platform.system()} {platform.release()}"
    )


def _peak_on(device: str) -> dict[str, float]:
    """``device_gigabytes``: peak memory of this process on a GPU, in 10^9 bytes."""
    if device == "cpu":
        return {}
    import torch

    return {"device_gigabytes": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)}


@dataclass(frozen=True)
class Job:
    """A running job of the workflow: the process of a rule's script.

    Args:
        device: to compute on, ``"cuda:0"`` or ``"cpu"``.
        started: in seconds of ``time.monotonic``.
        files: states of the user's files that were read and that the result depends on, by path.
    """

    device: str
    started: float
    files: dict[str, Any] = field(default_factory=dict)

    def account(self) -> dict[str, Any]:
        """Account of the job: seconds since the start, memory on a GPU, the machine, and the user's command."""
        return {
            "seconds": round(time.monotonic() - self.started, 1),
            "hardware": hardware(),
            "command": os.environ.get(COMMAND),
            **_peak_on(self.device),
        }


@contextlib.contextmanager
def step(snakemake: Any) -> Iterator[Job]:
    """Run the body of a script: log to the rule's log, and explain errors.

    For a step with ``resources.gpu`` (granted or not), mmdet is imported and torch is set up. If ``params.read``
    names a note, the user's files that the step has read are added to it.

    Yields:
        The job, which has the device to compute on.

    Raises:
        SystemExit: with status 1 after any failure, 130 after Ctrl-C or SIGTERM. The terminal shows a sentence
            with the remedy; the log ends with this sentence and the traceback.
    """
    started = time.monotonic()
    gc.set_threshold(GARBAGE_THRESHOLD)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_logging_to(Path(snakemake.log[0]), job_name(snakemake)))
        except OSError as error:
            sys.exit(f"[{job_name(snakemake)}] {explain(error)}")
        stack.enter_context(termination_interrupts())
        try:
            seed = snakemake.params.get("seed", 0)
            seed_everything(seed)
            device = "cpu"
            gpu = snakemake.resources.get("gpu")
            if gpu is not None:
                let_threads_sleep()
                from .imports import import_mmdet

                import_mmdet()
                set_up_torch(snakemake.threads, seed)
                device = choose_device(gpu, snakemake.config["device"])
            job, known = Job(device, started), set(sys.modules)
            yield job
            if read := snakemake.params.get("read"):
                add_to_note(read["note"], read["seen"], imported_files(known) | job.files)
        except (Exception, KeyboardInterrupt) as error:
            logger.error("%s", explain(error, snakemake.rule))
            logging.getLogger("traceback").info("", exc_info=error)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None

"""What Snakemake shows of a run, in few words: `--logger qwt`, the default (`workflow/profiles/default`).

A line for each step that ends, and in a terminal a bar below it with the time left for the whole run. A step that
fails says why by itself; this adds its log. A dry run (`-n`) shows how many jobs of each rule would run. Messages of
Snakemake about the run itself are in `.snakemake/log/`.

Snakemake imports its plugins before it reads the config files of its command line, for whose mistakes it has
no plain words. So those of this workflow are read here first.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from logging import ERROR, INFO, WARNING, LogRecord
from pathlib import Path
from typing import Any, NamedTuple

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from .bar import Bar, can_draw
from .time_left import TimeLeft, earlier_seconds, in_words, left_in_words

__all__ = ["LogHandler"]

COLUMNS = 80
TARGETS = ("all", "sensitivity")
"""Rules that only name what is wanted; they are no steps."""
CHATTER = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Config file ",  # is extended by --config
    "Using shell",
    "Group jobs: inactive",
    "Conda environments: ignored",
    "Singularity containers: ignored",
)
"""Beginnings of messages before the first step that tell users nothing."""
TOLD_ANYWAY = (
    "RuleException:\nCalledProcessError in file",
    "Exiting because a job execution failed",
    "WorkflowError:\nAt least one job did not complete",
)
"""Beginnings of messages that tell of a failed step, which is told in other words."""
NOTHING_TO_DO = "Nothing to be done"
"""Beginning of the message after which Snakemake calls none of the workflow's hooks."""


def check_config_files(arguments: Sequence[str]) -> None:
    """Read the config files of a command line of Snakemake's, if it is for this workflow.

    Raises:
        SystemExit: one of them cannot be read; says why.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--configfile", "--configfiles", nargs="+", action="extend", default=[])
    parser.add_argument("--config", "-C", nargs="*")  # no abbreviation of the other one
    parser.add_argument("--snakefile", "-s", type=Path, default=Path("Snakefile"))
    given, _ = parser.parse_known_args(arguments)
    library = given.snakefile.resolve().parent / "scripts"
    if not given.configfile or not (library / "qwt_mmdet").is_dir():
        return
    sys.path.insert(0, str(library))  # the library beside the workflow, as in its rules
    from qwt_mmdet.config.reading import check_values, read_file
    from qwt_mmdet.errors import QwtError

    for path in given.configfile:
        try:
            check_values(read_file(path))
        except QwtError as error:
            sys.exit(f"Error in the configuration ({path}):\n{error}")


if Path(sys.argv[0]).name in ("snakemake", "__main__.py"):
    check_config_files(sys.argv[1:])


class Running(NamedTuple):
    """A job that runs: its rule, its name with wildcards, its start in seconds of ``time.time``."""

    rule: str
    name: str
    start: float


def shortened(text: str, columns: int) -> str:
    """The text, with an ellipsis in its middle if it is longer than ``columns``."""
    if len(text) <= columns:
        return text
    end = (columns - 1) // 2
    return f"{text[: columns - 1 - end]}…{text[-end:]}"


class LogHandler(LogHandlerBase):
    """Takes the place of Snakemake's own output on standard error (of a dry run: standard output).

    Snakemake calls it from a thread of its own. ``flush`` ends the bar, so that something else can be printed.
    """

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self._stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self._bar: Bar | None = None
        self._running: dict[int, Running] = {}
        self._planned = False
        self._done = self._total = 0
        self._started: float | None = None
        self._time = TimeLeft({}, {})

    def emit(self, record: LogRecord) -> None:
        try:
            self._show(record)
        except Exception:  # else the thread ends, and nothing is shown any more
            self.handleError(record)

    def _show(self, record: LogRecord) -> None:
        said = vars(record)
        event = said.get("event")
        if event == LogEvent.RUN_INFO and not self._planned:  # a dry run says it again at its end
            self._plan(record)
        elif event == LogEvent.JOB_INFO and not self.common_settings.dryrun:
            self._begin(said)
        elif event == LogEvent.JOB_FINISHED:
            self._finish(said)
        elif event == LogEvent.JOB_ERROR:
            self._fail(said)
        elif event in (None, LogEvent.ERROR):
            text = self.format(record)
            hidden = TOLD_ANYWAY if record.levelno >= ERROR else CHATTER
            wanted = record.levelno >= WARNING or (record.levelno >= INFO and not self._planned)
            if wanted and not text.startswith(hidden):
                self._say(text)
                if text.startswith(NOTHING_TO_DO) and not self.common_settings.dryrun:
                    self._say_results()

    def flush(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        self.flush()
        super().close()

    def _plan(self, record: LogRecord) -> None:
        self._planned = True
        if self.common_settings.dryrun:
            self._say(self.format(record))
            return
        counts = {
            rule: count
            for rule, count in vars(record)["stats"].items()
            if rule not in ("total", *TARGETS)
        }
        self._total = sum(counts.values())
        self._time = TimeLeft(counts, earlier_seconds(Path("benchmarks")))

    def _begin(self, said: dict[str, Any]) -> None:
        if said["rule_name"] in TARGETS:
            return
        name = " ".join([said["rule_name"], *map(str, said["wildcards"].values())])
        if self._started is None:
            self._started = said["created"]
        self._running[said["jobid"]] = Running(said["rule_name"], name, said["created"])
        self._time.begin(said["jobid"], said["rule_name"], said["created"])
        if not self._bar and can_draw(self._stream):
            self._bar = Bar(self._stream, colours=not self.common_settings.nocolor)
        self._draw(said["created"])

    def _finish(self, said: dict[str, Any]) -> None:
        job = self._running.pop(said["job_id"], None)
        if job is None:  # a target, or --quiet rules
            return
        self._done += 1
        self._time.finish(said["job_id"], said["created"])
        count = f"[{self._done:{len(str(self._total))}} of {self._total}]"
        end = f"({in_words(said['created'] - job.start)})"
        left = left_in_words(self._time.seconds(said["created"]))
        if left and not self._bar:
            end += f", {left}"
        room = COLUMNS - len(f"{count}  {end}")
        self._say(f"{count} {shortened(job.name, room)} {end}")
        if self._done == self._total and self._started is not None:
            self._say(f"Finished after {in_words(said['created'] - self._started)}")
        self._draw(said["created"])

    def _fail(self, said: dict[str, Any]) -> None:
        job = self._running.pop(said["jobid"], None)
        self._time.stop(said["jobid"])
        name, end = said["rule_name"], ""
        if job:
            name, end = job.name, f" ({in_words(said['created'] - job.start)})"
        self._say(f"[failed] {shortened(name, COLUMNS - len('[failed] ' + end))}{end}")
        for path in said["log"]:
            self._say(f"  log: {path}")
        self._draw(said["created"])

    def _say_results(self) -> None:
        """What an earlier run has printed at its end."""
        from qwt_mmdet.reporting.terminal import run_summary

        if results := run_summary():
            print(f"\n{results}", flush=True)

    def _draw(self, now: float) -> None:
        if self._bar:
            left = self._time.seconds(now)
            ends = None if left is None else now + left
            self._bar.draw(
                self._done, self._total, ends, [job.name for job in self._running.values()]
            )

    def _say(self, text: str) -> None:
        if self._bar:
            self._bar.say(text)
        else:
            print(text, file=self._stream, flush=True)

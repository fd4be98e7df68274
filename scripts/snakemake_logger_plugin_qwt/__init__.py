"""What Snakemake says, in few words: `snakemake --logger qwt`, which `qwt-mmdet run` uses.

It shows how many steps are done, and why a workflow cannot run. A step that fails says so itself. A dry
run (`-n`) shows how many jobs of each rule would run.

Snakemake imports its plugins before it reads the config files of its command line, for whose mistakes it has
no plain words. So those of this workflow are read here first.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from logging import ERROR, LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

__all__ = ["LogHandler"]


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


class LogHandler(LogHandlerBase):
    """Takes the place of Snakemake's own output on standard error."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self._step_failed = False
        self._planned = not self.common_settings.dryrun  # whether there is nothing left to tell

    def emit(self, record: LogRecord) -> None:
        said = vars(record)
        event = said.get("event")
        if event == LogEvent.PROGRESS:
            self._say(f"{said['done']} of {said['total']} steps")
        elif event == LogEvent.RUN_INFO and not self._planned:
            self._planned = True  # a dry run says it again at its end
            self._say(self.format(record))
        elif event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR):
            self._step_failed = True  # what follows tells of it again
        elif record.levelno >= ERROR and not self._step_failed:
            self._planned = True
            self._say(self.format(record))

    def close(self) -> None:
        if not self._planned:
            self._say("Every result is up to date.")
        super().close()

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

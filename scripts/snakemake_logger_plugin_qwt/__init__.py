"""What Snakemake says, in few words: `snakemake --logger qwt`, which `qwt-mmdet run` uses.

It shows how many steps are done, and why a workflow cannot run. A step that fails says so itself. A dry
run (`-n`) shows how many jobs of each rule would run.
"""

import sys
from logging import ERROR, LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

__all__ = ["LogHandler"]


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

"""What Snakemake says, in few words: `snakemake --logger qwt`, which `qwt-mmdet run` uses.

It shows how many steps are done, and why a workflow cannot run. A step that fails says so itself.
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

    def emit(self, record: LogRecord) -> None:
        said = vars(record)
        event = said.get("event")
        if event == LogEvent.PROGRESS:
            self._say(f"{said['done']} of {said['total']} steps")
        elif event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR):
            self._step_failed = True  # what follows tells of it again
        elif record.levelno >= ERROR and not self._step_failed:
            self._say(self.format(record))

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

"""The line at the bottom of a terminal that is drawn again and again."""

import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .time_left import left_in_words

REFRESH_PER_SECOND = 2.0
BAR_COLUMNS = 16
FREE_COLUMNS = 3
"""At the end of the line, for the ^C that a terminal writes there. It must not begin another line."""


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can draw a line again."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


class Bar:
    """A bar, steps done, the time left and the steps that run, in one line; what is said stands above it.

    Args:
        stream: of a terminal.
    """

    def __init__(self, stream: TextIO, *, colours: bool = True) -> None:
        self._done = self._total = 0
        self._ends: float | None = None
        self._running: Sequence[str] = ()
        self._console = Console(file=stream, no_color=None if colours else True)
        self._live = Live(
            get_renderable=self._line,
            console=self._console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def _line(self) -> RenderableType:
        left = left_in_words(self._ends and self._ends - time.time())
        words = ", ".join(filter(None, [f"{self._done} of {self._total}", left]))
        text = Text(": ".join(filter(None, [words, ", ".join(self._running)])), no_wrap=True)
        room = self._console.width - BAR_COLUMNS - 1 - FREE_COLUMNS
        text.truncate(max(1, room), overflow="ellipsis")
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(self._total, self._done, BAR_COLUMNS), text)
        return line

    def draw(self, done: int, total: int, ends: float | None, running: Sequence[str]) -> None:
        """Show the steps done, when all of them end (in seconds of ``time.time``), and the names of those that run."""
        self._done, self._total, self._ends, self._running = done, total, ends, running
        self._live.refresh()

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bar."""
        self._live.stop()

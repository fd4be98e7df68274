"""The line at the bottom of a terminal that is drawn again and again."""

from collections.abc import Sequence
from typing import TextIO

REFRESH_PER_SECOND = 2.0
BAR_COLUMNS = 16


class Bar:
    """A bar, steps done, the time left and the steps that run; what is said stands above it.

    Args:
        stream: of a terminal.
    """

    @staticmethod
    def fits(stream: TextIO) -> bool:
        """Whether the stream is a terminal that can draw a line again."""
        if not stream.isatty():
            return False
        from rich.console import Console

        return not Console(file=stream).is_dumb_terminal

    def __init__(self, stream: TextIO, *, colours: bool = True) -> None:
        from rich.console import Console  # a tenth of a second, which jobs need not spend
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._progress = Progress(
            BarColumn(BAR_COLUMNS),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=Console(file=stream, no_color=None if colours else True, highlight=False),
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            expand=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def draw(self, done: int, total: int, left: str, running: Sequence[str]) -> None:
        """Show ``done`` of ``total`` steps, the time left and the names of the steps that run."""
        words = ", ".join(filter(None, [f"{done} of {total}", left]))
        text = f"{words}: {', '.join(running)}" if running else words
        self._progress.update(self._task, completed=done, total=total, description=text)

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bar."""
        self._progress.stop()

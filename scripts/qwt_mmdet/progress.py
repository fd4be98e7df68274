"""Progress: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOG_EVERY_SECONDS = 15.0


def progress(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "image"
) -> Iterator[T]:
    """Yield ``items`` and show the number of finished ones, the rate and the time left.

    On a terminal this is a bar on standard error; otherwise a log line every
    ``LOG_EVERY_SECONDS`` seconds and one at the end.

    Args:
        total: number of items, where ``items`` has no length of its own.
        unit: name of an item.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, unit=unit, dynamic_ncols=True)
        return
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    start = last = time.monotonic()
    count = 0
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS:
            last = now
            rate = count / (now - start)
            left = f", {(total - count) / rate:.0f} s left" if total else ""
            logger.info(
                "%s: %d of %s %s, %.2f per second%s",
                description, count, total if total is not None else "?", units, rate, left,
            )  # fmt: skip
    logger.info("%s: %d %s in %.1f s", description, count, units, time.monotonic() - start)

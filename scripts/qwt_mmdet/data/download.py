"""Downloads that survive broken connections and never leave a partial file under its final name."""

import functools
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
import tenacity
import urllib3

from .. import progress as progress_module
from ..errors import QwtError, quoted
from ..files import is_url, sha256_file, write_json

logger = logging.getLogger(__name__)

ATTEMPTS_WITHOUT_PROGRESS = 6
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 120.0
TIMEOUT_SECONDS = (15.0, 60.0)  # to connect, and between two pieces of data
GRACE_SECONDS = 60.0  # a transfer below the lowest rate for so long fails
LOWEST_BYTES_PER_SECOND = 1000
LARGEST_BYTES = 20 * 10**9  # of a file, unless the caller says otherwise
CHUNK_BYTES = 1 << 14  # at most so much is lost when a connection breaks
_BROKEN = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)
PASSING_STATUS = (408, 425, 429)  # worth another attempt, as is every 5xx


class _PassingError(Exception):
    """A transient failure, and the seconds that the server asks to wait before another attempt."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def _session() -> requests.Session:
    """A session that does not read the body of a redirect, which may be of any length."""
    session = requests.Session()
    session.max_redirects = 10
    session.hooks["response"].append(lambda r, *_, **__: r.close() if r.is_redirect else None)
    return session


def printable(source: str) -> str:
    """An address without the user and the query, where passwords and tokens are; a path as it is."""
    if not is_url(source):
        return source
    try:
        parts = urlsplit(source)
    except ValueError:  # no address at all
        return repr(source[:100])
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(
    url: str, path: str | Path, *, sha256: str | None = None, most_bytes: int = LARGEST_BYTES
) -> None:
    """Fetch ``url`` into the file ``path``.

    The bytes gather in ``{path}.part``. A later attempt, in this run or another one, goes on where they end
    if the server still has the same file (by ETag or modification time). Broken connections, 5xx, 408, 425
    and 429 are retried with growing pauses, as long as one of six attempts in a row brings more bytes at no
    less than the lowest rate. A file that is there already is kept if it has the wanted hash.

    Args:
        sha256: the hash that the file must have, in hexadecimal.
        most_bytes: largest size that is taken.

    Raises:
        QwtError: the address is wrong, the server does not deliver, the file is too large or cannot
            be written, or its hash is another one (the bad file is removed).
    """
    path = Path(path)
    wanted = sha256 and sha256.lower()
    if wanted and path.is_file() and sha256_file(path) == wanted:
        logger.info("%s is there already, with the wanted sha256.", path)
        return
    logger.info("Downloading %s", printable(url))

    def check(part: Path) -> None:
        if wanted and (found := sha256_file(part)) != wanted:
            raise QwtError(
                f"it has the sha256 {found}, but {wanted} was asked for. The file was removed; check the "
                "address and the sha256 in the configuration."
            )

    with _session() as session:
        _Transfer(url, path, session, most_bytes, check).run()


def download_many(
    items: Iterable[tuple[str, str]],
    folder: str | Path,
    workers: int = 8,
    *,
    check: Callable[[str, Path], None] = lambda name, path: None,
    most_bytes: Callable[[str], int] = lambda name: LARGEST_BYTES,
    description: str = "Downloading",
) -> None:
    """Fetch many small files at the same time; the first one that cannot be had stops the rest.

    Files that are already there and pass ``check`` are kept, so an interrupted call can be repeated.

    Args:
        items: pairs of address and file name relative to ``folder``.
        workers: number of downloads at a time.
        check: called with the file name and the path of its content, before the file gets its
            name; raises QwtError when the content is not what it should be.
        most_bytes: largest size that is taken, by file name.

    Raises:
        QwtError: a file cannot be fetched or does not pass ``check``.
    """
    items = list(items)
    cancelled = threading.Event()
    local = threading.local()  # requests does not promise that threads may share a session

    def start() -> None:
        local.session = _session()

    def fetch(url: str, name: str) -> None:
        target = Path(folder) / name
        if target.exists():
            try:
                return check(name, target)
            except QwtError as error:
                logger.warning("%s It is fetched again.", error)
        checked, most = functools.partial(check, name), most_bytes(name)
        _Transfer(url, target, local.session, most, checked, cancelled).run()

    done = 0
    with ThreadPoolExecutor(max(1, workers), initializer=start) as executor:
        futures = [executor.submit(fetch, url, name) for url, name in items]
        finished = as_completed(futures)
        try:
            for future in progress_module.progress(finished, description, total=len(futures)):
                future.result()
                done += 1
        except QwtError as error:
            there = f"{done} of {len(items)} files were there by then and are kept."
            raise QwtError(f"{error} ({there})") from error
        finally:  # an interrupt, too, must not wait for the whole queue
            cancelled.set()
            executor.shutdown(cancel_futures=True)


@dataclass
class _Transfer:
    """The download of one file: bytes that arrived, and attempts in a row without progress."""

    url: str
    path: Path
    session: requests.Session
    most_bytes: int
    check: Callable[[Path], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    arrived: int = 0  # the most bytes of the file that were there at a time

    def __post_init__(self) -> None:
        self.shown_url = printable(self.url)
        self.part = self.path.with_name(self.path.name + ".part")
        self.note = self.path.with_name(self.path.name + ".part.json")  # whose bytes these are

    def run(self) -> None:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=self._given_up,
            wait=self._pause,
            sleep=tenacity.sleep_using_event(self.cancelled),
            reraise=True,
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            retrying(self._attempt)
            try:
                self.check(self.part)
            except QwtError as error:
                self._discard()
                raise QwtError(f"{self.shown_url}: {error}") from error
            self.part.replace(self.path)
            self.note.unlink(missing_ok=True)
        except _PassingError as error:
            kept = self._part_bytes()
            raise QwtError(
                f"{self.shown_url} could not be downloaded: {error} (given up after {self.failures} attempts "
                "without progress). Check the network and the address, then run again"
                + (f"; it goes on after the {kept} bytes in {self.part}." if kept else ".")
            ) from error
        except OSError as error:
            raise QwtError(
                f"{self.shown_url} cannot be stored as {self.path}: {error}. Check free space and rights."
            ) from error

    def _attempt(self) -> None:
        before, start = self.arrived, time.monotonic()
        try:
            self._fetch()
        except (requests.RequestException, *_BROKEN, ValueError) as error:
            if isinstance(error, _BROKEN) and not isinstance(error, requests.exceptions.SSLError):
                raise _PassingError(_reason(error)) from error
            raise QwtError(
                f"{self.shown_url} cannot be fetched: {_reason(error)}. Check the address."
            ) from error
        finally:
            least = LOWEST_BYTES_PER_SECOND * max(1.0, time.monotonic() - start)
            self.failures = 0 if self.arrived - before >= least else self.failures + 1

    def _fetch(self) -> None:
        validator = self._known_validator()
        offset = self._part_bytes() if validator else 0
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
        if validator and offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        with self.session.get(
            self.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS
        ) as response:
            status = response.status_code
            first, total = _extent(response)
            said = f"answered {status} {quoted(response.reason)}"
            if status in PASSING_STATUS or status >= 500:
                raise _PassingError(f"the server {said}", _retry_after(response))
            if status == 416 and offset and total == offset:
                return  # everything had arrived before the interruption
            another = status == 206 and (
                first != offset or _validator(response) not in (None, validator)
            )
            if another or (status == 416 and offset):
                self._discard()
                raise _PassingError("the remote file has changed")
            if status not in (200, 206):
                raise QwtError(f"{self.shown_url} {said}; check the address.")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise QwtError(
                    f"{self.shown_url} is sent compressed, although it was asked for as it is; use "
                    "another address."
                )
            if status == 200:
                offset = 0
                write_json(self.note, {"url": self.url, "validator": _validator(response)})
            self._receive(response, offset, total)

    def _receive(self, response: requests.Response, arrived: int, total: int | None) -> None:
        """Append the content to the ``arrived`` bytes that are stored."""
        since, seen = time.monotonic(), arrived
        self._check_size(total or 0)
        with open(self.part, "ab" if arrived else "wb") as stream:
            while chunk := response.raw.read1(CHUNK_BYTES):
                arrived += len(chunk)
                self._check_size(arrived)
                stream.write(chunk)
                self.arrived = max(self.arrived, arrived)
                if self.cancelled.is_set():
                    raise _PassingError("another download failed")
                if (seconds := time.monotonic() - since) >= GRACE_SECONDS:
                    rate = (arrived - seen) / seconds
                    if rate < LOWEST_BYTES_PER_SECOND:
                        raise _PassingError(f"the server sent {rate:.0f} bytes per second")
                    done, speed = arrived / 1e6, rate / 1e6
                    logger.info("%s: %.1f MB, %.2f MB per second", self.path.name, done, speed)
                    since, seen = time.monotonic(), arrived
        if total is not None and arrived != total:
            raise _PassingError(f"{arrived} of {total} bytes arrived")

    def _check_size(self, size: int) -> None:
        if size > self.most_bytes:
            self._discard()
            raise QwtError(
                f"{self.shown_url} is larger than {self.most_bytes / 1e6:g} MB, the most that is taken here; "
                "check the address, or raise max_download_gb in the configuration if it is no image."
            )

    def _known_validator(self) -> str | None:
        """The validator of the remote file from which the stored bytes come."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note.get("validator") if note.get("url") == self.url else None

    def _part_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next attempt, which double with each failure."""
        error: Any = state.outcome and state.outcome.exception()
        # not all workers should come back at the same moment
        seconds = FIRST_WAIT_SECONDS * 2 ** max(0, self.failures - 1) * random.uniform(0.75, 1.25)
        seconds = min(max(seconds, error.retry_after), LONGEST_WAIT_SECONDS)
        if not self._given_up(state):
            logger.warning("%s: %s; next attempt in %.1f s.", self.shown_url, error, seconds)
        return seconds

    def _given_up(self, state: tenacity.RetryCallState) -> bool:
        return self.failures >= ATTEMPTS_WITHOUT_PROGRESS or self.cancelled.is_set()


def _reason(error: Exception) -> str:
    """The innermost cause; messages of outer exceptions repeat the address with its query."""
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    cause = getattr(cause, "reason", cause)
    text = next((part for part in cause.args if isinstance(part, str)), str(cause))
    return f"{type(cause).__name__}: {quoted(text)}"


def _validator(response: requests.Response) -> str | None:
    """The value of If-Range for this version of the file: a strong ETag, else the modification time."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _extent(response: requests.Response) -> tuple[int | None, int | None]:
    """The first byte that is sent, and the length of the whole remote file, where the server tells."""
    pattern = r"bytes (?:(\d{1,18})-\d+|\*)/(?:(\d{1,18})|\*)"
    found = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
    if found:
        first, total = (int(number) if number else None for number in found.groups())
        return first, total
    return None, response.raw.length_remaining if response.status_code == 200 else None


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait (Retry-After: a number, or a date)."""
    try:
        return urllib3.Retry().get_retry_after(response.raw) or 0.0
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0

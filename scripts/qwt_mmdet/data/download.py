"""Downloads that survive broken connections and never leave half a file under its final name."""

import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

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
GRACE_SECONDS = 60.0  # an attempt that is slower than the lowest rate for so long is ended
LOWEST_BYTES_PER_SECOND = 1000
LARGEST_BYTES = 20 * 10**9  # of a file whose size nobody told
CHUNK_BYTES = 1 << 14  # at most so much is lost when a connection breaks
LONGEST_CHAIN = 10  # redirects from address to address
LOOK_SECONDS = 0.1  # between two looks at an attempt: is it too slow, is it still wanted
PASSING_STATUS = (408, 425, 429)  # worth another attempt, as is every 5xx


def _session() -> requests.Session:
    """A session that follows no redirect: requests would read its body, however long that is."""
    session = requests.Session()
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
    return session


class _PassingError(Exception):
    """A failure that another attempt may not meet; ``retry_after`` is the server's wish."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


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
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    most_bytes: int = LARGEST_BYTES,
) -> None:
    """Fetch ``url`` into the file ``path``.

    The bytes gather in ``{path}.part``. After a broken connection, in this run or a later one, the
    download goes on where it stopped if the server still has the same file (by ETag or
    modification time), and starts anew otherwise. Connection errors, 5xx, 408, 425 and 429 are
    retried with growing pauses, as long as one of six attempts in a row brings more bytes at no less
    than the lowest rate. An attempt that is slower for a minute is ended. The length and the hash are
    checked before the file gets its name. A file that is already there is kept if it has the wanted
    hash, and replaced otherwise.

    Args:
        sha256: the hash that the file must have, in hexadecimal.
        most_bytes: largest size that is taken.

    Raises:
        QwtError: the address is wrong, the server does not deliver, the file is too large or cannot
            be written, or its hash is another one (the bad file is removed).
    """
    logger.info("Downloading %s", printable(url))
    with _session() as session:
        _Transfer(url, Path(path), session, most_bytes, sha256 and sha256.lower()).run()


def download_many(
    items: Iterable[tuple[str, str]],
    folder: str | Path,
    workers: int = 8,
    *,
    check: Callable[[str, Path], None] | None = None,
    most_bytes: Callable[[str], int] = lambda name: LARGEST_BYTES,
    description: str = "Downloading",
) -> None:
    """Fetch many small files at the same time.

    Files that are already there and pass ``check`` are kept, so an interrupted call can be
    repeated. The first file that cannot be had stops the rest at once.

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
    folder = Path(folder)
    cancelled = threading.Event()
    local = threading.local()  # requests does not promise that threads may share a session
    sessions: list[requests.Session] = []

    def fetch(url: str, name: str) -> None:
        target = folder / name
        if target.exists():
            try:
                if check is not None:
                    check(name, target)
                return
            except QwtError as error:
                logger.warning("%s It is fetched again.", error)
        if not hasattr(local, "session"):
            local.session = _session()
            sessions.append(local.session)
        _Transfer(
            url,
            target,
            local.session,
            most_bytes(name),
            check=check,
            name=name,
            cancelled=cancelled,
        ).run()

    done = 0
    with ThreadPoolExecutor(max_workers=max(1, workers)) as executor:
        futures = [executor.submit(fetch, url, name) for url, name in items]
        try:
            for future in progress_module.progress(
                as_completed(futures), description, total=len(futures)
            ):
                future.result()
                done += 1
        except BaseException as error:  # an interrupt, too, must not wait for the whole queue
            cancelled.set()
            executor.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, QwtError):
                raise QwtError(
                    f"{error} ({done} of {len(items)} files were there by then and are kept.)"
                ) from error
            raise
        finally:
            for session in sessions:
                session.close()


@dataclass
class _Transfer:
    """One file on its way: what has arrived, and how often nothing did."""

    url: str
    path: Path
    session: requests.Session
    most_bytes: int
    sha256: str | None = None
    check: Callable[[str, Path], None] | None = None
    name: str = ""  # for ``check``
    cancelled: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    arrived: int = 0  # the most bytes of the file that were there at a time
    received: int = 0  # bytes that came in, those that came twice included

    def __post_init__(self) -> None:
        self.shown_url = printable(self.url)
        self.part = self.path.with_name(self.path.name + ".part")
        self.note = self.path.with_name(self.path.name + ".part.json")  # whose bytes these are
        self.writing = threading.Lock()

    def run(self) -> None:
        if self.sha256 and self.path.is_file() and sha256_file(self.path) == self.sha256:
            logger.info("%s is there already, with the wanted sha256.", self.path)
            return
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
            self._finish()
        except _PassingError as error:
            kept = self._part_bytes()
            raise QwtError(
                f"{self.shown_url} could not be downloaded: {error} (given up after "
                f"{self.failures} attempts without progress). Check the network and the address, "
                "then run again"
                + (f"; it goes on after the {kept} bytes in {self.part}." if kept else ".")
            ) from error
        except OSError as error:
            raise QwtError(
                f"{self.shown_url} cannot be stored as {self.path}: {error}. Check free space and rights."
            ) from error

    def _attempt(self) -> None:
        """Fetch in a thread of its own, which is left behind when it is too slow or not wanted.

        No timeout of a socket ends a server that sends a byte now and then.
        """
        before, start = self.arrived, time.monotonic()
        ended = threading.Event()
        outcome: Future[None] = Future()

        def settle() -> None:
            try:
                self._fetch(ended)
                outcome.set_result(None)
            except Exception as error:  # whatever it is, it is raised where the outcome is awaited
                outcome.set_exception(error)

        threading.Thread(target=settle, daemon=True).start()
        seen, since = self.received, start
        try:
            while not wait([outcome], min(LOOK_SECONDS, GRACE_SECONDS)).done:
                if self.cancelled.is_set():
                    raise _PassingError("another download failed")
                now = time.monotonic()
                if now - since >= GRACE_SECONDS:
                    rate = (self.received - seen) / (now - since)
                    if rate < LOWEST_BYTES_PER_SECOND:
                        raise _PassingError(f"the server sent {rate:.0f} bytes per second")
                    logger.info(
                        "%s: %.1f MB, %.2f MB per second",
                        self.path.name,
                        self.arrived / 1e6,
                        rate / 1e6,
                    )
                    seen, since = self.received, now
            outcome.result()
        except _PassingError:
            seconds = max(1.0, time.monotonic() - start)
            gained = self.arrived - before >= LOWEST_BYTES_PER_SECOND * seconds
            self.failures = 0 if gained else self.failures + 1
            raise
        finally:
            with self.writing:
                ended.set()

    def _fetch(self, ended: threading.Event) -> None:
        validator = self._known_validator()
        offset = self._part_bytes() if validator else 0
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
        if validator and offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        try:
            with self._response(headers) as response:
                self._receive(response, offset, validator, ended)
        except requests.exceptions.SSLError as error:
            raise QwtError(
                f"{self.shown_url} has no valid certificate ({_reason(error)}). Check the address and the clock."
            ) from error
        except (
            requests.exceptions.ConnectionError,
            requests.exceptions.Timeout,
            urllib3.exceptions.ProtocolError,
            urllib3.exceptions.TimeoutError,
        ) as error:
            raise _PassingError(_reason(error)) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise QwtError(
                f"{self.shown_url} cannot be fetched: {_reason(error)}. Check the address."
            ) from error

    def _response(self, headers: dict[str, str]) -> requests.Response:
        """Ask, and follow redirects from one http address to another."""
        url = self.url
        for _ in range(LONGEST_CHAIN):
            response = self.session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
            target = requests.Session.get_redirect_target(self.session, response)
            if target is None:
                return response
            response.close()
            url = urljoin(url, target)
            if not is_url(url):
                raise QwtError(
                    f"{self.shown_url} leads to {printable(url)[:100]!r}, which is not http; check the address."
                )
        raise QwtError(
            f"{self.shown_url} leads from address to address without end; check the address."
        )

    def _receive(
        self,
        response: requests.Response,
        offset: int,
        validator: str | None,
        ended: threading.Event,
    ) -> None:
        if ended.is_set():
            return
        status = response.status_code
        if status in PASSING_STATUS or status >= 500:
            raise _PassingError(
                f"the server answered {status} {quoted(response.reason)}", _retry_after(response)
            )
        if status == 416 and offset:
            if _total_bytes(response) == offset:
                return  # everything had arrived before the interruption
            self._discard()
            raise _PassingError("the remote file has changed")
        if status not in (200, 206):
            raise QwtError(
                f"{self.shown_url} answered {status} {quoted(response.reason)}; check the address."
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise QwtError(
                f"{self.shown_url} is sent compressed, although it was asked for as it is; use "
                "another address."
            )
        if status == 206 and (
            _first_byte(response) != offset or _validator(response) not in (None, validator)
        ):
            self._discard()
            raise _PassingError("the server sent another part, or the remote file has changed")
        if status == 200:
            offset = 0
            write_json(self.note, {"url": self.url, "validator": _validator(response)})
        total = _total_bytes(response)
        arrived = offset
        self._check_size(total or 0)
        with open(self.part, "ab" if offset else "wb") as stream:
            while chunk := response.raw.read1(CHUNK_BYTES):
                arrived += len(chunk)
                self._check_size(arrived)
                with self.writing:
                    if ended.is_set():
                        return  # another attempt may be writing by now
                    stream.write(chunk)
                    self.received += len(chunk)
                    self.arrived = max(self.arrived, arrived)
        if total is not None and arrived != total:
            if arrived > total:
                self._discard()
            raise _PassingError(f"{arrived} of {total} bytes arrived")

    def _check_size(self, size: int) -> None:
        if size > self.most_bytes:
            self._discard()
            raise QwtError(
                f"{self.shown_url} is larger than {self.most_bytes / 1e6:g} MB, the most that is taken "
                "here; check the address"
                + ("." if self.check else ", or raise max_download_gb in the configuration.")
            )

    def _finish(self) -> None:
        if self.sha256:
            found = sha256_file(self.part)
            if found != self.sha256:
                self._discard()
                raise QwtError(
                    f"{self.shown_url} has the sha256 {found}, but {self.sha256} was asked for. The file "
                    "was removed; check the address and the sha256 in the configuration."
                )
        if self.check is not None:
            try:
                self.check(self.name, self.part)
            except QwtError as error:
                self._discard()
                raise QwtError(f"{self.shown_url}: {error}") from error
        self.part.replace(self.path)
        self.note.unlink(missing_ok=True)

    def _known_validator(self) -> str | None:
        """What identified the remote file that the bytes so far are of."""
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
        seconds = FIRST_WAIT_SECONDS * 2 ** max(0, self.failures - 1)
        seconds *= random.uniform(0.75, 1.25)  # not all workers should come back at the same moment
        seconds = min(max(seconds, error.retry_after), LONGEST_WAIT_SECONDS)
        if not self._given_up(state):
            logger.warning("%s: %s; next attempt in %.1f s.", self.shown_url, error, seconds)
        return seconds

    def _given_up(self, state: tenacity.RetryCallState) -> bool:
        return self.failures >= ATTEMPTS_WITHOUT_PROGRESS or self.cancelled.is_set()


def _reason(error: Exception) -> str:
    """What went wrong at the bottom; the outer layers repeat the address, with its query."""
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    cause = getattr(cause, "reason", cause)
    text = next((part for part in cause.args if isinstance(part, str)), str(cause))
    return f"{type(cause).__name__}: {quoted(text)}"


def _validator(response: requests.Response) -> str | None:
    """What If-Range may hold to mean this very file: a strong ETag, else the modification time."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _first_byte(response: requests.Response) -> int | None:
    found = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _total_bytes(response: requests.Response) -> int | None:
    """Length of the whole remote file, where the server tells."""
    found = re.search(r"/(\d{1,18})$", response.headers.get("Content-Range", ""))
    if found:
        return int(found[1])
    return response.raw.length_remaining if response.status_code == 200 else None


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait (Retry-After: a number, or a date)."""
    try:
        return urllib3.Retry().get_retry_after(response.raw) or 0.0
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0

"""Downloads: what arrives, in how many requests, and what is left behind after a failure."""

import hashlib
import logging
import os
import re
import socket
import time
from pathlib import Path

import pytest
from flaky_server import Drop, FlakyServer, Raw, Status
from qwt_mmdet.data import download as download_module
from qwt_mmdet.data.download import download, download_many
from qwt_mmdet.errors import QwtError

pytestmark = pytest.mark.usefixtures("local_server")

CONTENT = bytes(range(256)) * 4000  # 1 024 000 bytes
PIECE = download_module.CHUNK_BYTES
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OK = b"HTTP/1.1 200 OK\r\n"
RESUMED = [None, f"bytes={20 * PIECE}-", f"bytes={30 * PIECE}-"]


@pytest.fixture
def server():
    with FlakyServer({"a.bin": CONTENT}) as server:
        yield server


def get(server: FlakyServer, path: Path, name: str = "a.bin", **options) -> None:
    download(server.url(name), path, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("behaviour", "ranges"),
    [
        ({}, [None]),
        ({}, RESUMED),
        ({"ranges": False}, RESUMED[:2]),
        ({"etags": False}, [None, None, None]),
    ],
    ids=["no break", "good server", "ignores ranges", "has no ETag"],
)
def test_a_download_goes_on_where_the_connection_broke_if_it_can(tmp_path, behaviour, ranges):
    path = tmp_path / "deep" / "a.bin"
    with FlakyServer({"a.bin": CONTENT}, **behaviour) as server:
        server.plan["a.bin"] += [Drop(20 * PIECE), Drop(10 * PIECE)][: len(ranges) - 1]
        get(server, path, sha256=SHA256.upper())
    assert server.requests == [("a.bin", asked) for asked in ranges]
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"a.bin"}


def test_slow_progress_is_not_given_up(tmp_path, server):
    pieces = 2 * download_module.ATTEMPTS_WITHOUT_PROGRESS
    server.plan["a.bin"] += [Drop(PIECE)] * pieces
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert len(server.requests) == pieces + 1


def test_all_bytes_there_but_not_renamed(tmp_path, server):
    server.plan["a.bin"] += [Drop(30 * PIECE), Status(404)]
    with pytest.raises(QwtError):
        get(server, tmp_path / "a.bin")
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert server.requests[-1] == ("a.bin", f"bytes={len(CONTENT)}-")


def test_server_that_ignores_ranges_and_always_breaks_is_given_up(tmp_path, server):
    server.ranges, server.drop_every = False, 1
    with pytest.raises(QwtError, match="could not be downloaded"):
        get(server, tmp_path / "a.bin")
    assert len(server.requests) == 1 + download_module.ATTEMPTS_WITHOUT_PROGRESS


@pytest.mark.parametrize(
    ("options", "then", "content", "asked"),
    [
        ({}, "a.bin", CONTENT, RESUMED[2]),
        ({}, "a.bin", CONTENT[::-1], RESUMED[2]),
        ({"check_if_range": False}, "a.bin", CONTENT[::-1], None),
        ({}, "b.bin", CONTENT[::-1], None),
    ],
    ids=["the same file", "it changed", "it changed and the server is careless", "another address"],
)
def test_a_later_run_goes_on_with_the_bytes_of_an_earlier_one_if_they_are_of_the_file(
    tmp_path, monkeypatch, options, then, content, asked
):
    with FlakyServer({"a.bin": CONTENT}, **options) as server:
        server.plan["a.bin"] += [Drop(30 * PIECE), Status(503)]
        with monkeypatch.context() as patch:
            patch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 1)
            with pytest.raises(QwtError, match=rf"{30 * PIECE} bytes in .*file\.part"):
                get(server, tmp_path / "file")
        assert (tmp_path / "file.part").read_bytes() == CONTENT[: 30 * PIECE]
        server.files[then] = content
        get(server, tmp_path / "file", then)
    assert server.requests[-1] == (then, asked)
    assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == {"file"}


@pytest.fixture
def waits(monkeypatch, caplog):
    """Seconds of the pauses so far, which are not made random here."""
    monkeypatch.setattr(download_module.random, "uniform", lambda low, high: 1.0)
    caplog.set_level(logging.WARNING)
    return lambda: [record.args[2] for record in caplog.records]


def test_pauses_grow_twofold(tmp_path, waits, server):
    server.plan["a.bin"] += [Status(code) for code in (503, 500, 429, 502)]
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert len(server.requests) == 5
    assert waits() == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_retry_after_is_respected(tmp_path, server):
    server.plan["a.bin"].append(Status(429, {"Retry-After": "1"}))
    start = time.monotonic()
    get(server, tmp_path / "a.bin")
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize(
    "value", ["\u00b2", "0", "9" * 5000, "Mon, 01 Jan 2001 00:00:00 GMT",
              "Mon, 01 Jan 2001 00:00:00 +99999999999999", "Mon, 99 Foo 99999 00:00:00 GMT"],
)  # fmt: skip
def test_a_wish_to_wait_never_makes_the_pauses_shorter(tmp_path, monkeypatch, waits, value):
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.04)
    refused(tmp_path, *[Status(503, {"Retry-After": value})] * 9)
    assert len(waits()) == download_module.ATTEMPTS_WITHOUT_PROGRESS - 1
    assert waits()[2:] == [0.04] * 3
    assert min(waits()) >= 0.01


@pytest.mark.parametrize(("there", "requests"), [(CONTENT, 0), (b"old", 1)])
def test_a_file_that_is_there_is_fetched_again_unless_it_has_the_wanted_hash(
    tmp_path, server, there, requests
):
    (tmp_path / "a.bin").write_bytes(there)
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert len(server.requests) == requests
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (Raw(OK + b"Content-Length: 0\r\n\r\n"), b""),
        (Raw(OK + b"Content-Length: \xb2\r\n\r\nabc"), b"abc"),  # as if there were no length
    ],
)
def test_odd_lengths(tmp_path, server, answer, content):
    server.plan["a.bin"].append(answer)
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == content


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}/a.bin?token=secret"
        message = r"a\.bin could not be downloaded.*refused.*Check the network"
        with pytest.raises(QwtError, match=message) as caught:
            download(url, tmp_path / "a.bin")
    assert "secret" not in str(caught.value)


def test_address_of_an_unknown_kind(tmp_path):
    with pytest.raises(QwtError, match=r"ftp://host/a\.bin cannot be fetched.*Check the address"):
        download("ftp://host/a.bin", tmp_path / "a.bin")


def test_target_that_cannot_be_written(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(QwtError, match="cannot be stored"):
        get(server, tmp_path / "file" / "a.bin")


def test_the_log_tells_how_far_a_long_download_is(tmp_path, caplog, monkeypatch, server):
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    server.plan["a.bin"].append(Raw(OK + b"Content-Length: 3000000\r\n\r\n", b"x" * 100_000, 0.02))
    get(server, tmp_path / "a.bin")
    assert any(re.match(r"a\.bin: \d\.\d MB, .* MB per second", line) for line in caplog.messages)


def get_many(server: FlakyServer, paths, folder: Path, **options) -> None:
    download_many([(server.url(path), path) for path in paths], folder, **options)


def many(count: int) -> dict[str, bytes]:
    return {f"images/{number}.bin": os.urandom(4000) for number in range(count)}


def test_many_files_keep_what_is_there_and_good(tmp_path):
    files = many(5)
    (tmp_path / "images").mkdir()
    for name in ("images/1.bin", "images/2.bin"):
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "images/3.bin").write_bytes(b"rubbish")

    def check(name: str, path: Path) -> None:
        if path.read_bytes() != files[name]:
            raise QwtError(f"{path} is rubbish.")

    with FlakyServer(files) as server:
        get_many(server, files, tmp_path, check=check)
    asked = sorted(path for path, _ in server.requests)
    assert asked == [f"images/{number}.bin" for number in (0, 3, 4)]
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_one_missing_file_stops_the_rest(tmp_path):
    files = many(200)
    with FlakyServer(files) as server:
        with pytest.raises(QwtError, match=r"absent answered 404 .*of 201 files"):
            get_many(server, ["absent", *files], tmp_path, workers=2)
        assert len(server.requests) < 150


def test_a_file_that_fails_its_check_is_not_stored(tmp_path, server):
    def check(name: str, path: Path) -> None:
        raise QwtError(f"{name} is not an image.")

    with pytest.raises(QwtError, match="not an image"):
        get_many(server, ["a.bin"], tmp_path, check=check)
    assert names(tmp_path) == set()


def refused(tmp_path, *plan, **options) -> str:
    """What is said of a server that behaves so; nothing of the file may stay, and soon."""
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"] += plan
        start = time.monotonic()
        with pytest.raises(QwtError) as caught:
            get(server, tmp_path / "a.bin", **options)
        assert time.monotonic() - start < 3
    assert not (tmp_path / "a.bin").exists()
    return str(caught.value)


@pytest.mark.parametrize("code", [404, 403, 410])
def test_final_refusals_are_not_retried(tmp_path, code):
    said = refused(tmp_path, Status(code))
    assert re.search(rf"a\.bin answered {code} .*check the address", said)
    assert names(tmp_path) == set()


def test_wrong_hash_names_both_and_leaves_nothing(tmp_path):
    assert re.search(f"{SHA256}.*{'0' * 64}", refused(tmp_path, sha256="0" * 64))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"x" * 0xFFFF),
        (b"Transfer-Encoding: chunked\r\n", b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"),
        (b"Content-Length: 9000000\r\n", b"x" * 0xFFFF),
        (b"Content-Length: 99999999999999999999\r\n", b"x" * 0xFFFF),
    ],
)
def test_a_file_that_is_larger_than_it_can_be_is_not_taken(tmp_path, head, piece):
    said = refused(tmp_path, Raw(OK + head + b"\r\n", piece), most_bytes=2_000_000)
    assert "a.bin is larger than 2 MB" in said
    assert names(tmp_path) == set()


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 2)
    said = refused(tmp_path, *[Raw(OK + b"\r\n", b"x", 0.02)] * 9)
    assert "bytes per second (given up after 2 attempts" in said


EMPTY = b"Content-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (Raw(OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"), "sent compressed"),
        (Raw(OK + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"), "could not be downloaded"),
        (Raw(b"HTTP/1.1 404 \x1b[2Jgone\r\n" + EMPTY), r"answered 404 \x1b[2Jgone"),
        (Raw(b"HTTP/1.1 503 \x1b[2J\r\n" + EMPTY), r"answered 503 \x1b[2J ("),
        (Status(302, {"Location": "http://[::bad/"}), "cannot be fetched"),
        (Status(302, {"Location": "file:///etc/passwd"}), "cannot be fetched"),
        (Status(302, {"Location": "a.bin"}), "Exceeded 10 redirects"),
        (Raw(b"HTTP/1.1 302 Found\r\nLocation: /a.bin\r\n\r\n", b"x" * 9999), "Exceeded 10 redir"),
    ],
)
def test_an_answer_that_leads_nowhere_is_named(tmp_path, answer, part):
    assert part in refused(tmp_path, *[answer] * 20)


def test_one_missing_file_ends_an_endless_transfer_at_once(tmp_path, server):
    server.plan["a.bin"].append(Raw(OK + b"\r\n", b"x", 0.02))
    start = time.monotonic()
    with pytest.raises(QwtError, match="absent answered 404"):
        get_many(server, ["a.bin", "absent"], tmp_path, workers=2)
    assert time.monotonic() - start < 2


def test_an_interrupt_ends_endless_transfers_at_once(tmp_path, monkeypatch, server):
    def interrupted(*arguments, **options):
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(download_module.progress_module, "progress", interrupted)
    server.plan["a.bin"].append(Raw(OK + b"\r\n", b"x", 0.02))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        get_many(server, ["a.bin"], tmp_path)
    assert time.monotonic() - start < 2

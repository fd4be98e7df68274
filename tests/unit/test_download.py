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

CONTENT = bytes(range(256)) * 4000  # 1 024 000 bytes
PIECE = download_module.CHUNK_BYTES
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _local_network(monkeypatch):
    monkeypatch.setattr(download_module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the test server is not behind one


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_file_in_one_piece(tmp_path):
    with FlakyServer({"a.bin": CONTENT}) as server:
        download(server.url("a.bin"), tmp_path / "deep" / "a.bin", sha256=SHA256.upper())
        assert server.requests == [("a.bin", None)]
    assert (tmp_path / "deep" / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path / "deep") == {"a.bin"}


RESUMED = [None, f"bytes={20 * PIECE}-", f"bytes={30 * PIECE}-"]


@pytest.mark.parametrize(
    ("server_options", "ranges"),
    [({}, RESUMED), ({"ranges": False}, RESUMED[:2]), ({"etags": False}, [None, None, None])],
    ids=["good server", "ignores ranges", "has no ETag"],
)
def test_a_download_goes_on_where_the_connection_broke_if_it_can(tmp_path, server_options, ranges):
    with FlakyServer({"a.bin": CONTENT}, **server_options) as server:
        server.plan["a.bin"] += [Drop(20 * PIECE), Drop(10 * PIECE)][: len(ranges) - 1]
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
        assert server.requests == [("a.bin", asked) for asked in ranges]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == {"a.bin"}


def test_slow_progress_is_not_given_up(tmp_path):
    pieces = 2 * download_module.ATTEMPTS_WITHOUT_PROGRESS
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"] += [Drop(PIECE)] * pieces
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
        assert len(server.requests) == pieces + 1


def test_all_bytes_there_but_not_renamed(tmp_path):
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"] += [Drop(30 * PIECE), Status(404)]
        with pytest.raises(QwtError):
            download(server.url("a.bin"), tmp_path / "a.bin")
        (tmp_path / "a.bin.part").write_bytes(CONTENT)
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
        assert server.requests[-1] == ("a.bin", f"bytes={len(CONTENT)}-")


def test_server_that_ignores_ranges_and_always_breaks_is_given_up(tmp_path):
    with FlakyServer({"a.bin": CONTENT}, ranges=False, drop_every=1) as server:
        with pytest.raises(QwtError, match="could not be downloaded"):
            download(server.url("a.bin"), tmp_path / "a.bin")
        assert len(server.requests) == 1 + download_module.ATTEMPTS_WITHOUT_PROGRESS


@pytest.mark.parametrize(
    ("options", "then", "content", "asked"),
    [
        ({}, "a.bin", CONTENT, f"bytes={30 * PIECE}-"),
        ({}, "a.bin", CONTENT[::-1], f"bytes={30 * PIECE}-"),
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
                download(server.url("a.bin"), tmp_path / "file")
        assert (tmp_path / "file.part").read_bytes() == CONTENT[: 30 * PIECE]
        server.files[then] = content
        download(server.url(then), tmp_path / "file")
        assert server.requests[-1] == (then, asked)
    assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == {"file"}


def test_pauses_grow_twofold(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(download_module.random, "uniform", lambda low, high: 1.0)
    caplog.set_level(logging.WARNING)
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"] += [Status(code) for code in (503, 500, 429, 502)]
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
        assert len(server.requests) == 5
    waits = [record.args[2] for record in caplog.records]
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_retry_after_is_respected(tmp_path):
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"].append(Status(429, {"Retry-After": "1"}))
        start = time.monotonic()
        download(server.url("a.bin"), tmp_path / "a.bin")
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize("code", [404, 403, 410])
def test_final_refusals_are_not_retried(tmp_path, code):
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"].append(Status(code))
        with pytest.raises(QwtError, match=rf"a\.bin answered {code} .*check the address"):
            download(server.url("a.bin"), tmp_path / "a.bin")
        assert len(server.requests) == 1
    assert names(tmp_path) == set()


def test_wrong_hash_names_both_and_leaves_nothing(tmp_path):
    wanted = "0" * 64
    with (
        FlakyServer({"a.bin": CONTENT}) as server,
        pytest.raises(QwtError, match=f"{SHA256}.*{wanted}"),
    ):
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=wanted)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("there", "requests"), [(CONTENT, 0), (b"old", 1)])
def test_a_file_that_is_there_is_fetched_again_unless_it_has_the_wanted_hash(
    tmp_path, there, requests
):
    (tmp_path / "a.bin").write_bytes(there)
    with FlakyServer({"a.bin": CONTENT}) as server:
        download(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
        assert len(server.requests) == requests
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_empty_file(tmp_path):
    with FlakyServer({"a.bin": b""}) as server:
        download(server.url("a.bin"), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b""


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}/a.bin?token=secret"
        with pytest.raises(
            QwtError, match=r"a\.bin could not be downloaded.*refused.*Check the network"
        ) as caught:
            download(url, tmp_path / "a.bin")
    assert "secret" not in str(caught.value)


def test_address_of_an_unknown_kind(tmp_path):
    with pytest.raises(QwtError, match=r"ftp://host/a\.bin cannot be fetched.*Check the address"):
        download("ftp://host/a.bin", tmp_path / "a.bin")


def test_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        FlakyServer({"a.bin": CONTENT}) as server,
        pytest.raises(QwtError, match="cannot be stored"),
    ):
        download(server.url("a.bin"), tmp_path / "file" / "a.bin")


def test_the_log_tells_how_far_a_long_download_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    with FlakyServer() as server:
        server.plan["a.bin"].append(
            Raw(OK + b"Content-Length: 3000000\r\n\r\n", b"x" * 100_000, 0.02)
        )
        download(server.url("a.bin"), tmp_path / "a.bin")
    assert any(re.match(r"a\.bin: \d\.\d MB, .* MB per second", line) for line in caplog.messages)


def many(count: int) -> dict[str, bytes]:
    return {f"images/{number}.bin": os.urandom(4000) for number in range(count)}


def test_many_files_from_a_server_that_breaks_and_is_unavailable_now_and_then(
    tmp_path, monkeypatch
):
    # which file meets how many failures is up to the threads
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 50)
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.01)
    files = many(60)
    with FlakyServer(files, unavailable_every=7, drop_every=5) as server:
        download_many([(server.url(name), name) for name in files], tmp_path, workers=6)
        assert len(server.requests) > len(files)
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
    assert len(list((tmp_path / "images").iterdir())) == len(files)


def test_many_files_keep_what_is_there_and_good(tmp_path):
    files = many(5)
    for name in ("images/1.bin", "images/2.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "images/3.bin").write_bytes(b"rubbish")

    def check(name: str, path: Path) -> None:
        if path.read_bytes() != files[name]:
            raise QwtError(f"{path} is rubbish.")

    with FlakyServer(files) as server:
        download_many([(server.url(name), name) for name in files], tmp_path, check=check)
        assert sorted(path for path, _ in server.requests) == [
            "images/0.bin",
            "images/3.bin",
            "images/4.bin",
        ]
    assert (tmp_path / "images/3.bin").read_bytes() == files["images/3.bin"]


def test_one_missing_file_stops_the_rest(tmp_path):
    files = many(200)
    items = [("absent", "absent"), *((name, name) for name in files)]
    with FlakyServer(files) as server:
        with pytest.raises(QwtError, match=r"absent answered 404 .*of 201 files"):
            download_many([(server.url(path), name) for path, name in items], tmp_path, workers=2)
        assert len(server.requests) < 150


def test_a_file_that_fails_its_check_is_not_stored(tmp_path):
    def check(name: str, path: Path) -> None:
        raise QwtError(f"{name} is not an image.")

    with FlakyServer({"a.jpg": b"x"}) as server, pytest.raises(QwtError, match="not an image"):
        download_many([(server.url("a.jpg"), "a.jpg")], tmp_path, check=check)
    assert names(tmp_path) == set()


OK = b"HTTP/1.1 200 OK\r\n"


def refused(tmp_path, *plan, **options) -> str:
    """What is said of a server that behaves so; nothing of the file may stay, and soon."""
    with FlakyServer({"a.bin": CONTENT}) as server:
        server.plan["a.bin"] += plan
        start = time.monotonic()
        with pytest.raises(QwtError) as caught:
            download(server.url("a.bin"), tmp_path / "a.bin", **options)
        assert time.monotonic() - start < 3
    assert not (tmp_path / "a.bin").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "start",
    [
        OK + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n",
        OK + b"Content-Length: 9000000\r\n\r\n",
        OK + b"Content-Length: 99999999999999999999\r\n\r\n",
    ],
)
def test_a_file_that_is_larger_than_it_can_be_is_not_taken(tmp_path, start):
    piece = b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n" if b"chunked" in start else b"x" * 0xFFFF
    said = refused(tmp_path, Raw(start, piece), most_bytes=2_000_000)
    assert "a.bin is larger than 2 MB" in said
    assert names(tmp_path) == set()


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 2)
    said = refused(tmp_path, *[Raw(OK + b"\r\n", b"x", 0.02)] * 9)
    assert "bytes per second (given up after 2 attempts" in said


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (Raw(OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"), "sent compressed"),
        (
            Raw(b"HTTP/1.1 404 \x1b[2Jgone\r\nContent-Length: 0\r\n\r\n"),
            r"answered 404 \x1b[2Jgone",
        ),
        (Raw(b"HTTP/1.1 503 \x1b[2J\r\nContent-Length: 0\r\n\r\n"), r"answered 503 \x1b[2J ("),
        (Status(302, {"Location": "http://[::bad/"}), "cannot be fetched"),
        (Status(302, {"Location": "file:///etc/passwd"}), "cannot be fetched"),
        (Status(302, {"Location": "a.bin"}), "Exceeded 10 redirects"),
        (
            Raw(b"HTTP/1.1 302 Found\r\nLocation: /a.bin\r\n\r\n", b"x" * 9999),
            "Exceeded 10 redirects",
        ),
    ],
)
def test_an_answer_that_leads_nowhere_is_named(tmp_path, answer, part):
    assert part in refused(tmp_path, *[answer] * 20)


def test_chunks_that_are_none_are_given_up(tmp_path):
    answer = Raw(OK + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n")
    assert "could not be downloaded" in refused(tmp_path, *[answer] * 20)


def test_a_length_that_is_no_number_is_as_if_there_were_none(tmp_path):
    with FlakyServer() as server:
        server.plan["a.bin"].append(Raw(OK + b"Content-Length: \xb2\r\n\r\nabc"))
        download(server.url("a.bin"), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "value", ["\u00b2", "0", "9" * 5000, "Mon, 01 Jan 2001 00:00:00 GMT",
              "Mon, 01 Jan 2001 00:00:00 +99999999999999", "Mon, 99 Foo 99999 00:00:00 GMT"],
)  # fmt: skip
def test_a_wish_to_wait_never_makes_the_pauses_shorter(tmp_path, monkeypatch, caplog, value):
    monkeypatch.setattr(download_module.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.04)
    caplog.set_level(logging.WARNING)
    refused(tmp_path, *[Status(503, {"Retry-After": value})] * 9)
    waits = [record.args[2] for record in caplog.records]
    assert len(waits) == download_module.ATTEMPTS_WITHOUT_PROGRESS - 1
    assert waits[2:] == [0.04] * 3
    assert min(waits) >= 0.01


def test_one_missing_file_ends_an_endless_transfer_at_once(tmp_path):
    with FlakyServer({"slow": b""}) as server:
        server.plan["slow"].append(Raw(OK + b"\r\n", b"x", 0.02))
        start = time.monotonic()
        with pytest.raises(QwtError, match="absent answered 404"):
            download_many([(server.url(n), n) for n in ("slow", "absent")], tmp_path, workers=2)
        assert time.monotonic() - start < 2


def test_an_interrupt_ends_endless_transfers_at_once(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(download_module.progress_module, "progress", interrupted)
    with FlakyServer({"slow": b""}) as server:
        server.plan["slow"].append(Raw(OK + b"\r\n", b"x", 0.02))
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            download_many([(server.url("slow"), "slow")], tmp_path)
        assert time.monotonic() - start < 2

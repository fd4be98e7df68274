"""Files that are either whole or absent, and their hashes."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import QwtError


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path``; rename it to ``path`` when the body succeeds.

    If the body raises, ``path`` does not change and the partial file is removed. An OSError without a file name
    (as of a full disk) then names ``path``, also if it is the context of another error.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
        )
    except OSError as error:
        error.filename = str(target)
        raise
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # mkstemp makes the file private
        partial.replace(target)
    except Exception as error:
        # torch fails again, once or twice, at the end of a file that it could not write.
        fault: BaseException | None = error
        while fault is not None:
            if isinstance(fault, OSError) and fault.filename is None:
                fault.filename = str(target)
            fault = fault.__context__
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Write ``value`` as JSON, whole or not at all.

    Raises:
        ValueError: ``value`` holds a NaN or an infinity, which JSON cannot represent.
    """
    with write_atomically(path) as partial:
        text = json.dumps(value, indent=indent, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        what: the role of the file, for messages.

    Raises:
        QwtError: the file is missing or unreadable.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise QwtError(f"The {what} {path} does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QwtError(f"The {what} {path} cannot be read: {error}.") from error


MADE_BY_US = "delete it and run again, so that the workflow makes it again"


def read_json(path: str | os.PathLike[str], *, what: str = "file", remedy: str = MADE_BY_US) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Args:
        what: the role of the file, for messages.
        remedy: for messages about a file that is not JSON.

    Raises:
        QwtError: the file is missing, unreadable or not JSON, or an object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            where = f" with the id {value['id']!r}" if "id" in value else ""
            raise QwtError(
                f"The {what} {path} holds an object{where} that has the key {twice!r} twice; remove "
                "one of them."
            )
        return value

    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting without end
        raise QwtError(
            f"The {what} {path} is not valid JSON ({error}); it may be truncated, so {remedy}."
        ) from error


def is_url(location: str) -> bool:
    """Whether a location is an address to download from rather than a path."""
    return str(location).startswith(("http://", "https://"))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Files that are either whole or absent, and their hashes."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import QwtError


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path``; rename it to ``path`` when the body succeeds.

    Whatever raises inside the body leaves ``path`` as it was and removes the partial file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
    )
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # mkstemp makes the file private; results are ordinary files
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Write ``value`` as JSON, whole or not at all.

    Raises:
        ValueError: ``value`` holds a NaN or an infinity, which JSON has no name for.
    """
    with write_atomically(path) as partial:
        text = json.dumps(value, indent=indent, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, what: str = "file") -> Any:
    """Read a JSON file; ``what`` names its role in the error message.

    Raises:
        QwtError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QwtError(f"The {what} {path} does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QwtError(f"The {what} {path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise QwtError(
            f"The {what} {path} is not valid JSON ({error}); it may be truncated, so fetch it again."
        ) from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

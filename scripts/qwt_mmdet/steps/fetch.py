"""Get the weights of a model: fetch a checkpoint, verify it, and keep what is needed of it."""

import contextlib
import datetime
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from ..data.download import LARGEST_BYTES, download, printable
from ..detectors.checkpoint import read_checkpoint
from ..errors import QwtError
from ..files import is_url, sha256_file, write_atomically

logger = logging.getLogger(__name__)


def fetch_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    sha256: str | None = None,
    most_bytes: int = LARGEST_BYTES,
) -> None:
    """Get a checkpoint from a path or an address, verify it, and write its weights alone.

    ``output`` holds ``{"state_dict": {name: tensor}, "meta": {"source", "sha256", "classes"}}`` of plain
    types, which ``torch.load(weights_only=True)`` reads. Its bytes depend on the source alone. ``sha256`` is
    that of the source file. ``classes`` are the class names in an OpenMMLab checkpoint or in the metadata of a
    safetensors file, or None.

    Args:
        source: path or http(s) address of a file written by ``torch.save`` or by safetensors.
        sha256: the hash that the source must have. Without one, the last eight digits of an
            OpenMMLab file name (``name-1a2b3c4d.pth``) must be the first eight of the hash.
        most_bytes: largest size of a download.

    Raises:
        QwtError: the source cannot be read or downloaded, has another hash, is damaged, refers to code that
            reading weights does not need, or holds no weights or weights that are not finite. ``output`` is
            then not written.
    """
    source = str(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise QwtError(
            f"The sha256 {sha256!r} of the checkpoint {source} is not 64 hexadecimal digits; "
            "copy it again, or leave it out."
        )
    name = printable(source)
    with _local_file(source, Path(output), sha256, most_bytes) as path:
        digest = sha256_file(path)
        _verify(name, path.name, digest, sha256)
        weights, classes = read_checkpoint(path, name)
    meta = {"source": name, "sha256": digest, "classes": classes}
    # Saved through a stream: torch would write the name of a file into the archive.
    content = io.BytesIO()
    torch.save({"state_dict": weights, "meta": meta}, content)
    with write_atomically(output) as partial:
        partial.write_bytes(content.getbuffer())
    logger.info("%s: %d tensors from %s", output, len(weights), name)


@contextlib.contextmanager
def _local_file(source: str, output: Path, sha256: str | None, most_bytes: int) -> Iterator[Path]:
    """Yield a path with the content of ``source``; a download is deleted afterwards."""
    if not is_url(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise QwtError(f"The checkpoint {source} does not exist; check the path.")
        yield path
        return
    name = Path(unquote(urlsplit(source).path)).name
    if not name:
        raise QwtError(
            f"The checkpoint address {printable(source)} names no file; check the address."
        )
    folder = output.parent / f"{output.name}.download"
    download(source, folder / name, sha256=sha256, most_bytes=most_bytes)
    try:
        yield folder / name
    finally:
        (folder / name).unlink()
        with contextlib.suppress(OSError):  # it may hold parts of another file
            folder.rmdir()


def _verify(source: str, name: str, digest: str, sha256: str | None) -> None:
    if sha256 is not None and digest != sha256.lower():
        raise QwtError(
            f"The checkpoint {source} has the sha256 {digest}, but the config says "
            f"{sha256.lower()}; get the right file, or correct the config."
        )
    digits = _digits_in_name(name)
    if digits is None or digest.startswith(digits):
        return
    if sha256 is not None:
        logger.warning(
            "%s has the sha256 of the config, but not the one in its own name (%s).", source, digits
        )
        return
    raise QwtError(
        f"The checkpoint {source} has the sha256 {digest}, but its name says {digits}…; the file "
        "is incomplete or another one. Get it again, or put the sha256 into the config if it is "
        "the file that you mean."
    )


def _digits_in_name(name: str) -> str | None:
    """First eight digits of the sha256 as OpenMMLab writes them into file names."""
    found = re.search(r"-([0-9a-f]{8})\.(?:pth|safetensors)$", name)
    if not found:
        return None
    try:  # model-20240131.pth carries a date, not a hash
        datetime.datetime.strptime(found[1], "%Y%m%d")
    except ValueError:
        return found[1]
    return None

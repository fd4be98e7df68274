"""Reading and writing our .pth files (archives), and the JSON summary beside each of them.

Tables and report read only the summaries, without torch and mmdet.
"""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import QwtError
from .files import read_json, write_atomically, write_json

logger = logging.getLogger(__name__)

WARMUP_FORMAT = "qwt-mmdet warmup 2"
COMPENSATION_FORMAT = "qwt-mmdet compensation 4"
UNFINISHED_FORMAT = "qwt-mmdet unfinished step 1"

OURS = "qwt-mmdet "
"""Start of the format name of all our files."""
REMEDY = "if the workflow made it, under results/, delete it there and run again; else get it again"

SUMMARY_KEYS = ("format", "fingerprint", "settings", "summary", "provenance")
"""Keys of an archive with plain values, which the summary holds."""


def load_archive(
    path: str | os.PathLike[str], expected_format: str, what: str, keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Read one of our .pth files without running any code that it may hold.

    Args:
        keys: that it must have.

    Raises:
        QwtError: it is missing, truncated, of another type or format version, or lacks a key.
    """
    content = load_any_archive(path, {expected_format: what})
    if missing := [key for key in keys if key not in content]:
        raise QwtError(f"The {what} file {path} holds no {' and no '.join(missing)}; {REMEDY}.")
    return content


def load_any_archive(path: str | os.PathLike[str], expected: Mapping[str, str]) -> dict[str, Any]:
    """Read one of our .pth files of any of several formats; see :func:`load_archive`.

    Args:
        expected: name of a file in messages, by format.

    Raises:
        QwtError: it is missing, truncated, or of another type or format version.
    """
    import torch  # takes seconds; summaries are read without it

    what = " or ".join(expected.values())
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise QwtError(f"The {what} file {path} does not exist; check the path.") from None
    except Exception as error:
        raise QwtError(
            f"The {what} file {path} cannot be read ({type(error).__name__}); it is truncated or no "
            f"{what} file; {REMEDY}."
        ) from error
    _check_format(content, path, expected, what)
    return content


def save_archive(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write tensors and plain values as a .pth, whole or not at all.

    The file is read back before it gets its name, so that other values raise here and not when it is loaded.
    """
    import torch

    with write_atomically(path) as partial:
        with open(partial, "wb") as stream:
            # Saving to a stream keeps the file's name out of it: equal content gives equal bytes.
            torch.save(content, stream)
        torch.load(partial, weights_only=True)


def summary_path(path: str | os.PathLike[str]) -> Path:
    """Path of an archive's summary: beside it, with the suffix .json."""
    return Path(path).with_suffix(".json")


def save_with_summary(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write an archive, and its summary beside it."""
    save_archive(content, path)
    _write_summary(content, path)


def read_summary(path: str | os.PathLike[str], expected_format: str, what: str) -> dict[str, Any]:
    """Read the summary of the archive ``path``, without the archive.

    Raises:
        QwtError: it is missing, not JSON, or of another type or format version.
    """
    content = read_json(summary_path(path), what=f"summary of the {what} file")
    _check_format(content, summary_path(path), [expected_format], what)
    return content


def _check_format(
    content: Any, path: str | os.PathLike[str], expected: Collection[str], what: str
) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if not str(found).startswith(OURS):  # somebody's weights, perhaps the only copy
        raise QwtError(f"{path} is not a {what} file; name one that qwt-mmdet wrote.")
    if found not in expected:
        raise QwtError(
            f"{path} is not a {what} file of this version (format {found!r}, expected "
            f"{' or '.join(map(repr, expected))}); {REMEDY}."
        )


def copy_with_summary(
    source: str | os.PathLike[str], path: str | os.PathLike[str], expected_format: str, what: str
) -> None:
    """Copy an archive byte for byte, and write its summary beside the copy."""
    content = load_archive(source, expected_format, what)
    with write_atomically(path) as partial:
        partial.write_bytes(Path(source).read_bytes())
    _write_summary(content, path)


def _write_summary(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    write_json(summary_path(path), {key: content[key] for key in SUMMARY_KEYS}, indent=1)


def add_account(path: str | os.PathLike[str], account: Mapping[str, Any]) -> None:
    """Add time, memory and machine of the job that made an archive to the provenance in its summary.

    The archive does not hold them, so that equal inputs give equal archives.
    """
    content = read_json(summary_path(path), what="summary")
    content["provenance"] |= account
    write_json(summary_path(path), content, indent=1)


class Finished:
    """Results of the finished parts of a step by name, as tensors and plain values; saved after each part.

    Args:
        path: the file; None keeps nothing.
        inputs: everything that the results depend on. A file with other inputs is ignored and overwritten.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, inputs: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.inputs = path, dict(inputs or {})
        self.results: dict[str, Any] = {}
        if path is None or not os.path.exists(path):
            return
        try:
            content = load_archive(path, UNFINISHED_FORMAT, "unfinished")
        except QwtError as error:
            logger.warning("%s Starting anew.", error)
            return
        if content["inputs"] != self.inputs:
            logger.info("What is finished in %s had other inputs; starting anew.", path)
            return
        self.results = content["results"]
        logger.info("Going on after what is finished: %s", ", ".join(self.results))

    def add(self, name: str, result: Any) -> None:
        """Record the result of a part."""
        self.results[name] = result
        if self.path is not None:
            content = {"inputs": self.inputs, "results": self.results}
            save_archive({"format": UNFINISHED_FORMAT, **content}, self.path)


def worst_layers(sqnr_db: Mapping[str, float | None], most: int = 3) -> str:
    """``backbone.conv1 (-2.5 dB), …``: the layers with the lowest ratios in dB, the worst first."""
    measured = [(ratio, name) for name, ratio in sqnr_db.items() if ratio is not None]
    return ", ".join(f"{name} ({ratio:.1f} dB)" for ratio, name in sorted(measured)[:most])


OVERFITTED_DB = 3.0
"""Ranges overfit if the SQNR of other images is lower by this."""
HARMLESS_DB = 23.0
"""A higher SQNR of other images is harmless: the error has half a percent of the outputs' power."""


def overfitted_ranges(check: Mapping[str, Any] | None) -> str | None:
    """A sentence about ranges that fit only the images they were estimated from; None if they generalize.

    Args:
        check: the fields of a :class:`.record.RangeCheck`.
    """
    if check is None:
        return None
    if check["images"] < 2:
        return "Ranges come from a single image, so their quality on other images is unknown; use more calibration images."
    seen, unseen = check["seen_db"], check["unseen_db"]
    if seen is None or unseen is None:
        return None
    if seen - unseen < OVERFITTED_DB or unseen >= HARMLESS_DB:
        return None
    return (
        f"Ranges are not settled: estimated from half of the {check['images']} calibration images, they give {seen:.1f} dB on "
        f"images that made them, {unseen:.1f} dB on others; use more images."
    )

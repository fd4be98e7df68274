"""A trial of a test pipeline on a generated image, before its config is used.

Faults raise an error that names the key: a step that cannot be built or run, that is random or moves objects; or a
result without values that detectors need.
"""

import contextlib
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmcv.transforms import TRANSFORMS as MMCV_TRANSFORMS
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..errors import QwtError, reason, suggestion
from .loaders import far_backends, pipeline_steps, reading_files, transform_name

logger = logging.getLogger(__name__)

SIZE = (480, 640)
"""Height and width of the generated image, those of most images of COCO."""
OBJECTS = ((64, 400), (64, 496))  # whole blocks of JPEG
"""Top and left, in pixels, of the object in the first and in the second image."""
SIDE = 80
"""Of that object."""
RUNS = 4
RUNS_BY_CHANCE = 32
"""Of a pipeline that draws random numbers."""
NEEDED = ("img_id", "ori_shape", "img_shape", "scale_factor")
"""What detectors read of an image beside its pixels."""

_passed: set[str] = set()


class _Step(NamedTuple):
    """A transform of a pipeline.

    Attributes:
        place: its key in the config.
        unusual: whether it may fail on a generated image alone: it is neither MMCV's nor MMDetection's, or reads
            images as they are.
    """

    place: str
    name: str
    settings: Mapping[str, Any]
    run: Compose
    unusual: bool

    def __str__(self) -> str:
        return f"{self.place} of the model config ({self.name})"


class _Seen(NamedTuple):
    """The state of an image after a step.

    Attributes:
        pixels: [height, width], [height, width, channels], or [channels, height, width] when it is packed.
        meta: the known values of ``NEEDED`` and ``border``.
        drew: whether the step drew random numbers.
    """

    pixels: np.ndarray
    meta: dict[str, Any]
    drew: bool

    def equals(self, other: "_Seen") -> bool:
        """Whether a detector would see the same."""
        return repr(self.meta) == repr(other.meta) and np.array_equal(self.pixels, other.pixels)


class _UncertainError(Exception):
    """A step fails on a generated image, but may work on real ones."""


def try_pipeline(config: Config) -> None:
    """Build a config's test pipeline and run it on a generated image.

    Raises:
        QwtError: a step cannot be built or run, or changes images by chance; or the result lacks what detectors
            need, or shows objects elsewhere than their boxes would be.
    """
    given = pipeline_steps(config)
    if (text := repr(given)) in _passed:
        return
    for place, transform in given:
        for key, backend in far_backends(transform).items():
            logger.warning(
                "%s.%s of the model config reads from %s, but all images are files of this machine, so it is taken "
                "as None.",
                place, key, backend.get("backend") or backend.get("prefix"),
            )  # fmt: skip
    with DefaultScope.overwrite_default_scope("mmdet"), _generators_kept():
        steps = [_build(place, reading_files(transform)) for place, transform in given]
        with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
            try:
                _try(steps, *_images(steps, Path(folder)))
            except _UncertainError as failure:
                logger.warning(
                    "The test pipeline cannot be checked on a generated image: %s.", failure
                )
    _passed.add(text)


def _build(place: str, transform: Mapping[str, Any]) -> _Step:
    name = transform_name(transform)
    try:
        run = Compose([transform])
    except Exception as error:
        if isinstance(error, KeyError) and f"{name} is not in the" in str(error):
            known = {**MMCV_TRANSFORMS.module_dict, **TRANSFORMS.module_dict}
            raise QwtError(
                f"{place} of the model config has the type {name!r}, which is not registered"
                f"{suggestion(name, known) or '; correct it, or name its module in custom_imports.'}"
            ) from error
        raise QwtError(
            f"{place} of the model config ({name}) cannot be built: {reason(error)}; correct it."
        ) from error
    package = type(run.transforms[0]).__module__.partition(".")[0]
    unusual = package not in ("mmcv", "mmdet") or transform.get("color_type") == "unchanged"
    return _Step(place, name, transform, run, unusual)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Inside: random numbers may be drawn; afterwards the generators have their former states."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _generators() -> tuple[Any, ...]:
    """State of the generators that transforms draw from."""
    numpy: Any = np.random.get_state()
    return random.getstate(), bytes(numpy[1]), numpy[2], bytes(torch.get_rng_state().numpy())


def _images(steps: Sequence[_Step], folder: Path) -> tuple[Path, Path, Path]:
    """Write an image of noise, and two images with an object at different places."""
    tiff = any(step.settings.get("imdecode_backend") == "tifffile" for step in steps)
    paths = [folder / f"{name}.{'tif' if tiff else 'jpg'}" for name in ("noise", "here", "there")]
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(paths[0]), cv2.resize(noise, SIZE[::-1], interpolation=cv2.INTER_CUBIC))
    for path, (top, left) in zip(paths[1:], OBJECTS, strict=True):
        image = np.full((*SIZE, 3), (60, 90, 120), np.uint8)
        image[top : top + SIDE, left : left + SIDE] = 255
        cv2.imwrite(str(path), image)
    return paths[0], paths[1], paths[2]


def _run(steps: Sequence[_Step], image: Path, seed: int = 0) -> tuple[list[_Seen], dict[str, Any]]:
    """The state of an image after each step, and the results of the last step."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
    results: Any = {"img_path": str(image), "img_id": 0, "height": SIZE[0], "width": SIZE[1]}
    seen = []
    for number, step in enumerate(steps):
        before = _generators()
        try:
            results = step.run(results)
        except Exception as error:
            told = f"{step} fails on an image: {reason(error)}"
            if any(one.unusual for one in steps[: number + 1]):
                raise _UncertainError(told) from error
            raise QwtError(f"{told}; correct it, or what comes before it.") from error
        if not isinstance(results, dict):
            raise QwtError(f"{step} makes {results!r:.60} of an image; remove it.")
        meta = getattr(results.get("data_samples"), "metainfo", results)
        known = {key: meta[key] for key in (*NEEDED, "border") if key in meta}
        pixels = results.get("inputs", results.get("img"))
        pixels = pixels.numpy() if isinstance(pixels, torch.Tensor) else np.asarray(pixels)
        seen.append(_Seen(pixels.copy(), known, drew=before != _generators()))
    return seen, results


def _try(steps: Sequence[_Step], noise: Path, here: Path, there: Path) -> None:
    first, results = _run(steps, noise)
    _check_result(steps, first, results)
    for step, seen in zip(steps, first, strict=True):
        if seen.drew and _is_sometimes_skipped(step.settings):
            raise _by_chance(step)
    for seed in range(1, RUNS_BY_CHANCE if any(seen.drew for seen in first) else RUNS):
        for step, one, other in zip(steps, first, _run(steps, noise, seed)[0], strict=True):
            if not one.equals(other):
                raise _by_chance(step)
    if "border" in first[-1].meta:  # by which such detectors map boxes back
        return
    for step, *images in zip(steps, _run(steps, here)[0], _run(steps, there)[0], strict=True):
        if not _are_in_place(*images):
            told = (
                f"{step} moves what is in an image otherwise than scale_factor says, by which alone MMDetection "
                "maps boxes back"
            )
            if any(one.unusual for one in steps):
                logger.warning("%s; is that what the detector expects?", told)
                return
            raise QwtError(f"{told}; remove it from the test pipeline.")


def _check_result(steps: Sequence[_Step], seen: Sequence[_Seen], results: dict[str, Any]) -> None:
    place, last = steps[-1].place.rpartition(".")[0], steps[-1]
    image, sample = results.get("inputs"), results.get("data_samples")
    if not isinstance(image, torch.Tensor) or not isinstance(sample, DetDataSample):
        raise QwtError(
            f"{place} of the model config ends with {last.name}, and makes no input for a detector; let it end "
            "with dict(type='PackDetInputs')."
        )
    known: set[str] = set().union(*(one.meta for one in seen))
    for key in NEEDED:
        if key in sample.metainfo or (key == "scale_factor" and "border" in sample.metainfo):
            continue
        raise QwtError(
            f"{last} gives the detector no {key}, without which boxes find no place in their image; "
            + (
                "name it in meta_keys."
                if key in known
                else f"add a Resize to {place}, with the size that the detector was trained for."
            )
        )


def _is_sometimes_skipped(settings: Any) -> bool:
    """Whether a transform, or one inside of it, has a probability that is neither 0 nor 1."""
    if isinstance(settings, Mapping):
        given = [settings[key] for key in ("prob", "p") if key in settings]
        numbers = np.ravel([one for one in given if isinstance(one, int | float | list | tuple)])
        return any(0 < number < 1 for number in numbers) or any(
            map(_is_sometimes_skipped, settings.values())
        )
    return isinstance(settings, list | tuple) and any(map(_is_sometimes_skipped, settings))


def _by_chance(step: _Step) -> QwtError:
    zero = ", or set its prob to 0" if "prob" in step.settings else ""
    return QwtError(
        f"{step} changes images by chance, so boxes would not fit them and each run would give another AP; remove it "
        f"from the test pipeline{zero}."
    )


def _are_in_place(here: _Seen, there: _Seen) -> bool:
    """Whether the middle between both positions of the object is where ``scale_factor`` says."""
    if here.pixels.shape != there.pixels.shape:
        return False
    change = np.abs(there.pixels.astype(np.float64) - here.pixels)
    if change.ndim == 3:
        change = change.sum(axis=0 if change.shape[0] < change.shape[2] else 2)
    if not change.any():
        return False
    change[change < change.max() / 4] = 0
    scale = here.meta.get("scale_factor", (1.0, 1.0))
    middle = (np.mean(OBJECTS, axis=0) + SIDE / 2) * [scale[1], scale[0]]  # row, column
    found = [
        np.average(np.arange(size), weights=change.sum(axis=1 - axis))
        for axis, size in enumerate(change.shape)
    ]
    return bool(np.all(np.abs(found - middle) < 2 + 0.01 * np.array(change.shape)))

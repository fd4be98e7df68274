"""Loaders of images through the model's own test pipeline."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS  # noqa: F401  (its import registers mmdet's transforms)
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.fileio import FileClient
from mmengine.fileio.backends.registry_utils import backends
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from ..config.datasets import Exif
from ..errors import QwtError, reason
from .annotations import read_annotations
from .images import check_image

AUGMENTATION = ("TestTimeAug", "MultiScaleFlipAug")
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
"""Numbers of errors with the image file as their cause, not the machine."""
NARROW = 100
"""Ratio of an image's sides above which the pipeline may fail on it."""
NEVER_TURN = ("turbojpeg", "tifffile")  # decoders that ignore EXIF orientations


def test_datasets(config: Config) -> list[tuple[str, ConfigDict]]:
    """The config's test data sets, without wrappers, by their key in the config."""

    def unwrapped(path: str, dataset: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
        if "dataset" in dataset:
            yield from unwrapped(f"{path}.dataset", dataset.dataset)
        elif "datasets" in dataset:
            for number, part in enumerate(dataset.datasets):
                yield from unwrapped(f"{path}.datasets.{number}", part)
        else:
            yield path, dataset

    return list(unwrapped("test_dataloader.dataset", config.test_dataloader.dataset))


def transform_name(transform: Mapping[str, Any]) -> str:
    """Name of a transform's class, without its module or registry."""
    return getattr(transform["type"], "__name__", str(transform["type"])).split(".")[-1]


def far_backends(transform: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a transform that make it read images from remote storage.

    They name a file backend of mmengine, or one that is not registered.
    """
    found = {}
    for key in ("backend_args", "file_client_args"):
        given = transform.get(key)
        if not isinstance(given, Mapping):
            continue
        name = str(given.get("backend") or given.get("prefix") or "local")
        known = backends.get(name) or FileClient._backends.get(name)
        own = known is not None and not known.__module__.startswith("mmengine.")
        if name not in ("local", "disk") and not own:
            found[key] = given
    return found


def reading_files(transform: dict[str, Any]) -> dict[str, Any]:
    """A transform without the arguments of :func:`far_backends`."""
    far = far_backends(transform)
    return {**transform, **dict.fromkeys(far)} if far else transform


def pipeline_steps(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of the config's test pipeline but those that load ground truth, each with its key.

    Raises:
        QwtError: there is none, several data sets have different ones, or it needs more than an image.
    """
    (place, dataset), *others = test_datasets(config)
    pipeline = dataset.get("pipeline") or config.get("test_pipeline")
    key = f"{place}.pipeline" if dataset.get("pipeline") else "test_pipeline"
    if not pipeline:
        raise QwtError(f"The model config has no test pipeline; add {place}.pipeline.")
    for other, another in others:
        if another.get("pipeline", pipeline) != pipeline:
            raise QwtError(
                f"{place}.pipeline and {other}.pipeline differ, but all images go through one "
                "pipeline; leave one data set in test_dataloader."
            )
    names = [transform_name(transform) for transform in pipeline]
    for name in names:
        if name in AUGMENTATION:
            raise QwtError(
                f"The test pipeline has {name}, which makes several images of one (test-time "
                f"augmentation); set {place}.pipeline in the model config to a pipeline without it, "
                "such as its test_pipeline."
            )
    if "LoadProposals" in names:
        raise QwtError(
            "The test pipeline has LoadProposals: the detector needs a file of proposals that another "
            "model made; take a config that makes its own, such as "
            "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py."
        )
    return [
        (f"{key}.{number}", transform)
        for number, (transform, name) in enumerate(zip(pipeline, names, strict=True))
        if not name.endswith("LoadAnnotations")
    ]


def inference_pipeline(config: Config) -> list[dict[str, Any]]:
    """The config's test pipeline without the transforms that load ground truth.

    All images are files of this machine, so backends that read from elsewhere are left out.

    Raises:
        QwtError: as :func:`pipeline_steps`.
    """
    return [reading_files(transform) for _, transform in pipeline_steps(config)]


def unprepared(path: Path, width: int, height: int, error: Exception) -> QwtError:
    """The error if the pipeline fails on a valid image, such as one of 1 pixel width."""
    return QwtError(
        f"The model's test pipeline cannot prepare {path} ({width}x{height} pixels): {reason(error)}; take this "
        "image out, or change the pipeline in the model config."
    )


def _follow_exif(pipeline: list[dict[str, Any]], info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pipeline, which applies EXIF orientations or not, by ``info.exif``."""
    suffix = "_ignore_orientation"
    transforms = []
    for transform in pipeline:
        if transform_name(transform) == "LoadImageFromFile" and "exif" in info:
            color = transform.get("color_type", "color")
            turns = color != "unchanged" and transform.get("imdecode_backend") not in NEVER_TURN
            if turns:
                base = color.removesuffix(suffix)
                color = base if info["exif"] == "apply" else base + suffix
                transform = {**transform, "color_type": color}
            elif info["exif"] == "apply" and info.get("exif_rotated"):
                raise QwtError(
                    f"The test pipeline reads images with {dict(transform)}, which turns none, but "
                    f"{info['exif_rotated']} images have an EXIF rotation; set exif: ignore for the "
                    "dataset, or color_type: color and imdecode_backend: cv2 in the model config."
                )
        transforms.append(transform)
    return transforms


class ImageDataset(Dataset):
    """The images of a COCO annotation file, through a test pipeline.

    Args:
        config: mmdet config with the test pipeline.
        annotations: annotation file whose ``info.image_root`` is the image folder; ``info.exif``
            (apply or ignore, where it is there) decides whether EXIF orientations are applied.
        images: indices in the file of the images to take.
    """

    def __init__(
        self, config: Config, annotations: str | os.PathLike[str], images: slice = slice(None)
    ) -> None:
        content = read_annotations(annotations, labelled=False, objects=False)
        if not isinstance(content["info"].get("image_root"), str):
            raise QwtError(
                f"The annotation file {annotations} has no info.image_root; put the folder that its "
                "file names are relative to there."
            )
        self.images = content["images"][images]
        self.root = Path(content["info"]["image_root"])
        if not self.root.is_dir():
            start = (
                ""
                if self.root.is_absolute()
                else ", or work in the run's folder, where its path starts"
            )
            raise QwtError(
                f"The image folder {self.root} of {annotations} does not exist; put it back{start}."
            )
        self.exif: Exif = content["info"].get("exif", "apply")
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.pipeline = Compose(_follow_exif(inference_pipeline(config), content["info"]))
        self._try_narrow_images()

    def _try_narrow_images(self) -> None:
        """Prepare each narrow image now: a resize may leave no row or column of it, which would fail late in a run.

        Raises:
            QwtError: the pipeline fails on one.
        """
        for index, image in enumerate(self.images):
            short, long = sorted((image["width"], image["height"]))
            if long > NARROW * short:
                _ = self[index]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The prepared image.

        Raises:
            QwtError: the file has changed since it was chosen, or the pipeline fails on it.
        """
        image = self.images[index]
        path, width, height = self.root / image["file_name"], image["width"], image["height"]
        given = {"img_path": str(path), "img_id": image["id"], "height": height, "width": width}
        try:
            return self.pipeline(given)
        except (QwtError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in GONE:
                raise  # the machine's fault, not the image's
            try:
                check_image(path, width, height, exif=self.exif)
            except QwtError as damage:
                raise QwtError(
                    f"{str(damage).rstrip('.')}; it has changed since the images were chosen. Put it "
                    "back, or take it out of the annotation file, and run again."
                ) from error
            raise unprepared(path, width, height, error) from error

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]] | Exception:
        """The item of a loader's process. Errors are returned: raised there, they would arrive as text only."""
        try:
            return [self[index] for index in indices]
        except (QwtError, OSError, MemoryError) as error:
            return error


def _collate(images: list[dict[str, Any]] | Exception) -> Any:
    return images if isinstance(images, Exception) else pseudo_collate(images)


class ImageLoader(DataLoader):
    """A loader that raises the errors that its processes return."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


def make_loader(
    config: Config,
    annotations: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    workers: int = 0,
    images: slice = slice(None),
) -> DataLoader:
    """Loader over the images of an annotation file, in its order.

    Args:
        images: indices in the file of the images to take; None: all.

    Yields:
        Batches as mmdet's test transform takes them: {"inputs": [image tensors],
        "data_samples": [DetDataSample]}.

    Raises:
        QwtError: the annotation file is unreadable or wrong, or the config has no test pipeline; during
            iteration: an image cannot be read or prepared.
    """
    return ImageLoader(
        ImageDataset(config, annotations, images),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
    )

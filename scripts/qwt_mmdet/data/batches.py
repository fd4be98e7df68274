"""Splitting of batches for mmdet's test step: {"inputs": [images], "data_samples": […]}.

A detector pads the images of a batch to the largest one, which can change the results of the others.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def single_images(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The images of all batches as batches of one, so that results do not depend on the batches."""
    for batch in loader:
        for index in range(len(batch["inputs"])):
            yield {key: [value[index]] for key, value in batch.items()}


def count_images(loader: Iterable[dict[str, Any]]) -> int | None:
    """Number of images of a loader; None if unknown."""
    if isinstance(loader, Sequence):
        return sum(len(batch["inputs"]) for batch in loader)
    dataset = getattr(loader, "dataset", None)
    return None if dataset is None else len(dataset)


def shard_of(images: int, batch_size: int, shard: tuple[int, int]) -> slice:
    """Indices of the images of a shard: whole batches, the same as without shards.

    Args:
        shard: its number, from 1, and the number of shards.
    """
    number, shards = shard
    batches = -(-images // batch_size)
    start, stop = (batches * index // shards * batch_size for index in (number - 1, number))
    return slice(start, stop)


def same_shapes(batch: dict[str, Any]) -> list[list[int]]:
    """Indices of a batch's images, [3, height, width] each, in groups of one shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(batch["inputs"]):
        groups.setdefault(tuple(image.shape), []).append(index)
    return list(groups.values())

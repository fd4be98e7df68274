"""Batches as mmdet's test step takes them, taken apart: {"inputs": [images], "data_samples": […]}.

A detector pads the images of a batch to the largest, which changes what the network sees of the
others.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def single_images(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The images of all batches as batches of one.

    Alone, each image gives the same result whatever the batches are.
    """
    for batch in loader:
        for index in range(len(batch["inputs"])):
            yield {key: [value[index]] for key, value in batch.items()}


def count_images(loader: Iterable[dict[str, Any]]) -> int | None:
    """How many images a loader has, where it knows."""
    if isinstance(loader, Sequence):
        return sum(len(batch["inputs"]) for batch in loader)
    dataset = getattr(loader, "dataset", None)
    return None if dataset is None else len(dataset)


def shard_of(images: int, batch_size: int, shard: tuple[int, int]) -> slice:
    """Places of the images of a shard, in whole batches, which are those of a run without shards.

    Args:
        shard: its number from 1 on, and how many there are.
    """
    number, shards = shard
    batches = -(-images // batch_size)
    start, stop = (batches * index // shards * batch_size for index in (number - 1, number))
    return slice(start, stop)


def same_shapes(batch: dict[str, Any]) -> list[list[int]]:
    """Positions of a batch's images, [3, height, width] each, in groups that need no padding."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(batch["inputs"]):
        groups.setdefault(tuple(image.shape), []).append(index)
    return list(groups.values())

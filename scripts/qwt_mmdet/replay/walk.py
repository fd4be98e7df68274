"""Walk many images through a network from layer to layer; nothing that is settled runs twice.

To reach a layer, the model's own forward pass runs from its start, but a module that has returned before
returns what it returned then. Once a module has returned, what the modules in it returned is forgotten, so
few are asked on the way, however deep the layer lies.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cache import ActivationCache
from .forwards import (
    Forward,
    detached,
    has_untied,
    made_of,
    new_leaf,
    outlined,
    replaced_forwards,
    tied,
    unknown,
)


class ReachedError(Exception):
    """Raised in a forward pass to stop it at the layer that is wanted."""


@dataclass
class _Frame:
    """A call that runs.

    Attributes:
        key: path of calls that led here: ``/backbone:0/stem:1`` is the second call of the stem in the
            first call of the backbone.
        calls: how often each module was called in it so far.
        kept: keys of the calls in it whose outputs wait in the cache.
    """

    key: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)


def outermost_modules(
    model: nn.Module, layers: Collection[str], ignored: type[nn.Module]
) -> dict[str, nn.Module]:
    """The layers, the modules that hold a layer, and the outermost ones that hold none, by name.

    Args:
        ignored: modules of this class run as if they were code of the module that holds them.
    """
    holders = _holders(layers)
    return {
        name: module
        for name, module in model.named_modules()
        if name and name.rpartition(".")[0] in holders and not isinstance(module, ignored)
    }


def _holders(layers: Collection[str]) -> set[str]:
    parts = [name.split(".") for name in layers]
    return {".".join(p[:n]) for p in parts for n in range(len(p))}


class Uses:
    """When outputs are read in a forward pass, in numbers of calls and returns since its start.

    Every output is tied to a leaf of its own in the autograd graph; what has a gradient path to the leaf
    is made of the output.

    Attributes:
        ends: by key of a call when it returns.
        last: by key of a call when its output is read for the last time.
        stops: by name of a layer when it is called first.
    """

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self.last: dict[str, float] = {}
        self.stops: dict[str, int] = {}
        self.time = 0
        self._leaves: dict[str, Tensor] = {}

    def read(self, values: Any, time: float) -> None:
        """Note that nested tensors are read."""
        is_made_of = made_of(values, list(self._leaves.values()))
        for key in itertools.compress(self._leaves, is_made_of):
            self.last[key] = max(self.last[key], time)

    def called(self, layer: str | None, arguments: Any) -> None:
        """Note that a module is called, or the layer of this name."""
        self.time += 1
        if layer is not None:
            self.stops.setdefault(layer, self.time)
        self.read(arguments, self.time)

    def returned(self, key: str, output: Any) -> Any:
        """Note that a call returns; what it returns comes back tied to its leaf."""
        self.time += 1
        self.read(output, self.time)
        self.ends[key], self.last[key] = self.time, self.time
        if has_untied(output):
            self.last[key] = math.inf  # no gradients: whatever comes later may depend on it
        return tied(output, self._leaves.setdefault(key, new_leaf()))

    def is_needed(self, key: str) -> bool:
        """Whether a layer that is called after a call has returned reads what it has returned."""
        if key not in self.ends:
            return True
        end, last = self.ends[key], self.last[key]
        return last == math.inf or any(end < stop <= last for stop in self.stops.values())


class Walk:
    """One network's way over its layers, for all images.

    Args:
        modules: whose outputs may be kept, by name (:func:`outermost_modules`).
        layers: names of those among them that passes will be stopped at.
        cache: where outputs wait.

    Attributes:
        unsettled: layers whose function will still change. What a forward pass computes after one of them
            is not kept.
    """

    def __init__(
        self, modules: dict[str, nn.Module], layers: Collection[str], cache: ActivationCache
    ) -> None:
        self.unsettled = set(layers)
        self._layers = frozenset(layers)
        self._holders = _holders(layers)
        self._modules = modules
        self._cache = cache
        self._uses = Uses()
        self._is_recording = False
        self._frames: list[_Frame] = []
        self._image = 0
        self._reached: dict[int, int] = {}  # how far each image has come
        self._is_settled = True
        self._outlines: dict[tuple[int, str], Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, modules run as this walk has it."""
        forwards = {module: self._forward(name, module) for name, module in self._modules.items()}
        with replaced_forwards(forwards):
            yield

    def record(self, forward: Callable[[], object]) -> None:
        """Learn from a forward pass of an image, or of the first part of one, which outputs are needed.

        Without it, or where the pass of another image goes another way, outputs wait until the module
        that has called returns.
        """
        self._is_recording = True
        self._frames = [_Frame()]
        try:
            with torch.enable_grad():
                output = forward()
                self._uses.read(output, math.inf)
        finally:
            self._is_recording = False

    def run(self, image: int, layer: str, forward: Callable[[], object]) -> bool:
        """Run a forward pass of an image; tell whether :class:`ReachedError` has stopped it.

        Args:
            image: its number.
            layer: name of the one that the pass is to be stopped at.
        """
        self._image = image
        self._frames = [_Frame()]
        self._is_settled = True
        try:
            forward()
        except ReachedError:
            self._reached[image] = max(self._uses.stops.get(layer, 0), self._reached.get(image, 0))
            return True
        return False

    def _forward(self, name: str, module: nn.Module) -> Forward:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            parent = self._frames[-1]
            key = f"{parent.key}/{name}:{parent.calls[name]}"
            parent.calls[name] += 1
            if self._is_recording:
                return self._recorded(name, key, original, args, kwargs)
            if self._is_known(key):
                parent.kept.append(key)
                return self._recalled(key)
            if name in self.unsettled:
                self._is_settled = False
            frame = _Frame(key)
            self._frames.append(frame)
            output = original(*args, **kwargs)
            self._frames.pop()
            if not self._is_settled:
                return output
            for inner in frame.kept:
                self._forget(inner)
            parent.kept.append(key)
            if not self._uses.is_needed(key):
                self._outlines[self._image, key] = outlined(output)
                return output
            self._cache[self._image, key] = output
            return detached(output)  # the code between modules may work in place

        return forward

    def _recorded(
        self, name: str, key: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        uses = self._uses
        uses.called(name if name in self._layers else None, (args, kwargs))
        self._frames.append(_Frame(key))
        if name in self._holders:
            output = original(*args, **kwargs)
        else:
            with torch.no_grad():
                output = original(*detached(args), **detached(kwargs))
        self._frames.pop()
        return uses.returned(key, output)

    def _is_known(self, key: str) -> bool:
        return (self._image, key) in self._cache or (self._image, key) in self._outlines

    def _recalled(self, key: str) -> Any:
        """What a call has returned; NaN in the place of what nobody reads any more."""
        place = self._image, key
        if place in self._cache:
            if self._uses.last.get(key, math.inf) >= self._reached.get(self._image, 0):
                return self._cache[place]
            self._outlines[place] = outlined(self._cache.pop(place))
        return unknown(self._outlines[place])

    def _forget(self, key: str) -> None:
        if (self._image, key) in self._cache:
            del self._cache[self._image, key]
        self._outlines.pop((self._image, key), None)

"""Activation replay: many images go through a detector from stop to stop, and no module runs twice.

A stop is a layer (sequential calibration) or a block (compensation). To reach it, the detector's own forward
pass runs from its start, but a module that has returned before returns what it returned then. Once a module has
returned, the outputs of the modules in it are forgotten, so few are asked on the way, however deep the stop lies.
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

from ..detectors.forward import forward_scope
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

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: args and kwargs."""

Place = tuple[str, int, str]
"""Where an output waits: tag of the walk, number of the image, key of the call."""

Completion = Callable[[Arguments, Any], Any]
"""Takes what a module was called with and what it returned; gives what it shall return."""


class ReachedError(Exception):
    """Raised in a forward pass to end it at its stop."""


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


def _holders(stops: Collection[str]) -> set[str]:
    """Names of the modules that hold a stop."""
    parts = [name.split(".") for name in stops]
    return {".".join(p[:n]) for p in parts for n in range(len(p))}


class Uses:
    """When outputs are read in a forward pass, in numbers of calls and returns since its start.

    Every output is tied to a leaf of its own in the autograd graph; what has a gradient path to the leaf
    is made of the output.

    Attributes:
        ends: by key of a call when it returns.
        last: by key of a call when its output is read for the last time.
        stops: by name of a stop when it is called first.
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

    def called(self, stop: str | None, arguments: Any) -> None:
        """Note that a module is called, or the stop of this name."""
        self.time += 1
        if stop is not None:
            self.stops.setdefault(stop, self.time)
        self.read(arguments, self.time)

    def returned(self, key: str, output: Any) -> Any:
        """Note that a call returns; what it returns comes back tied to its leaf."""
        self.time += 1
        self.read(output, self.time)
        self.ends[key], self.last[key] = self.time, self.time
        if has_untied(output):
            self.last[key] = math.inf  # no gradients: whatever comes later may depend on it
        return tied(output, self._leaves.setdefault(key, new_leaf()))

    def is_needed(self, key: str, *, ends_pass: bool) -> bool:
        """Whether what a call has returned is read in the pass to a later stop.

        Args:
            ends_pass: the pass ends with the call, so nobody has read it yet.
        """
        if key not in self.ends:
            return True
        end = self.ends[key]
        last = math.inf if ends_pass else self.last[key]
        return self.last[key] == math.inf or any(end < stop <= last for stop in self.stops.values())


class Walk:
    """One detector's way over its stops, for all images.

    Args:
        model: the detector.
        stops: names of the modules that passes will be stopped at.
        cache: holds the images under ``("image", number)``; outputs wait in it.
        scope: what of the detector a pass runs.
        ignored: modules of this class run as if they were code of the module that holds them.
        tag: tells walks that share a cache apart.
        uses: when outputs are read, as another walk has recorded it over the same stops.

    Attributes:
        unsettled: stops whose function will still change. What a forward pass computes after one of them
            is not kept.
        completions: by name of a stop what still happens to its output.
    """

    def __init__(
        self,
        model: nn.Module,
        stops: Collection[str],
        cache: ActivationCache,
        scope: str,
        *,
        ignored: type[nn.Module] | tuple[()] = (),
        tag: str = "",
        uses: Uses | None = None,
    ) -> None:
        self.pending = set(stops)
        self.completions: dict[str, Completion] = {}
        self._model = model
        self._scope = scope
        self._stops = frozenset(stops)
        self._holders = _holders(stops)
        # The stops, the modules that hold one, and the outermost ones that hold none.
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if name and name.rpartition(".")[0] in self._holders and not isinstance(module, ignored)
        }
        self._cache = cache
        self._tag = tag
        self.uses = uses or Uses()
        self._is_recording = False
        self._frames: list[_Frame] = []
        self._image = 0
        self._target: str | None = None
        self._reached: dict[int, int] = {}  # how far each image has come
        self._is_settled = True
        self._raw: set[Place] = set()  # outputs whose completion is still to come
        self._outlines: dict[Place, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, modules run as this walk has it."""
        forwards = {module: self._forward(name, module) for name, module in self._modules.items()}
        with replaced_forwards(forwards):
            yield

    def record(self, scope: str) -> None:
        """Learn from a forward pass of the first image, or of a part of it, which outputs are needed.

        Without it, or where the pass of another image goes another way, outputs wait until the module
        that has called returns.
        """
        self._is_recording = True
        self._frames = [_Frame()]
        try:
            with torch.enable_grad():
                output = forward_scope(self._model, self._cache["image", 0], scope)
                self.uses.read(output, math.inf)
        finally:
            self._is_recording = False

    def run(self, image: int, stop: str) -> bool:
        """Run a forward pass of an image; tell whether :class:`ReachedError` has ended it.

        Args:
            image: its number.
            stop: name of the one that the pass is to be ended at, by whoever watches it.
        """
        has_preprocessor = "data_preprocessor" in self._modules
        is_read = image in self._reached and has_preprocessor  # what it has returned waits
        self._image = image
        self._frames = [_Frame()]
        self._is_settled = True
        reached = self._reached.setdefault(image, 0)
        try:
            inputs = None if is_read else self._cache["image", image]
            forward_scope(self._model, inputs, self._scope)
        except ReachedError:
            self._reached[image] = max(self.uses.stops.get(stop, 0), reached)
            return True
        return False

    def reach(self, image: int, stop: str) -> tuple[Arguments, Any]:
        """Run a forward pass of an image up to the end of a stop's first call.

        Returns:
            What the stop was called with, and what it returned, before it is completed. They may hold NaN
            or infinite values: a quantized detector that diverged is a result.
        """
        found: list[tuple[Arguments, Any]] = []

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found.append(((args, kwargs), output))
            raise ReachedError

        self._target = stop
        with self._modules[stop].register_forward_hook(end, with_kwargs=True):
            try:
                self.run(image, stop)
            finally:
                self._target = None
        return found[0]

    def _forward(self, name: str, module: nn.Module) -> Forward:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            parent = self._frames[-1]
            key = f"{parent.key}/{name}:{parent.calls[name]}"
            parent.calls[name] += 1
            if self._is_recording:
                return self._recorded(name, key, original, args, kwargs)
            place = self._tag, self._image, key
            complete = self.completions.get(name)
            if place in self._cache or place in self._outlines:
                parent.kept.append(key)
                return self._recalled(place, (args, kwargs), complete)
            if name in self.pending:
                self._is_settled = False
            frame = _Frame(key)
            self._frames.append(frame)
            is_target = name == self._target
            # A module may work in place on its input, which is still to be read.
            copies = is_target or complete is not None
            run_args, run_kwargs = detached((args, kwargs)) if copies else (args, kwargs)
            output = original(*run_args, **run_kwargs)
            self._frames.pop()
            if complete is not None:
                output = complete((args, kwargs), output)
            if is_target:
                self._raw.add(place)
            elif not self._is_settled:
                return output
            for inner in frame.kept:
                self._forget(inner)
            parent.kept.append(key)
            if not self.uses.is_needed(key, ends_pass=is_target):
                self._outlines[place] = outlined(output)
                return output
            self._cache[place] = output
            return detached(output)  # the code between modules may work in place

        return forward

    def _recorded(
        self, name: str, key: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        uses = self.uses
        uses.called(name if name in self._stops else None, (args, kwargs))
        self._frames.append(_Frame(key))
        if name in self._holders:
            output = original(*args, **kwargs)
        else:
            with torch.no_grad():
                output = original(*detached(args), **detached(kwargs))
        self._frames.pop()
        return uses.returned(key, output)

    def _recalled(self, place: Place, arguments: Arguments, complete: Completion | None) -> Any:
        """What a call has returned, completed; NaN in the place of what nobody reads any more."""
        is_raw = place in self._raw
        self._raw.discard(place)
        if place in self._cache:
            if self.uses.last.get(place[2], math.inf) >= self._reached[self._image]:
                output = self._cache[place]
                if is_raw and complete is not None:
                    output = complete(arguments, output)
                    self._cache[place] = detached(output)
                return output
            self._outlines[place] = outlined(self._cache.pop(place))
        return unknown(self._outlines[place])

    def _forget(self, key: str) -> None:
        place = self._tag, self._image, key
        if place in self._cache:
            del self._cache[place]
        self._outlines.pop(place, None)

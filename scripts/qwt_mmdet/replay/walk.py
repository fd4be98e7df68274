"""Activation replay: a detector runs on many images from stop to stop, and no module runs twice.

A stop is a layer (sequential calibration) or a block (compensation). Each forward pass to a stop starts at the
detector's input. A module that has run in an earlier pass returns its cached output. When a module has returned,
the cached outputs of its submodules are deleted. So a pass recalls few outputs, however deep the stop is.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors.forward import forward_scope
from .cache import ActivationCache
from .forwards import (
    Forward,
    Placeholders,
    detached,
    has_untied,
    made_of,
    new_leaf,
    outlined,
    replaced_forwards,
    tied,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a module's call: args and kwargs."""

Place = tuple[str, int, str]
"""Cache key of an output: tag of the walk, number of the image, key of the call."""

Completion = Callable[[Arguments, Any], Any]
"""Takes the arguments and the output of a module's call; returns the output that replaces it."""


class ReachedError(Exception):
    """Raised in a forward pass to end it at its stop."""


@dataclass
class _Frame:
    """A running call.

    Attributes:
        key: path of calls: ``/backbone:0/stem:1`` is the second call of the stem in the backbone's first call.
        calls: number of calls of each module inside of it so far.
        kept: keys of the calls inside of it whose outputs are cached.
    """

    key: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)


def _holders(stops: Collection[str]) -> set[str]:
    """Names of the modules that hold a stop."""
    parts = [name.split(".") for name in stops]
    return {".".join(p[:n]) for p in parts for n in range(len(p))}


class Uses:
    """When outputs are read in a forward pass; time is the number of calls and returns since its start.

    Every output is tied to its own leaf of the autograd graph. A tensor with a gradient path to the leaf depends
    on the output.

    Attributes:
        ends: time at which a call returns, by its key.
        last: time at which a call's output is read for the last time, by its key.
        stops: time of the first call of a stop, by its name.
    """

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self.last: dict[str, float] = {}
        self.stops: dict[str, int] = {}
        self.time = 0
        self._leaves: dict[str, Tensor] = {}

    def read(self, values: Any, time: float) -> None:
        """Record that nested tensors are read at ``time``."""
        is_made_of = made_of(values, list(self._leaves.values()))
        for key in itertools.compress(self._leaves, is_made_of):
            self.last[key] = max(self.last[key], time)

    def called(self, stop: str | None, arguments: Any) -> None:
        """Record a call of a module; ``stop`` is its name if it is one."""
        self.time += 1
        if stop is not None:
            self.stops.setdefault(stop, self.time)
        self.read(arguments, self.time)

    def returned(self, key: str, output: Any) -> Any:
        """Record the return of a call; return its output, tied to its leaf."""
        self.time += 1
        self.read(output, self.time)
        self.ends[key], self.last[key] = self.time, self.time
        if has_untied(output):
            self.last[key] = math.inf  # no gradients: anything later may depend on it
        return tied(output, self._leaves.setdefault(key, new_leaf()))

    def is_needed(self, key: str, *, ends_pass: bool) -> bool:
        """Whether a call's output is read in the pass to a later stop.

        Args:
            ends_pass: whether the pass ends with the call, so that its output was not read yet.
        """
        if key not in self.ends:
            return True
        end = self.ends[key]
        last = math.inf if ends_pass else self.last[key]
        return self.last[key] == math.inf or any(end < stop <= last for stop in self.stops.values())


class Walk:
    """Replay of one detector over its stops, for all images.

    Args:
        model: the detector.
        stops: names of the modules at which passes will stop.
        cache: holds the images under ``("image", number)``; the outputs are added.
        scope: the part of the detector that a pass runs.
        ignored: modules of this class are treated as code of their parent module.
        tag: distinguishes walks that share a cache.
        uses: when outputs are read, as another walk over the same stops has recorded it.
        spent: numbers of the images that nobody reads after this walk. They leave the cache once their
            preprocessed form is cached.

    Attributes:
        pending: stops whose function will still change. Outputs that depend on one of them are not cached.
        completions: function that is applied to the output of a stop, by its name.
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
        spent: Container[int] = (),
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
        self._spent = spent if "data_preprocessor" in self._modules else ()
        self._is_recording = False
        self._frames: list[_Frame] = []
        self._image = 0
        self._target: str | None = None
        self._reached: dict[int, int] = {}  # time of the last stop, by image
        self._is_final = True
        self._raw: set[Place] = set()  # outputs that are not completed yet
        self._outlines: dict[Place, Any] = {}
        self._placeholders = Placeholders()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside: modules are replayed by this walk."""
        forwards = {module: self._forward(name, module) for name, module in self._modules.items()}
        with replaced_forwards(forwards):
            yield

    def record(self, scope: str) -> None:
        """Record in a forward pass of the first image, over ``scope``, which outputs are needed later.

        Outputs of calls that were not recorded are cached until the calling module returns.
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
        """Run a forward pass of an image; return whether a callback at the stop has raised :class:`ReachedError`."""
        has_preprocessor = "data_preprocessor" in self._modules
        is_read = image in self._reached and has_preprocessor  # its output is cached
        self._image = image
        self._frames = [_Frame()]
        self._is_final = True
        reached = self._reached.setdefault(image, 0)
        try:
            if is_read:
                inputs = None
            elif image in self._spent:
                inputs = self._cache.pop(("image", image))
            else:
                inputs = self._cache["image", image]
            forward_scope(self._model, inputs, self._scope)
        except ReachedError:
            self._reached[image] = max(self.uses.stops.get(stop, 0), reached)
            return True
        return False

    def reach(self, image: int, stop: str) -> tuple[Arguments, Any]:
        """Run a forward pass of an image up to the end of a stop's first call.

        Returns:
            The arguments of the stop and its output, not completed. They may hold NaN or infinite values, if a
            quantized detector diverges.
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
                self._is_final = False
            frame = _Frame(key)
            self._frames.append(frame)
            is_target = name == self._target
            # Copied, since a module may change its input in place, which is read again below.
            copies = is_target or complete is not None
            run_args, run_kwargs = detached((args, kwargs)) if copies else (args, kwargs)
            output = original(*run_args, **run_kwargs)
            self._frames.pop()
            if complete is not None:
                output = complete((args, kwargs), output)
            if is_target:
                self._raw.add(place)
            elif not self._is_final:
                return output
            for inner in frame.kept:
                self._forget(inner)
            parent.kept.append(key)
            if not self.uses.is_needed(key, ends_pass=is_target):
                self._outlines[place] = outlined(output)
                return output
            self._cache[place] = output
            return detached(output)  # code between modules may work in place

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
        """The output of an earlier call, completed; filled with NaN if it is not read any more."""
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
        return self._placeholders.of(self._outlines[place])

    def _forget(self, key: str) -> None:
        place = self._tag, self._image, key
        if place in self._cache:
            del self._cache[place]
        self._outlines.pop(place, None)

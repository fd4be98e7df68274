"""Run a detector from block to block, each module once per image."""

from collections import Counter
from collections.abc import Hashable
from typing import Any

from torch import nn

from ..detectors.forward import forward_scope
from ..replay.cache import ActivationCache
from ..replay.forwards import Forward, detached, outlined, replaced_forwards, unknown
from .kinds import Kind
from .modules import Arguments, compensated
from .trace import Call, Plan


class _BlockReachedError(Exception):
    """Stops a replay at the block whose input is wanted."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__("stop")
        self.arguments = arguments


class Stream:
    """One model's way over the blocks, for all calibration images.

    To reach a block, the model's own forward pass is replayed with everything that has run before
    replaced by its cached output. What has no cached output runs for real, so each module runs once
    per image, and a way that was lost (a resumed fit) is walked again.

    Args:
        tag: key of this stream in the cache.
        lingers: how many blocks longer a block's input is needed than for the block itself.

    Attributes:
        kinds: the compensation of the blocks that are fitted already, None for no compensation.
    """

    def __init__(
        self, tag: str, model: nn.Module, plan: Plan, cache: ActivationCache, lingers: int
    ) -> None:
        self.tag = tag
        self.model = model
        self.plan = plan
        self.cache = cache
        self.kinds: dict[str, Kind | None] = {}
        self._modules = {name: model.get_submodule(name) for name in plan.modules}
        self._last_use = plan.last_uses(lingers)
        self._raw: set[Hashable] = set()
        self._outlines: dict[Hashable, Any] = {}

    def arguments_at(self, target: int, image: int, batch: dict[str, Any] | None) -> Arguments:
        """Replay one image up to block ``target`` and return what that block is called with.

        Args:
            image: its number, for the cache.
            batch: the image; None once the model's preprocessor has run on it.

        The input may hold NaN or infinite values: a quantized model that diverged is a result.
        """
        replay = _Replay(self, target, image)
        forwards = {module: replay.stub(name, module) for name, module in self._modules.items()}
        try:
            with replaced_forwards(forwards):
                forward_scope(self.model, batch, self.plan.scope)
        except _BlockReachedError as reached:
            arguments = reached.arguments
        else:
            raise AssertionError(f"{self.plan.blocks[target]} was not reached")
        return arguments

    def run(self, index: int, image: int, arguments: Arguments, *, keep: bool) -> Any:
        """Run block ``index`` and cache what it returns as long as it is needed.

        Args:
            keep: leave the arguments as they are (a block may work in place).
        """
        name = self.plan.blocks[index]
        args, kwargs = detached(arguments) if keep else arguments
        output = self.model.get_submodule(name)(*args, **kwargs)
        self.remember(Call(name, 0), index, image, output, raw=True)
        return output

    def remember(self, call: Call, target: int, image: int, output: Any, *, raw: bool) -> bool:
        """Cache a call's output if a later block needs it; tell whether it was cached."""
        key = (self.tag, image, call)
        self._outlines[key] = outlined(output)
        if self._last_use.get(call, len(self.plan.blocks)) <= target:
            return False
        self.cache[key] = output
        if raw:
            self._raw.add(key)
        return True

    def recall(self, call: Call, target: int, image: int) -> tuple[bool, Any]:
        """A call's output on the way to ``target``: whether it is known, and what it is.

        What no later block needs comes as NaN; should it be needed after all, that is found at the
        block's input.
        """
        key = (self.tag, image, call)
        last = self._last_use.get(call, len(self.plan.blocks))
        if key in self.cache:
            return True, self.cache.pop(key) if last <= target else self.cache[key]
        if key in self._outlines and last < target:
            return True, unknown(self._outlines[key])
        return False, None

    def finish(self, call: Call, target: int, image: int, arguments: Arguments, output: Any) -> Any:
        """Compensate a block's output that was cached before its compensation was fitted."""
        key = (self.tag, image, call)
        is_raw = key in self._raw
        self._raw.discard(key)
        if not is_raw or self.kinds.get(call.module) is None:
            return output
        output = self.compensate(call, arguments, output)
        if key in self.cache:
            self.cache[key] = detached(output)
        return output

    def compensate(self, call: Call, arguments: Arguments, output: Any) -> Any:
        """The output of a fitted block with its compensation, of other modules as it is."""
        kind = self.kinds.get(call.module)
        if kind is None:
            return output
        return compensated(self.model.get_submodule(call.module), kind, arguments, output)


class _Replay:
    """One forward pass of one image up to one block."""

    def __init__(self, stream: Stream, target: int, image: int) -> None:
        self.stream = stream
        self.target = target
        self.image = image
        self.counts: Counter[str] = Counter()
        self.inside = False

    def stub(self, name: str, module: nn.Module) -> Forward:
        """What the module's forward does in this pass."""
        original = module.forward
        stream, target, image = self.stream, self.target, self.image

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            if name == stream.plan.blocks[target]:
                raise _BlockReachedError((args, kwargs))
            call = Call(name, self.counts[name])
            self.counts[name] += 1
            known, output = stream.recall(call, target, image)
            if known:
                return stream.finish(call, target, image, (args, kwargs), output)
            self.inside = True
            try:
                needs_input = stream.kinds.get(name) is not None
                run_args, run_kwargs = detached((args, kwargs)) if needs_input else (args, kwargs)
                output = original(*run_args, **run_kwargs)
            finally:
                self.inside = False
            output = stream.compensate(call, (args, kwargs), output)
            cached = stream.remember(call, target, image, output, raw=False)
            # The code between modules may work in place.
            return detached(output) if cached else output

        return forward

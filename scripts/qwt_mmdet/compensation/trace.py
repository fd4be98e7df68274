"""What runs between the blocks of a detector, in which order, and what depends on what."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..detectors.forward import forward_scope
from ..errors import QwtError
from ..replay.forwards import (
    Forward,
    detached,
    has_untied,
    made_of,
    new_leaf,
    replaced_forwards,
    tied,
)
from .modules import Arguments, aligned_input, block_output, channel_axis


class Call(NamedTuple):
    """One call of a module in the forward pass: of a block, or of a module outside of all blocks."""

    module: str
    number: int


@dataclass(frozen=True)
class Plan:
    """The forward pass as a sequence of calls, of which some are blocks.

    Attributes:
        scope: what of the detector has to run: ``backbone``, ``backbone+neck`` or ``detector``.
        blocks: names of the blocks in running order.
        positions: of each block's output, for the traced image.
        calls: in running order up to the last block.
        depends: for each call the earlier calls that its input is made of.
    """

    scope: str
    blocks: tuple[str, ...]
    positions: tuple[int, ...]
    calls: tuple[Call, ...]
    depends: tuple[tuple[int, ...], ...]

    @property
    def modules(self) -> list[str]:
        """Names of the modules of all calls."""
        return list(dict.fromkeys(call.module for call in self.calls))

    def last_uses(self, blocks_linger: int = 0) -> dict[Call, int]:
        """For each call the last block on whose way from the image its output is read.

        Calls between two blocks run on the way to the later one.

        Args:
            blocks_linger: how many blocks longer a block's input is needed.
        """
        last = dict.fromkeys(self.calls, -1)
        reached = 0
        for call, sources in zip(self.calls, self.depends, strict=True):
            is_block = call.module in self.blocks
            until = min(reached + blocks_linger * is_block, len(self.blocks) - 1)
            for source in sources:
                last[self.calls[source]] = max(last[self.calls[source]], until)
            reached += is_block
        return last


def replay_scope(blocks: Iterable[str]) -> str:
    """The smallest scope whose forward pass runs all these blocks."""
    components = {name.split(".")[0] for name in blocks}
    if components == {"backbone"}:
        return "backbone"
    return "backbone+neck" if components <= {"backbone", "neck"} else "detector"


def _traceable(model: nn.Module, blocks: list[str]) -> Iterator[str]:
    """The blocks, and all modules that neither hold a block nor lie in one."""
    holders = {name.rsplit(".", n)[0] for name in blocks for n in range(1, name.count(".") + 1)}
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if name and name not in holders and not inside:
            yield name


class _Tracer:
    """Records calls. Every call's output is tied to a leaf of its own in the autograd graph; a call
    depends on the leaves that its input has a gradient path to."""

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        self.model = model
        self.blocks = blocks
        self.calls: list[Call] = []
        self.depends: list[tuple[int, ...]] = []
        self.leaves: list[Tensor] = []
        self.positions: dict[str, int] = {}
        self.opaque: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.inside = False

    def forwards(self) -> dict[nn.Module, Forward]:
        """The recording forward of every module whose calls are recorded."""
        modules = {
            name: self.model.get_submodule(name) for name in _traceable(self.model, self.blocks)
        }
        return {module: self._traced(name, module) for name, module in modules.items()}

    def _traced(self, name: str, module: nn.Module) -> Forward:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            call = Call(name, self.counts[name])
            self.counts[name] += 1
            if name in self.blocks and call.number:
                raise QwtError(
                    f"The block {name} runs twice in one forward pass and cannot be compensated; "
                    "leave it out of 'blocks'."
                )
            self.depends.append(self._sources((args, kwargs)))
            self.calls.append(call)
            args, kwargs = detached(args), detached(kwargs)
            self.inside = True
            try:
                with torch.no_grad():
                    output = original(*args, **kwargs)
            finally:
                self.inside = False
            if name in self.blocks:
                self._check(name, module, (args, kwargs), output)
            return self._tied(output)

        return forward

    def _sources(self, arguments: Arguments) -> tuple[int, ...]:
        found = set(itertools.compress(range(len(self.leaves)), made_of(arguments, self.leaves)))
        return tuple(sorted(found | self.opaque))

    def _tied(self, output: Any) -> Any:
        if has_untied(output):
            self.opaque.add(len(self.leaves))  # no gradients: whatever comes later may depend on it
        self.leaves.append(new_leaf())
        return tied(output, self.leaves[-1])

    def _check(self, name: str, module: nn.Module, arguments: Arguments, output: Any) -> None:
        tensor = block_output(name, output)
        axis = channel_axis(module, tensor)
        aligned_input(arguments, tensor, axis)
        self.positions[name] = tensor.numel() // tensor.shape[axis]


def trace_blocks(model: nn.Module, blocks: list[str], batch: dict[str, Any], scope: str) -> Plan:
    """Find in which order blocks and the modules between them run, and what depends on what.

    Args:
        batch: one image as the loader gives it.

    Raises:
        QwtError: a block does not run, runs twice, or returns something that cannot be compensated.
    """
    tracer = _Tracer(model, blocks)
    with replaced_forwards(tracer.forwards()), torch.enable_grad():
        forward_scope(model, batch, scope)
    missing = [name for name in blocks if name not in tracer.positions]
    if missing:
        raise QwtError(
            f"The blocks {', '.join(missing)} do not run in the forward pass; leave them out of "
            "'blocks'."
        )
    end = max(tracer.calls.index(Call(name, 0)) for name in blocks) + 1
    order = tuple(call.module for call in tracer.calls if call.module in blocks)
    return Plan(
        scope,
        order,
        tuple(tracer.positions[name] for name in order),
        tuple(tracer.calls[:end]),
        tuple(tracer.depends[:end]),
    )

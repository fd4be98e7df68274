"""Fit the compensation of all blocks of a quantized detector, one block after the other.

The model's own code runs between the blocks. For block i the forward pass is replayed with the
blocks before it replaced by stubs that return their cached output, and stopped at block i; there the
full-precision block and the quantized block run once each. Nothing else of the network is run, so a
fit costs one full-precision and one quantized forward per image plus what lies between the blocks.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QwtError
from ..progress import progress
from ..quantization.convert import forward_scope
from ..settings import CompensationSettings
from .blocks import find_blocks
from .cache import ActivationCache
from .modules import add_compensation, aligned_input, as_rows, block_input
from .solve import Solution, choose_ridge, solve_ridge
from .statistics import RegressionStatistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockFit:
    """The compensation of one block and what is known about it.

    Errors are mean squared differences per output element to the target, r² is the part of the
    variance of the quantization error that x W + b explains.

    Attributes:
        weight, bias: W [in, out] and b [out], float32.
        kept: the gate's decision; a block that is not kept runs without compensation.
        positions: output positions (tokens) of one image, on average.
        parameters: numbers in W and b. multiply_adds: of x W for one image, on average.
    """

    name: str
    weight: Tensor
    bias: Tensor
    kept: bool
    ridge: float
    solver: str
    positions: float
    parameters: int
    multiply_adds: float
    fit_error_before: float
    fit_error_after: float
    fit_r2: float
    holdout_error_before: float | None
    holdout_error_after: float | None
    holdout_r2: float | None
    seconds: float


@dataclass(frozen=True)
class Compensation:
    """The fitted compensation of a quantized detector: blocks in the order in which they run."""

    settings: CompensationSettings
    blocks: tuple[BlockFit, ...]


class _BlockReachedError(Exception):
    """Stops a replay at the block whose input is wanted."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("stop")
        self.arguments = args, kwargs


@contextlib.contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other functions in place of their forward, until the context ends."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def replay_scope(blocks: Iterable[str]) -> str:
    """The smallest part of a detector whose forward pass runs all these blocks."""
    parts = {name.split(".")[0] for name in blocks}
    if parts == {"backbone"}:
        return "backbone"
    return "backbone+neck" if parts <= {"backbone", "neck"} else "detector"


def trace_blocks(
    model: nn.Module, blocks: list[str], batch: dict[str, Any], scope: str
) -> tuple[list[str], list[list[int]]]:
    """Find in which order blocks run and which earlier blocks each block's input comes from.

    Every block's output is cut off as a leaf of the autograd graph; a block depends on the leaves
    that its input has a gradient path to.

    Returns:
        The names in running order, and for each the indices of the blocks that its input uses.

    Raises:
        QwtError: a block does not run, runs twice, or returns something else than a tensor.
    """
    order: list[str] = []
    inputs: list[Tensor] = []
    leaves: list[Tensor] = []

    def traced(name: str, original: Callable[..., Any]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if name in order:
                raise QwtError(
                    f"The block {name} runs twice in one forward pass and cannot be compensated; "
                    "leave it out of 'blocks'."
                )
            order.append(name)
            inputs.append(block_input(args, kwargs))
            with torch.no_grad():
                output = original(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise QwtError(
                    f"The block {name} returns a {type(output).__name__}, not a tensor; choose "
                    "other 'blocks'."
                )
            aligned_input(inputs[-1], output)
            leaves.append(output.detach().requires_grad_())
            # In-place operations are not allowed on leaves, but on copies of them.
            return leaves[-1].clone()

        return forward

    modules = {name: model.get_submodule(name) for name in blocks}
    forwards = {module: traced(name, module.forward) for name, module in modules.items()}
    with replaced_forwards(forwards), torch.enable_grad():
        forward_scope(model, batch, scope)
    missing = [name for name in blocks if name not in order]
    if missing:
        raise QwtError(
            f"The blocks {', '.join(missing)} do not run in the forward pass; leave them out of "
            "'blocks'."
        )
    depends: list[list[int]] = []
    for index, x in enumerate(inputs):
        if index == 0 or not x.requires_grad:
            depends.append([])
            continue
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                x.sum(), leaves[:index], allow_unused=True, retain_graph=True
            )
        depends.append([k for k, gradient in enumerate(gradients) if gradient is not None])
    return order, depends


@dataclass
class _Path:
    """One model's way over the blocks, for all calibration batches.

    Attributes:
        tag: key of this path in the cache.
        needed_until: for each block, the last replay that uses its output.
    """

    model: nn.Module
    blocks: list[str]
    scope: str
    cache: ActivationCache
    tag: str
    needed_until: list[int]
    shapes: dict[tuple[int, int], torch.Size] = field(default_factory=dict)
    pending: Solution | None = None

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.blocks[index])

    def _stub(self, index: int, target: int, batch_index: int) -> Callable[..., Tensor]:
        key = (self.tag, batch_index, index)
        finishes = index == target - 1 and self.pending is not None

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = block_input(args, kwargs)
            if self.needed_until[index] < target:
                # Nothing uses it any more; should that be wrong, the NaN is found at the target.
                return x.new_full((), float("nan")).expand(self.shapes[batch_index, index])
            output = self.cache[key].to(x.device)
            if finishes:
                weight, bias = self.pending.weight.float(), self.pending.bias.float()
                output = add_compensation(output, x, weight, bias)
                self.cache[key] = output.cpu()
            # The code between blocks may work in place.
            return output.clone()

        return forward

    def arguments_at(
        self, target: int, batch_index: int, batch: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replay one batch up to block ``target`` and return what that block is called with."""

        def stop(*args: Any, **kwargs: Any) -> Tensor:
            raise _BlockReachedError(args, kwargs)

        forwards = {self.block(k): self._stub(k, target, batch_index) for k in range(target)}
        forwards[self.block(target)] = stop
        try:
            with replaced_forwards(forwards):
                forward_scope(self.model, batch, self.scope)
        except _BlockReachedError as reached:
            arguments = reached.arguments
        else:
            raise AssertionError(f"{self.blocks[target]} was not reached")
        if not torch.isfinite(block_input(*arguments)).all():
            raise QwtError(
                f"The input of block {self.blocks[target]} holds NaN or infinite values; the "
                "quantized model has diverged, so raise the bit widths of the blocks before it."
            )
        for k in range(target):
            key = (self.tag, batch_index, k)
            if self.needed_until[k] <= target and key in self.cache:
                del self.cache[key]
        return arguments

    def run(self, index: int, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """Run block ``index`` on copies of the arguments (a block may work in place)."""
        args, kwargs = arguments

        def copy(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        return self.block(index)(*map(copy, args), **{k: copy(v) for k, v in kwargs.items()})

    def store(self, index: int, batch_index: int, output: Tensor) -> None:
        self.shapes[batch_index, index] = output.shape
        if self.needed_until[index] > index:
            self.cache[self.tag, batch_index, index] = output.cpu()


def split_holdout(images: int, fraction: float) -> list[bool]:
    """Tell for each of ``images`` calibration images whether it is held out of the fit.

    Held-out images are spread evenly.

    Raises:
        QwtError: no image would be left on one of the two sides.
    """
    held = [int((i + 1) * fraction) > int(i * fraction) for i in range(images)]
    if all(held) or (fraction > 0 and not any(held)):
        raise QwtError(
            f"{images} calibration images cannot be split with holdout_fraction {fraction}; use more "
            "calibration images."
        )
    return held


def _solve(
    settings: CompensationSettings, fit: RegressionStatistics, holdout: RegressionStatistics
) -> Solution:
    if settings.ridge == "auto":
        return choose_ridge(fit, holdout)
    return solve_ridge(fit, float(settings.ridge))


def _is_kept(settings: CompensationSettings, block: dict[str, Any]) -> bool:
    if settings.gate == "holdout":
        return block["holdout_error_after"] < block["holdout_error_before"]
    if settings.gate == "fit":
        return block["fit_r2"] > 0
    return True


def _errors(
    solution: Solution, statistics: RegressionStatistics, prefix: str
) -> dict[str, float | None]:
    keys = [f"{prefix}_{key}" for key in ("error_before", "error_after", "r2")]
    if statistics.count == 0:
        return dict.fromkeys(keys)
    elements = statistics.count * len(statistics.mean_y)
    after = statistics.error_after(solution.weight, solution.bias)
    variance = float(statistics.yy.sum())
    r2 = 1 - after / variance if variance > 0 else 0.0
    return dict(
        zip(keys, (statistics.error_before() / elements, after / elements, r2), strict=True)
    )


@torch.no_grad()
def fit_compensation(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[dict[str, Any]],
    settings: CompensationSettings,
    *,
    memory_gb: float = 4.0,
) -> Compensation:
    """Fit the compensation of a quantized detector's blocks on calibration images.

    Args:
        model: quantized and calibrated; it is not changed.
        reference: the same detector in full precision.
        loader: calibration batches as mmdet's test step takes them.
        settings: form, target, ridge and gate.
        memory_gb: activations beyond this wait on disk, with the same result.

    Raises:
        QwtError: no images, no registered blocks, a block that cannot be compensated, or values
            that are not finite.
    """
    batches = list(loader)
    if not batches:
        raise QwtError("There are no calibration images; choose at least one.")
    sizes = [len(batch["inputs"]) for batch in batches]
    held = iter(split_holdout(sum(sizes), settings.holdout_fraction))
    held_out = [[next(held) for _ in range(size)] for size in sizes]
    names = find_blocks(reference, settings.blocks)
    scope = replay_scope(names)
    order, depends = trace_blocks(reference, names, batches[0], scope)
    last_use = [
        max((i for i, d in enumerate(depends) if k in d), default=k) for k in range(len(order))
    ]
    fits: list[BlockFit] = []
    with ActivationCache(memory_gb) as cache:
        # A quantized output is compensated in the replay for the next block, which passes its input
        # by; so what that input is made of must live one replay longer.
        quantized = _Path(
            model, order, scope, cache, "quantized",
            [max(last + 1, k + 1) if last > k else k for k, last in enumerate(last_use)],
        )  # fmt: skip
        full = _Path(reference, order, scope, cache, "reference", last_use)
        for index, name in enumerate(progress(order, "Fitting", unit="block")):
            block = _fit_block(index, name, batches, held_out, quantized, full, settings)
            fits.append(block)
            solution = Solution(block.weight, block.bias, block.ridge, block.solver)
            quantized.pending = solution if block.kept else None
    return Compensation(settings, tuple(fits))


def _fit_block(
    index: int,
    name: str,
    batches: list[dict[str, Any]],
    held_out: list[list[bool]],
    quantized: _Path,
    full: _Path,
    settings: CompensationSettings,
) -> BlockFit:
    start = time.monotonic()
    sums: tuple[RegressionStatistics, RegressionStatistics] | None = None
    for batch_index, batch in enumerate(batches):
        arguments = quantized.arguments_at(index, batch_index, batch)
        output = quantized.run(index, arguments)
        if settings.target == "reference":
            expected = full.run(index, full.arguments_at(index, batch_index, batch))
            full.store(index, batch_index, expected)
        else:
            expected = full.run(index, arguments)
        quantized.store(index, batch_index, output)
        x = aligned_input(block_input(*arguments), output)
        error = expected - output
        for image, held in enumerate(held_out[batch_index]):
            rows_x, rows_y = as_rows(x[image : image + 1]), as_rows(error[image : image + 1])
            if sums is None:
                sums = tuple(
                    RegressionStatistics.zeros(rows_x.shape[1], rows_y.shape[1], rows_x.device)
                    for _ in range(2)
                )
            sums[held].update(rows_x, rows_y)
    fit, holdout = sums
    solution = _solve(settings, fit, holdout)
    weight, bias = solution.weight.float().cpu(), solution.bias.float().cpu()
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise QwtError(f"The compensation of block {name} is not finite; set a larger ridge.")
    positions = (fit.count + holdout.count) / sum(map(len, held_out))
    values: dict[str, Any] = {
        **_errors(solution, fit, "fit"),
        **_errors(solution, holdout, "holdout"),
        "name": name,
        "weight": weight,
        "bias": bias,
        "ridge": solution.ridge,
        "solver": solution.solver,
        "positions": positions,
        "parameters": weight.numel() + bias.numel(),
        "multiply_adds": positions * weight.numel(),
        "seconds": time.monotonic() - start,
    }
    block = BlockFit(**values, kept=_is_kept(settings, values))
    logger.info(
        "%s: %d -> %d channels, %d tokens, error %.3g -> %.3g on fitted and %s on held-out images, "
        "r2 %.3f, ridge %.1g (%s), %s, %.1f s",
        name, *weight.shape, fit.count + holdout.count,
        block.fit_error_before, block.fit_error_after,
        "no error" if block.holdout_error_before is None
        else f"{block.holdout_error_before:.3g} -> {block.holdout_error_after:.3g}",
        block.fit_r2, block.ridge, block.solver,
        "kept" if block.kept else "not kept", block.seconds,
    )  # fmt: skip
    return block

"""A GPU that is only pretended: it finds tensors in the wrong place where no GPU is.

Its tensors lie in the processor's memory and say that they are on ``cuda:0``. As on a GPU, they have no form as
a numpy array, nothing is computed from them and a tensor on the CPU together (numbers without axes apart), and
a function returns on the GPU what it makes of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import mmcv._ext
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda:0")

TAKE_BOTH = {Tensor.copy_, torch.tensor, torch._has_compatible_shallow_copy_type}
"""What takes tensors of both places."""

ASKS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "requires_grad")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.data_ptr),
    *(Tensor.is_floating_point, Tensor.item, Tensor.tolist, Tensor.__len__, Tensor.__bool__),
}  # fmt: skip
"""What returns no tensor; answered first because it is called most."""

WRITTEN_IN_PYTHON = ("torch.functional", "torch.nn.functional")
"""Modules of torch whose functions ask a tensor for its place and make others there."""

MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as, torch.as_tensor, torch.asarray}
"""What may return its first argument in another place."""


class GpuTensor(Tensor):
    """A tensor on the pretended GPU."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return DEVICE.index

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first."
        )

    __array__ = __dlpack__ = numpy

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            vars(copied).update(vars(self))  # marks parameters
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"a tensor on {DEVICE} is saved; without a GPU nobody could load it")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """Sees the functions that no tensor of the GPU is given to, too."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {})


def _is_gpu(device: Any) -> bool:
    return device is not None and (device is DEVICE or torch.device(device).type == "cuda")


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            found += _tensors(value)
    return found


def _as_class(value: Any, old: type, new: type) -> Any:
    """All tensors of one class as another; they keep their memory."""
    kind = type(value)
    if kind is old:
        return value.as_subclass(new)
    if kind in (list, tuple):
        return kind([_as_class(one, old, new) for one in value])
    if kind is dict:
        return {key: _as_class(one, old, new) for key, one in value.items()}
    if isinstance(value, tuple) and kind is not torch.Size:  # a named one, such as torch.max's
        return kind([_as_class(one, old, new) for one in value])
    return value


def _placed(value: Any) -> Any:
    return _as_class(value, Tensor, GpuTensor)


def _wanted(function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, bool] | None:
    """Device, type and copy that a function moves its first argument to; None where it moves nothing."""
    if function is Tensor.cpu:
        return torch.device("cpu"), None, False
    if function is Tensor.cuda:
        return DEVICE, None, False
    if function in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
        return kwargs.get("device", args[0].device), kwargs.get("dtype"), False
    if function in (Tensor.type_as, Tensor.to) and isinstance(args[-1], Tensor) and len(args) > 1:
        return args[1].device, args[1].dtype, False
    if function is Tensor.to:
        options = dict(kwargs)
        copies = options.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **options)
        return device or args[0].device, dtype, copies
    return None


def _moved(tensor: Tensor, device: Any, dtype: torch.dtype | None, copies: bool) -> Tensor:
    to_gpu, on_gpu = _is_gpu(device), isinstance(tensor, GpuTensor)
    with torch._C.DisableTorchFunctionSubclass():
        where = "cpu" if to_gpu else device
        moved = Tensor.to(tensor, where, dtype or tensor.dtype, copy=copies or to_gpu is not on_gpu)
    return _placed(moved) if to_gpu else moved


def _check_places(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raise what torch raises where tensors of both places meet."""
    name = getattr(function, "__name__", str(function))
    elsewhere = [t for t in tensors if not isinstance(t, GpuTensor)]
    if not elsewhere or (name == "__getitem__" and isinstance(args[0], GpuTensor)):
        return  # indices may be on the CPU
    if name == "__setitem__" and not _tensors(args[1:2]):
        return  # a copy
    writes = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    into_cpu = writes and not isinstance(args[0], GpuTensor)
    if into_cpu or function in (torch.cat, torch.stack) or any(t.dim() for t in elsewhere):
        shapes = [(tuple(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {shapes} in {name}"
        )


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function of torch or mmcv returns, with tensors of the GPU among its arguments or not."""
    if function in ASKS:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    tensors = _tensors(args) + _tensors(kwargs.values()) if kwargs else _tensors(args)
    here = [t for t in tensors if isinstance(t, GpuTensor)]
    device = kwargs.get("device")
    if function in MOVES:
        wanted = _wanted(function, args, kwargs)
        if wanted is not None and (here or _is_gpu(wanted[0])):
            return _moved(args[0], *wanted)
    if not here and not _is_gpu(device):
        return function(*args, **kwargs)
    if len(here) < len(tensors) and here and function not in TAKE_BOTH:
        _check_places(function, args, kwargs, tensors)
    if _is_gpu(device):
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        kwargs = {**kwargs, "device": "cpu"}
        if kwargs.pop("requires_grad", False):  # of what lies on the GPU, which is a leaf
            return compute(function, args, {**kwargs, "device": device}).requires_grad_()
    elif function is torch.tensor and args[0] is not here[0]:
        device = "cpu"  # numbers from the GPU
    elif device is None:
        device = tensors[0].device if function is Tensor.copy_ else DEVICE
    with torch._C.DisableTorchFunctionSubclass():
        if getattr(function, "__module__", None) in WRITTEN_IN_PYTHON:
            args, kwargs = (_as_class(given, GpuTensor, Tensor) for given in (args, kwargs))
        found = function(*args, **kwargs)
    return _placed(found) if _is_gpu(device) else found


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside, torch, mmcv and mmdet compute on a pretended GPU where they are asked for one."""
    operators = {
        name: lambda *args, _operator=operator, **kwargs: compute(_operator, args, kwargs)
        for name, operator in vars(mmcv._ext).items()
        if callable(operator)
    }
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with (
        mock.patch.multiple(mmcv._ext, **operators),
        mock.patch.multiple(
            torch.cuda,
            current_device=lambda: DEVICE.index,
            get_device_name=lambda *_: "pretended",
            synchronize=lambda *_: None,
        ),
        _Factories(),
    ):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)

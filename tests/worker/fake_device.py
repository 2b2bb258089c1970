"""A CUDA device without a GPU: tensors without contents, on which every read by the host raises, and kernels that are only checked.

`fake_cuda` is for code that a CUDA graph captures. torch computes the shapes of results as it would on the device; a shape or a
branch that depends on contents raises, as does every copy to the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class HostRead(AssertionError):
    """The host read the contents of a tensor on the device."""


class Launch(NamedTuple):
    """A launch of a kernel, whose arguments have passed the checks."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _NoCopyToHost(TorchDispatchMode):
    """Raises `HostRead` if an operation on tensors of the device gives or fills a tensor of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(each.device.type == "cuda" for each in given) and any(each.device.type == "cpu" for each in results):
            raise HostRead(f"{func} copies to the host")
        return out


class _WithoutGuard(TorchFunctionMode):
    """Indexes and copies by operators. Python's bindings of these make the tensor's device the current one, which a build of torch
    without CUDA does not have.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.__setitem__:
            tensor, key, value = args
            view = _indexed(tensor, key)
            assert view._is_view(), "tensors as indices make a copy: use index_put_"
            return aten.copy_(view, value) if isinstance(value, Tensor) else aten.fill_.Scalar(view, value)
        if func is Tensor.copy_:
            return aten.copy_(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _indexed(tensor: Tensor, key: Any) -> Tensor:
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(each, Tensor) for each in keys):
        return aten.index.Tensor(tensor, [None if each == slice(None) else each for each in keys])  # type: ignore[no-any-return]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (tensor.dim() - sum(each is not None for each in keys) + 1)
    dim = 0
    for each in keys:
        if isinstance(each, slice):
            tensor = aten.slice.Tensor(tensor, dim, each.start, each.stop, each.step or 1)
        elif each is None:
            tensor = aten.unsqueeze.default(tensor, dim)
        else:
            tensor, dim = aten.select.int(tensor, dim, each), dim - 1
        dim += 1
    return tensor


@contextmanager
def fake_cuda() -> Iterator[list[Launch]]:
    """Yields the launches so far. Tensors that are made inside have no contents."""
    launches: list[Launch] = []

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del warmup
        launches.append(_checked(kernel, grid, given, named))

    with (
        FakeTensorMode(),
        _NoCopyToHost(),
        _WithoutGuard(),
        patch.object(JITFunction, "run", run),
        patch.object(Autotuner, "run", run),
    ):
        yield launches


def _checked(kernel: Any, grid: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Raises `TypeError` for arguments that the kernel does not have, `AssertionError` for those it cannot read."""
    function = kernel
    while not inspect.isfunction(function):
        function = function.fn
    parameters = inspect.signature(function).parameters
    tuned = set(kernel.configs[0].all_kwargs()) if isinstance(kernel, Autotuner) else set()
    arguments = inspect.signature(function).bind_partial(*given, **{k: v for k, v in named.items() if k in parameters}).arguments
    assert parameters.keys() - arguments.keys() <= tuned, f"{function.__name__} is launched without an argument"
    assert named.keys() - parameters.keys() <= {"num_warps", "num_stages"}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            assert value.device == CUDA, f"{function.__name__} is given {name} on {value.device}"
        else:
            assert value is None or type(value) in (int, float, bool) or name.isupper(), f"{name} is {value!r}"
    places = grid(arguments) if callable(grid) else grid
    assert all(type(place) is int and place >= 0 for place in places), places
    return Launch(function.__name__, tuple(places), dict(arguments))

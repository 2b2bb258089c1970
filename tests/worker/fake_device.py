"""A CUDA device without a GPU: tensors without contents, on which every read by the host raises, and launches that compile nothing.

`fake_cuda` is for code that a CUDA graph captures. torch computes the shapes of results as it would on the device; a shape or a
branch that depends on contents raises, as does every copy to the host. Triton binds the arguments of a launch as it would for an
sm_90 device, and says what it would compile for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class HostRead(AssertionError):
    """The host read the contents of a tensor on the device."""


class Launch(NamedTuple):
    """A launch of a kernel: what Triton compiles for its arguments, unless it has compiled the same before."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def compiled(self) -> str:
        """Equal for launches that share one compilation."""
        return repr((self.name, *self[1:]))


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
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(each, FakeTensor) for each in given):
            with _disable_current_modes():  # memory of the host that was made before, and has contents
                return func(*args, **(kwargs or {}))
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


class _Pointer:
    """A tensor as Triton sees it: its type, and how far it is from an aligned address."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset_bytes = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset_bytes


class _Driver:
    """Triton's driver of a device that nothing is loaded on."""

    def get_current_device(self) -> str:
        return "fake"

    def get_current_stream(self, device: str) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def fake_cuda() -> Iterator[list[Launch]]:
    """Yields the launches so far. Tensors that are made inside have no contents."""
    launches: list[Launch] = []
    bind = JITFunction.run

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        for each in (*given, *named.values()):
            assert not isinstance(each, Tensor) or each.device == CUDA, f"{kernel.__name__} is given a tensor on {each.device}"
        pointers = [_Pointer(each) if isinstance(each, Tensor) else each for each in given]
        bind(kernel, *pointers, grid=grid, warmup=warmup, **named)

    def compile_nothing(
        kernel: Any, key: str, signature: Any, device: str, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        del key, device, warmup
        launches.append(Launch(kernel, signature, constants, attributes, dict(options.__dict__)))

    def run_first(tuned: Any, *given: Any, **named: Any) -> None:
        tuned.fn.run(*given, **named, **tuned.configs[0].all_kwargs())

    with (
        FakeTensorMode(),
        _NoCopyToHost(),
        _WithoutGuard(),
        patch.object(driver, "_active", _Driver()),
        patch.object(JITFunction, "run", run),
        patch.object(JITFunction, "_do_compile", compile_nothing),
        patch.object(Autotuner, "run", run_first),
    ):
        yield launches

"""Which device a name opens, why one is refused, and who may name CUDA.

What is refused here is refused by this machine's own torch and driver: nothing of CUDA is replaced.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnstore.errors import InvalidArgument
from attnstore_worker.device.factory import open_device
from attnstore_worker.errors import DeviceUnavailable
from attnstore_worker.options import device_name

ROOT = Path(__file__).parents[3]
MAY_NAME_CUDA = ("worker/attnstore_worker/device/", "attnstore/attention/triton")

no_cuda_build = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12", "auto", "simulated"])
def test_a_name_of_a_device_is_taken_as_it_is(name: str) -> None:
    assert device_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:1234", "cuda0", " cpu", "cpu:0", "auto:1", "cuda:\u0663"]
)
def test_any_other_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not cpu, cuda, cuda:N or auto"):
        device_name(name)
    with pytest.raises(InvalidArgument):
        open_device(name)


def test_the_cpu_is_a_device_whose_blocks_are_host_memory() -> None:
    device = open_device("cpu")
    assert (device.name, device.torch_device.type, device.addressable) == ("cpu", "cpu", True)
    device.close()


@no_cuda_build
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_build_of_torch_for_the_cpu_is_the_reason_for_no_cuda(name: str) -> None:
    index = name.partition(":")[2] or "0"
    with pytest.raises(DeviceUnavailable) as refused:
        open_device(name)
    assert str(refused.value) == (
        f"cuda:{index} cannot be used: torch {torch.__version__} is a build for the CPU; install one for CUDA"
    )


@no_device
def test_cuda_is_refused_with_one_line_where_there_is_none() -> None:
    with pytest.raises(DeviceUnavailable, match=r"cuda:3 cannot be used: \S[^\n]+$"):
        open_device("cuda:3")


@no_device
def test_auto_is_the_cpu_where_there_is_no_cuda_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attnstore_worker"):
        device = open_device("auto")
    assert device.name == "cpu"
    [record] = caplog.records
    assert (record.levelno, record.name) == (logging.INFO, "attnstore_worker.device.factory")
    assert record.getMessage().startswith("the model runs on the CPU: cuda:0 cannot be used: ")
    device.close()


@pytest.mark.gpu
def test_auto_is_a_gpu_that_works_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attnstore_worker"):
        device = open_device("auto")
    assert (device.name, device.addressable, device.uses_triton) == ("cuda:0", False, True)
    [record] = caplog.records
    assert record.getMessage() == f"the model runs on cuda:0: {device.description}"
    device.close()


@pytest.mark.gpu
def test_an_index_that_is_not_there_is_refused_with_the_number_of_devices() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(DeviceUnavailable, match=f"cuda:{count} cannot be used: there (is one device|are {count} devices), cuda:0"):
        open_device(f"cuda:{count}")


def _names_of_cuda(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of a module that name `torch.cuda`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
                yield node.lineno
            case ast.ImportFrom(module=str(module)) if module == "torch.cuda" or module.startswith("torch.cuda."):
                yield node.lineno
            case ast.ImportFrom(module="torch", names=names) if any(each.name == "cuda" for each in names):
                yield node.lineno
            case ast.Import(names=names) if any(f"{each.name}.".startswith("torch.cuda.") for each in names):
                yield node.lineno
            case ast.Constant(value=str(text)) if text == "torch.cuda" or text.startswith("torch.cuda."):
                yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\ntorch.cuda.synchronize()", [2]),
        ("import torch.cuda", [1]),
        ("import torch.cuda.streams as streams", [1]),
        ("from torch import nn, cuda", [1]),
        ("from torch.cuda import Stream", [1]),
        ("import importlib\nimportlib.import_module('torch.cuda')", [2]),
        ("import torch\ntorch.device('cuda')\ntorch.version.cuda\n'''Not torch.cuda itself.'''", []),
    ],
)
def test_every_way_to_name_cuda_is_found(source: str, lines: list[int]) -> None:
    assert list(_names_of_cuda(ast.parse(source))) == lines


def test_only_the_device_package_and_the_launching_of_kernels_name_cuda() -> None:
    """import-linter sees that torch is imported, but not which part of it is used."""
    paths = [path for folder in ("attnstore", "worker", "experiments") for path in (ROOT / folder).rglob("*.py")]
    named = {str(path.relative_to(ROOT)): list(_names_of_cuda(ast.parse(path.read_text()))) for path in paths}
    naming = {path for path, lines in named.items() if lines}
    assert "worker/attnstore_worker/device/cuda.py" in naming
    assert [path for path in sorted(naming) if not path.startswith(MAY_NAME_CUDA)] == []

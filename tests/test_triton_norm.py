"""The Triton kernels compute what PyTorch's batch norm, addition and ReLU do, forwards and backwards.

Triton's interpreter runs them on the CPU. Triton reads TRITON_INTERPRET at import, so they run in a separate process.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tune_kd.training import networks

pytestmark = [
    pytest.mark.long,  # a process imports torch; not slow, since these are the only tests of the kernels
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA"),
]

SMALL = {"TILE": 64, "PROGRAMS": 4}  # so small that a few rows fill several tiles of several parts
SHAPES = {"odd": (3, 5, 7, 3), "one column": (5, 8, 1, 1), "more channels than a tile has": (2, 70, 2, 3)}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Return a function that calls a function of this file in a process with Triton's interpreter."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, context) as process:
        yield lambda function, *arguments: process.submit(_with_small_tiles, function, *arguments).result()


def _with_small_tiles(function: Callable[..., Any], *arguments: Any) -> Any:
    from benchmarks import triton_norm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with patch.multiple(triton_norm, **SMALL):
        return function(*arguments)


def _both(
    precision: str, shape: tuple[int, ...], adds: bool, relu: bool, device: str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """Return output, gradients and running statistics of the kernels, each with that of PyTorch in float32."""
    from benchmarks.triton_norm import Norm

    kind = getattr(torch, precision)
    images, shortcut, slope = (torch.randn(shape, device=device).mul(2).add(shift).to(kind) for shift in (3, 0, 0))
    norm = nn.BatchNorm2d(shape[1]).to(device)
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    mine = deepcopy(norm)

    def passed(forward: Callable[..., Tensor], norm: nn.BatchNorm2d, kind: torch.dtype) -> list[Tensor]:
        given = [each.to(kind).clone().requires_grad_() for each in ((images, shortcut) if adds else (images,))]
        out = forward(*given)
        out.backward(slope.to(kind))
        assert norm.weight.grad is not None and norm.bias.grad is not None
        gradients = [each.grad for each in given if each.grad is not None]
        assert all(each.dtype == kind for each in (out, *gradients)) and len(gradients) == len(given)
        return [out.detach(), *gradients, norm.weight.grad, norm.bias.grad, *norm.buffers()]

    def plain(images: Tensor, shortcut: Tensor | None = None) -> Tensor:
        out = norm(images) if shortcut is None else norm(images) + shortcut
        return out.relu() if relu else out

    return list(zip(passed(Norm(mine, relu), mine, kind), passed(plain, norm, torch.float32), strict=True))


@pytest.mark.parametrize(
    ("precision", "shape", "adds", "relu"),
    [
        *(("float32", "odd", adds, relu) for adds in (False, True) for relu in (False, True)),
        *((half, "odd", adds, True) for half in ("bfloat16", "float16") for adds in (False, True)),
        *(("float32", shape, True, True) for shape in SHAPES if shape != "odd"),
    ],
)
def test_output_gradients_and_running_statistics_are_those_of_pytorch(
    precision: str, shape: str, adds: bool, relu: bool, interpreted: Callable[..., Any]
) -> None:
    tolerance = TOLERANCE[precision]
    for found, expected in interpreted(_both, precision, SHAPES[shape], adds, relu):
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("adds", [False, True])
def test_on_a_gpu_the_kernels_compute_what_pytorch_does(precision: str, adds: bool) -> None:
    """A feature map of ResNet-18's first stage, which takes many tiles in many parts, and one of odd sizes."""
    tolerance = max(1e-3, TOLERANCE[precision])  # sums over 131,072 values, in another order
    for shape in ((128, 64, 32, 32), (5, 70, 7, 3)):
        for found, expected in _both(precision, shape, adds, True, "cuda"):
            torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def _networks(training: bool) -> list[tuple[Tensor, Tensor]]:
    """Return output, gradients and buffers of a network with the kernels, each with that without them."""
    from benchmarks.triton_norm import replace_norms

    net = networks.build("resnet18", stem="cifar", classes=10, width=0.0625, seed=1)
    mine = deepcopy(net)
    parts = [*mine.parameters()], [*mine.buffers()]
    replace_norms(mine)
    assert {id(each) for each in mine.parameters()} == {id(each) for each in parts[0]}
    images = torch.randn(5, 3, 5, 7)
    out, expected = (each.train(training)(images) for each in (mine, net))
    if training:
        for each in (out, expected):
            nn.functional.cross_entropy(each, torch.arange(5)).backward()
    yielded = [(out.detach(), expected.detach())]
    gradients = [(one.grad, other.grad) for one, other in zip(parts[0], net.parameters(), strict=True) if training]
    return [*yielded, *gradients, *zip(parts[1], net.buffers(), strict=True)]  # type: ignore[list-item]


def test_a_network_trains_as_it_does_without_the_kernels(interpreted: Callable[..., Any]) -> None:
    for found, expected in interpreted(_networks, True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_in_eval_mode_a_network_with_the_kernels_gives_the_same_bits(interpreted: Callable[..., Any]) -> None:
    assert all(torch.equal(found, expected) for found, expected in interpreted(_networks, False))


def _compiled() -> list[tuple[Tensor, Tensor]]:
    from torchvision.models.resnet import BasicBlock

    from benchmarks.triton_norm import Block

    plain = Block(BasicBlock(8, 8))
    compiled, images = deepcopy(plain), torch.randn(2, 8, 3, 3)
    for each in (plain, torch.compile(compiled, backend="aot_eager", fullgraph=True)):
        each(images).square().sum().backward()
    found, expected = ([*(part.grad for part in each.parameters()), *each.buffers()] for each in (compiled, plain))
    return list(zip(found, expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_kernels_compile_without_a_graph_break(interpreted: Callable[..., Any]) -> None:
    for found, expected in interpreted(_compiled):
        torch.testing.assert_close(found, expected)


def _losses_of_a_lever() -> tuple[list[float], list[float]]:
    """Return the losses of two calls of a lever on a fake GPU, with the kernels and without."""
    from benchmarks import gpu, levers, triton_norm
    from second_device import simulated_gpu
    from tune_kd.training.step import Step

    gpu.IMAGES, gpu.VALIDATION, levers.WIDTH, levers.WARM_UP = 4, 2, 0.0625, 1
    triton_norm.TILE = 2**16  # one tile for all, since the interpreter is slow for each
    losses: list[Tensor] = []
    call = Step.__call__

    def watched(self: Step, *arguments: Any) -> None:
        self.sums.zero_()
        call(self, *arguments)
        losses.append(self.sums[0].clone())

    with patch.object(Step, "__call__", watched), simulated_gpu():
        for triton in (True, False):
            levers.prepare(levers.Lever(triton=triton))
            levers.timed(1, 1)
        levers.release()
    found = [float(each) for each in losses]
    return found[:2], found[2:]


@pytest.mark.slow
def test_the_lever_trains_with_the_kernels_as_without_them(interpreted: Callable[..., Any]) -> None:
    found, expected = interpreted(_losses_of_a_lever)
    assert found == pytest.approx(expected, rel=0.02) and found[1] < found[0]

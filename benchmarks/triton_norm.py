"""Batch norm in training mode with the addition and the ReLU that follow it, as Triton kernels.

A ResNet's step on a GPU spends more time on these than on its convolutions, since each reads and writes whole feature
maps. Here a forward pass reads the input twice, once for its statistics and once to normalise, and a backward pass
reads the input and the gradient twice. Maps are bfloat16, float16 or float32 in the channels-last layout: M = N * H * W
rows of C channels. Statistics, affine parameters and their gradients are float32.

Formulas: Ioffe and Szegedy 2015; partial variances are merged as in Chan et al. 1979.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torchvision.models import ResNet

TILE = 4096  # elements of a tile (rows x channels), which a program processes at once
CHANNELS = 64  # maximum channels of a tile: 128 bytes of a row, so that reads coalesce
PROGRAMS = 512  # programs for partial sums: four per multiprocessor of an H100; more rows mean more tiles per program


def replace_norms(net: ResNet) -> None:
    """Replace all batch norms of a network in place by these kernels, for training mode. Its parameters are kept."""
    net.bn1, net.relu = Norm(net.bn1, relu=True), nn.Identity()
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for number, block in enumerate(stage):
            stage[number] = Block(block)


class Norm(nn.Module):
    """A batch norm, then the addition of a shortcut if given, then a ReLU if `relu`. In eval mode, uses PyTorch's."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        assert norm.affine and norm.track_running_stats and norm.momentum is not None
        self.norm, self.relu = norm, relu

    def forward(self, images_NCHW: Tensor, shortcut_NCHW: Tensor | None = None) -> Tensor:
        norm = self.norm
        if not self.training:
            out = norm(images_NCHW)
            out = out if shortcut_NCHW is None else out + shortcut_NCHW
            return torch.relu(out) if self.relu else out
        norm.num_batches_tracked.add_(1)
        return _Fused.apply(
            images_NCHW, shortcut_NCHW, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.momentum, norm.eps, self.relu,
        )  # fmt: skip


class Block(nn.Module):
    """A block of torchvision's ResNets: convolutions, each with its norm and ReLU, the last one after the addition."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = dict(block.named_children())
        numbers = [number for number in (1, 2, 3) if f"conv{number}" in parts]
        self.convolutions = nn.ModuleList(parts[f"conv{number}"] for number in numbers)
        self.norms = nn.ModuleList(Norm(parts[f"bn{number}"], relu=True) for number in numbers)
        self.downsample = parts.get("downsample")
        if self.downsample is not None:
            self.downsample[1] = Norm(self.downsample[1], relu=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        shortcut = images_NCHW if self.downsample is None else self.downsample(images_NCHW)
        out = images_NCHW
        for convolution, norm in zip(self.convolutions[:-1], self.norms[:-1], strict=True):
            out = norm(convolution(out))
        return self.norms[-1](self.convolutions[-1](out), shortcut)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu):
        out, mean, scale = _forward(images, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu)
        masks = relu and shortcut is not None  # otherwise the ReLU's mask follows from the input
        ctx.save_for_backward(images, out if masks else None, weight, bias, mean, scale)
        ctx.relu, ctx.adds = relu, shortcut is not None
        return out

    @staticmethod
    def backward(ctx, gradient):
        images, out, weight, bias, mean, scale = ctx.saved_tensors
        to_images, masked, to_bias, to_weight = _backward(gradient, images, out, weight, bias, mean, scale, ctx.relu)
        to_shortcut = None if not ctx.adds else gradient if out is None else masked
        return to_images, to_shortcut, to_weight, to_bias, None, None, None, None, None


# Custom operators, which torch.compile treats as opaque


@torch.library.custom_op("benchmarks::norm_forward", mutates_args=("running_mean", "running_var"))
def _forward(
    images: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the output [N, C, H, W], and for each channel the mean and the inverse standard deviation."""
    images = images.contiguous(memory_format=torch.channels_last)
    shortcut = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    rows, channels, tile, parts, tiles = _division(images)
    assert rows > 1, "a variance needs two values per channel"
    means, squares = torch.empty(2, parts, channels, device=images.device, dtype=torch.float32)
    mean, scale = torch.empty(channels, device=images.device), torch.empty(channels, device=images.device)
    out = torch.empty_like(images, memory_format=torch.channels_last)
    columns = triton.cdiv(channels, tile["COLUMNS"])
    _partial_statistics[(parts, columns)](images, means, squares, rows, channels, tiles, **tile)
    _statistics[(triton.cdiv(channels, 16),)](
        means, squares, mean, scale, running_mean, running_var, rows, channels, parts, tiles * tile["ROWS"],
        momentum, eps, PARTS=64, COLUMNS=16,
    )  # fmt: skip
    _normalise[(triton.cdiv(rows, tile["ROWS"]), columns)](
        images, images if shortcut is None else shortcut, out, mean, scale, weight, bias, rows, channels,
        ADDS=shortcut is not None, RELU=relu, **tile,
    )  # fmt: skip
    return out, mean, scale


@_forward.register_fake
def _(images, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu):
    out = torch.empty_like(images, memory_format=torch.channels_last)
    return out, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("benchmarks::norm_backward", mutates_args=())
def _backward(
    gradient: Tensor, images: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the input, of the shortcut (one unused element if `out` is None), of bias and weight."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    rows, channels, tile, parts, tiles = _division(images)
    masked = _like_shortcut(images, out)
    sums = torch.empty(2, parts, channels, device=images.device, dtype=torch.float32)
    to_images = torch.empty_like(images, memory_format=torch.channels_last)
    columns = triton.cdiv(channels, tile["COLUMNS"])
    _partial_sums[(parts, columns)](
        gradient, images, images if out is None else out, masked, mean, scale, weight, bias, sums[0], sums[1],
        rows, channels, tiles, MASKED=out is not None, RELU=relu, **tile,
    )  # fmt: skip
    to_bias, to_weight = sums[0].sum(0), sums[1].sum(0)
    _gradient[(triton.cdiv(rows, tile["ROWS"]), columns)](
        gradient if out is None else masked, images, to_images, mean, scale, weight, bias, to_bias, to_weight,
        rows, channels, RELU=relu and out is None, **tile,
    )  # fmt: skip
    return to_images, masked, to_bias, to_weight


@_backward.register_fake
def _(gradient, images, out, weight, bias, mean, scale, relu):
    to_images = torch.empty_like(images, memory_format=torch.channels_last)
    return to_images, _like_shortcut(images, out), torch.empty_like(bias), torch.empty_like(weight)


def _like_shortcut(images: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return images.new_empty(1)
    return torch.empty_like(images, memory_format=torch.channels_last)


def _division(images: Tensor) -> tuple[int, int, dict[str, int], int, int]:
    """Return rows, channels, the size of a tile, and for partial sums the number of parts and of tiles per part."""
    count, channels, height, width = images.shape
    rows, columns = count * height * width, min(CHANNELS, triton.next_power_of_2(channels))
    tile = {"ROWS": max(1, TILE // columns), "COLUMNS": columns}
    all_tiles = triton.cdiv(rows, tile["ROWS"])
    tiles = triton.cdiv(all_tiles, max(1, PROGRAMS // triton.cdiv(channels, columns)))
    return rows, channels, tile, triton.cdiv(all_tiles, tiles), tiles


# Kernels. A program processes one tile of ROWS x COLUMNS at a time.


@triton.jit
def _partial_statistics(
    images, means, squares, rows, channels, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Compute the mean of a part of the rows, and the sum of squared distances from this mean."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros([COLUMNS], tl.float32)
    square = tl.zeros([COLUMNS], tl.float32)
    seen = 0.0
    for tile in range(tiles):
        first = (part * tiles + tile) * ROWS
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < channels)[None, :]
        value = tl.load(images + row[:, None] * channels + column[None, :], mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - first, 0), ROWS).to(tl.float32)
        its_mean = tl.sum(value, 0) / tl.maximum(count, 1.0)
        distance = tl.where(inside, value - its_mean[None, :], 0.0)
        both = tl.maximum(seen + count, 1.0)
        apart = its_mean - mean
        square += tl.sum(distance * distance, 0) + apart * apart * (seen * count / both)
        mean += apart * (count / both)
        seen += count
    tl.store(means + part * channels + column, mean, mask=column < channels)
    tl.store(squares + part * channels + column, square, mask=column < channels)


@triton.jit
def _statistics(
    means, squares, mean_out, scale_out, running_mean, running_var, rows, channels, parts, rows_of_part, momentum, eps,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all parts, and update the running statistics."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & there[None, :]
        count = tl.minimum(tl.maximum(rows - part * rows_of_part, 0), rows_of_part).to(tl.float32)
        its_mean = tl.load(means + part[:, None] * channels + column[None, :], mask=inside, other=0.0)
        total += tl.sum(its_mean * count[:, None], 0)
    mean = total / rows
    square = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & there[None, :]
        count = tl.minimum(tl.maximum(rows - part * rows_of_part, 0), rows_of_part).to(tl.float32)
        at = part[:, None] * channels + column[None, :]
        apart = tl.load(means + at, mask=inside, other=0.0) - mean[None, :]
        within = tl.load(squares + at, mask=inside, other=0.0)
        square += tl.sum(tl.where(inside, within + apart * apart * count[:, None], 0.0), 0)
    tl.store(mean_out + column, mean, mask=there)
    tl.store(scale_out + column, 1.0 / tl.sqrt(square / rows + eps), mask=there)
    before = tl.load(running_mean + column, mask=there)
    tl.store(running_mean + column, before + momentum * (mean - before), mask=there)
    before = tl.load(running_var + column, mask=there)
    tl.store(running_var + column, before + momentum * (square / (rows - 1) - before), mask=there)


@triton.jit
def _normalise(
    images, shortcut, out, mean, scale, weight, bias, rows, channels,
    ADDS: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    inside, at = (row < rows)[:, None] & there[None, :], row[:, None] * channels + column[None, :]
    value = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    value = (value - tl.load(mean + column, mask=there)[None, :]) * tl.load(scale + column, mask=there)[None, :]
    value = value * tl.load(weight + column, mask=there)[None, :] + tl.load(bias + column, mask=there)[None, :]
    if ADDS:
        value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(out + at, value, mask=inside)


@triton.jit
def _partial_sums(
    gradient, images, out, masked, mean, scale, weight, bias, sums, products, rows, channels, tiles,
    MASKED: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For a part of the rows, sum the gradient of the ReLU's input, and its product with the normalised input. With a
    shortcut, this gradient is also the shortcut's, and is written to `masked`."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    its_mean, its_scale = tl.load(mean + column, mask=there), tl.load(scale + column, mask=there)
    its_weight, its_bias = tl.load(weight + column, mask=there), tl.load(bias + column, mask=there)
    total = tl.zeros([COLUMNS], tl.float32)
    product = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside, at = (row < rows)[:, None] & there[None, :], row[:, None] * channels + column[None, :]
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - its_mean[None, :]) * its_scale[None, :]
        if MASKED:
            slope = tl.where(tl.load(out + at, mask=inside, other=0.0).to(tl.float32) > 0, slope, 0.0)
            tl.store(masked + at, slope, mask=inside)
        elif RELU:
            slope = tl.where(value * its_weight[None, :] + its_bias[None, :] > 0, slope, 0.0)
        total += tl.sum(slope, 0)
        product += tl.sum(tl.where(inside, slope * value, 0.0), 0)
    tl.store(sums + part * channels + column, total, mask=there)
    tl.store(products + part * channels + column, product, mask=there)


@triton.jit
def _gradient(
    gradient, images, to_images, mean, scale, weight, bias, to_bias, to_weight, rows, channels,
    RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    inside, at = (row < rows)[:, None] & there[None, :], row[:, None] * channels + column[None, :]
    its_scale, its_weight = tl.load(scale + column, mask=there), tl.load(weight + column, mask=there)
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    value = (value - tl.load(mean + column, mask=there)[None, :]) * its_scale[None, :]
    if RELU:
        before = value * its_weight[None, :] + tl.load(bias + column, mask=there)[None, :]
        slope = tl.where(before > 0, slope, 0.0)
    mean_slope = tl.load(to_bias + column, mask=there) / rows
    mean_product = tl.load(to_weight + column, mask=there) / rows
    slope = slope - mean_slope[None, :] - value * mean_product[None, :]
    tl.store(to_images + at, slope * (its_weight * its_scale)[None, :], mask=inside)

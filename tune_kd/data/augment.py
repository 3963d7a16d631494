"""Augmentation: the views (crop and flip of each training image) of an epoch, and the network's input."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_kd.data.datasets import DataSet, generator


@dataclass(frozen=True, eq=False)
class Views:
    """The views of one epoch in training order: entry i is the i-th image that the epoch shows."""

    order: Tensor  # int64 [N], positions in the training split
    top: Tensor  # int64 [N], first row of the crop in the padded image, 0 to 2 * pad
    left: Tensor  # int64 [N], first column of the crop in the padded image, 0 to 2 * pad
    flip: Tensor  # bool [N], whether the crop is flipped

    def __getitem__(self, some: slice) -> "Views":
        return Views(self.order[some], self.top[some], self.left[some], self.flip[some])

    def to(self, device: torch.device) -> "Views":
        return Views(*(each.to(device) for each in (self.order, self.top, self.left, self.flip)))


def draw_views(seed: int, epoch: int, count: int, *, pad: int, flip: bool, view: int = 0) -> Views:
    """Draw order, crops and flips of one epoch over `count` images: four CPU tensors of shape [count].

    The result depends only on the arguments: the global generator is neither read nor advanced. The order is the same
    for any `pad`, `flip` and `view`, and the flips are the same for any `pad`. `view` is the number of the view, from
    0, for several views of the same images.

    Raises `ValueError` for a negative `count` or `pad`.
    """
    if count < 0 or pad < 0:
        raise ValueError(f"count and pad must be 0 or more, not {count} and {pad}")
    order = torch.randperm(count, generator=generator("order", seed, epoch), device="cpu")
    stream = generator("augmentation" if view == 0 else f"augmentation {view}", seed, epoch)
    top = torch.randint(0, 2 * pad + 1, (count,), generator=stream, device="cpu")
    left = torch.randint(0, 2 * pad + 1, (count,), generator=stream, device="cpu")
    mirrored = torch.randint(0, 2, (count,), generator=stream, device="cpu").bool()
    return Views(order, top, left, mirrored if flip else torch.zeros_like(mirrored))


def view_numbers(views: Views, data: DataSet) -> Tensor:
    """A number for each view, int64 [N], that depends only on its image, crop and flip."""
    way = (views.top * (2 * data.pad + 1) + views.left) * (1 + data.flip) + (views.flip if data.flip else 0)
    return views.order * data.views_per_image + way


def numbered_views(numbers: Tensor, data: DataSet) -> Views:
    """The inverse of `view_numbers`: views of int64 [N] numbers from 0 to images * views_per_image - 1."""
    way = numbers % data.views_per_image
    place = way // (1 + data.flip)
    mirrored = (way % 2).bool() if data.flip else torch.zeros_like(way, dtype=torch.bool)
    return Views(numbers // data.views_per_image, place // (2 * data.pad + 1), place % (2 * data.pad + 1), mirrored)


def show(views: Views, data: DataSet) -> Tensor:
    """The training images, cropped and flipped according to `views`: uint8 [N, 3, H, W].

    Images and views must be on the same device, so that a training step copies nothing.
    """
    shown = data.train.images.index_select(0, views.order)
    return crop(shown, views.top, views.left, views.flip, data.pad)


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad with `pad` zero pixels, crop to the original size at (top, left), and flip horizontally if `flip` is True.

    `images` uint8 [B, 3, H, W]; `top`, `left` int64 [B] in 0 to 2 * pad and `flip` bool [B]; all on one device.
    Returns uint8 [B, 3, H, W] on that device. Equal to torchvision's pad, crop and hflip.
    """
    device = images.device
    batch, channels, height, width = images.shape
    padded = F.pad(images, [pad] * 4)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    # One gather over flattened pixels is several times faster on a CPU than indexing rows and columns separately.
    where = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, height * width)
    chosen = padded.view(batch, channels, -1).gather(2, where.expand(-1, channels, -1))
    return chosen.view(batch, channels, height, width)


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    # Cached, because creating a GPU tensor from Python numbers would synchronize in every batch. Never an inference
    # tensor, even if evaluation creates it first, since training could not use one.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def prepare(images: Tensor, data: DataSet) -> Tensor:
    """Scale to [0, 1], normalise each channel by the data set's mean and std, then enlarge.

    uint8 [B, 3, H, W] to float32 [B, 3, H * upsample, W * upsample] on the same device. Enlarging repeats
    pixels (nearest neighbour).
    """
    mean, std = _per_channel(data.mean, images.device), _per_channel(data.std, images.device)
    pixels = torch.div(images, 255).sub_(mean).div_(std)  # in place: small batches are memory-bound
    if data.upsample == 1:
        return pixels
    return F.interpolate(pixels, scale_factor=data.upsample, mode="nearest")

"""Views of training images: the crop and mirror image that each seed and epoch draws, as a network sees them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_kd.data.datasets import DataSet, generator


@dataclass(frozen=True, eq=False)
class Views:
    """The draw of one epoch in training order: entry i is how the i-th image of the epoch is shown."""

    order: Tensor  # int64 [N], positions in the training split
    top: Tensor  # int64 [N], first row of the crop in the padded image, 0 to 2 * pad
    left: Tensor  # int64 [N], first column of the crop in the padded image, 0 to 2 * pad
    flip: Tensor  # bool [N], whether the crop is mirrored

    def __getitem__(self, some: slice) -> "Views":
        return Views(self.order[some], self.top[some], self.left[some], self.flip[some])

    def to(self, device: torch.device) -> "Views":
        return Views(*(each.to(device) for each in (self.order, self.top, self.left, self.flip)))


def draw_views(seed: int, epoch: int, count: int, *, pad: int, flip: bool) -> Views:
    """Draw order, crops and flips of one epoch over `count` images: four CPU tensors of shape [count].

    A function of its arguments alone: the global generator is neither read nor moved. Order, offsets and
    flips use the random numbers in a way that `pad` and `flip` do not shift: the order is the same under
    any augmentation, and so are the flips under any `pad`.

    Raises `ValueError` for a negative `count` or `pad`.
    """
    if count < 0 or pad < 0:
        raise ValueError(f"count and pad must be 0 or more, not {count} and {pad}")
    order = torch.randperm(count, generator=generator("order", seed, epoch), device="cpu")
    stream = generator("augmentation", seed, epoch)
    top = torch.randint(0, 2 * pad + 1, (count,), generator=stream, device="cpu")
    left = torch.randint(0, 2 * pad + 1, (count,), generator=stream, device="cpu")
    mirrored = torch.randint(0, 2, (count,), generator=stream, device="cpu").bool()
    return Views(order, top, left, mirrored if flip else torch.zeros_like(mirrored))


def view_numbers(views: Views, data: DataSet) -> Tensor:
    """A number for each view, int64 [N]: the same for the same image, crop and flip, whoever draws it."""
    way = (views.top * (2 * data.pad + 1) + views.left) * (1 + data.flip) + (views.flip if data.flip else 0)
    return views.order * data.views_per_image + way


def numbered_views(numbers: Tensor, data: DataSet) -> Views:
    """The views that `view_numbers` gives these numbers, int64 [N] from 0 to N * views_per_image - 1."""
    way = numbers % data.views_per_image
    place = way // (1 + data.flip)
    mirrored = (way % 2).bool() if data.flip else torch.zeros_like(way, dtype=torch.bool)
    return Views(numbers // data.views_per_image, place // (2 * data.pad + 1), place % (2 * data.pad + 1), mirrored)


def show(views: Views, data: DataSet) -> Tensor:
    """The training images as `views` show them: uint8 [N, 3, H, W]. Images and views are on one device, so that a step
    does not move any."""
    shown = data.train.images.index_select(0, views.order)
    return crop(shown, views.top, views.left, views.flip, data.pad)


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad with `pad` zero pixels, cut to the old size at (top, left), and mirror where `flip` says so.

    `images` uint8 [B, 3, H, W]; `top`, `left` int64 [B] in 0 to 2 * pad and `flip` bool [B]; all on one device.
    Returns uint8 [B, 3, H, W] there. Equal to torchvision's pad, crop and hflip.
    """
    device = images.device
    batch, channels, height, width = images.shape
    padded = F.pad(images, [pad] * 4)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    # One gather over flattened pixels: several times faster on CPU than indexing rows and columns apart.
    where = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, height * width)
    chosen = padded.view(batch, channels, -1).gather(2, where.expand(-1, channels, -1))
    return chosen.view(batch, channels, height, width)


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    # Kept, because making a tensor on a GPU from Python numbers waits for the GPU in every batch. Not an
    # inference tensor even when evaluation makes it first: training could not use that one.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def prepare(images: Tensor, data: DataSet) -> Tensor:
    """Scale to [0, 1], normalise each channel by the data set's mean and std, then enlarge.

    uint8 [B, 3, H, W] to float32 [B, 3, H * upsample, W * upsample] on the same device. Each pixel becomes
    a square of equal pixels: nothing is interpolated.
    """
    mean, std = _per_channel(data.mean, images.device), _per_channel(data.std, images.device)
    pixels = torch.div(images, 255).sub_(mean).div_(std)  # in place: small batches are bound by memory
    if data.upsample == 1:
        return pixels
    return F.interpolate(pixels, scale_factor=data.upsample, mode="nearest")

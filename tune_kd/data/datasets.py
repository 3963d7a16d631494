"""Data sets as uint8 tensors, split into training, validation and test images.

A data set depends only on its source, the requested sizes and `split_seed`; a view (see `augment`) depends only on seed
and epoch. Neither depends on the arm, so arms with the same seed see the same images under the same crops.

Axes: B or N images, 3 channels, H rows, W columns.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_kd.data.cifar import load_pixels, recognised
from tune_kd.data.cifar_pickles import FORMS
from tune_kd.data.image_folder import Pixels
from tune_kd.study.spec import DATA_SETS, Data
from tune_kd.system.characters import visible
from tune_kd.system.errors import raise_problems

# Mean and standard deviation per channel of the 50,000 training images, in [0, 1]. The deviations are over all pixels.
# The often quoted 0.2023, 0.1994, 0.2010 for CIFAR-10 are means of per-image deviations.
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set."""

    images: Tensor  # uint8 [N, 3, H, W], raw pixels
    labels: Tensor  # int64 [N], positions in DataSet.classes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as arrays, which Ray shares between the processes of a machine without a copy."""
        return _split_of, (self.images.cpu().numpy(), self.labels.cpu().numpy())


def _split_of(images: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> Split:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shared arrays are not writable, and no code writes to them
        return Split(torch.from_numpy(images), torch.from_numpy(labels))


@dataclass(frozen=True, eq=False)
class DataSet:
    """The images of a data set, with the parameters of augmentation and normalisation."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, float, float]  # per channel, of training pixels in [0, 1]
    std: tuple[float, float, float]  # per channel, of training pixels in [0, 1]
    pad: int  # zero pixels added on each side before the crop; the largest shift of a view
    flip: bool  # whether views may be flipped
    upsample: int  # factor by which images are enlarged after augmentation
    digest: str  # SHA-256 (64 hexadecimal digits) of all of the above except the names

    @property
    def views_per_image(self) -> int:
        """The number of different views of one training image."""
        return (2 * self.pad + 1) ** 2 * (1 + self.flip)


@lru_cache(maxsize=1)
def on_device(data: DataSet, device: torch.device) -> DataSet:
    """The data set with its images and labels on a device: one copy per process, for training steps and teachers."""

    def move(split: Split) -> Split:
        return Split(split.images.to(device), split.labels.to(device))

    return replace(data, train=move(data.train), validation=move(data.validation), test=move(data.test))


def _to_stderr(sentence: str) -> None:
    print(visible(sentence), file=sys.stderr)


def load(
    name: str,
    folder: Path | None = None,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    split_seed: int = 0,
    cache: Path | None = None,
    say: Callable[[str], None] = _to_stderr,
    progress: bool = True,
    download: bool = True,
) -> DataSet:
    """Load the data set `name` (one of DATA_SETS), split it, and keep the requested number of images of each part.

    `train`, `validation` and `test` are numbers of images; None keeps the whole part. A smaller part is balanced over
    the classes, fixed by `split_seed`, and contained in every larger one. `folder` has CIFAR-10 or CIFAR-100, or is the
    target of their download (see `tune_kd.data.cifar.load_pixels`); scikit-learn includes the digits. `cache` is the
    folder for decoded images. `say` receives messages for the user; `progress` shows bars on a terminal; with
    `download=False`, nothing is downloaded.

    The study's check validates the name. Raises `UserError` for impossible sizes, and for data that are missing,
    truncated or damaged.
    """
    wanted = {"train": train, "validation": validation, "test": test}
    assert name in DATA_SETS
    if name == "digits":
        if folder is not None:
            say(f"The digits come with scikit-learn, so {folder} is not read.")
        return _digits(wanted, split_seed)
    pixels = load_pixels(folder, form=FORMS[name], cache=cache, say=say, progress=progress, download=download)
    return _cifar(name, recognised(pixels, name), wanted, split_seed)


def load_declared(spec: Data, folder: Path | None, **options: Any) -> DataSet:
    """Load a study's data set from `folder`. `options` are those of `load`."""
    return load(
        spec.name,
        folder,
        train=spec.train,
        validation=spec.validation,
        test=spec.test,
        split_seed=spec.split_seed,
        **options,
    )


def _digits(wanted: dict[str, int | None], split_seed: int) -> DataSet:
    from sklearn.datasets import load_digits  # imported here because it takes a second

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).to(torch.int64)  # [N, 8, 8], 0 to 16
    images = ((grey * 255 + 8) // 16).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)

    ranks = _ranks("split", labels, split_seed)
    fifths = ((2 * labels.bincount() + 5) // 10)[labels]
    parts = _sized(
        {
            "train": (images, labels, ranks, ranks >= 2 * fifths),
            "validation": (images, labels, ranks, ranks < fifths),
            "test": (images, labels, ranks, (ranks >= fifths) & (ranks < 2 * fifths)),
        },
        wanted,
    )
    mean, std = _statistics(parts["train"].images)
    classes = tuple(str(digit) for digit in range(10))
    return _finished("digits", classes, parts, mean, std, pad=1, flip=False, upsample=2)


def _cifar(name: str, pixels: Pixels, wanted: dict[str, int | None], split_seed: int) -> DataSet:
    images, labels = pixels.train_images, pixels.train_labels
    ranks = _ranks("split", labels, split_seed)
    tenths = ((labels.bincount() + 5) // 10).clamp(min=1)[labels]  # a tenth of each class: 45,000 and 5,000
    test_ranks = _ranks("test", pixels.test_labels, split_seed)
    parts = _sized(
        {
            "train": (images, labels, ranks, ranks >= tenths),
            "validation": (images, labels, ranks, ranks < tenths),
            "test": (pixels.test_images, pixels.test_labels, test_ranks, test_ranks >= 0),
        },
        wanted,
    )
    mean, std = CIFAR_STATISTICS[name]
    return _finished(name, pixels.classes, parts, mean, std, pad=4, flip=True, upsample=1)


def generator(stream: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one named stream of random numbers.

    PyTorch uses 32 bits of a CPU generator's seed. Hashing spreads the streams over them: among a thousand streams, two
    coincide with a probability of 0.0001. Two unrelated draws would then be equal.
    """
    name = "/".join([stream, *map(str, numbers)])
    stream_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.Generator(device="cpu").manual_seed(stream_seed)


def _ranks(stream: str, labels: Tensor, seed: int) -> Tensor:
    """The rank of each image within its class after a shuffle, int64 [N].

    Splits and subsets are ranges of these ranks, so they are stratified, disjoint and nested.
    """
    shuffled = torch.randperm(len(labels), generator=generator(stream, seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    firsts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - firsts[labels[by_class]]
    return ranks


def _sized(parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]], wanted: dict[str, int | None]) -> dict[str, Split]:
    """Cut each part (images, labels, ranks, membership) to its size. Raises `UserError` with all impossible sizes."""
    problems = []
    for part, (_, labels, _, member) in parts.items():
        size, most, classes = wanted[part], int(member.sum()), int(labels.max()) + 1
        if size is not None and size > most:
            problems.append(f"{part} is {size} images; allowed: at most {most}")
        elif size is not None and size < classes:
            problems.append(
                f"{part} is {size} images, fewer than one for each of {classes} classes; allowed: {classes} to {most}"
            )
    raise_problems(problems)

    def cut(images: Tensor, labels: Tensor, ranks: Tensor, member: Tensor, size: int | None) -> Split:
        members = member.nonzero().squeeze(1)
        # The first of every class, then the second of every class, and so on.
        round_robin = (ranks * (labels.max() + 1) + labels)[members].argsort()
        kept = members[round_robin[:size]].sort().values
        return Split(images[kept], labels[kept])

    return {part: cut(*tensors, wanted[part]) for part, tensors in parts.items()}


def _statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel in [0, 1], rounded to four digits.

    They are computed from integer sums, so that the digest does not depend on a machine's rounding.
    """
    pixels = images.transpose(0, 1).flatten(1).to(torch.int64)
    n, sums = pixels.shape[1], zip(pixels.sum(1).tolist(), pixels.square().sum(1).tolist(), strict=True)
    red, green, blue = (
        (round(first / (255 * n), 4), round(math.sqrt(n * second - first * first) / (255 * n), 4))
        for first, second in sums
    )
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


def _finished(
    name: str,
    classes: tuple[str, ...],
    parts: dict[str, Split],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    pad: int,
    flip: bool,
    upsample: int,
) -> DataSet:
    rule = {
        "layout": 1,
        "classes": len(classes),
        "shapes": [list(part.images.shape) for part in parts.values()],
        "mean": mean,
        "std": std,
        "pad": pad,
        "flip": flip,
        "upsample": upsample,
    }
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode())
    for part in parts.values():
        digest.update(part.images.numpy().reshape(-1).data)
        digest.update(part.labels.numpy().astype("<i8").data)
    return DataSet(
        name, classes, parts["train"], parts["validation"], parts["test"],
        mean, std, pad, flip, upsample, digest.hexdigest(),
    )  # fmt: skip

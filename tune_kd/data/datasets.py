"""Data sets as uint8 tensors, their split, and the views (crops and flips) that an epoch draws.

A data set is a function of its source, the sizes asked for and `split_seed`; a view is a function of seed
and epoch. Neither knows the arm, so arms at one seed see the same images under the same crops.

Axes: B or N images, 3 channels, H rows, W columns.
"""

import hashlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_kd.data.cifar import load_pixels
from tune_kd.data.cifar_pickles import CIFAR10, FORMS
from tune_kd.data.image_folder import Pixels
from tune_kd.study.spec import DATA_SETS, Data
from tune_kd.system.characters import visible
from tune_kd.system.errors import UserError

# Mean and deviation by channel of the 50,000 training images, in [0, 1]. The deviations are those over all pixels; the
# 0.2023, 0.1994, 0.2010 that also circulate for CIFAR-10 are means of per-image deviations.
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR_CLASSES = {
    "cifar10": CIFAR10.classes,
    "cifar100": tuple(_CIFAR100.split()),
}
"""As the published archives, and torchvision, name and number them."""
SPELLINGS = {
    "plane": "airplane",
    "aeroplane": "airplane",
    "car": "automobile",
    "auto": "automobile",
    "computerkeyboard": "keyboard",
    "cra": "crab",
    "racoon": "raccoon",
    **{tree: f"{tree}_tree" for tree in ("maple", "oak", "palm", "pine", "willow")},
}
"""How else the classes are called where they are folders of images."""
CIFAR_SIZES = (50_000, 10_000)


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set."""

    images: Tensor  # uint8 [N, 3, H, W], raw pixels
    labels: Tensor  # int64 [N], positions in DataSet.classes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as arrays, which Ray keeps once a machine and shows to all its processes without a copy."""
        return _split_of, (self.images.cpu().numpy(), self.labels.cpu().numpy())


def _split_of(images: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> Split:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shared arrays cannot be written to: nobody does
        return Split(torch.from_numpy(images), torch.from_numpy(labels))


@dataclass(frozen=True, eq=False)
class DataSet:
    """Everything that a network is shown, and the rule by which it is shown."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, float, float]  # per channel, of training pixels in [0, 1]
    std: tuple[float, float, float]  # per channel, of training pixels in [0, 1]
    pad: int  # zero pixels added on each side before the crop, so shifts of at most this many pixels
    flip: bool  # whether views may be mirrored
    upsample: int  # factor by which images are enlarged after augmentation
    digest: str  # SHA-256 (64 hexadecimal digits) over all of the above but the names

    @property
    def views_per_image(self) -> int:
        """How many ways of showing one training image there are."""
        return (2 * self.pad + 1) ** 2 * (1 + self.flip)


@lru_cache(maxsize=1)
def on_device(data: DataSet, device: torch.device) -> DataSet:
    """The data set with its images and labels on a device: one copy a process, which steps and teachers share."""

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
    """Load the data set `name` (one of DATA_SETS), split it, and keep as many images of each part as asked for.

    `train`, `validation` and `test` are sizes in images; None keeps the whole part. A smaller part is balanced over the
    classes, fixed by `split_seed`, and contained in every larger one. `folder` is where CIFAR-10 or CIFAR-100 is or
    shall be (see `tune_kd.data.cifar.load_pixels`); digits ship with scikit-learn. `cache` is the folder for decoded
    images. `say` receives sentences for the user; `progress` shows bars on a terminal; without `download` CIFAR has to
    be there.

    Raises `UserError` for an unknown name, impossible sizes, and data that are missing, cut or damaged.
    """
    wanted = {"train": train, "validation": validation, "test": test}
    problems = [f"{part}: {size} is not a number of images; give 1 or more" for part, size in wanted.items()
                if size is not None and size < 1]  # fmt: skip
    if name not in DATA_SETS:
        problems.insert(0, f"data: there is no data set {name!r}; choose one of {', '.join(DATA_SETS)}")
    if problems:
        raise UserError(*problems)
    if name == "digits":
        if folder is not None:
            say(f"The digits come with scikit-learn: {folder} is not read.")
        return _digits(wanted, split_seed)
    pixels = load_pixels(folder, form=FORMS[name], cache=cache, say=say, progress=progress, download=download)
    return _cifar(name, recognised(pixels, name), wanted, split_seed)


def load_declared(spec: Data, folder: Path | None, **options: Any) -> DataSet:
    """What a study declares of its data, from `folder`; `options` are those of `load`."""
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
    from sklearn.datasets import load_digits  # here: it takes a second

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


def recognised(pixels: Pixels, name: str) -> Pixels:
    """The data set with its classes named and numbered as published, however their folders spell them.

    Raises `UserError` for less, or more, than all of it, since results on a part would pass for results on it, and for
    other classes, since any pictures of this size would be normalised with its statistics.
    """
    found, known = (len(pixels.train_labels), len(pixels.test_labels)), CIFAR_CLASSES[name]
    if found != CIFAR_SIZES or len(pixels.classes) != len(known):
        raise UserError(
            f"--data-dir: these are {found[0]} training and {found[1]} test images of {len(pixels.classes)} classes, "
            f"and {FORMS[name].title} has {CIFAR_SIZES[0]} and {CIFAR_SIZES[1]} of {len(known)}; complete them, or "
            "name another place"
        )
    spelled = {each: _spelling(each) for each in pixels.classes}
    if lacking := [each for each in known if each not in spelled.values()]:
        strange = [
            each for each, meant in spelled.items() if meant not in known or list(spelled.values()).count(meant) > 1
        ]
        raise UserError(
            f"--data-dir: these are not the images of {FORMS[name].title}, though as many: it has no class "
            f"{_first(strange)}, and its class {_first(lacking)} is missing; name each folder after its class, or name "
            "another place"
        )
    number = torch.tensor([known.index(spelled[each]) for each in pixels.classes])
    return replace(
        pixels, classes=known, train_labels=number[pixels.train_labels], test_labels=number[pixels.test_labels]
    )


def _spelling(name: str) -> str:
    """The published name of a class that is called so, with a number before it or not; else its own in small letters
    alone. Spaces, hyphens and capitals say nothing: `AquariumFish` and `00_aquarium-fish` are `aquarium_fish`."""
    plain = re.sub(r"[\W_]+", "", re.sub(r"^\W*\d+[\W_]+", "", name.strip())).lower()
    published = {each.replace("_", ""): each for classes in CIFAR_CLASSES.values() for each in classes}
    return published.get(plain) or SPELLINGS.get(plain, plain)


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(repr(name[:60]) for name in names[:most]) + (" ..." if len(names) > most else "")


def generator(stream: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one named stream.

    PyTorch keeps 32 bits of a CPU generator's seed. Hashing spreads the streams over them: among a
    thousand streams two coincide with a probability of 0.0001, and then two unrelated draws are equal.
    """
    name = "/".join([stream, *map(str, numbers)])
    stream_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.Generator(device="cpu").manual_seed(stream_seed)


def _ranks(stream: str, labels: Tensor, seed: int) -> Tensor:
    """Position of each image among those of its class after a shuffle of its own, int64 [N].

    Splits and subsets are cuts through these ranks: stratified, disjoint and nested by construction.
    """
    shuffled = torch.randperm(len(labels), generator=generator(stream, seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    firsts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - firsts[labels[by_class]]
    return ranks


def _sized(parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]], wanted: dict[str, int | None]) -> dict[str, Split]:
    """Cut each part (images, labels, ranks, membership) to its size, or name all sizes that fail."""
    problems = []
    for part, (_, labels, _, member) in parts.items():
        size, most, classes = wanted[part], int(member.sum()), int(labels.max()) + 1
        if size is not None and size > most:
            problems.append(f"{part}: {size} images were asked for, and there are at most {most}")
        elif size is not None and size < classes:
            problems.append(
                f"{part}: {size} images are fewer than one for each of {classes} classes; give {classes} to {most}"
            )
    if problems:
        raise UserError(*problems)

    def cut(images: Tensor, labels: Tensor, ranks: Tensor, member: Tensor, size: int | None) -> Split:
        members = member.nonzero().squeeze(1)
        # The first of every class, then the second of every class, and so on.
        round_robin = (ranks * (labels.max() + 1) + labels)[members].argsort()
        kept = members[round_robin[:size]].sort().values
        return Split(images[kept], labels[kept])

    return {part: cut(*tensors, wanted[part]) for part, tensors in parts.items()}


def _statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel in [0, 1], to four digits.

    From integer sums, so that no machine's rounding gets into the digest.
    """
    means, deviations = [], []
    for channel in range(3):
        counts = images[:, channel].flatten().to(torch.int64).bincount().tolist()
        n = sum(counts)
        first = sum(count * value for value, count in enumerate(counts))
        second = sum(count * value * value for value, count in enumerate(counts))
        means.append(round(first / (255 * n), 4))
        deviations.append(round(math.sqrt(n * second - first * first) / (255 * n), 4))
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


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

"""The training step, compared with the plain loop; with and without cached logits; with the teacher in every step.

Images are scikit-learn's digits, enlarged 4 times and augmented as CIFAR-10: 32 x 32, crops with 4 pixels of padding,
random flips. The cost of a step does not depend on the content of an image.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Measure, Result, Side, pairs
from benchmarks.plain import train_plain
from tune_kd.data import augment, datasets
from tune_kd.data.augment import Views, prepare, show
from tune_kd.data.datasets import DataSet, Split
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.trial import Answering, Epoch, Trial
from tune_kd.training import networks
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import keep_freed_blocks
from tune_kd.training.loop import train
from tune_kd.training.teachers import Teacher, load_teacher, publish_teacher

FOREVER = 10**6  # epochs of a recipe, more than any benchmark trains
SEED = 1
STUDENT, TEACHER = "resnet18", "resnet50"


def digits_as_cifar(train: int) -> DataSet:
    """Return digits in CIFAR-10's shape: `train` training images, and a tenth as many validation and test images."""
    digits = datasets.load("digits")

    def enlarged(split: Split, count: int) -> Split:
        images = split.images[:count].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        return Split(images, split.labels[:count])

    return replace(
        digits,
        train=enlarged(digits.train, train),
        validation=enlarged(digits.validation, train // 10),
        test=enlarged(digits.test, train // 10),
        pad=4,
        flip=True,
        upsample=1,
        digest=f"{digits.digest}, the first {train} enlarged",
    )


def cell(method: str, stem: str, width: float) -> Cell:
    distils = {"teacher": TEACHER, "alpha": 0.5} if method != "none" else {"teacher": None, "alpha": None}
    return Cell(
        method=method,
        stem=stem,
        width=width,
        temperature=4.0 if method == "logit" else None,
        beta=0.5 if method == "feature" else None,
        **distils,
    )


def trial(each: Cell, recipe: Recipe, teacher_id: str | None) -> Trial:
    return Trial("benchmark", "confirm", each, recipe, SEED, Data("digits"), None, "benchmark", teacher_id)


class LiveTeacher(Teacher):
    """A teacher without cached logits, which computes them in every step."""

    def logits(self, views: Views) -> Any:
        return _Live(self, views), None


class _Live:
    """Takes the place of a tensor of logits, and computes the logits of a batch when it is indexed."""

    def __init__(self, teacher: Teacher, views: Views) -> None:
        self._teacher, self._views = teacher, views

    def to(self, device: torch.device) -> "_Live":
        return self

    @torch.no_grad()
    def __getitem__(self, some: slice) -> Tensor:
        shown = show(self._views[some], self._teacher.data)
        logits: Tensor = self._teacher.net(prepare(shown, self._teacher.data))
        return logits


def untrained_teacher(
    folder: Path, stem: str, width: float, recipe: Recipe, dataset: DataSet, device: torch.device, epochs: int
) -> Teacher:
    """Return a teacher with random weights, as fast as trained ones. Caches logits of `epochs` epochs of one seed."""
    taught = replace(
        trial(cell("none", stem, width), replace(recipe, epochs=1), None),
        phase="teacher",
        cell=replace(cell("none", stem, width), teacher=TEACHER),
    )
    net = networks.build(TEACHER, stem=stem, classes=len(dataset.classes), width=width, seed=9)
    publish_teacher(folder, taught, net.state_dict(), [])
    return load_teacher(folder, taught.trial_id, dataset, device, Answering(False, ((SEED, epochs),)))


def ours(
    method: str,
    stem: str,
    width: float,
    *,
    images: int,
    recipe: Recipe,
    device: torch.device,
    answered: int = 0,
    live: bool = False,
) -> Iterator[Epoch]:
    """Yield epochs of our training without end. For a logit student, the logits of `answered` epochs are cached."""
    dataset = digits_as_cifar(images)
    with tempfile.TemporaryDirectory() as folder:
        teacher = None
        if method != "none":
            teacher = untrained_teacher(Path(folder), stem, width, recipe, dataset, device, answered)
            if live:
                teacher = LiveTeacher(**vars(teacher))
            for epoch in range(1, 0 if live else answered + 1):
                teacher.logits(augment.draw_views(SEED, epoch, images, pad=dataset.pad, flip=dataset.flip))
        yield from train(
            trial(cell(method, stem, width), recipe, teacher.teacher_id if teacher else None),
            dataset,
            teacher,
            device=device,
            checkpoints=Checkpoints(Path(folder, "checkpoints")),
            checkpoint_every=math.inf,
        )


def our_speed(stem: str, images: int, epochs: int) -> Measure:
    """Images per second of our control at width 1/8 on one thread, over `epochs` epochs."""
    return _speed(ours("none", stem, 0.125, images=images, recipe=_recipe(), device=_one_thread()), images, epochs)


def plain_speed(stem: str, images: int, epochs: int) -> Measure:
    """Images per second of the plain loop, otherwise like `our_speed`."""
    device, dataset = torch.device("cpu"), digits_as_cifar(images)
    torch.set_num_threads(1)
    each = cell("none", stem, 0.125)
    return _speed(train_plain(STUDENT, each, _recipe(), dataset, seed=SEED, device=device), images, epochs)


def epoch_seconds(method: str, stem: str, width: float, images: int, answered: int, live: bool = False) -> Measure:
    """Seconds of an epoch of our training on one thread, without evaluation, with the time to get the logits."""
    epochs = ours(
        method, stem, width, images=images, recipe=_recipe(), device=_one_thread(), answered=answered, live=live
    )

    def measure() -> float:
        epoch = next(epochs)
        assert live or not epoch.views_answered, "logits should have been cached"
        return images / epoch.images_per_second + (epoch.answer_seconds or 0.0)

    return measure


def against_plain(stem: str, count: int) -> Result:
    epochs = 1 if stem == "cifar" else 4
    return pairs(
        f"images/s, ours / plain loop, {stem} stem, width 1/8",
        Side("ours", our_speed, (stem, 1024, epochs)),
        Side("plain", plain_speed, (stem, 1024, epochs)),
        count,
        unit="images/s",
        bar=">= 1.25" if stem == "cifar" else ">= 1.7",
    )


def logit_against_control(width: float, count: int) -> Result:
    images = 1024 if width < 1 else 128
    return pairs(
        f"epoch, logit with cached logits / control, cifar stem, width {width:g}",
        Side("logit", epoch_seconds, ("logit", "cifar", width, images, count + 1)),
        Side("control", epoch_seconds, ("none", "cifar", width, images, 0)),
        count,
        unit="s",
        bar="<= 1.05",
        together=True,
    )


def live_against_answers(count: int) -> Result:
    return pairs(
        "epoch, logit with live teacher / with cached logits, cifar stem, width 1",
        Side("live", epoch_seconds, ("logit", "cifar", 1.0, 128, 1, True)),
        Side("answers", epoch_seconds, ("logit", "cifar", 1.0, 128, count + 1)),
        count,
        unit="s",
        bar=">= 1.8",
        together=True,
    )


def _recipe() -> Recipe:
    return Recipe(epochs=FOREVER, batch_size=128)


def _one_thread() -> torch.device:
    """Return the CPU, set up as a worker sets it up."""
    torch.set_num_threads(1)
    keep_freed_blocks()
    return torch.device("cpu")


def _speed(epochs: Iterator[Any], images: int, count: int) -> Callable[[], float]:
    def measure() -> float:
        seconds = sum(images / next(epochs).images_per_second for _ in range(count))
        return count * images / seconds

    return measure

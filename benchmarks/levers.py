"""What might make training on a GPU faster, each measured alone and the first ones together, before tune_kd does it.

Seconds for 45,000 images of 32 x 32 in batches of 128, ResNet-50 to ResNet-18 in bfloat16. A variant that trains
several students counts the images of all.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import IMAGES, PRECISION, noise
from benchmarks.measure import Result, Row, result
from benchmarks.steps import cell, trial, untrained_teacher
from search_spaces.ablation import study
from tune_kd.data.augment import Views, draw_views
from tune_kd.data.datasets import DataSet
from tune_kd.training import compilation, device as devices, networks, step as stepping
from tune_kd.training.device import Captured
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

CALLS = 60  # timed, of a step or of several in one graph
WARM_UP = 6  # calls before: the graph is captured in the fourth


@dataclass(frozen=True)
class Lever:
    """A way to train: how many students, how many steps of each in one graph, and what is switched on."""

    name: str
    method: str = "none"
    stem: str = "cifar"
    steps: int = 1  # in one graph
    students: int = 1  # as parallel branches of one graph
    shares_teacher: bool = False  # one forward pass of the teacher for students of one seed, which see the same views
    compiled: bool = False
    folded: bool = True
    float16: bool = False  # in place of bfloat16; without a scale of the loss, which costs next to nothing


LEVERS = (
    Lever("control"),
    Lever("control, compiled", compiled=True),
    Lever("control, float16", float16=True),
    Lever("control, 4 steps a graph", steps=4),
    Lever("control, 4 students in one graph", students=4),
    Lever("control, compiled, 4 students in one graph", students=4, compiled=True),
    Lever("control, ImageNet stem", stem="imagenet"),
    Lever("control, ImageNet stem, 8 steps a graph", stem="imagenet", steps=8),
    Lever("control, ImageNet stem, 8 students in one graph", stem="imagenet", students=8),
    Lever("feature, teacher as it is", "feature", folded=False),
    Lever("feature, teacher folded", "feature"),
    Lever("feature, teacher folded, student compiled", "feature", compiled=True),
    Lever("feature, teacher folded, shared by 4 students in one graph", "feature", students=4, shares_teacher=True),
)


class Sharing:
    """A teacher whose forward pass of a batch serves all students that ask for it until the next batch."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.passed_once: networks.Passed | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._teacher, name)

    def passed(self, images: Tensor, precision: str, before_relu: bool = False) -> networks.Passed:
        if self.passed_once is None:
            self.passed_once = self._teacher.passed(images, precision, before_relu)
        return self.passed_once


def rows(levers: Sequence[Lever] = LEVERS) -> Iterator[Row]:
    """A row for each lever."""
    dataset, device = noise(train=IMAGES, validation=128), torch.device("cuda")
    for lever in levers:
        yield lever.name, partial(measured, lever, dataset, device)


def measured(lever: Lever, dataset: DataSet, device: torch.device, width: float = 1.0, calls: int = CALLS) -> Result:
    """Seconds for as many images as an epoch has."""
    with _ready(lever, dataset, device, width) as (call, images):
        for _ in range(WARM_UP):
            call()
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        seconds = (time.perf_counter() - started) / calls
    return result(lever.name, [seconds * IMAGES / images], unit="s", detail=f"{1000 * seconds:.2f} ms a call")


def _wait(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


@contextmanager
def _ready(
    lever: Lever, dataset: DataSet, device: torch.device, width: float
) -> Iterator[tuple[Callable[[], None], int]]:
    """A function that trains once, and of how many images, while this context lasts."""
    recipe = replace(study().recipe, epochs=10**6, precision=PRECISION)
    with ExitStack() as around:
        around.enter_context(patch.object(compilation, "COMPILING_PAYS", 0 if lever.compiled else math.inf))
        if not lever.folded:
            around.enter_context(patch.object(networks, "folded", side_effect=RuntimeError("switched off")))
        if lever.float16:
            half = partial(torch.autocast, device.type, dtype=torch.float16, cache_enabled=False)
            around.enter_context(patch.object(stepping, "autocast", lambda precision, device: half()))
        teacher, sharing = None, None
        if lever.method != "none":
            folder = Path(around.enter_context(tempfile.TemporaryDirectory()))
            teacher = untrained_teacher(folder, lever.stem, width, recipe, dataset, device, 1)
        if teacher is not None and lever.shares_teacher:
            sharing = Sharing(teacher)
            teacher = cast(Teacher, sharing)
        one = trial(cell(lever.method, lever.stem, width), recipe, "benchmark" if teacher else None)
        students = [Step(replace(one, seed=1 + place), dataset, teacher, device) for place in range(lever.students)]
        for each in students:
            each.train()
        views = draw_views(1, 1, len(dataset.train.labels), pad=dataset.pad, flip=dataset.flip).to(device)
        size = min(recipe.batch_size, len(dataset.train.labels) // lever.steps)
        batches = [views[place * size : (place + 1) * size] for place in range(lever.steps)]
        captured = Captured(partial(_trained, students, sharing, lever.steps, device), device)
        inputs = [part for each in batches for part in _parts(each)]
        yield partial(captured, *inputs), size * lever.steps * lever.students


def _parts(views: Views) -> tuple[Tensor, ...]:
    return views.order, views.top, views.left, views.flip


def _trained(
    students: Sequence[Step], teacher: Sharing | None, steps: int, device: torch.device, *views: Tensor
) -> None:
    """Some steps of all students, each on a stream of its own where there are several."""
    several = len(students) > 1 and torch.cuda.is_current_stream_capturing()  # one by one in the steps before
    for place in range(steps):
        batch = views[4 * place : 4 * place + 4]
        if teacher is not None:
            teacher.passed_once = None
            with devices.autocast(PRECISION, device):
                teacher.passed(students[0]._shown(Views(*batch)), PRECISION)
        if not several:
            for each in students:
                each._train(*batch)
            continue
        here = torch.cuda.current_stream(device)
        branches = [torch.cuda.Stream(device) for _ in students]  # type: ignore[no-untyped-call]
        for each, branch in zip(students, branches, strict=True):
            branch.wait_stream(here)
            with torch.cuda.stream(branch):
                each._train(*batch)
        for branch in branches:
            here.wait_stream(branch)

"""Possible speed-ups of training on a GPU, called levers: each alone, and several combined. tune_kd does not use them
yet.

Measures seconds for 45,000 images of 32 x 32 in batches of 128, ResNet-50 to ResNet-18 in bfloat16: first for one
process with one lever (alone) or several (together), then for concurrent processes. A lever that trains several
students counts the images of all of them.
"""

import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.gpu import PRECISION, dataset, serves
from benchmarks.measure import Result, Row, result
from benchmarks.steps import cell, trial, untrained_teacher
from benchmarks.workers import Budget, Pool, fine, pool, under_mps
from search_spaces.ablation import study
from tune_kd.data.augment import Views, draw_views, prepare as prepared, show
from tune_kd.training import compilation, networks, notices, step as stepping
from tune_kd.training.compilation import Compiled, compiled
from tune_kd.training.device import Captured, autocast
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

SECONDS = 220.0  # for all rows; the rest of four minutes is for imports and for killing processes that hang
PREPARING, MEASURING = 75.0, 20.0  # maximum seconds: to build, compile and capture; and to time
WIDTH = 1.0
STEPS, REPEATS = 60, 3  # timed training steps, over all students of a process; number of repeats
STEPS_BESIDE = 150  # timed training steps of each concurrent process
WARM_UP = 6  # calls before timing; the fourth captures the graph
TOGETHER = 8  # processes that are prepared at the same time
LOSS_SCALE = 1024.0  # of float16, fixed: gradients of a mean over 128 images are small, and the largest is clipped to 5


@dataclass(frozen=True)
class Lever:
    """A way to train: the number of students, the steps of each in one graph, and the enabled features."""

    method: str = "none"
    stem: str = "cifar"
    compiled: bool = False
    triton: bool = False  # batch norm, addition and ReLU in one kernel each way: benchmarks/triton_norm.py
    float16: bool = False  # in place of bfloat16, with a fixed scale of the loss
    folded: bool = True  # the teacher's batch norms into its convolutions
    students: int = 1  # as parallel branches of one graph
    shares_teacher: bool = False  # one forward pass of the teacher for all students, which see the same views
    steps: int = 1  # in one graph

    @property
    def switched(self) -> list[str]:
        """The differences from the plain captured step."""
        words = {
            "compiled": self.compiled,
            "Triton norm": self.triton,
            "float16": self.float16,
            "teacher not folded": not self.folded,
            f"{self.students} students in one graph": self.students > 1,
            "sharing the teacher": self.shares_teacher,
            f"{self.steps} steps in one graph": self.steps > 1,
        }
        return [word for word, is_on in words.items() if is_on]

    @property
    def name(self) -> str:
        arm = "control" if self.method == "none" else self.method
        return ", ".join([arm if self.stem == "cifar" else f"{arm}, ImageNet stem", *self.switched])

    @property
    def title(self) -> str:
        return f"{'together' if len(self.switched) > 1 else 'alone'}: {self.name}"


ImageNet, Feature = partial(Lever, stem="imagenet"), partial(Lever, "feature")
LEVERS = (  # most important first; each group of TOGETHER is prepared at the same time
    Lever(),
    Lever(compiled=True),
    Lever(triton=True),
    Lever(compiled=True, triton=True),
    Feature(compiled=True),
    Lever(float16=True),
    ImageNet(),
    ImageNet(steps=16),
    #
    Lever(students=4),
    Lever(compiled=True, students=4),
    ImageNet(students=8),
    ImageNet(steps=4),
    Feature(students=4, shares_teacher=True),
    Feature(compiled=True, students=4, shares_teacher=True),
    Feature(),
    Feature(folded=False),
    #
    Lever(triton=True, float16=True),
    Lever(compiled=True, triton=True, students=4),
    Lever(students=2),
    Lever(students=8),
    Lever(steps=4),
    Lever(steps=16),
    Lever(compiled=True, float16=True),
    ImageNet(compiled=True, steps=16),
)
BESIDE = (  # numbers of concurrent processes; largest first, so that its processes can be reused
    (Lever(compiled=True), (8, 4, 2, 1)),
    (Feature(compiled=True), (4, 2, 1)),
    (Lever(), (8, 4, 2, 1)),
    (Feature(), (4, 2, 1)),
)


def rows(budget: Budget, pools: Callable[[Budget], AbstractContextManager[Pool]] = pool) -> Iterator[Row]:
    """Yield a row for each lever, then rows for concurrent processes, with and without MPS."""
    with pools(budget) as processes:
        for first in range(0, len(LEVERS), TOGETHER):
            group = LEVERS[first : first + TOGETHER]
            ready: dict[int, Any] = {}
            for place, lever in enumerate(group):
                yield lever.title, partial(_alone, processes, group, ready, place)
    for mps in (True, False):
        with under_mps(mps and budget.left > 0), pools(budget) as processes:
            for lever, counts in BESIDE:
                for count in counts:
                    title = f"{count} at a time, {'MPS' if mps else 'no MPS'}: {lever.name}"
                    yield title, partial(_beside, title, processes, lever, count, mps)


def _alone(processes: Pool, group: Sequence[Lever], ready: dict[int, Any], place: int) -> Result:
    """Measure one process. The first row of a group prepares the whole group, so nothing else runs during timing."""
    lever = group[place]
    if not ready:
        ready |= processes.ask(prepare, {each: (other,) for each, other in enumerate(group)}, PREPARING)
    begun: Ready = fine(ready[place])
    calls = max(1, STEPS // (lever.steps * lever.students))
    seconds = fine(processes.ask(timed, {place: (calls, REPEATS)}, MEASURING)[place])
    return result(
        lever.title,
        [each * gpu.IMAGES / (calls * begun.images) for each in seconds],
        unit="s",
        detail=f"{1000 * min(seconds) / calls:.2f} ms per call of {begun.images} images; {begun.how}",
    )


def _beside(title: str, processes: Pool, lever: Lever, count: int, mps: bool) -> Result:
    """Measure wall-clock seconds for an epoch's images with `count` concurrent processes."""
    places = range(count)
    if fine(processes.ask(serves, {0: ()}, PREPARING)[0]) != mps:
        raise RuntimeError("MPS is not available here" if mps else "an MPS already serves the GPU")
    ready = processes.prepare(prepare, dict.fromkeys(places, (lever,)), PREPARING)
    begun: Ready = [fine(each) for each in ready.values()].pop()  # check all of them, to raise any error
    calls = STEPS_BESIDE if lever.method == "none" else STEPS_BESIDE // 2
    started = time.perf_counter()
    answers = processes.ask(timed, dict.fromkeys(places, (calls, 1)), MEASURING)
    seconds = time.perf_counter() - started
    for each in answers.values():
        fine(each)
    return result(
        title,
        [seconds * gpu.IMAGES / (count * calls * begun.images)],
        unit="s",
        detail=f"{count} x {calls} steps in {seconds:.2f} s; {begun.how}",
    )


# In the process that measures


class Ready(NamedTuple):
    """The answer of a process after its warm-up."""

    images: int  # per call, over all students
    how: str  # how it runs, and the time of its preparation


_call: Callable[[], None] | None = None
_around = ExitStack()  # contexts of the current lever


def prepare(lever: Lever) -> Ready:
    """Build a lever's students and train until kernels are chosen and the graph is captured."""
    global _call
    device = torch.device("cuda")
    torch.set_num_threads(1)
    release()
    notices.take()
    started = time.perf_counter()
    _call, images = _around.enter_context(_pulled(lever, device))
    for _ in range(WARM_UP):
        _call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    how = "launched kernel by kernel" if Captured.given_up else "one graph"
    return Ready(images, "; ".join([how, f"ready in {seconds:.1f} s", *notices.take()]))


def timed(calls: int, repeats: int) -> list[float]:
    """Return the seconds of `calls` calls of the prepared lever, measured `repeats` times."""
    assert _call is not None
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            _call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def release() -> None:
    """Free the memory of the previous lever, and reset the record of failed fast paths."""
    global _call
    _call = None
    _around.close()
    gc.collect()  # a step refers to itself
    Captured.given_up.clear()
    Compiled.given_up.clear()
    if "torch._dynamo" in sys.modules:  # otherwise `reset` would import it, which takes seconds
        torch.compiler.reset()
    torch.cuda.empty_cache()


@contextmanager
def _pulled(lever: Lever, device: torch.device) -> Iterator[tuple[Callable[[], None], int]]:
    """Within this context, the lever's settings apply. Yields a function that trains once, and its number of images."""
    recipe = replace(study().recipe, epochs=1, precision=PRECISION)
    data = dataset()
    with ExitStack() as around:
        around.enter_context(patch.object(stepping, "Captured", Launched))  # all steps are captured together, below
        around.enter_context(patch.object(compilation, "COMPILING_PAYS", 0 if lever.compiled else math.inf))
        if not lever.folded:
            around.enter_context(patch.object(networks, "folded", side_effect=RuntimeError("switched off")))
        if lever.float16:
            around.enter_context(in_float16(LOSS_SCALE))
        teacher, sharing = None, None
        if lever.method != "none":
            folder = Path(around.enter_context(tempfile.TemporaryDirectory()))
            teacher = untrained_teacher(folder, lever.stem, WIDTH, recipe, data, device, 1)
        if teacher is not None and lever.shares_teacher:
            sharing = Sharing(teacher, lever.compiled)
        one = trial(cell(lever.method, lever.stem, WIDTH), recipe, "benchmark" if teacher else None)
        students = [Step(replace(one, seed=1 + place), data, teacher, device) for place in range(lever.students)]
        for each in students:
            if lever.triton:
                from benchmarks.triton_norm import replace_norms  # Triton is installed only with CUDA

                replace_norms(each.student)
            if sharing is not None:
                each._taught = sharing
            each.train()
        views = draw_views(1, 1, len(data.train.labels), pad=data.pad, flip=data.flip).to(device)
        size = min(recipe.batch_size, len(data.train.labels) // lever.steps)
        batches = [views[place * size : (place + 1) * size] for place in range(lever.steps)]
        captured = Captured(partial(_trained, students, sharing, Branches(device)), device)
        inputs = [part for each in batches for part in (each.order, each.top, each.left, each.flip)]
        yield partial(captured, *inputs), size * lever.steps * lever.students


class Launched(Captured):
    """A step without a graph, launched kernel by kernel."""

    def __call__(self, *inputs: Tensor) -> None:
        self._step(*inputs)


class Sharing:
    """A teacher that runs one forward pass per batch, whose result all students use."""

    def __init__(self, teacher: Teacher, is_compiled: bool) -> None:
        pass_ = partial(networks.forward_with_features, teacher.frozen(PRECISION))
        self._pass = compiled(pass_) if is_compiled else pass_
        self._passed: networks.Passed | None = None
        self.served = 0

    @torch.no_grad()
    def begin(self, images: Tensor) -> None:
        self._passed = self._pass(images)

    def __call__(self, images: Tensor) -> networks.Passed:
        assert self._passed is not None
        self.served += 1
        return self._passed


class Branches:
    """Streams for students that train at the same time. Each call uses the same streams, since autograd returns to the
    stream on which a weight was first used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run each task on its own stream if a graph is captured, else one after another."""
        if len(tasks) == 1 or Captured.given_up:
            for each in tasks:
                each()
            return
        here = torch.cuda.current_stream(self._device)
        while len(self._streams) < len(tasks):
            self._streams.append(torch.cuda.Stream(self._device))
        for stream in self._streams:  # before any task: work that a task queues here would delay later tasks
            stream.wait_stream(here)
        for stream, each in zip(self._streams, tasks, strict=True):
            with torch.cuda.stream(stream):
                each()
        for stream in self._streams:
            here.wait_stream(stream)


def _trained(students: Sequence[Step], teacher: Sharing | None, branches: Branches, *inputs: Tensor) -> None:
    """Train each student one step on each batch. `inputs` are the four parts of each batch's views."""
    for place in range(0, len(inputs), 4):
        views = Views(*inputs[place : place + 4])
        if teacher is not None:
            data, served = students[0].data, teacher.served
            with autocast(PRECISION, inputs[0].device):
                images = prepared(show(views, data), data)
                teacher.begin(networks.in_layout_of(students[0].student, images))
        branches.run([partial(each, views, None) for each in students])
        if teacher is not None and teacher.served - served != len(students):
            raise ValueError("students did not use the shared teacher")


@contextmanager
def in_float16(scale: float) -> Iterator[None]:
    """Within this context, autocast uses float16 in place of bfloat16, losses are multiplied by `scale` before the
    backward pass, and gradients are divided by `scale` before they are clipped."""
    plain_autocast, backward, clip = torch.autocast, Tensor.backward, nn.utils.clip_grad_norm_

    def cast(device_type: str, dtype: torch.dtype | None = None, **options: Any) -> torch.autocast:
        return plain_autocast(device_type, dtype=torch.float16 if dtype is torch.bfloat16 else dtype, **options)

    def scaled(loss: Tensor, *arguments: Any, **options: Any) -> None:
        backward(loss * scale, *arguments, **options)

    def unscaled(parameters: Sequence[Tensor], *arguments: Any, **options: Any) -> Tensor:
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1 / scale)
        return clip(parameters, *arguments, **options)

    with (
        patch.object(torch, "autocast", cast),
        patch.object(Tensor, "backward", scaled),
        patch.object(nn.utils, "clip_grad_norm_", unscaled),
    ):
        yield

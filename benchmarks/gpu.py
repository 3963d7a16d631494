"""Paper scale on a GPU: seconds per epoch, the limits of the hardware, and concurrent trials.

45,000 images of 32 x 32, batch 128, ResNet-50 to ResNet-18 at width 1, in bfloat16, compiled as tune_kd compiles long
trials. The images are noise, since the cost of a step does not depend on the content of an image. Bars are for an H100.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Result, Row, result
from benchmarks.plain import train_plain
from benchmarks.steps import STUDENT, TEACHER, cell, trial, untrained_teacher
from benchmarks.workers import Budget, Pool, fine, pool, under_mps
from search_spaces.ablation import study
from tune_kd.data import datasets
from tune_kd.data.datasets import DataSet, Split
from tune_kd.execute import mps
from tune_kd.study.cost import macs
from tune_kd.study.trial import Epoch
from tune_kd.training import networks, notices
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train

SECONDS = 160.0  # for all rows; the rest of three minutes is for imports and for killing processes that hang
FIRST, EPOCHS_WITHIN = 100.0, 60.0  # maximum seconds: for first epochs with compilation, and for the other epochs
IMAGES, VALIDATION, WIDTH = 45_000, 5_000, 1.0
PRECISION = "bfloat16"
TIMED = 3  # maximum number of timed epochs


@dataclass(frozen=True)
class Training:
    """The training of a process: a student with a method, or a teacher (method `teacher`)."""

    method: str
    stem: str = "cifar"

    @property
    def name(self) -> str:
        arm = {"none": "control", "teacher": "ResNet-50 teacher in training"}.get(self.method, self.method)
        return f"{arm}, {'CIFAR' if self.stem == 'cifar' else 'ImageNet'} stem"


CONTROL = Training("none")
ALONE = {  # one trial at a time, with the bar in seconds per epoch
    CONTROL: "<= 0.95",
    Training("feature"): "<= 1.8",
    Training("teacher"): "<= 2.8",
    Training("logit"): "",
    Training("none", "imagenet"): "",
    Training("logit", "imagenet"): "",
    Training("feature", "imagenet"): "",
}
AMORTISED = (  # training, number of concurrent trials, bar
    (CONTROL, 4, "<= 0.8"),
    (CONTROL, 2, ""),
    (Training("none", "imagenet"), 8, "<= 0.2"),
    (CONTROL, 8, ""),
)
ANSWERS = "teacher logits of an epoch's views, ResNet-50, CIFAR stem"
LATER = "first epoch of a later process minus its other epochs, control, CIFAR stem"


def noise(train: int = IMAGES, validation: int = VALIDATION) -> DataSet:
    """Return random images with the number and shape of CIFAR-10's."""
    digits = datasets.load("digits")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(0, 10, (count,), generator=generator))

    return replace(
        digits, train=split(train), validation=split(validation), test=split(validation),
        pad=4, flip=True, upsample=1, digest="noise of CIFAR-10's form",
    )  # fmt: skip


def our_training(
    method: str, stem: str, device: torch.device, data: DataSet, width: float = 1.0, answered: int = 8
) -> Iterator[Epoch]:
    """Yield epochs of our training without end. The teacher of a logit student caches logits for `answered` epochs."""
    recipe = replace(study().recipe, epochs=10**6, precision=PRECISION)
    with tempfile.TemporaryDirectory() as folder:
        teacher, one = None, trial(cell("none", stem, width), recipe, None)
        if method == "teacher":
            one = replace(one, phase="teacher", cell=replace(one.cell, teacher=TEACHER))
        elif method != "none":
            teacher = untrained_teacher(Path(folder), stem, width, recipe, data, device, answered)
            one = trial(cell(method, stem, width), recipe, teacher.teacher_id)
        yield from train(
            one, data, teacher, device=device, checkpoints=Checkpoints(Path(folder)), checkpoint_every=math.inf
        )


def our_epochs(
    method: str, stem: str, count: int, device: torch.device, dataset: DataSet, width: float = 1.0
) -> list[tuple[float, float]]:
    """Return (seconds of training, seconds of the teacher's logits) for `count` epochs of our training, after one epoch
    in which kernels are chosen and the step is captured."""
    epochs = islice(our_training(method, stem, device, dataset, width, count + 1), 1, count + 1)
    return [(len(dataset.train.labels) / each.images_per_second, each.answer_seconds or 0.0) for each in epochs]


def plain_epochs(
    method: str, stem: str, count: int, device: torch.device, dataset: DataSet, width: float = 1.0, workers: int = 8
) -> list[float]:
    """Return the training seconds of `count` epochs of the plain loop, as usually run: TF32, eight loader processes."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    teacher = None
    if method != "none":
        net = networks.build(TEACHER, stem=stem, classes=10, width=width, seed=9)
        teacher = net.to(device).eval().requires_grad_(False)
    epochs = train_plain(
        STUDENT, cell(method, stem, width), replace(study().recipe, epochs=10**6, precision=PRECISION), dataset,
        seed=1, device=device, teacher=teacher, workers=workers,
    )  # fmt: skip
    return [len(dataset.train.labels) / next(epochs).images_per_second for _ in range(count + 1)][1:]


def matrix_rate(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """Return the floating-point operations per second that this GPU reaches on a large matrix product in bfloat16."""
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        one @ one
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        one @ one
    torch.cuda.synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def bandwidth(device: torch.device, size: int = 2**30, repeats: int = 20) -> float:
    """Return the bytes per second that this GPU reads and writes in a copy."""
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 2 * size * repeats / (time.perf_counter() - started)


def floor(method: str, stem: str, rate: float) -> float:
    """Return the seconds for an epoch's multiplications at `rate`: three times a forward pass of the trained network,
    and with features one forward pass of the teacher."""
    student, teacher = (macs(each, stem=stem, width=1.0, size=32, classes=10) for each in (STUDENT, TEACHER))
    passes = {"feature": 3 * student + teacher, "teacher": 3 * teacher}.get(method, 3 * student)
    return 2 * passes * IMAGES / rate


# In the process that measures


class First(NamedTuple):
    """The first epoch of a process."""

    seconds: float  # with evaluation
    with_start: float  # seconds including everything before it, such as the start of CUDA
    notices: list[str]  # about slow paths


@cache
def dataset() -> DataSet:
    """Return the images of this process."""
    return noise(IMAGES, VALIDATION)


_epochs: Iterator[Epoch] = iter(())


def begin(training: Training) -> First:
    """Start a training, in place of any earlier one, and run its first epoch, which compiles and captures."""
    global _epochs
    torch.set_num_threads(1)
    _epochs = iter(())
    data = dataset()
    notices.take()
    started = time.perf_counter()
    _epochs = our_training(training.method, training.stem, torch.device("cuda"), data, WIDTH)
    first = next(_epochs)
    return First(first.seconds, time.perf_counter() - started, notices.take())


def go_on(count: int) -> list[Epoch]:
    """Train and return the next epochs of this process's training."""
    return list(islice(_epochs, count))


def trained(epoch: Epoch) -> float:
    """Return the seconds of an epoch's training, without evaluation."""
    return IMAGES / epoch.images_per_second


def plain_control() -> float:
    """Return the training seconds of an epoch of the plain loop."""
    return plain_epochs("none", "cifar", 1, torch.device("cuda"), dataset(), WIDTH)[0]


def rates() -> tuple[float, float]:
    """Return the rates of matrix products and copies."""
    device = torch.device("cuda")
    return matrix_rate(device), bandwidth(device)


def serves() -> bool:
    """Whether MPS serves this process."""
    return mps.serves()


# In the benchmark's own process


def rows(count: int, budget: Budget, pools: Callable[[Budget], AbstractContextManager[Pool]] = pool) -> Iterator[Row]:
    """Yield rows of single trials, then of concurrent trials, with MPS if available. The first epochs of all single
    trials run at the same time, each in its own process."""
    count = min(count, TIMED)
    rate = [math.nan]
    with pools(budget) as processes:
        for number, (name, unit) in enumerate((("matrix rate, bfloat16", "TFLOP/s"), ("bandwidth of a copy", "TB/s"))):
            yield name, partial(_rate, name, unit, number, processes, rate)
        firsts: dict[int, Any] = {}
        for place, training in enumerate(ALONE):
            name = f"first epoch of a first process, {training.name}"
            yield name, partial(_first, name, processes, firsts, place)
        for place, (training, bar) in enumerate(ALONE.items()):
            yield f"epoch, {training.name}", partial(_epoch, training, bar, processes, firsts, place, count, rate)
            if training.method == "logit" and training.stem == "cifar":
                yield ANSWERS, partial(_answers, processes, firsts, place, count)
    with under_mps(budget.left > 0), pools(budget) as processes:
        yield LATER, partial(_later, processes, count)
        for training, trials, bar in AMORTISED:
            name = f"epoch amortised over {trials} concurrent trials, {training.name}"
            yield name, partial(_amortised, name, training, trials, bar, processes, count)
    with pools(budget) as processes:
        name = "epoch of the plain loop, control, CIFAR stem"
        yield name, lambda: result(name, [fine(processes.ask(plain_control, {0: ()}, EPOCHS_WITHIN)[0])], unit="s")


def _rate(name: str, unit: str, number: int, processes: Pool, rate: list[float]) -> Result:
    both = fine(processes.ask(rates, {0: ()}, EPOCHS_WITHIN)[0])
    rate[0] = both[0]
    return result(name, [both[number] / 1e12], unit=unit)


def _first(name: str, processes: Pool, firsts: dict[int, Any], place: int) -> Result:
    if not firsts:
        firsts |= processes.ask(begin, {each: (training,) for each, training in enumerate(ALONE)}, FIRST)
    first: First = fine(firsts[place])
    detail = "; ".join([f"including the start of CUDA {first.with_start:.1f} s", *first.notices])
    return result(name, [first.seconds], unit="s", detail=f"{detail}; all first epochs ran at the same time")


def _measured(processes: Pool, firsts: dict[int, Any], place: int, count: int) -> list[Epoch]:
    if place not in firsts:
        raise RuntimeError("its first epoch was not trained")
    fine(firsts[place])
    epochs: list[Epoch] = fine(processes.ask(go_on, {place: (count,)}, EPOCHS_WITHIN)[place])
    return epochs


def _epoch(
    training: Training, bar: str, processes: Pool, firsts: dict[int, Any], place: int, count: int, rate: Sequence[float]
) -> Result:
    epochs = _measured(processes, firsts, place, count)
    least = floor(training.method, training.stem, rate[0])
    evaluated = statistics.median(each.seconds for each in epochs)
    return result(
        f"epoch, {training.name}", [trained(each) for each in epochs], unit="s", bar=bar,
        detail=f"with evaluation {evaluated:.2f} s, floor of the training {least:.2f} s",
    )  # fmt: skip


def _answers(processes: Pool, firsts: dict[int, Any], place: int, count: int) -> Result:
    epochs = _measured(processes, firsts, place, count)
    return result(ANSWERS, [each.answer_seconds or 0.0 for each in epochs], unit="s", bar="<= 0.5")


def _later(processes: Pool, count: int) -> Result:
    """Measure a first epoch when the compiled kernels of another process are on disk."""
    first: First = fine(processes.prepare(begin, {0: (CONTROL,)}, FIRST)[0])
    others = [each.seconds for each in fine(processes.ask(go_on, {0: (count,)}, EPOCHS_WITHIN)[0])]
    return result(
        LATER, [first.seconds - statistics.median(others)], unit="s", bar="<= 2",
        detail=f"{first.seconds:.2f} s and {statistics.median(others):.2f} s; including the start of CUDA "
               f"{first.with_start:.1f} s",
    )  # fmt: skip


def _amortised(name: str, training: Training, trials: int, bar: str, processes: Pool, count: int) -> Result:
    """Measure training seconds per epoch and trial for concurrent trials."""
    begun = processes.prepare(begin, dict.fromkeys(range(trials), (training,)), FIRST)
    for each in begun.values():
        fine(each)
    served = fine(processes.ask(serves, {0: ()}, FIRST)[0])
    started = time.perf_counter()
    answers = processes.ask(go_on, dict.fromkeys(begun, (count,)), EPOCHS_WITHIN)
    seconds = time.perf_counter() - started
    together = zip(*(fine(each) for each in answers.values()), strict=True)  # all first epochs, all second epochs, ...
    return result(
        name, [statistics.mean(map(trained, each)) / trials for each in together], unit="s", bar=bar,
        detail=f"{'MPS' if served else 'no MPS'}; wall time with evaluation {seconds / (trials * count):.3f} s",
    )  # fmt: skip

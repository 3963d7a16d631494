"""The GPU code of a study, from a teacher's training to a student's final metrics, on any device.

Shared by the tests with a simulated GPU, the tests with a real GPU, and `moves.py`.
"""

import math
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu as benchmark
from benchmarks.workers import Budget, Failed, Pool, in_a_line
from trials import as_teacher, trial
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.execute import probe_processes
from tune_kd.study.methods import Method, built_in
from tune_kd.study.trial import Answering, Epoch, Trial
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import best_weights, train
from tune_kd.training.loss import Batch, Context, divergence
from tune_kd.training.step import stepping
from tune_kd.training.teachers import Teacher, load_teacher, publish_teacher

BROUGHT = {  # custom methods, for features that the built-in losses do not use
    "views": Method("views", loss="placement:Views", needs="before_relu", settings={"weight": 2.0}, views=2),
    "wrapped": Method("wrapped", loss="placement:Wrapped", needs="features"),
}
METHODS = (*built_in(), *BROUGHT)
DRAWING = ("crd", "views")  # they draw random numbers, which differ between a captured and a launched step
BENCHMARKED = ("none", "logit", "feature")  # together they cover all code paths of a step on a GPU
RATES = partial(benchmark.matrix_rate, size=8, repeats=1), partial(benchmark.bandwidth, size=64, repeats=1)
WIDTH = 0.0625


class Views(nn.Module):
    """A loss with two views, feature maps before the ReLU, dropout and a memory bank."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        assert context.teacher is not None
        self.map = nn.Conv2d(context.student.taps[-1][0], context.teacher.taps[-1][0], 1)
        self.dropout = nn.Dropout()
        self.register_buffer("memory", torch.randn(context.classes, context.classes)[context.train_labels])
        self.memory: Tensor

    def forward(self, batch: Batch, *, weight: float | Tensor) -> Tensor:
        assert batch.second is not None and batch.second.teacher_logits is not None and batch.progress is not None
        maps = self.dropout(self.map(batch.student_before_relu[-1]))
        logits = batch.student_logits
        past = nn.functional.mse_loss(logits, self.memory[batch.index])
        self.memory.index_copy_(0, batch.index, logits.detach().to(self.memory.dtype))
        other = divergence(batch.second.student_logits, batch.second.teacher_logits, 4.0)
        return weight * other + batch.progress * past + nn.functional.mse_loss(maps, batch.teacher_before_relu[-1])


class Wrapped(nn.Module):
    """A loss that replaces the evaluated network: the student gets the teacher's classifier."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def student(self, net: nn.Module, context: Context) -> nn.Module:
        assert context.teacher is not None and context.classifier is not None
        net.fc = nn.Linear(context.student.embedding, context.teacher.embedding)
        return nn.Sequential(net, context.classifier)

    def forward(self, batch: Batch) -> Tensor:
        assert batch.student_embedding is not None and batch.teacher_logits is not None
        return divergence(batch.student_logits, batch.teacher_logits, 4.0) + batch.student_embedding.square().mean()


_taught: dict[tuple[Any, ...], tuple[dict[str, Tensor], list[Epoch]]] = {}
"""Weights and epochs of teachers, each trained once per process."""


def taught_on(device: torch.device, data: DataSet, stem: str, folder: Path, width: float = WIDTH) -> Teacher:
    """Train a teacher on a device, publish it, and load it there."""
    taught, checkpoints = as_teacher(trial("none", width=width)), Checkpoints(folder / "teacher")
    taught = replace(taught, cell=replace(taught.cell, stem=stem))
    key = (device.type, data.digest, taught)
    if key not in _taught:
        epochs = list(train(taught, data, None, device=device, checkpoints=checkpoints))
        _taught[key] = best_weights(checkpoints), epochs
    publish_teacher(folder / "teachers", taught, *_taught[key])
    return load_teacher(folder / "teachers", taught.trial_id, data, device, Answering(True, ()))


def pupil(method: str, stem: str, teacher: Teacher | None, width: float = WIDTH, **recipe: Any) -> Trial:
    """Return a student of a teacher, or a control if there is no teacher."""
    one = trial(method, teacher_id=teacher.teacher_id if teacher else None, stem=stem, width=width)
    return replace(one, recipe=replace(one.recipe, epochs=2, **recipe), brought=BROUGHT.get(method))


def distil(
    device: torch.device, data: DataSet, method: str, stem: str, folder: Path, width: float = WIDTH, **recipe: Any
) -> tuple[list[Epoch], list[Epoch]]:
    """Train a student twice, without interruption and resumed after epoch 1. Returns the epochs of both runs."""
    teacher = taught_on(device, data, stem, folder, width) if method != "none" else None
    student = pupil(method, stem, teacher, width, **recipe)
    whole = list(train(student, data, teacher, device=device, checkpoints=Checkpoints(folder / "whole")))
    begun = train(student, data, teacher, device=device, checkpoints=Checkpoints(folder / "cut"), checkpoint_every=0.0)
    before = list(islice(begun, 1))
    begun.close()
    after = train(student, data, teacher, device=device, checkpoints=Checkpoints(folder / "cut"), acknowledged=1)
    return whole, before + list(after)


def probe_one(device: torch.device, data: DataSet, student: Trial, teacher: Trial | None) -> tuple[float, int]:
    """Probe one trial in this process. Returns its images per second and its memory in bytes."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        try:
            job = probe_processes.job(student, teacher, data, device, Path(folder), threads)
            speed, peak = probe_processes.trained(job, probe_processes.prepared(job))
        finally:
            torch.set_num_threads(threads)
    assert math.isfinite(speed)
    return speed, peak


def benchmarked(device: torch.device, method: str, stem: str) -> list[float]:
    """Run the GPU benchmark with small networks and few images. Returns the seconds of each epoch."""
    dataset = benchmark.noise(train=130, validation=20)
    mine = benchmark.our_epochs(method, stem, 1, device, dataset, WIDTH)
    plain = benchmark.plain_epochs(method, stem, 1, device, dataset, WIDTH, workers=0)
    return [seconds for seconds, _ in mine] + plain


class Here:
    """A fake worker process of a benchmark, in this process. Its epochs are separate; all other state is shared."""

    def __init__(self, folder: str) -> None:
        self._epochs: Iterator[Epoch] = iter(())

    def ask(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._asked = partial(function, *arguments)

    def answer(self, seconds: float) -> Any:
        benchmark._epochs = self._epochs
        try:
            return self._asked()
        except Exception as error:  # as a real worker does
            raise Failed(in_a_line(error)) from error
        finally:
            self._epochs, benchmark._epochs = benchmark._epochs, iter(())

    def kill(self) -> None:
        self._epochs = iter(())

    def end(self) -> None:
        self._epochs = iter(())


@contextmanager
def processes_here(budget: Budget) -> Iterator[Pool]:
    """A pool whose workers run in this process."""
    made = Pool(budget, Here)  # type: ignore[arg-type]
    yield made
    made.end()


def through_pickle(device: torch.device, data: DataSet) -> DataSet:
    """Send data that are on a device through pickle, as to another process."""
    received: DataSet = pickle.loads(pickle.dumps(on_device(data, device)))
    return received


def numbers_of_a_step(device: torch.device, data: DataSet, folder: Path) -> list[Any]:
    """Return the values that a step reads each time: alpha, temperature, progress, epoch and learning rate."""
    teacher = taught_on(device, data, "cifar", folder, WIDTH)
    with stepping(pupil("logit", "cifar", teacher), data, teacher, device) as step:
        rates = [group["lr"] for group in step._optimizer.param_groups]
        return [*step._settings.values(), step._progress, step._epoch, *rates]

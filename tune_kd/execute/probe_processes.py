"""Processes that train the same trial at the same time, to measure how fast several share a GPU.

They start once, wait while they are not needed, and are told what to do through a pipe each. They are no children of
`multiprocessing`, which would execute the user's script again in each.
"""

import gc
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from tune_kd.data.augment import draw_views
from tune_kd.data.datasets import DataSet, Split
from tune_kd.execute.worker import Failure, failure
from tune_kd.study.brought import Code
from tune_kd.study.trial import Answering, Epoch, StopReason, Trial
from tune_kd.system.environment import guard_code, python_path
from tune_kd.training import networks, step, teachers
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import keep_freed_blocks, peak_memory, start_measuring
from tune_kd.training.loop import train
from tune_kd.training.loss import bring

NUMBERS = (1, 2, 4, 8)  # of concurrent trials to try
PROBE_STEPS = 40  # of a probing epoch: a tenth of a second on an H100
PROBE_EPOCHS = 3  # measured for each number, after one epoch of warm-up, in which a step is captured
MOST_EPOCHS = 1 + PROBE_EPOCHS * len(NUMBERS)
CONTEXT_BYTES = 2**29  # of a GPU that a process needs beside its tensors: CUDA's context and the code of its kernels
GROWTH = 1.05  # a larger number of trials must raise images per second by at least this factor
HEADROOM = 0.9  # fraction of memory to plan with; the rest is for fragmentation
ENDING = 5.0  # seconds for processes to end
PATIENCE = 600.0  # seconds for an answer: the first trial of a machine may be compiled


class ProbeFailed(RuntimeError):
    """Nothing can be measured; the message says why."""


@dataclass(frozen=True)
class Measured:
    """Result of training `together` equal trials at the same time."""

    together: Annotated[int, Field(ge=1)]
    images_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # of all of them
    bytes_each: Annotated[int, Field(ge=0)]  # peak of one


@dataclass(frozen=True)
class Job:
    """A trial that processes train, on few images, with a teacher that was published in a folder."""

    trial: Trial
    data: DataSet
    device: torch.device
    folder: Path
    threads: int
    codes: tuple[Code, ...]
    more_bytes: int  # that a process needs in the run and not here


def job(
    trial: Trial,
    teacher: Trial | None,
    data: DataSet,
    device: torch.device,
    folder: Path,
    threads: int = 1,
    codes: Sequence[Code] = (),
) -> Job:
    """Prepare a trial for a probe in a folder: cut its images, and publish a teacher with random weights, which costs
    as much as a trained one."""
    if teacher is not None:
        cell, classes = teacher.cell, len(data.classes)
        net = networks.build(teacher.architecture, stem=cell.stem, classes=classes, width=cell.width, seed=0)
        teachers.publish_teacher(folder / "teachers", teacher, net.state_dict(), [])
    full = len(data.train.labels)
    count = min(full, PROBE_STEPS * trial.recipe.batch_size)
    train, validation, test = (_cut(split, count, full) for split in (data.train, data.validation, data.test))
    small = replace(data, train=train, validation=validation, test=test)
    # Whether a trial is compiled depends on all images that it sees, which stay as many.
    epochs = max(MOST_EPOCHS + 1, round(trial.recipe.epochs * full / count))
    scaled = replace(trial, recipe=replace(trial.recipe, epochs=epochs, validate_every=1))  # an evaluation needs memory
    mine = tuple(code for code in codes if trial.brought and code.digest == trial.brought.source)
    more = _image_bytes(data) - _image_bytes(small) + (CONTEXT_BYTES if device.type == "cuda" else 0)
    return Job(scaled, small, device, folder, threads, mine, more)


def _cut(split: Split, count: int, full: int) -> Split:
    """The first of a split's images: `count` of each `full`."""
    some = math.ceil(count * len(split.labels) / full)
    return Split(split.images[:some].clone(), split.labels[:some].clone())


def _image_bytes(data: DataSet) -> int:
    return sum(split.images.nbytes for split in (data.train, data.validation, data.test))


# In a process


def serve(pipe: Connection) -> None:
    """Do what is told, and send the result or a `Failure`, until the pipe is closed. A job is prepared, "train" trains
    it further, and "rest" frees what it holds."""
    import torchvision.models  # noqa: F401  (takes seconds, and all processes wait for one another)

    guard_code()
    keep_freed_blocks()
    epochs: Iterator[Epoch] = iter(())
    mine: Job | None = None
    with suppress(EOFError, OSError):  # of a pipe that is closed
        while True:
            told = pipe.recv()
            try:
                if told == "train":
                    assert mine is not None
                    pipe.send(trained(mine, epochs))
                    continue
                epochs, before, mine = iter(()), mine, None  # frees the one before
                if isinstance(told, Job):
                    epochs, mine = prepared(told), told
                elif before is not None:
                    step.forget()
                    gc.collect()
                    start_measuring(before.device)  # frees what is cached of a GPU
                pipe.send(None)
            except Exception as error:
                pipe.send(failure(error))


def prepared(job: Job) -> Iterator[Epoch]:
    """Begin a trial, run its first epoch, and return the following ones."""
    bring(job.codes)
    torch.set_num_threads(job.threads)
    teacher, trial = None, job.trial
    if trial.teacher_id is not None:
        drawn = Answering(False, ((trial.seed, MOST_EPOCHS),))
        teacher = teachers.load_teacher(job.folder / "teachers", trial.teacher_id, job.data, job.device, drawn)
        for epoch in range(1, MOST_EPOCHS + 1) if trial.method.uses_cached_logits else ():
            teacher.logits(
                draw_views(trial.seed, epoch, len(job.data.train.labels), pad=job.data.pad, flip=job.data.flip)
            )
    unused = Checkpoints(job.folder / "checkpoints")
    epochs = train(trial, job.data, teacher, device=job.device, checkpoints=unused, checkpoint_every=math.inf)
    next(epochs)
    return epochs


def trained(job: Job, epochs: Iterator[Epoch]) -> tuple[float, int]:
    """Train further, and return the images a second and the bytes that the process would need in the run."""
    seconds = sum(next(epochs).seconds for _ in range(PROBE_EPOCHS))
    return PROBE_EPOCHS * len(job.data.train.labels) / seconds, (peak_memory(job.device) or 0) + job.more_bytes


PROGRAM = (
    "import sys; from multiprocessing.connection import Connection; from tune_kd.execute import probe_processes; "
    "probe_processes.serve(Connection(int(sys.argv[1])))"
)


# Here


class Process:
    """A process that serves."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._pipe, there = multiprocessing.Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(there.fileno())],
                env=os.environ | python_path() | dict(variables),
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def tell(self, what: Job | str) -> None:
        with suppress(OSError):  # it died, which `answer` tells
            self._pipe.send(what)

    def answer(self, until: float) -> Any:
        """What it sends until a time of `time.monotonic`. Raises `ProbeFailed`."""
        with suppress(EOFError, OSError):
            if self._pipe.poll(max(0.0, until - time.monotonic())):
                return self._pipe.recv()
            raise ProbeFailed(f"a probing process does not answer within {PATIENCE:.0f} s")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        raise ProbeFailed(f"a probing process died (exit status {self._process.returncode})")

    def dismiss(self) -> None:
        """Have it end once it has done what it was told. A process that is killed while it computes could take other
        clients of its MPS along."""
        self._pipe.close()

    def end(self, until: float) -> None:
        """Wait until it ends, and kill it at a time of `time.monotonic`."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def processes(count: int, variables: Mapping[str, str]) -> Iterator[list[Process]]:
    """Within this context there are processes that serve, with more variables of the environment."""
    made: list[Process] = []
    try:
        made.extend(Process(variables) for _ in range(count))  # one by one, so that those are ended which were started
        yield made
    finally:
        for each in made:
            each.dismiss()
        until = time.monotonic() + ENDING
        for each in made:
            each.end(until)


def measure(pool: Sequence[Process], job: Job, numbers: Sequence[int], memory: int) -> list[Measured]:
    """Train one trial, then more at a time while images per second grow and they fit into the memory (bytes).

    Returns nothing if not even one fits. Raises `ProbeFailed`.
    """
    found: list[Measured] = []
    ready = 0
    _told(pool, "rest")  # they have started, and hold nothing, so that the first trial is alone
    for together in numbers:
        if found and together * found[-1].bytes_each > HEADROOM * memory:
            break
        if _told(pool[ready:together], job) is None or (answers := _told(pool[:together], "train")) is None:
            break  # out of memory
        ready = together
        found.append(Measured(together, sum(speed for speed, _ in answers), max(size for _, size in answers)))
        if len(found) > 1 and found[-1].images_per_second < GROWTH * found[-2].images_per_second:
            break
    return found


def _told(pool: Sequence[Process], what: Job | str) -> list[Any] | None:
    """Tell processes something, and return their answers; None if one ran out of memory. Raises `ProbeFailed`."""
    for each in pool:
        each.tell(what)
    until = time.monotonic() + PATIENCE
    answers = [each.answer(until) for each in pool]
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    if others := [each for each in failures if each.reason != StopReason.OUT_OF_MEMORY]:
        raise ProbeFailed(f"a probing process failed: {others[0].message}")
    return None if failures else answers

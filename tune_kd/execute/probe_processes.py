"""Processes that train copies of a trial at the same time, to measure the throughput of a shared GPU.

The processes start once and get commands through pipes. They are not started by `multiprocessing`, which would execute
the user's script again in each of them.
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

NUMBERS = (1, 2, 4, 8)  # numbers of concurrent trials to measure
PROBE_STEPS = 40  # steps of an epoch in a probe: a tenth of a second on an H100
PROBE_EPOCHS = 3  # measured epochs for each number, after one epoch of warm-up, in which the step is captured
MOST_EPOCHS = 1 + PROBE_EPOCHS * len(NUMBERS)
CONTEXT_BYTES = 2**29  # GPU memory of a process besides its tensors: CUDA's context and kernel code
GROWTH = 1.05  # a larger number of trials must raise images per second by at least this factor
HEADROOM = 0.9  # fraction of memory to use; the rest is for fragmentation
ENDING = 5.0  # seconds for processes to end
PATIENCE = 600.0  # seconds for an answer, which may include compilation


class ProbeFailed(RuntimeError):
    """The probe cannot measure; the message says why."""


@dataclass(frozen=True)
class Measured:
    """Result of training `together` equal trials at the same time."""

    together: Annotated[int, Field(ge=1)]
    images_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # sum over all trials
    bytes_each: Annotated[int, Field(ge=0)]  # peak memory of one trial


@dataclass(frozen=True)
class Job:
    """A trial to train on few images, and the folder with its published teacher."""

    trial: Trial
    data: DataSet
    device: torch.device
    folder: Path
    threads: int
    codes: tuple[Code, ...]
    more_bytes: int  # memory that a process needs in the run but not in the probe


def job(
    trial: Trial,
    teacher: Trial | None,
    data: DataSet,
    device: torch.device,
    folder: Path,
    threads: int = 1,
    codes: Sequence[Code] = (),
) -> Job:
    """Prepare a trial for a probe: reduce its images, and publish a teacher in `folder`. The teacher has random
    weights, which cost as much time as trained ones."""
    if teacher is not None:
        cell, classes = teacher.cell, len(data.classes)
        net = networks.build(teacher.architecture, stem=cell.stem, classes=classes, width=cell.width, seed=0)
        teachers.publish_teacher(folder / "teachers", teacher, net.state_dict(), [])
    full = len(data.train.labels)
    count = min(full, PROBE_STEPS * trial.recipe.batch_size)
    train, validation, test = (_cut(split, count, full) for split in (data.train, data.validation, data.test))
    small = replace(data, train=train, validation=validation, test=test)
    # More epochs keep the total number of images, which decides whether a trial is compiled.
    epochs = max(MOST_EPOCHS + 1, round(trial.recipe.epochs * full / count))
    scaled = replace(trial, recipe=replace(trial.recipe, epochs=epochs, validate_every=1))  # evaluations need memory
    mine = tuple(code for code in codes if trial.brought and code.digest == trial.brought.source)
    more = _image_bytes(data) - _image_bytes(small) + (CONTEXT_BYTES if device.type == "cuda" else 0)
    return Job(scaled, small, device, folder, threads, mine, more)


def _cut(split: Split, count: int, full: int) -> Split:
    """Return the first images of a split, a fraction `count / full` of them."""
    some = math.ceil(count * len(split.labels) / full)
    return Split(split.images[:some].clone(), split.labels[:some].clone())


def _image_bytes(data: DataSet) -> int:
    return sum(split.images.nbytes for split in (data.train, data.validation, data.test))


# In the probing process


def serve(pipe: Connection) -> None:
    """Execute commands from a pipe until it closes, and send back each result or a `Failure`. A `Job` starts a trial,
    "train" continues it, and "rest" frees its memory."""
    import torchvision.models  # noqa: F401  (takes seconds; import it before the processes wait for one another)

    guard_code()
    keep_freed_blocks()
    epochs: Iterator[Epoch] = iter(())
    mine: Job | None = None
    with suppress(EOFError, OSError):  # the pipe is closed
        while True:
            told = pipe.recv()
            try:
                if told == "train":
                    assert mine is not None
                    pipe.send(trained(mine, epochs))
                    continue
                epochs, before, mine = iter(()), mine, None  # frees the previous trial
                if isinstance(told, Job):
                    epochs, mine = prepared(told), told
                elif before is not None:
                    step.forget()
                    gc.collect()
                    start_measuring(before.device)  # also empties the cache of GPU memory
                pipe.send(None)
            except Exception as error:
                pipe.send(failure(error))


def prepared(job: Job) -> Iterator[Epoch]:
    """Start a trial, run its first epoch, and return an iterator over the next epochs."""
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
    """Train `PROBE_EPOCHS` epochs. Returns images per second, and the bytes that the process would need in the run."""
    seconds = sum(next(epochs).seconds for _ in range(PROBE_EPOCHS))
    return PROBE_EPOCHS * len(job.data.train.labels) / seconds, (peak_memory(job.device) or 0) + job.more_bytes


PROGRAM = (
    "import sys; from multiprocessing.connection import Connection; from tune_kd.execute import probe_processes; "
    "probe_processes.serve(Connection(int(sys.argv[1])))"
)


# In the process that measures


class Process:
    """A probing process, which runs `serve`."""

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
        with suppress(OSError):  # it died; `answer` raises
            self._pipe.send(what)

    def answer(self, until: float) -> Any:
        """Return the next answer. Raises `ProbeFailed` if none arrives before `until`, a time of `time.monotonic`."""
        with suppress(EOFError, OSError):
            if self._pipe.poll(max(0.0, until - time.monotonic())):
                return self._pipe.recv()
            raise ProbeFailed(f"a probing process did not respond within {PATIENCE:.0f} s")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        raise ProbeFailed(f"a probing process died (exit status {self._process.returncode})")

    def dismiss(self) -> None:
        """Let the process exit after its current command. Killing a process while it computes could also end other
        clients of the same MPS."""
        self._pipe.close()

    def end(self, until: float) -> None:
        """Wait for the process to end. Kill it at the time `until` of `time.monotonic`."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def processes(count: int, variables: Mapping[str, str]) -> Iterator[list[Process]]:
    """Within this context, `count` probing processes run, with additional environment variables."""
    made: list[Process] = []
    try:
        made.extend(Process(variables) for _ in range(count))  # `made` grows one by one, in case a start fails
        yield made
    finally:
        for each in made:
            each.dismiss()
        until = time.monotonic() + ENDING
        for each in made:
            each.end(until)


def measure(pool: Sequence[Process], job: Job, numbers: Sequence[int], memory: int) -> list[Measured]:
    """Train 1 trial, then more at the same time, as long as images per second grow and `memory` (bytes) suffices.

    Returns an empty list if one trial does not fit. Raises `ProbeFailed`.
    """
    found: list[Measured] = []
    ready = 0
    _told(pool, "rest")  # wait until all have started and freed their memory, so that the first trial is alone
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
    """Send a command to processes and return their answers; None if one ran out of memory. Raises `ProbeFailed`."""
    for each in pool:
        each.tell(what)
    until = time.monotonic() + PATIENCE
    answers = [each.answer(until) for each in pool]
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    if others := [each for each in failures if each.reason != StopReason.OUT_OF_MEMORY]:
        raise ProbeFailed(f"a probing process failed: {others[0].message}")
    return None if failures else answers

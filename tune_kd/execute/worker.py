"""Run a trial: load its data and teacher, train, publish. Independent of Ray and of the ledger."""

import math
import platform
import re
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from tune_kd.data.datasets import DataSet, load_declared
from tune_kd.study.brought import Code
from tune_kd.study.spec import Data
from tune_kd.study.trial import Answering, Epoch, Role, StopReason, Trial
from tune_kd.system.environment import guard_code
from tune_kd.system.errors import CorruptFile
from tune_kd.system.object_store import Mirror, local
from tune_kd.system.secrets import masked
from tune_kd.training import teachers
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import keep_freed_blocks
from tune_kd.training.loop import Diverged, best_weights, train
from tune_kd.training.loss import bring

ASK_EVERY = 2.0  # seconds between checks of an object store for the request to stop


@dataclass(frozen=True)
class Workplace:
    """Folders of a run that its trials read and write. With a `url`, each machine has its own mirror of the folders of
    teachers and checkpoints."""

    data_dir: Path | None
    cache: Path | None
    teachers: Path
    checkpoints: Path
    checkpoint_every: float = 30.0  # seconds between the checkpoints of a trial
    url: str | None = None  # URL of the folder for all runs
    data: DataSet | None = None  # if None, each process loads it from `data_dir`
    codes: tuple[Code, ...] = ()  # code of the study's own losses
    umask: int | None = None  # for result files: that of the user who started the run; None keeps the process's umask
    variables: tuple[tuple[str, str], ...] = ()  # environment variables to set before CUDA is initialized

    @property
    def drain(self) -> Path:
        """The file that asks trials to stop. While it exists, each writes a checkpoint and stops after its epoch."""
        return self.checkpoints / "drain"

    def here(self) -> "Workplace":
        """Return the workplace with the paths on this machine."""
        if self.url is None:
            return self
        root, run = local(self.url), self.checkpoints.parent.name
        return replace(self, teachers=root / self.teachers.name, checkpoints=root / run / self.checkpoints.name)

    def leaving(self) -> Callable[[], bool]:
        """Return a function that tells whether trials are asked to stop. A trial calls it after each epoch."""
        mirror, asked = Mirror.of(self.drain.parent), -math.inf

        def asked_to_leave() -> bool:
            nonlocal asked
            if self.drain.exists() or mirror.url is None or time.monotonic() - asked < ASK_EVERY:
                return self.drain.exists()
            asked = time.monotonic()
            return self.drain.name in mirror.names(self.drain.parent)

        return asked_to_leave


@dataclass(frozen=True)
class Task:
    """One attempt at a trial, with its share of CPUs and GPUs."""

    trial: Trial
    attempt: int  # from 1
    acknowledged: int  # number of epochs in the ledger
    cpus: float
    gpus: float
    answering: Answering | None = None  # how its teacher computes logits
    taught: str | None = None  # digest of the teacher's weights in the ledger

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Where:
    """The host and device of a trial, for the records."""

    host: str
    device: str


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended early. `lost` (the worker died), `storage` (a disk error) and `mps` (an error of another
    trial on the same GPU) are not the trial's fault."""

    reason: StopReason | Literal["lost", "storage", "mps"]
    message: str
    broken: bool = False  # the process can no longer use its GPU


def failure(error: BaseException) -> Failure:
    """Classify an exception that a trial raised."""
    message = masked("".join(traceback.format_exception_only(error)).strip())  # before Ray sees it
    if isinstance(error, Diverged):
        return Failure(StopReason.DIVERGED, message)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return Failure(StopReason.OUT_OF_MEMORY, message)
    if isinstance(error, teachers.TeacherChanged):
        return Failure(StopReason.TEACHER_FAILED, message)
    if isinstance(error, OSError | CorruptFile):
        return Failure("storage", message)
    return _of_cuda(message) or Failure(StopReason.ERROR, message)


ASSERTION = "device-side assert"
BREAKS = re.compile(
    f"{ASSERTION}|illegal memory access|illegal instruction|misaligned address|invalid program counter|launch failure|"
    "operation not supported on global/shared address space|hardware stack error|launch timed out|uncorrectable"
)
"""Errors after which every CUDA call in the same process fails."""
MPS = re.compile(r"CUDA error.*(\bMPS\b|cudaErrorMps)", re.DOTALL)
LIBRARIES = re.compile(r"CUBLAS_STATUS|CUDNN_STATUS|CUSPARSE_STATUS|CUFFT")


def _of_cuda(message: str) -> Failure | None:
    """Classify an error after which CUDA no longer works in this process. Returns None for other errors.

    If MPS serves a GPU, such an error of one trial also ends the other trials on the GPU, with errors that mention MPS.
    The trial's own error counts as a lost worker, except for a device-side assertion, which fails each time.
    """
    if LIBRARIES.search(message) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # has the cause, which errors of CUDA libraries lack
            message = f"{message}; {masked(str(error).strip())}"
    if MPS.search(message):
        return Failure("mps", message, broken=True)
    if "CUDA error" not in message or not BREAKS.search(message):
        return None
    return Failure(StopReason.ERROR if ASSERTION in message else "lost", message, broken=True)


Work = Callable[[Task, Workplace], Generator[Epoch]]  # `work`, or a stand-in in tests


def work(task: Task, place: Workplace) -> Generator[Epoch]:
    """Run one attempt at a trial and yield its epochs. Raises what training raises; see `failure`."""
    trial = task.trial
    place = place.here()
    device = _device(task)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, task.gpus))  # Ray does not enforce its fractions
    torch.set_num_threads(task.threads)
    keep_freed_blocks()
    guard_code()
    bring(code for code in place.codes if trial.brought and code.digest == trial.brought.source)  # only what it uses
    dataset = place.data or _dataset(trial.data, place.data_dir, place.cache)
    if trial.data_digest != dataset.digest:
        raise RuntimeError(
            f"the data have the digest {dataset.digest[:16]}, but the plan has {str(trial.data_digest)[:16]}: "
            f"{place.data_dir or trial.data.name} differs between this machine and the one that started the run"
        )
    checkpoints, every = Checkpoints(place.checkpoints / trial.trial_id), place.checkpoint_every
    training = partial(
        train, trial, dataset, device=device, checkpoints=checkpoints, checkpoint_every=every, leaving=place.leaving()
    )
    if trial.role == Role.TEACHER:
        yield from _teach(trial, place, checkpoints, training(None))
        return
    teacher = None
    if trial.teacher_id:
        teachers.fetch_teacher(place.teachers, trial.teacher_id)
        teacher = _teacher(place.teachers, trial.teacher_id, dataset, device, task.answering, task.taught)
    yield from training(teacher, acknowledged=task.acknowledged)


def _teach(trial: Trial, place: Workplace, checkpoints: Checkpoints, training: Iterator[Epoch]) -> Iterator[Epoch]:
    """Reuse a published teacher, or train it and publish it before its last epoch is reported.

    Only one process trains a teacher. Another run that needs the same teacher waits here, then reuses it.
    """
    teachers.fetch_teacher(place.teachers, trial.trial_id)
    with _patiently(teachers.writing(place.teachers, trial.trial_id), place):
        published = teachers.published_epochs(place.teachers, trial.trial_id)
        if published is not None:
            yield from published  # including recorded epochs, since the driver checks that they are equal
            return
        trained: list[Epoch] = []
        for epoch in training:
            trained.append(epoch)
            if epoch.outcome is not None:
                teachers.publish_teacher(place.teachers, trial, best_weights(checkpoints), trained)
            yield epoch


@contextmanager
def _patiently(lock: FileLock, place: Workplace) -> Iterator[None]:
    """Wait for a lock that another run may hold for hours. Raises `RuntimeError` if this run is asked to stop."""
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            if place.drain.exists():
                raise RuntimeError("stopped while waiting for a teacher that another run is training") from None
    try:
        yield
    finally:
        lock.release()


@lru_cache(maxsize=1)
def _dataset(spec: Data, folder: Path | None, cache: Path | None) -> DataSet:
    """Load the data set once per process."""
    return load_declared(spec, folder, cache=cache, say=lambda _: None, progress=False)


# Keep the last two teachers of a process, with networks and logits, for its next trials.
_teacher = lru_cache(maxsize=2)(teachers.load_teacher)


def _device(task: Task) -> torch.device:
    return torch.device("cuda" if task.gpus > 0 and torch.cuda.is_available() else "cpu")


def whereabouts(task: Task) -> Where:
    """Return the host and device on which this process runs a task."""
    device = _device(task)
    return Where(platform.node(), torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)

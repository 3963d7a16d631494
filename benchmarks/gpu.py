"""Paper scale on a GPU: seconds an epoch, what the hardware would allow, and trials side by side.

45,000 images of 32 x 32, batch 128, ResNet-50 to ResNet-18 at width 1, in bfloat16. The images are noise: what a step
costs does not depend on what is in the picture.
"""

import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.measure import Result, Row, result
from benchmarks.plain import train_plain
from benchmarks.steps import STUDENT, TEACHER, cell, trial, untrained_teacher
from search_spaces.ablation import study
from tune_kd.data import datasets
from tune_kd.data.datasets import DataSet, Split
from tune_kd.study.cost import macs
from tune_kd.training import networks
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train

IMAGES, VALIDATION = 45_000, 5_000
PRECISION = "bfloat16"
STEMS = ("cifar", "imagenet")
METHODS = ("none", "logit", "feature")
TARGETS = {"none": "<= 0.5", "logit": "<= 0.5", "feature": "<= 1.3"}  # seconds an epoch on an H200, cifar stem
TOGETHER = (2, 4, 8)
TIMED = 5  # epochs of each trial that trains beside others


def noise(train: int = IMAGES, validation: int = VALIDATION) -> DataSet:
    """Images of CIFAR-10's number and form."""
    digits = datasets.load("digits")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(0, 10, (count,), generator=generator))

    return replace(
        digits, train=split(train), validation=split(validation), test=split(validation),
        pad=4, flip=True, upsample=1, digest="noise of CIFAR-10's form",
    )  # fmt: skip


def our_epochs(
    method: str, stem: str, count: int, device: torch.device, dataset: DataSet, width: float = 1.0
) -> list[tuple[float, float]]:
    """(seconds of training, of the teacher's answers) of `count` epochs of ours, after one in which kernels are chosen
    and the step is captured."""
    recipe = replace(study().recipe, epochs=10**6, precision=PRECISION)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = None
        if method != "none":
            teacher = untrained_teacher(Path(folder), stem, width, recipe, dataset, device, count + 1)
        epochs = train(
            trial(cell(method, stem, width), recipe, teacher.teacher_id if teacher else None),
            dataset, teacher, device=device, checkpoints=Checkpoints(Path(folder)), checkpoint_every=math.inf,
        )  # fmt: skip
        for _ in range(count + 1):
            epoch = next(epochs)
            found.append((len(dataset.train.labels) / epoch.images_per_second, epoch.answer_seconds or 0.0))
    return found[1:]


def plain_epochs(
    method: str, stem: str, count: int, device: torch.device, dataset: DataSet, width: float = 1.0, workers: int = 8
) -> list[float]:
    """Seconds of training of the plain loop's epochs, with TF32 and eight loading processes, as it is usually run."""
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
    """Floating-point operations a second that this GPU reaches in bfloat16 on a large product."""
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
    """Bytes a second that this GPU reads and writes when it copies."""
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
    """Seconds that an epoch's multiplications take at `rate`: three forward passes, and the teacher's with features."""
    student = macs(STUDENT, stem=stem, width=1.0, size=32, classes=10)
    teacher = macs(TEACHER, stem=stem, width=1.0, size=32, classes=10) if method == "feature" else 0
    return 2 * (3 * student + teacher) * IMAGES / rate


def rows(count: int) -> Iterator[Row]:
    """The table of stems and methods, then trials beside each other."""
    device = torch.device("cuda")
    name, rate = torch.cuda.get_device_name(device), math.nan

    def matrices() -> Result:
        nonlocal rate
        rate = matrix_rate(device)
        return result("matrix rate, bfloat16", [rate / 1e12], unit="TFLOP/s", detail=name)

    yield "matrix rate, bfloat16", matrices
    copies = "bandwidth of a copy"
    yield copies, lambda: result(copies, [bandwidth(device) / 1e12], unit="TB/s", detail=name)
    for stem in STEMS:
        for method in METHODS:
            title = f"epoch, {stem} stem, {method}, {PRECISION}"
            yield title, partial(_epoch, title, method, stem, count, device, lambda: rate)
    alone = cache(partial(_together, 1, TIMED))
    for trials in TOGETHER:
        title = f"{trials} controls at a time / one after another, cifar stem"
        yield title, partial(_packed, title, trials, alone)


def _epoch(title: str, method: str, stem: str, count: int, device: torch.device, rate: Callable[[], float]) -> Result:
    dataset = noise()
    mine = our_epochs(method, stem, count, device, dataset)
    plain = plain_epochs(method, stem, 1, device, dataset)[0]
    answers = f"; to answer an epoch's views {mine[0][1]:.2f} s" if method == "logit" else ""
    return result(
        title,
        [trained for trained, _ in mine],
        unit="s",
        bar=TARGETS[method] if stem == "cifar" else "",
        detail=f"plain loop {plain:.2f} s, floor {floor(method, stem, rate()):.2f} s{answers}",
    )


def _packed(title: str, trials: int, alone: Callable[[], float]) -> Result:
    """Several controls on one GPU at a time, by share, against one after another."""
    seconds, one = _together(trials, TIMED), alone()
    return result(
        title, [seconds / (trials * one)],
        detail=f"{seconds:.1f} s against {trials * one:.1f} s for {trials} x {TIMED} epochs",
    )  # fmt: skip


def _train_beside(share: float, epochs: int, connection: Connection) -> None:
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(share)
    dataset, recipe = noise(), replace(study().recipe, epochs=10**6, precision=PRECISION)
    with tempfile.TemporaryDirectory() as folder:
        rows = train(
            trial(cell("none", "cifar", 1.0), recipe, None), dataset, None,
            device=device, checkpoints=Checkpoints(Path(folder)), checkpoint_every=math.inf,
        )  # fmt: skip
        next(rows)
        connection.send("ready")
        connection.recv()
        for _ in range(epochs):
            next(rows)
        connection.send("done")


def _together(count: int, epochs: int, beside: Callable[[float, int, Connection], None] = _train_beside) -> float:
    """Seconds that so many trials take for their epochs at the same time. Raises RuntimeError where one dies."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=beside, args=(1 / count, epochs, there)) for _, there in pipes]
    for process in processes:
        process.start()
    for _, there in pipes:
        there.close()  # so that the death of a process ends what is received from it
    try:
        for here, _ in pipes:
            assert here.recv() == "ready"
        started = time.perf_counter()
        for here, _ in pipes:
            here.send("go")
        for here, _ in pipes:
            assert here.recv() == "done"
        return time.perf_counter() - started
    except EOFError as error:
        raise RuntimeError(f"one of {count} trials at a time died; what it said stands above") from error
    finally:
        for here, _ in pipes:
            here.close()
        for process in processes:
            process.join()

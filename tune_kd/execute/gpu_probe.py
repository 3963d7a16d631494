"""Measure which share of a GPU a trial should have, by training several copies of the heaviest student at once."""

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tune_kd.data.datasets import DataSet, Split
from tune_kd.execute.worker import failure
from tune_kd.study.brought import Code
from tune_kd.study.cost import flop
from tune_kd.study.plan import Plan
from tune_kd.study.trial import Answering, Role, StopReason, Trial
from tune_kd.system.environment import guard_code
from tune_kd.system.errors import UserError
from tune_kd.training import networks, teachers
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import peak_memory, start_measuring
from tune_kd.training.loop import train
from tune_kd.training.loss import bring

NUMBERS = (1, 2, 4, 8)  # of concurrent trials to try
PROBE_STEPS = 40  # of a probing epoch: about a second, without the capture of a step
PROBE_EPOCHS = 3  # measured after one epoch of warm-up
GROWTH = 1.05  # a larger number of trials must raise images per second by at least this factor
HEADROOM = 0.9  # fraction of memory to plan with; the rest is for fragmentation


@dataclass(frozen=True)
class Measured:
    """Result of training `together` equal trials at the same time."""

    together: int
    images_per_second: float  # of all of them
    bytes_each: int  # peak of one


def propose(measured: Sequence[Measured], memory: int) -> float:
    """Return the share 1/k, where k is the smallest number of trials within 5 % of the best images per second.

    Skips numbers whose trials need more than 90 % of `memory` (bytes). Raises `UserError` if none fits.
    """
    fitting = [each for each in measured if each.together * each.bytes_each <= HEADROOM * memory]
    if not fitting:
        raise UserError(
            "--gpus-per-trial is auto, and not one trial fits into the GPU's memory; lower recipe.batch_size"
        )
    best = max(each.images_per_second for each in fitting)
    return 1 / min(each.together for each in fitting if GROWTH * each.images_per_second >= best)


def probe(
    plan: Plan,
    data: DataSet,
    device: torch.device,
    say: Callable[[str], None],
    numbers: Sequence[int] = NUMBERS,
    codes: Sequence[Code] = (),
) -> float:
    """Measure one trial, then more at a time while images per second grow; return the share to use. `codes` are what
    the study brings."""
    # One share is used for all trials, so measure the most expensive one.
    student = max((trial for trial in plan.trials if trial.role == Role.STUDENT), key=flop)
    teacher = next((trial for trial in plan.teachers if trial.trial_id == student.teacher_id), None)
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 2**63
    found: list[Measured] = []
    for together in numbers:
        one = measure(student, teacher, data, device, together, codes)
        if one is None:
            say(f"{together} at a time: out of memory")
            break
        say(f"{together} at a time: {one.images_per_second:,.0f} images/s, {one.bytes_each / 2**30:.2f} GiB each")
        found.append(one)
        if len(found) > 1 and one.images_per_second < GROWTH * found[-2].images_per_second:
            break
    share = propose(found, memory)
    say(f"a share of {share:g} for each trial, measured with {student.label}")
    return share


def measure(
    student: Trial,
    teacher: Trial | None,
    data: DataSet,
    device: torch.device,
    together: int,
    codes: Sequence[Code] = (),
) -> Measured | None:
    """Train `together` copies of a student at once, one per process. Returns None if one runs out of memory."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(together)]
    processes = [
        context.Process(target=_train, args=(student, teacher, data, device, together, codes, there), daemon=True)
        for _, there in pipes
    ]
    for process in processes:
        process.start()
    for _, there in pipes:
        there.close()  # so that recv raises EOFError if the process dies
    try:
        answers = [here.recv() for here, _ in pipes]  # after warm-up
        if all(answer == "ready" for answer in answers):
            for here, _ in pipes:
                here.send("go")
            answers = [here.recv() for here, _ in pipes]
    except EOFError as error:
        raise RuntimeError("a probing process died; give --gpus-per-trial a number") from error
    finally:
        for here, _ in pipes:
            here.close()
        for process in processes:
            process.join()
    for answer in answers:
        if isinstance(answer, Exception):
            if failure(answer).reason == StopReason.OUT_OF_MEMORY:
                return None
            raise answer
    return Measured(together, sum(speed for speed, _ in answers), max(peak for _, peak in answers))


def _train(
    student: Trial,
    teacher: Trial | None,
    data: DataSet,
    device: torch.device,
    together: int,
    codes: Sequence[Code],
    pipe: Connection,
) -> None:
    """Send "ready" after an epoch, wait, then send (images per second, peak bytes) of the next epochs, or the error."""
    with tempfile.TemporaryDirectory() as name, suppress(EOFError):
        try:
            guard_code()
            bring(codes)
            torch.set_num_threads(1)
            before = 0
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1 / together)
                before = torch.cuda.mem_get_info(device)[0]
                torch.zeros(1, device=device)
            context = before - torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            start_measuring(device)
            count = min(len(data.train.labels), PROBE_STEPS * student.recipe.batch_size)
            small = replace(data, train=Split(data.train.images[:count], data.train.labels[:count]))
            trial = replace(student, recipe=replace(student.recipe, epochs=PROBE_EPOCHS + 2, validate_every=1))
            helper = None
            if teacher is not None:  # random weights cost as much as trained ones
                cell, folder = teacher.cell, Path(name, "teachers")
                net = networks.build(
                    teacher.architecture, stem=cell.stem, classes=len(data.classes), width=cell.width, seed=0
                )
                teachers.publish_teacher(folder, teacher, net.state_dict(), [])
                drawn = Answering(False, ((trial.seed, trial.recipe.epochs),))
                helper = teachers.load_teacher(folder, teacher.trial_id, small, device, drawn)
            epochs = train(
                trial, small, helper, device=device, checkpoints=Checkpoints(Path(name)), checkpoint_every=math.inf
            )
            next(epochs)
            pipe.send("ready")
            pipe.recv()
            speeds = [next(epochs).images_per_second for _ in range(PROBE_EPOCHS)]
            pipe.send((PROBE_EPOCHS / sum(1 / speed for speed in speeds), (peak_memory(device) or 0) + max(0, context)))
        except EOFError:
            raise  # another process failed, and nobody waits for this one
        except Exception as error:
            pipe.send(error)

"""Choose GPU shares, and whether to use MPS, by measuring the throughput of concurrent trials.

There are two kinds of students. Light ones train alone or on cached logits; heavy ones also run their teacher. The
probe measures the most expensive student of each kind, with and without MPS. The user's cache keeps the measurements
for later runs on the same GPU model with the same trials and versions.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from tune_kd.data.cifar import default_cache
from tune_kd.data.datasets import DataSet
from tune_kd.execute import mps, mps_daemon
from tune_kd.execute.options import Options
from tune_kd.execute.probe_processes import (
    GROWTH,
    HEADROOM,
    NUMBERS,
    Job,
    Measured,
    ProbeFailed,
    job,
    measure,
    processes,
)
from tune_kd.execute.resources import Packing
from tune_kd.records.adaptive_plan import to_come
from tune_kd.study.brought import Code
from tune_kd.study.cost import estimate, flop, images_of
from tune_kd.study.plan import Plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import Role, Trial
from tune_kd.system.adapters import adapter
from tune_kd.system.environment import make_private
from tune_kd.system.errors import UserError
from tune_kd.system.files import parsed, publish, read

Kind = Literal["light", "heavy"]
Say = Callable[[str], None]
GPU = torch.device("cuda")

WORTH_SECONDS = 300.0  # minimum estimated GPU time of a study that is measured
MOST_CACHE_BYTES = 2**16  # maximum size of a file of measurements; typical is 2 kB


@dataclass(frozen=True)
class Series:
    """Measurements of one kind of trial, with or without MPS."""

    kind: Kind
    mps: bool
    measured: Annotated[tuple[Measured, ...], Field(min_length=1, max_length=len(NUMBERS))]


@dataclass(frozen=True)
class Found:
    """All measurements of a probe, and their date."""

    day: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    series: Annotated[tuple[Series, ...], Field(min_length=1, max_length=4)]


# What to measure


def kind_of(trial: Trial) -> Kind:
    """Return the kind of a trial. A teacher in training counts as heavy, since it is a large network."""
    return "heavy" if trial.role == Role.TEACHER or trial.method.runs_teacher else "light"


def probed(plan: Plan) -> dict[Kind, Trial]:
    """Return the student to measure for each kind in a plan: the most expensive one. Among light ones, prefers a
    control, which needs no teacher and costs the same."""
    found: dict[Kind, Trial] = {}
    for trial in plan.trials:
        if trial.role == Role.STUDENT:
            best = found.setdefault(kind_of(trial), trial)
            found[kind_of(trial)] = max(best, trial, key=lambda each: (each.teacher_id is None, flop(each)))
    return dict(sorted(found.items(), reverse=True))  # light before heavy


def images_of_kinds(plan: Plan, students: Mapping[Kind, Trial]) -> dict[Kind, float]:
    """Return the cost of all trials of each kind, as a number of training images of the measured student."""
    total = dict.fromkeys(students, 0.0)
    for trial in plan.trials:
        kind = kind_of(trial)
        total[kind if kind in total else "light"] += flop(trial)
    images = {kind: images_of(each).train * each.recipe.epochs for kind, each in students.items()}
    return {kind: total[kind] * images[kind] / flop(each) for kind, each in students.items()}


def numbers_for(options: Options, cpus: int, gpus: int) -> list[int]:
    """Return the numbers of concurrent trials to measure on a GPU, limited by the options and the CPUs."""
    most = min(options.max_concurrent or math.inf, cpus / options.cpus_per_trial) / gpus
    return [number for number in NUMBERS if number <= math.ceil(most)]


# The choice


def propose(measured: Sequence[Measured], memory: int) -> Measured:
    """Return the smallest number of concurrent trials within 5 % of the best images per second.

    Skips numbers that need more than 90 % of `memory` (bytes). A single trial always counts as fitting, since it ran.
    """
    fitting = [each for each in measured if each.together == 1 or each.together * each.bytes_each <= HEADROOM * memory]
    best = max(each.images_per_second for each in fitting)
    return min((each for each in fitting if GROWTH * each.images_per_second >= best), key=lambda each: each.together)


def choose(series: Sequence[Series], images: Mapping[Kind, float], memory: int) -> tuple[dict[Kind, Measured], bool]:
    """Return the number of concurrent trials for each kind, and whether to use MPS.

    `images` is the size of the study for each kind. MPS is used if it makes the whole study 5 % faster, or if nothing
    was measured without MPS.
    """
    chosen = {
        served: {each.kind: propose(each.measured, memory) for each in series if each.mps == served}
        for served in {each.mps for each in series}
    }
    seconds = {
        served: sum(images[kind] / each.images_per_second for kind, each in kinds.items())
        for served, kinds in chosen.items()
    }
    with_mps = False not in seconds or (True in seconds and seconds[False] >= GROWTH * seconds[True])
    return chosen[with_mps], with_mps


def packing(found: Found, plan: Plan, memory: int, again: bool) -> Packing:
    """Return the shares and their explanation. `again`: an earlier run made the measurements."""
    students = probed(plan)
    chosen, served = choose(found.series, images_of_kinds(plan, students), memory)
    told = ", ".join(
        f"{each.together} concurrent trials of {students[kind].arm} train {each.images_per_second:,.0f} images/s"
        for kind, each in chosen.items()
    )
    shares = {kind: 1 / each.together for kind, each in chosen.items()}
    light, heavy = (shares.get(kind, min(shares.values())) for kind in ("light", "heavy"))
    when = f"as measured before ({found.day})" if again else "as measured now"
    return Packing(light, heavy, served, f"{when}: {'with' if served else 'without'} MPS {told}")


# The measurement


def packed(
    plan: Plan,
    data: DataSet,
    options: Options,
    say: Say,
    codes: Sequence[Code] = (),
    device: torch.device = GPU,
    gpus: int = 1,
) -> Packing | None:
    """Choose shares for a plan on the `gpus` GPUs of this machine. Raises `UserError` if one trial alone does not fit
    into the memory.

    Returns None if the study is too short to measure, or if the probe fails; a failure is reported through `say`.
    """
    rate = max(plan.study.rate, Study.rate)  # a lower rate is that of a CPU
    if estimate((*plan.trials, *to_come(plan)), plan.answering, rate).slot_seconds < WORTH_SECONDS:
        return None
    numbers = numbers_for(options, os.cpu_count() or 1, gpus)
    gpu = mps.asked() if len(numbers) > 1 else None
    if gpu is None:
        return None
    modes = _modes(options.mps, gpu)
    file = _file(gpu, modes, numbers, plan, data, options)
    known = _read(file, probed(plan), modes)
    if known is not None:
        return packing(known, plan, gpu.memory, again=True)
    say("measuring how many trials should share a GPU; later runs of this study reuse the result")
    try:
        with tempfile.TemporaryDirectory(prefix="tune_kd-probe-") as folder:
            jobs = _jobs(plan, data, device, Path(folder), max(1, int(options.cpus_per_trial)), codes)
            found = Found(date.today().isoformat(), tuple(_measured(jobs, modes, numbers, gpu, say)))
    except (ProbeFailed, mps_daemon.NotStarted, OSError) as error:
        say(f"warning: the best GPU share cannot be measured ({error}); the run uses the default share")
        return None
    _write(file, found)
    return packing(found, plan, gpu.memory, again=False)


def _modes(asked: str, gpu: mps.Gpu) -> tuple[bool, ...]:
    """Return the modes to measure: with MPS (True), without (False), or both."""
    if asked == "off":
        return (False,)
    if asked == "on" or gpu.served:
        return (True,)
    return (False, True) if mps_daemon.is_there() else (False,)


def _jobs(
    plan: Plan, data: DataSet, device: torch.device, folder: Path, threads: int, codes: Sequence[Code]
) -> dict[Kind, Job]:
    teachers = {each.trial_id: each for each in plan.teachers}
    return {
        kind: job(each, teachers.get(each.teacher_id or ""), data, device, folder / kind, threads, codes)
        for kind, each in probed(plan).items()
    }


def _measured(
    jobs: Mapping[Kind, Job], modes: Sequence[bool], numbers: Sequence[int], gpu: mps.Gpu, say: Say
) -> Iterator[Series]:
    """Measure each kind in each mode. If MPS cannot be started, skip that mode, unless it is the only one."""
    for served in modes:
        own: AbstractContextManager[dict[str, str]] = nullcontext({})
        if served and not gpu.served:
            own = mps_daemon.for_children()
        try:
            with own as variables, processes(numbers[-1], variables) as pool:
                for kind, each in jobs.items():
                    found = measure(pool, each, numbers, gpu.memory)
                    if not found:
                        raise UserError(
                            f"recipe.batch_size is {each.trial.recipe.batch_size}, and one trial of {each.trial.arm} "
                            "does not fit into the GPU's memory; lower the batch size, or set --gpus-per-trial to a "
                            "number to skip this measurement"
                        )
                    say(_row(each.trial, served, found))
                    yield Series(kind, served, tuple(found))
        except mps_daemon.NotStarted as error:
            if len(modes) == 1:
                raise
            say(f"MPS is not measured: {error}")


def _row(trial: Trial, served: bool, found: Sequence[Measured]) -> str:
    numbers = ", ".join(str(each.together) for each in found)
    speeds = ", ".join(f"{each.images_per_second:,.0f}" for each in found)
    most = max(each.bytes_each for each in found) / 2**30
    how = "with" if served else "without"
    return f"{trial.arm}, {how} MPS: {numbers} concurrent trials train {speeds} images/s; {most:.2f} GiB each"


# The cache of measurements


def _file(
    gpu: mps.Gpu, modes: Sequence[bool], numbers: Sequence[int], plan: Plan, data: DataSet, options: Options
) -> Path | None:
    """Return the cache file for these measurements, whose name is a hash of everything that affects them. Returns None
    if there is no cache."""
    teachers = {each.trial_id: each for each in plan.teachers}
    splits = (data.train, data.validation, data.test)
    pixels = (len(data.classes), data.pad, data.flip, data.upsample, *(tuple(each.images.shape) for each in splits))
    parts = [(gpu, *modes), (*numbers, int(options.cpus_per_trial)), pixels]
    parts.append((version("tune_kd"), torch.__version__, torch.version.cuda))
    for kind, student in probed(plan).items():
        pair = (student, teachers.get(student.teacher_id or ""))
        parts.append((kind, *(_computed(trial) for trial in pair if trial is not None)))
    with suppress(UserError):  # no home directory
        return default_cache() / "gpu-shares" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
    return None


def _computed(trial: Trial) -> tuple[object, ...]:
    """Return the settings of a trial that affect its speed and memory."""
    return trial.architecture, trial.cell, trial.recipe, trial.method


def _read(file: Path | None, kinds: Collection[Kind], modes: Sequence[bool]) -> Found | None:
    """Return the measurements in a file; None if the file is missing, damaged or incomplete."""
    if file is None or not file.exists():
        return None
    with suppress(OSError, ValueError):
        found = adapter(Found).validate_python(parsed(read(file, MOST_CACHE_BYTES)))
        return found if _is_whole(found, kinds, modes) else None
    return None


def _is_whole(found: Found, kinds: Collection[Kind], modes: Sequence[bool]) -> bool:
    """Whether each kind was measured in each mode, starting with a single trial."""
    measured = sorted((each.kind, each.mps) for each in found.series)
    return measured == sorted(product(kinds, modes)) and all(each.measured[0].together == 1 for each in found.series)


def _write(file: Path | None, found: Found) -> None:
    if file is None:
        return
    with suppress(OSError):  # then the next run measures again
        make_private(file.parent)
        publish(file, json.dumps(asdict(found), indent=1).encode())

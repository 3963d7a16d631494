"""A trial's share of CPUs and GPUs: limits, defaults, and shares chosen by a probe."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from tune_kd.study.plan import Plan
from tune_kd.study.trial import Role
from tune_kd.system.errors import raise_problems

SIZES = {0.0: "no GPU", 1.0: "a whole GPU"}


def check_cluster(cpus: float, gpus: float, have_cpus: float, have_gpus: float) -> None:
    """Raise `UserError` for shares that exceed Ray's resources."""
    problems = []
    if cpus > have_cpus:
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: at most {have_cpus:g} (the CPUs that Ray has)")
    if gpus > have_gpus:
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {have_gpus:g} (the GPUs that Ray has)")
    raise_problems(problems)


@dataclass(frozen=True)
class Shares:
    """The GPU shares of trials, and the reason for them."""

    light: float  # of a student that trains alone or on cached logits
    heavy: float  # of a student that also runs its teacher
    teacher: float  # of a teacher in training
    why: str = ""
    methods: tuple[str, ...] = ()  # methods whose students are heavy

    @classmethod
    def equal(cls, gpus: float, why: str = "") -> "Shares":
        """The same share for all trials."""
        return cls(gpus, gpus, gpus, why)

    def of(self, role: str, method: str | None) -> float:
        """Return the share of a trial that has not started."""
        if role == Role.TEACHER:
            return self.teacher
        return self.heavy if method in self.methods else self.light

    @property
    def smallest(self) -> float:
        return min(self.light, self.heavy, self.teacher)

    @property
    def words(self) -> str:
        """The shares as a sentence for the user."""
        others = []
        if self.heavy != self.light:
            others.append(f"with {' or '.join(self.methods)} {_size(self.heavy)}")
        if self.teacher != self.light:
            others.append(f"a teacher {_size(self.teacher)}")
        but = f" ({', '.join(others)})" if others else ""
        return f"Each trial gets {_size(self.light)}{but}, {self.why}."


def _size(gpus: float) -> str:
    return SIZES.get(gpus, f"{gpus:g} {'GPUs' if gpus > 1 else 'of a GPU'}")


@dataclass(frozen=True)
class Packing:
    """The result of a probe: GPU shares, and whether to use MPS."""

    light: float
    heavy: float
    mps: bool
    why: str


@dataclass(frozen=True)
class Mps:
    """Whether NVIDIA's MPS serves all GPUs of a run."""

    served: bool
    words: str = ""  # for the user; empty if MPS does not matter to this run
    variables: tuple[tuple[str, str], ...] = ()  # environment of workers, to find an MPS that was started for them


def gpu_shares(
    asked: float | Literal["auto"], plan: Plan, available: float, mps: Mps, packing: Packing | None, note: str = ""
) -> Shares:
    """Return the shares of a plan's trials: those that the user asked for, or those that a probe chose.

    Without a probe, a trial gets a quarter of a GPU if MPS serves the GPUs, else a whole GPU. Without MPS, processes
    take turns on a GPU: on an H100, four concurrent trials took 1.1 times as long as four in sequence, and with MPS
    0.72 times as long (docs/performance.md). `note` tells the user why nothing was measured.
    """
    if asked != "auto":
        return Shares.equal(asked, f"as --gpus-per-trial says{'; ' if mps.words else ''}{mps.words}")
    if not available:
        return Shares.equal(0.0, "since Ray sees none")
    methods = tuple(dict.fromkeys(each.cell.method for each in plan.trials if each.method.runs_teacher))
    if packing is not None and (mps.served or not packing.mps):
        found = Shares(packing.light, packing.heavy, packing.heavy, packing.why, methods)
    elif mps.served:
        found = Shares.equal(0.25, f"since {mps.words}, so four trials can train on a GPU at the same time{note}")
    else:
        found = Shares.equal(1.0, f"since {mps.words}, and without MPS trials would take turns on a GPU{note}")
    return replace(found, teacher=_teacher(plan, found, available))


def _teacher(plan: Plan, shares: Shares, available: float) -> float:
    """Return the share of a teacher in training: a whole GPU if all teachers and all students without a teacher then
    fit at the same time, else the share of a heavy student. Several teachers finish sooner side by side than in
    sequence."""
    untaught = [trial for trial in plan.trials if trial.role == Role.STUDENT and trial.teacher_id is None]
    alone = len(plan.teachers) + math.ceil(len(untaught) * shares.light) <= available
    return 1.0 if alone else shares.heavy

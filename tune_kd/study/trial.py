"""One trial, what it yields epoch by epoch, and what the schedule answers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.tuning import number

Phase = Literal["teacher", "screen", "confirm"]


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value as canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Trial:
    """An arm with a seed. A teacher is a trial too: `cell.teacher` names its network."""

    arm: str
    phase: Phase
    cell: Cell
    recipe: Recipe
    seed: int
    data: Data
    data_digest: str | None  # of the pixels, labels and split; null while only planning
    scale: str
    teacher_id: str | None = None  # the trial that trains this student's teacher; null without one
    drawn: tuple[tuple[str, float], ...] = ()  # what was drawn for it, by name; its cell and recipe have it

    @property
    def role(self) -> Literal["teacher", "student"]:
        return "teacher" if self.phase == "teacher" else "student"

    @property
    def architecture(self) -> str:
        """The network that this trial trains."""
        name = self.cell.teacher if self.role == "teacher" else self.cell.student
        assert name is not None
        return name

    @property
    def label(self) -> str:
        """What people see: `cifar/logit/T=4 seed 1`, or `cifar/logit (temperature=3.1, lr=0.08) seed 0`."""
        drawn = ", ".join(f"{name}={number(value)}" for name, value in self.drawn)
        return f"{self.arm}{f' ({drawn})' if drawn else ''} seed {self.seed}"

    @property
    def recipe_id(self) -> str:
        return digest(self._schedule | {"precision": self._precision})[:16]

    @property
    def _schedule(self) -> dict[str, Any]:
        """The recipe without its arithmetic."""
        return {name: value for name, value in asdict(self.recipe).items() if name not in ("precision", "compile")}

    @property
    def _precision(self) -> str:
        return f"{self.recipe.precision} compiled" if self.recipe.compile else self.recipe.precision

    @cached_property
    def trial_id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of what changes the result, and of nothing else."""
        cell = asdict(self.cell)
        del cell["student"], cell["teacher"]
        identity = {
            "role": self.role,
            "architecture": self.architecture,
            "cell": cell if self.role == "student" else {key: cell[key] for key in ("stem", "weights", "width")},
            "recipe": self._schedule,
            "seed": self.seed,
            "data": self.data_digest,
            "teacher": self.teacher_id,
            "precision": self._precision,
        }
        return digest(identity)[:16]


@dataclass(frozen=True)
class Answering:
    """Which views of the training images a teacher answers for the logit arms of a study, each once.

    `ahead` is every view that there is, for any seed; else those that the students draw, in the order of `draws`.
    """

    ahead: bool
    draws: tuple[tuple[int, int], ...]  # (seed, epochs) of the students


@dataclass(frozen=True)
class Outcome:
    """What is measured once, after the last epoch. Accuracies are fractions; null: does not apply."""

    best_epoch: int
    val_accuracy_best: float
    test_accuracy: float  # of the last weights
    test_accuracy_best: float  # of the best-validation weights: the headline
    agreement: float | None  # share of test images on which student and teacher choose one class
    kl_t1: float | None  # KL(teacher || student) at temperature 1, nats a test image
    kl_t4: float | None
    ece: float  # expected calibration error on the test images, best-validation weights
    params: int
    weights_digest: str  # SHA-256 of the last and of the best-validation weights
    teacher_digest: str | None  # SHA-256 of the teacher's weight file, as checked when it was loaded
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Epoch:
    """One epoch of one trial; the last one carries the outcome."""

    epoch: int  # from 1
    val_accuracy: float
    val_loss: float
    train_loss: float
    train_accuracy: float
    loss_ce: float
    loss_kd: float | None  # null without a teacher
    lr: float  # at the last step
    grad_norm: float  # mean over steps, before clipping
    seconds: float  # wall-clock, training and evaluation
    images_per_second: float  # training images over training time
    answer_seconds: float | None = None  # until the teacher's answers were there, not part of `seconds`; null without
    views_answered: int | None = None  # views that the teacher had to be asked for; null without its answers
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Decision:
    """One comparison of the schedule, whatever came of it."""

    trial_id: str
    arm: str
    phase: Phase
    stratum: str
    epoch: int
    rung: int  # from 0
    metric: float  # validation accuracy
    cutoff: float | None  # null while nothing has been reported to compare with
    rank: int  # 1 is best, among this arm and its peers
    peers: int  # arms of the stratum that had reported at this rung before
    action: Literal["continue", "stop"]
    reason: Literal["ahead", "behind", "near_tie", "immune", "too_few_peers", "last_of_stratum"]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Decision":
        """The decision that a row of the table records."""
        return cls(**{name: value for name, value in row.items() if name != "run"})

    @property
    def words(self) -> str:
        """The comparison as people read it."""
        beside = "the first there"
        if self.cutoff is not None:
            beside = f"cutoff {100 * self.cutoff:.2f}, rank {self.rank} of {self.peers + 1}"
        action = "stopped" if self.action == "stop" else "goes on"
        return (
            f"{self.arm} at epoch {self.epoch}: {100 * self.metric:.2f} %, {beside} in {self.stratum}; {action}: "
            f"{self.reason.replace('_', ' ')}"
        )

"""A trial, its epochs and outcome, and the decisions of early stopping about it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum, auto
from functools import cached_property
from typing import Any

from tune_kd.study.methods import Method, built_in
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.tuning import number

Row = Mapping[str, Any]  # a row of a table
FURTHER = "further"  # column of the ledger's trials: settings as JSON, each of which is a column in Parquet


class Phase(StrEnum):
    """The phase of a study that a trial belongs to, in the order in which they run."""

    TEACHER = auto()
    SCREEN = auto()
    CONFIRM = auto()


class Role(StrEnum):
    """The network that a trial trains."""

    TEACHER = auto()
    STUDENT = auto()


class Status(StrEnum):
    """The status of a trial."""

    PENDING = auto()
    RUNNING = auto()
    COMPLETED = auto()
    STOPPED = auto()
    FAILED = auto()
    BLOCKED = auto()  # its teacher failed


UNENDED = (Status.PENDING, Status.RUNNING)
UNSUCCESSFUL = (Status.FAILED, Status.BLOCKED)
ENDED = (Status.COMPLETED, Status.STOPPED, Status.FAILED, Status.BLOCKED)  # no driver restarts these by itself


class StopReason(StrEnum):
    """Why a trial ended before its last epoch."""

    ASHA = auto()  # stopped by early stopping, or the arm's trial in the screen was
    DIVERGED = auto()
    OUT_OF_MEMORY = auto()
    ERROR = auto()
    TEACHER_FAILED = auto()


class ArmRole(StrEnum):
    """The role of an arm in the contrasts. Early stopping never stops the first two."""

    CONTROL = auto()
    REFERENCE = auto()  # others are compared with it, or it represents its method
    COMPARED = auto()


class Action(StrEnum):
    """The action of early stopping on a trial at a rung."""

    CONTINUE = auto()
    STOP = auto()


class DecisionReason(StrEnum):
    """Why early stopping stops a trial or lets it continue."""

    AHEAD = auto()  # at or above the cutoff
    BEHIND = auto()  # the only reason to stop
    NEAR_TIE = auto()  # behind the cutoff, but within the margin
    IMMUNE = auto()
    TOO_FEW_PEERS = auto()
    LAST_OF_STRATUM = auto()


def reason_in_words(reason: str) -> str:
    """A reason for messages: `within the margin`. It may be any text, since records can come from somebody else."""
    return "within the margin" if reason == DecisionReason.NEAR_TIE else reason.replace("_", " ")


def further(row: Row) -> dict[str, Any]:
    """The settings of a trial's row that have no column of their own."""
    text = row.get(FURTHER)
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def level_in(row: Row, name: str) -> Any:
    """The level of a factor in a trial's row."""
    return row[name] if name in row else further(row).get(name)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value as canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Trial:
    """An arm with a seed. A teacher is also a trial: `cell.teacher` is its architecture."""

    arm: str
    phase: Phase
    cell: Cell
    recipe: Recipe
    seed: int
    data: Data
    data_digest: str | None  # SHA-256 of the pixels, labels and split; None in a preview
    scale: str
    teacher_id: str | None = None  # id of the trial that trains this student's teacher; None without a teacher
    drawn: tuple[tuple[str, float], ...] = ()  # tuned settings by name; cell and recipe contain them too
    brought: Method | None = None  # the study's own method, if the cell has one
    teacher_seed: int | None = None  # seed of the teacher, for the label; None unless the study has several teachers

    @property
    def role(self) -> Role:
        return Role.TEACHER if self.phase == Phase.TEACHER else Role.STUDENT

    @property
    def method(self) -> Method:
        """The cell's method."""
        return self.brought or built_in()[self.cell.method]

    @property
    def architecture(self) -> str:
        """The network that this trial trains."""
        name = self.cell.teacher if self.role == Role.TEACHER else self.cell.student
        assert name is not None
        return name

    @property
    def label(self) -> str:
        """The trial's readable name: `cifar/logit/T=4 seed 1`, or `cifar/logit (temperature=3.1, lr=0.08) seed 0`.

        If there are several teachers, the teacher's seed follows: `cifar/logit/T=4 seed 1, teacher seed 7`.
        """
        drawn = ", ".join(f"{name}={number(value)}" for name, value in self.drawn)
        taught = "" if self.teacher_seed is None else f", teacher seed {self.teacher_seed}"
        return f"{self.arm}{f' ({drawn})' if drawn else ''} seed {self.seed}{taught}"

    @property
    def recipe_id(self) -> str:
        return recipe_id(asdict(self.recipe))

    @cached_property
    def trial_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of everything that changes the result, and of nothing else."""
        cell = asdict(self.cell)
        del cell["student"], cell["teacher"], cell["recipe"]  # contained in `architecture`, `teacher` and `recipe`
        for name in ("ce_weight", "kd_weight"):  # keep the ids from before these fields existed
            if cell[name] is None:
                del cell[name]
        settings = dict(cell.pop("settings"))
        more: dict[str, Any] = {"settings": settings} if settings else {}
        more |= {"version": self.method.version} if self.method.version > 1 else {}
        if (brought := self.method).source is not None:
            more |= {"source": brought.source, "needs": brought.needs, "views": brought.views}
        identity = {
            "role": self.role,
            "architecture": self.architecture,
            "cell": cell if self.role == Role.STUDENT else {key: cell[key] for key in ("stem", "weights", "width")},
            "recipe": _schedule(asdict(self.recipe)),
            "seed": self.seed,
            "data": self.data_digest,
            "teacher": self.teacher_id,
            "precision": _precision(asdict(self.recipe)),
        }
        return digest(identity | more)[:16]


def recipe_id(recipe: Row) -> str:
    """The first 16 digits of the digest of a recipe, or of some of its fields."""
    return digest(_schedule(recipe) | {"precision": _precision(recipe)})[:16]


def _schedule(recipe: Row) -> dict[str, Any]:
    """The recipe without `precision` and `compile`."""
    return {name: value for name, value in hashed(recipe).items() if name not in ("precision", "compile")}


def hashed(recipe: Row) -> dict[str, Any]:
    """A recipe for hashes: without `validate_every` if that is 1, so that ids from before this field do not change."""
    return {name: value for name, value in recipe.items() if (name, value) != ("validate_every", 1)}


def _precision(recipe: Row) -> str:
    precision = str(recipe.get("precision"))
    return f"{precision} compiled" if recipe.get("compile") else precision


@dataclass(frozen=True)
class Answering:
    """The views of the training images for which a teacher's logits are computed, each once.

    With `ahead`, these are all possible views; otherwise the views that the students draw, in the order of `draws`.
    """

    ahead: bool
    draws: tuple[tuple[int, int], ...]  # (seed, epochs) of the students


@dataclass(frozen=True)
class Outcome:
    """Measurements after the last epoch. Accuracies are fractions; None means that a value does not apply."""

    best_epoch: int  # epoch with the best validation accuracy
    val_accuracy_best: float  # validation accuracy after the best epoch
    test_accuracy: float  # test accuracy of the last weights
    test_accuracy_best: float  # test accuracy of the best epoch's weights: the main result
    agreement: float | None  # share of test images on which student and teacher predict the same class
    kl_t1: float | None  # KL(teacher || student) at temperature 1, in nats per test image
    kl_t4: float | None  # KL(teacher || student) at temperature 4, in nats per test image
    ece: float  # expected calibration error of the best epoch's weights on the test images
    params: int  # number of the network's parameters
    weights_digest: str  # SHA-256 of the last weights and the best epoch's weights
    teacher_digest: str | None  # SHA-256 of the teacher's weight file, checked when the file was loaded
    peak_memory_bytes: int | None  # peak memory allocated on the GPU; without a GPU, resident memory of the process
    # Fast paths in use at the end, separated by commas: graph, compiled, compiled loss, compiled teacher, folded.
    fast_paths: str | None = None


@dataclass(frozen=True)
class Epoch:
    """One epoch of a trial. The last one holds the outcome."""

    epoch: int  # number of the epoch, from 1
    val_accuracy: float | None  # validation accuracy; None after an epoch without validation
    val_loss: float | None  # validation loss; None after an epoch without validation
    train_loss: float  # weighted sum of the two losses, mean over training images
    train_accuracy: float  # share of correct predictions on training images, during training
    loss_ce: float  # mean cross-entropy over training images, unweighted
    loss_kd: float | None  # mean of the method's loss over training images, unweighted; None without a teacher
    lr: float  # learning rate at the last step
    grad_norm: float  # norm of the gradient before clipping, mean over steps
    seconds: float  # wall-clock time of training and evaluation
    images_per_second: float  # training images per second of training time
    answer_seconds: float | None = None  # wait for the teacher's logits, not part of seconds; None without logits
    views_answered: int | None = None  # number of views whose logits the teacher computed; None without logits
    outcome: Outcome | None = None

    @classmethod
    def of(cls, row: Row) -> "Epoch":
        """The epoch in a row of the epochs table, without the outcome."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    @property
    def quality(self) -> tuple[float, float]:
        """Sort key of epochs: the highest validation accuracy, then the lowest validation loss.

        With few validation images, accuracies are often equal, and the first of these epochs would often be an early
        one. An epoch without validation is below all others.
        """
        if self.val_accuracy is None or self.val_loss is None:
            return -math.inf, -math.inf
        return self.val_accuracy, -self.val_loss


@dataclass(frozen=True)
class Decision:
    """One comparison of early stopping, with its result."""

    trial_id: str  # id of the trial
    arm: str  # name of its arm
    phase: Phase
    stratum: str  # name of the stratum in which it competes
    epoch: int  # epoch of the rung
    rung: int  # number of the rung, from 0
    metric: float  # validation accuracy of the trial at this epoch
    cutoff: float | None  # validation accuracy at which a trial keeps up with its peers; None for the first report
    rank: int  # rank of the trial among itself and its peers; 1 is best
    peers: int  # number of trials of the stratum that reported earlier at this rung
    action: Action  # continue or stop
    reason: DecisionReason  # why

    @classmethod
    def of(cls, row: Row) -> "Decision":
        """The decision in a row of the decisions table."""
        return cls(**{name: value for name, value in row.items() if name != "run"})

    @property
    def stops(self) -> bool:
        return self.action == Action.STOP

    @property
    def words(self) -> str:
        """The comparison as a sentence."""
        beside = f"the first in {self.stratum}"
        if self.cutoff is not None:
            beside = f"cutoff {100 * self.cutoff:.2f} %, rank {self.rank} of {self.peers + 1} in {self.stratum}"
        action, why = "stopped" if self.stops else "continues", reason_in_words(self.reason)
        return f"{self.arm} at epoch {self.epoch}: {action} ({why}), {100 * self.metric:.2f} %, {beside}"

"""Schemas of a run's three tables: columns, types, keys and row rules. File names in a run's folder."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypedDict, TypeVar, cast, get_args, get_type_hints

from tune_kd.study.spec import Level
from tune_kd.study.trial import FURTHER, Action, Decision, Epoch, Phase, Role, Row, Status, StopReason, Trial, further
from tune_kd.system.characters import CONTROL

R = TypeVar("R", bound=Row)
PANDAS = {str: "string", int: "Int64", float: "float64"}
MOST_FURTHER = 1000  # largest number of further settings in one run
LAYOUT = 2  # version of a run folder's layout; version 2 added digests of the tables
LEDGER = "ledger.sqlite"  # in a run's folder
COMMITS = "ledger.commits"  # in the same folder: the least number of transactions that the ledger must hold
DIGESTS = "tables.json"  # SHA-256 of each table and of its previous version, which a kill may leave in place
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # run names are also file and folder names


@dataclass(frozen=True)
class Schema(Generic[R]):
    """A table: its ordered columns with types, and the rules for its rows. Writers and readers both check the rules."""

    name: str
    columns: Mapping[str, type]
    key: tuple[str, ...]  # unique, never null
    optional: tuple[str, ...] = ()  # missing in tables of earlier versions; read as null
    needed: tuple[str, ...] = ()  # never null
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # allowed values of text columns, besides null
    fractions: tuple[str, ...] = ()  # from 0 to 1
    free: tuple[str, ...] = ()  # text that may contain control characters, such as line breaks
    only_completed: tuple[str, ...] = ()  # null unless `status` is completed
    timing: tuple[str, ...] = ()  # may differ when a row is recomputed

    @property
    def in_parquet(self) -> dict[str, type]:
        """The fixed columns of the Parquet table. The columns of further settings follow them."""
        return {name: kind for name, kind in self.columns.items() if name != FURTHER}

    @property
    def names(self) -> list[str]:
        """The text columns that must not contain control characters."""
        return [name for name, kind in self.columns.items() if kind is str and name not in self.free]

    def clean(self, row: Row) -> dict[str, Any]:
        """Return the row in the schema's order and types. Non-finite numbers become None."""
        unknown = set(row) - set(self.columns)
        assert not unknown, f"{self.name} has no column {sorted(unknown)}"
        cleaned: dict[str, Any] = {}
        for name, kind in self.columns.items():
            value = row.get(name)
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                cleaned[name] = None
            elif kind is str:  # a path may contain bytes that SQLite and Parquet reject as text
                cleaned[name] = str(value).encode(errors="backslashreplace").decode()
            else:  # SQLite drops the sign of zero, and a row's checksum must not depend on it
                cleaned[name] = kind(value) + 0
        return cleaned

    def broken(self, row: Row) -> str | None:
        """Return a sentence about the first rule that the row breaks, or None if the row is valid.

        `reader.check` applies the same rules to whole tables.
        """
        for name in (*self.key, *self.needed):
            if row[name] is None:
                return f"{self.name}.{name} is null; allowed: a value"
        for name, levels in self.levels.items():
            if row[name] is not None and row[name] not in levels:
                return f"{self.name}.{name} is {row[name]!r}; allowed: null, {', '.join(levels)}"
        for name in self.names:
            if row[name] is not None and CONTROL.search(row[name]):
                return f"{self.name}.{name} is {row[name]!r}; allowed: text without control characters"
        for name in self.fractions:
            if row[name] is not None and not 0 <= row[name] <= 1:
                return f"{self.name}.{name} is {row[name]}; allowed: null, or from 0 to 1"
        for name in self.only_completed:
            if row[name] is not None and row["status"] != Status.COMPLETED:
                return f"{self.name}.{name} is {row[name]} while status is {row['status']}; allowed: null"
        if row.get(FURTHER) is not None and not is_further(row[FURTHER]):
            return f"{self.name}.{FURTHER} is {row[FURTHER]!r:.60}; allowed: null, or JSON of names with levels"
        ran, planned = row.get("epochs_run"), row.get("epochs_planned")
        if ran is not None and planned is not None and row["status"] == Status.COMPLETED and ran < planned:
            return f"{self.name}.status is completed after {ran} of {planned} epochs; allowed: after all {planned}"
        return None

    def mistyped(self, row: Row) -> str | None:
        """Return a sentence about the first value that has the wrong type or is not finite, or None."""
        for (name, kind), value in zip(self.columns.items(), row.values(), strict=True):
            finite = not isinstance(value, float) or math.isfinite(value)
            if value is not None and (type(value) is not kind or not finite):
                return f"{self.name}.{name} is {value!r:.60}"
        return None


def is_further(text: Any) -> bool:
    """Return whether `as_further` could have written this text, from settings that have no column of their own."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(map(_is_setting, found.items())) and as_further(found) == text


def further_kinds(texts: Iterable[str]) -> dict[str, type] | None:
    """Return the types of the trials' further settings, by name. Return None if no run could have written the texts."""
    found: dict[str, type] = {}
    for text in texts:
        settings = further({FURTHER: text}) if is_further(text) else None
        if settings is None or any(
            found.setdefault(name, type(each)) is not type(each) for name, each in settings.items()
        ):
            return None
    return dict(sorted(found.items())) if len(found) <= MOST_FURTHER else None


def _is_setting(item: tuple[str, Any]) -> bool:
    name, level = item
    known = name in TRIALS.columns or not name.isidentifier()
    return not known and (not CONTROL.search(level) if isinstance(level, str) else _is_number(level))


def _is_number(level: Any) -> bool:
    return type(level) is float and math.isfinite(level)


def columns_of(row: type) -> dict[str, type]:
    """Return the columns of a dataclass or TypedDict: its fields that are text, integers or floats."""
    kinds = {name: (*get_args(hint), hint)[0] for name, hint in get_type_hints(row).items()}  # `T` of `T | None`
    return {name: plain for name, kind in kinds.items() for plain in PANDAS if issubclass(kind, plain)}


class TrialRow(TypedDict):
    """A row of the trials table as a run writes it. Tables of other tools may lack all values that are not `needed`.

    Columns without a comment here have one in `Cell`, `Recipe` or `Outcome`.
    """

    run: str  # name of the run
    trial_id: str  # hash of everything that affects the result: the first 16 hexadecimal digits of a SHA-256
    arm: str  # name of the arm: its levels, such as `cifar/logit/T=4`
    phase: str  # part of the study that the trial belongs to
    role: str  # whether the trial trains a teacher or a student
    student: str | None  # architecture of the student; None for a teacher
    teacher: str | None  # architecture of the teacher, for a teacher its own; None if the method has no teacher
    teacher_id: str | None  # trial id of the student's teacher; a teacher has its own trial id
    stem: str  # first layers of student and teacher: imagenet (7x7, stride 2, max pooling) or cifar (3x3, stride 1)
    weights: str
    width: float
    method: str | None  # distillation method; None for a teacher
    temperature: float | None  # softmax temperature of the method's loss; None if it has none
    alpha: float | None
    beta: float | None
    lr: float
    weight_decay: float  # weight decay of SGD
    seed: int  # seed of initial weights, data order and augmentation
    recipe_id: str  # hash of the recipe
    dataset: str  # name of the data set
    data_digest: str | None  # SHA-256 of pixels, labels and split
    scale: str  # scale of the study
    device: str | None  # device of the last attempt
    threads: int | None  # CPU threads of the last attempt
    status: str  # state of the trial
    stop_reason: str | None  # why the trial ended before its last epoch
    epochs_planned: int  # epochs of the recipe
    epochs_run: int  # epochs on record
    best_epoch: int | None  # epoch with the best validation accuracy; ties go to the lowest validation loss
    val_accuracy: float | None  # validation accuracy after the last epoch
    val_accuracy_best: float | None  # validation accuracy after the best epoch
    test_accuracy: float | None
    test_accuracy_best: float | None
    agreement: float | None
    kl_t1: float | None
    kl_t4: float | None  # KL(teacher || student) at temperature 4, nats a test image
    ece: float | None
    params: int | None  # number of parameters of the trained network
    train_seconds: float | None  # training and evaluation, over all epochs
    wall_seconds: float | None  # time that the trial occupied its slot, over all attempts
    gpu_fraction: float | None  # share of a GPU that the trial reserved
    peak_memory_bytes: int | None  # peak memory: allocated on the GPU, or resident in the process on a CPU
    attempts: int  # number of attempts that started
    error: str | None  # errors of all attempts, including retried ones
    teacher_digest: str | None
    weights_digest: str | None
    host: str | None  # host of the last attempt
    started: float | None  # start of the first attempt, in seconds since the Unix epoch
    fast_paths: str | None  # fast paths in use at the end: graph, compiled, compiled loss, compiled teacher, folded
    further: str | None  # settings without a column here, as JSON; in Parquet each has its own column


TRIALS: Schema[TrialRow] = Schema(
    "trials",
    columns_of(TrialRow),
    ("run", "trial_id"),
    optional=("teacher_digest", "weights_digest", "host", "started", "fast_paths", FURTHER),
    needed=("arm", "phase", "role", "seed", "status"),
    levels={"phase": tuple(Phase), "role": tuple(Role), "status": tuple(Status), "stop_reason": tuple(StopReason)},
    fractions=("val_accuracy", "val_accuracy_best", "test_accuracy", "test_accuracy_best", "agreement", "ece", "alpha"),
    free=("error",),
    only_completed=("test_accuracy", "test_accuracy_best"),
)

EPOCHS: Schema[Row] = Schema(
    "epochs",
    {"run": str, "trial_id": str, "epoch": int, "attempt": int} | columns_of(Epoch),
    ("run", "trial_id", "epoch"),
    optional=("answer_seconds", "views_answered"),
    fractions=("val_accuracy", "train_accuracy"),
    timing=("attempt", "seconds", "images_per_second", "answer_seconds", "views_answered"),
)

DECISIONS: Schema[Row] = Schema(
    "decisions",
    {"run": str} | columns_of(Decision),
    ("run", "trial_id", "epoch"),
    needed=("arm", "phase", "action", "reason"),
    levels={"action": tuple(Action)},
    fractions=("metric",),
)

SCHEMAS: tuple[Schema[Any], ...] = (TRIALS, DECISIONS, EPOCHS)
"""Tables are written in this order and read in reverse. So every epoch that is read has its trial and its decision,
even if a kill or a concurrent write leaves tables of different ages."""


def first_row(run: str, trial: Trial) -> TrialRow:
    """Return the row of a trial that has not started, with None for values that are not known yet."""
    known = vars(trial) | asdict(trial.recipe) | asdict(trial.cell)
    if trial.role == Role.TEACHER:
        known |= {"student": None, "method": None, "teacher_id": trial.trial_id}
    known |= {
        "run": run,
        "trial_id": trial.trial_id,
        "role": trial.role,
        "recipe_id": trial.recipe_id,
        "dataset": trial.data.name,
        "status": Status.PENDING,
        "epochs_planned": trial.recipe.epochs,
        "epochs_run": 0,
        "attempts": 0,
    }
    own = {*TRIALS.columns, "epochs"}
    known |= {FURTHER: as_further({name: each for name, each in trial.cell.levels.items() if name not in own})}
    return cast(TrialRow, {name: known.get(name) for name in TRIALS.columns})


def as_further(settings: Mapping[str, Level]) -> str | None:
    """Return settings as the ledger stores them, or None if there are none."""
    plain = {name: level if isinstance(level, str) else float(level) for name, level in settings.items()}
    return json.dumps(plain, sort_keys=True) if plain else None


def labels(rows: Iterable[TrialRow]) -> dict[str, str]:
    """Return display names of trials, by trial id: those of `Trial.label`, without the drawn values."""
    rows = list(rows)
    seeds = {row["trial_id"]: row["seed"] for row in rows if row["role"] == Role.TEACHER}
    several = len(set(seeds.values())) > 1
    found = {}
    for row in rows:
        taught = several and row["role"] == Role.STUDENT and row["teacher_id"] in seeds
        after = f", teacher seed {seeds[row['teacher_id'] or '']}" if taught else ""
        found[row["trial_id"]] = f"{row['arm']} seed {row['seed']}{after}"
    return found


MOST_LEDGER_BYTES = 2**36  # 100 times the ledger of 10,000 trials with 100 epochs each
MOST_TABLE_BYTES = 2**30  # of a Parquet table, which is read into memory: 5 times the epochs table of those trials

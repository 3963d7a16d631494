"""The three tables of a run: their columns, types and keys, what has to hold of a row, and how files are named."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_kd.study.trial import Action, Phase, Role, Status, StopReason, Trial
from tune_kd.system.characters import CONTROL

Row = dict[str, Any]
LAYOUT = 2  # of a run's folder: from 2 on there are digests of its tables
LEDGER = "ledger.sqlite"  # in a run's folder
COMMITS = "ledger.commits"  # beside it: how many transactions it holds at least
DIGESTS = "tables.json"  # beside them: the SHA-256 of each table, and of the one before, which a kill may leave
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # files and folders are named after runs


@dataclass(frozen=True)
class Schema:
    """A table: its columns with their types, in order, and what has to hold of its rows. Readers hold them to it."""

    name: str
    columns: Mapping[str, type]
    key: tuple[str, ...]  # never null, and never twice
    optional: tuple[str, ...] = ()  # columns that a table of an earlier version may lack; they are null then
    needed: tuple[str, ...] = ()  # never null
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what a text column may hold, besides null
    fractions: tuple[str, ...] = ()  # from 0 to 1
    free: tuple[str, ...] = ()  # text that may have control characters, such as lines; other text names something
    only_completed: tuple[str, ...] = ()  # null unless `status` is completed: nothing poses as a final accuracy

    @property
    def names(self) -> list[str]:
        """The columns of text that name something."""
        return [name for name, kind in self.columns.items() if kind is str and name not in self.free]


def _columns(kind: type, names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


TRIALS = Schema(
    "trials",
    _columns(str, "run trial_id arm phase role student teacher teacher_id stem weights")
    | _columns(float, "width")
    | _columns(str, "method")
    | _columns(float, "temperature alpha beta lr weight_decay")
    | _columns(int, "seed")
    | _columns(str, "recipe_id dataset data_digest scale device")
    | _columns(int, "threads")
    | _columns(str, "status stop_reason")
    | _columns(int, "epochs_planned epochs_run best_epoch")
    | _columns(float, "val_accuracy val_accuracy_best test_accuracy test_accuracy_best")
    | _columns(float, "agreement kl_t1 kl_t4 ece")
    | _columns(int, "params")
    | _columns(float, "train_seconds wall_seconds gpu_fraction")
    | _columns(int, "peak_memory_bytes attempts")
    | _columns(str, "error teacher_digest weights_digest host")
    | _columns(float, "started"),
    ("run", "trial_id"),
    optional=("teacher_digest", "weights_digest", "host", "started"),
    needed=("arm", "phase", "role", "seed", "status"),
    levels={
        "phase": tuple(Phase),
        "role": tuple(Role),
        "status": tuple(Status),
        "stop_reason": tuple(StopReason),
    },
    fractions=(
        "val_accuracy",
        "val_accuracy_best",
        "test_accuracy",
        "test_accuracy_best",
        "agreement",
        "ece",
        "alpha",
    ),
    free=("error",),
    only_completed=("test_accuracy", "test_accuracy_best"),
)
"""`started`: seconds since the Unix epoch at which the first attempt began. `error` also tells of retries."""

EPOCHS = Schema(
    "epochs",
    _columns(str, "run trial_id")
    | _columns(int, "epoch attempt")
    | _columns(float, "val_accuracy val_loss train_loss train_accuracy loss_ce loss_kd lr grad_norm")
    | _columns(float, "seconds images_per_second answer_seconds")
    | _columns(int, "views_answered"),
    ("run", "trial_id", "epoch"),
    optional=("answer_seconds", "views_answered"),
    fractions=("val_accuracy", "train_accuracy"),
)

DECISIONS = Schema(
    "decisions",
    _columns(str, "run trial_id arm phase stratum")
    | _columns(int, "epoch rung")
    | _columns(float, "metric cutoff")
    | _columns(int, "rank peers")
    | _columns(str, "action reason"),
    ("run", "trial_id", "epoch"),
    needed=("arm", "phase", "action", "reason"),
    levels={"action": tuple(Action)},
    fractions=("metric",),
)

SCHEMAS = (TRIALS, DECISIONS, EPOCHS)
"""In the order in which the tables are made, against which they are read: of tables of two ages, as a kill or a reader
in between finds them, no epoch is there without its trial and its comparison."""


TIMING = (
    "attempt",
    "seconds",
    "images_per_second",
    "answer_seconds",
    "views_answered",
)  # an epoch that is computed again may differ in these

PANDAS = {str: "string", int: "Int64", float: "float64"}


def clean(schema: Schema, row: Mapping[str, Any]) -> Row:
    """The row in the schema's order and types. A number that is not finite does not apply: it becomes null."""
    unknown = set(row) - set(schema.columns)
    assert not unknown, f"{schema.name} has no column {sorted(unknown)}"
    cleaned: Row = {}
    for name, kind in schema.columns.items():
        value = row.get(name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            cleaned[name] = None
        else:  # SQLite keeps no sign of zero, and a row's check sum must not depend on it
            cleaned[name] = float(value) + 0.0 if kind is float else kind(value)
            if kind is str:  # a path may hold bytes that are no text, which neither SQLite nor Parquet takes
                cleaned[name] = cleaned[name].encode(errors="backslashreplace").decode()
    return cleaned


def broken(schema: Schema, row: Row) -> str | None:
    """Which rule of its schema a whole row breaks, as a sentence; null where it breaks none. `tables.check` holds whole
    tables to the same rules."""
    for name in (*schema.key, *schema.needed):
        if row[name] is None:
            return f"{schema.name}.{name} is null; allowed: a value"
    for name, levels in schema.levels.items():
        if row[name] is not None and row[name] not in levels:
            return f"{schema.name}.{name} is {row[name]!r}; allowed: null, {', '.join(levels)}"
    for name in schema.names:
        if row[name] is not None and CONTROL.search(row[name]):
            return f"{schema.name}.{name} is {row[name]!r}; allowed: text without control characters"
    for name in schema.fractions:
        if row[name] is not None and not 0 <= row[name] <= 1:
            return f"{schema.name}.{name} is {row[name]}; allowed: null, or from 0 to 1"
    for name in schema.only_completed:
        if row[name] is not None and row["status"] != "completed":
            return f"{schema.name}.{name} is {row[name]} while status is {row['status']}; allowed: null"
    ran, planned = row.get("epochs_run"), row.get("epochs_planned")
    if ran is not None and planned is not None and row["status"] == "completed" and ran < planned:
        return f"{schema.name}.status is completed after {ran} of {planned} epochs; allowed: after all"
    return None


def mistyped(schema: Schema, row: Row) -> str | None:
    """Which value of a whole row has another type than its column, or is no finite number; null where none is."""
    for (name, kind), value in zip(schema.columns.items(), row.values(), strict=True):
        if value is not None and (type(value) is not kind or (isinstance(value, float) and not math.isfinite(value))):
            return f"{schema.name}.{name} is {value!r:.60}"
    return None


def first_row(run: str, trial: Trial) -> Row:
    """The row of a trial that has not begun: what it is, and null for what is not known yet."""
    cell, recipe = trial.cell, trial.recipe
    student = trial.role == "student"
    row: Row = dict.fromkeys(TRIALS.columns)
    row |= {
        "run": run,
        "trial_id": trial.trial_id,
        "arm": trial.arm,
        "phase": trial.phase,
        "role": trial.role,
        "student": cell.student if student else None,
        "teacher": cell.teacher,
        "teacher_id": trial.teacher_id if student else trial.trial_id,
        "stem": cell.stem,
        "weights": cell.weights,
        "width": cell.width,
        "method": cell.method if student else None,
        "temperature": cell.temperature,
        "alpha": cell.alpha,
        "beta": cell.beta,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "seed": trial.seed,
        "recipe_id": trial.recipe_id,
        "dataset": trial.data.name,
        "data_digest": trial.data_digest,
        "scale": trial.scale,
        "status": "pending",
        "epochs_planned": recipe.epochs,
        "epochs_run": 0,
        "attempts": 0,
    }
    return row


MOST_LEDGER_BYTES = 2**36  # a hundred times that of 10,000 trials with 100 epochs each
MOST_TABLE_BYTES = 2**30  # of a Parquet table, which is read whole: five times the epochs of those trials

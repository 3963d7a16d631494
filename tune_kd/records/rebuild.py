"""A damaged ledger is set aside and made again from the tables, where those are whole.

What came after the tables is missing then: it is in the checkpoints of the trials that were under way, which report
it again, or it is computed again, which on one thread of a CPU gives the same.
"""

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from tune_kd.records.adaptive_plan import grown
from tune_kd.records.ledger import ASIDE, Ledger, commits, damage, reading
from tune_kd.records.reader import Records, load, rows, without_advice
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import COMMITS, DECISIONS, EPOCHS, LEDGER, SCHEMAS, TRIALS, Row, first_row
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UserError
from tune_kd.system.files import sync

REBUILT = ".rebuilt"  # a folder in a run's, for the time that it takes


def opened(run: Run, say: Callable[[str], None]) -> Ledger:
    """A run's ledger to write to. One that is damaged, or gone, is rebuilt first, and that is said. A new one is made
    aside, so that none is ever there by half.

    Raises `CorruptFile` where the tables are damaged, too, and `UserError` where the ledger is not this plan's.
    """
    wrong = wrong_with(run.folder)
    if wrong is not None:
        say(f"warning: {wrong}")
        say(rebuild(run))
    elif not (run.folder / LEDGER).is_file():
        _make(run, {schema.name: [] for schema in SCHEMAS})
        _put(run)
    with reading(run.folder / LEDGER) as whole:
        rows = whole.rows(TRIALS)
    strange = {row["trial_id"] for row in rows} - {trial.trial_id for trial in grown(run.plan, rows).trials}
    if strange:
        raise UserError(
            f"RUN is {run.name}, whose ledger holds trials that are not in the plan of {run.folder}/study.json: "
            f"{', '.join(sorted(strange))}; put the study.json or the ledger back that belongs to the other"
        )
    uncounted = commits(run.folder) is None
    ledger = Ledger(run.folder / LEDGER)
    if uncounted:
        say(f"warning: {run.folder / COMMITS} is damaged, which tells whether the ledger is whole; it is made again")
        ledger.count_again()
    return ledger


def wrong_with(folder: Path) -> str | None:
    """What is wrong with the ledger in a folder; null where it is whole, or where none was begun."""
    path = folder / LEDGER
    if not os.path.exists(path):
        tables = any((folder / f"{schema.name}.parquet").is_file() for schema in SCHEMAS)  # which come after it
        return f"{path} is missing, and rows were committed to it" if tables or commits(folder) else None
    try:
        with reading(path) as ledger:
            ledger.check()
    except Exception as error:
        if damage(error):
            return str(error) if isinstance(error, CorruptFile) else f"{path} is damaged ({error})"
        raise
    return None


def rebuild(run: Run) -> str:
    """Make the ledger again from the tables, set the old one aside, and tell what the new one holds."""
    try:
        records = load(run.folder)
    except UserError as mistake:
        raise CorruptFile(
            f"{run.folder / LEDGER} cannot be used, and the tables it could be made from are not whole "
            f"({'; '.join(map(without_advice, mistake.problems))}); restore the "
            "ledger or the tables from a copy, or start a new run, which takes over the teachers"
        ) from mistake
    rows = _consistent(run, records)
    _make(run, rows)
    taken = {path.name for path in set_aside(run.folder)}
    number = next(n for n in count(1) if f"{LEDGER}.damaged-{n}" not in taken)
    there = [path for path in (run.folder / f"{LEDGER}{end}" for end in ASIDE) if path.exists()]
    for old in there:
        old.rename(old.with_name(f"{old.name}.damaged-{number}"))
    point("rebuild.set_aside")
    _put(run)
    ended = sum(row["status"] == "completed" for row in rows[TRIALS.name])
    return (
        f"The ledger was made again from the tables: {len(rows[EPOCHS.name])} epochs of {len(rows[TRIALS.name])} "
        f"trials, of which {ended} are completed; what is missing runs again."
        + (f" The old one is {LEDGER}.damaged-{number}." if there else "")
    )


def set_aside(folder: Path) -> list[Path]:
    """Damaged ledgers that were set aside."""
    return sorted(folder.glob(f"{LEDGER}.damaged-*"))


def _make(run: Run, rows: dict[str, list[Row]]) -> None:
    """A new ledger of these rows, whole and synced, in a folder of its own."""
    aside = run.folder / REBUILT
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    ledger = Ledger(aside / LEDGER, after=commits(run.folder) or 0)
    try:
        with ledger.transaction():
            for schema in SCHEMAS:
                for row in rows[schema.name]:
                    ledger.put(schema, row)
        ledger.count_again()
    finally:
        ledger.close()  # which also ends its write-ahead log


def _put(run: Run) -> None:
    """Have the ledger that was made in its place, after its count: a count alone says that a ledger is missing."""
    for name in (COMMITS, LEDGER):
        (run.folder / REBUILT / name).rename(run.folder / name)
    sync(run.folder)
    shutil.rmtree(run.folder / REBUILT)


def _consistent(run: Run, records: Records) -> dict[str, list[Row]]:
    """The rows of tables that a kill may have left of different ages, so that they fit together and the plan."""
    trials, epochs, decisions = (rows(table) for table in (records.trials, records.epochs, records.decisions))
    planned = {trial.trial_id: trial for trial in grown(run.plan, trials).trials}
    if strange := {row["trial_id"] for row in trials} - set(planned):
        raise CorruptFile(
            f"{run.folder}: the tables hold trials that are not in the plan: {', '.join(sorted(strange))}"
        )
    of_trial: dict[str, list[Row]] = {}
    for row in epochs:
        of_trial.setdefault(row["trial_id"], []).append(row)
    for place, row in enumerate(trials):
        theirs = sorted(of_trial.get(row["trial_id"], []), key=lambda each: int(each["epoch"]))
        underived = row["status"] in ("stopped", "blocked") and not theirs  # a driver finds out again
        if underived or row["epochs_run"] != len(theirs):
            trials[place] = _as_of(first_row(run.name, planned[row["trial_id"]]), row, theirs)
    # Where a draw runs again, what follows from all of them is not known yet.
    known_trials = {trial.trial_id for trial in grown(run.plan, trials).trials}
    trials = [row for row in trials if row["trial_id"] in known_trials]
    epochs = [row for row in epochs if row["trial_id"] in known_trials]
    known = {(row["trial_id"], row["epoch"]) for row in epochs}
    kept = [row for row in decisions if (row["trial_id"], row["epoch"]) in known]
    return {TRIALS.name: trials, EPOCHS.name: epochs, DECISIONS.name: kept}


def _as_of(first: Row, row: Row, epochs: list[Row]) -> Row:
    """A trial's row as it was when it had these epochs: to be run on."""
    best = max(epochs, key=lambda each: (each["val_accuracy"], -each["val_loss"]), default=None)
    names = ("attempts", "started", "host", "device", "threads", "gpu_fraction")
    kept = {name: row[name] for name in (*names, *(["error"] if row["attempts"] else []))}  # else: why it did not run
    return (
        first
        | kept
        | {
            "epochs_run": len(epochs),
            "val_accuracy": epochs[-1]["val_accuracy"] if epochs else None,
            "val_accuracy_best": None if best is None else best["val_accuracy"],
            "best_epoch": None if best is None else best["epoch"],
            "train_seconds": sum(each["seconds"] for each in epochs) if epochs else None,
        }
    )

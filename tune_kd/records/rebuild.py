"""Back up a corrupt ledger and rebuild it from intact Parquet tables.

Results newer than the tables are then missing. Running trials report them again from their checkpoints, or recompute
them; on one CPU thread, recomputing gives the same values.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import cast

from tune_kd.records.adaptive_plan import grown
from tune_kd.records.ledger import ASIDE, Ledger, commits, damage, reading
from tune_kd.records.reader import Records, load, rows, without_advice
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import COMMITS, DECISIONS, EPOCHS, LEDGER, SCHEMAS, TRIALS, TrialRow, first_row
from tune_kd.study.trial import Epoch, Row, Status
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UserError
from tune_kd.system.files import sync

REBUILT = ".rebuilt"  # temporary folder inside a run's folder


def opened(run: Run, say: Callable[[str], None]) -> Ledger:
    """Open a run's ledger for writing. Creates it for a new run; rebuilds it, with a warning, if it is damaged or lost.

    Raises `CorruptFile` if the tables are also damaged, and `UserError` if the ledger belongs to another plan.
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
            f"{', '.join(sorted(strange))}; restore the study.json or the ledger, so that both belong together"
        )
    uncounted = commits(run.folder) is None
    ledger = Ledger(run.folder / LEDGER)
    if uncounted:
        say(f"warning: {run.folder / COMMITS}, which shows whether the ledger is complete, is damaged; it is rewritten")
        ledger.count_again()
    return ledger


def wrong_with(folder: Path) -> str | None:
    """Return what is wrong with the ledger in a folder; None if it is intact, or was never created."""
    path = folder / LEDGER
    if not os.path.exists(path):
        tables = any((folder / f"{schema.name}.parquet").is_file() for schema in SCHEMAS)  # written after the ledger
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
    """Rebuild the ledger from the tables and back up the old one. Returns a message about the new one's content."""
    try:
        records = load(run.folder)
    except UserError as mistake:
        raise CorruptFile(
            f"{run.folder / LEDGER} cannot be used, and it cannot be rebuilt, since the tables are damaged "
            f"({'; '.join(map(without_advice, mistake.problems))}); restore the "
            "ledger or the tables from a copy, or start a new run, which reuses the teachers"
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
    ended = sum(row["status"] == Status.COMPLETED for row in rows[TRIALS.name])
    return (
        f"The ledger was rebuilt from the tables: {len(rows[EPOCHS.name])} epochs of {len(rows[TRIALS.name])} "
        f"trials, of which {ended} are completed; missing epochs run again."
        + (f" The old one is {LEDGER}.damaged-{number}." if there else "")
    )


def set_aside(folder: Path) -> list[Path]:
    """Return the backups of damaged ledgers."""
    return sorted(folder.glob(f"{LEDGER}.damaged-*"))


def _make(run: Run, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write a ledger of these rows in a temporary folder, so that a kill never leaves a partial ledger."""
    aside = run.folder / REBUILT
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with closing(Ledger(aside / LEDGER, after=commits(run.folder) or 0)) as ledger:  # closing removes its log
        with ledger.transaction():
            for schema in SCHEMAS:
                for row in rows[schema.name]:
                    ledger.put(schema, row)
        ledger.count_again()


def _put(run: Run) -> None:
    """Move the count, then the new ledger, into place: a count alone means that the ledger is missing."""
    for name in (COMMITS, LEDGER):
        (run.folder / REBUILT / name).rename(run.folder / name)
    sync(run.folder)
    shutil.rmtree(run.folder / REBUILT)


def _consistent(run: Run, records: Records) -> dict[str, Sequence[Row]]:
    """Return the tables' rows, consistent with each other and the plan: a kill can leave tables of different ages."""
    trials, epochs = rows(TRIALS, records.trials), rows(EPOCHS, records.epochs)
    planned = {trial.trial_id: trial for trial in grown(run.plan, trials).trials}
    if strange := {row["trial_id"] for row in trials} - set(planned):
        raise CorruptFile(
            f"{run.folder}: the tables hold trials that are not in the plan: {', '.join(sorted(strange))}"
        )
    of_trial: dict[str, list[Epoch]] = {}
    for each in epochs:
        of_trial.setdefault(each["trial_id"], []).append(Epoch.of(each))
    for place, row in enumerate(trials):
        theirs = sorted(of_trial.get(row["trial_id"], []), key=lambda each: each.epoch)
        underived = row["status"] in (Status.STOPPED, Status.BLOCKED) and not theirs  # a driver decides again
        if underived or row["epochs_run"] != len(theirs):
            trials[place] = _as_of(first_row(run.name, planned[row["trial_id"]]), row, theirs)
    # If a draw runs again, the trials that depend on all draws are not known yet.
    known_trials = {trial.trial_id for trial in grown(run.plan, trials).trials}
    trials = [row for row in trials if row["trial_id"] in known_trials]
    epochs = [row for row in epochs if row["trial_id"] in known_trials]
    known = {(row["trial_id"], row["epoch"]) for row in epochs}
    kept = [row for row in rows(DECISIONS, records.decisions) if (row["trial_id"], row["epoch"]) in known]
    return {TRIALS.name: trials, EPOCHS.name: epochs, DECISIONS.name: kept}


def _as_of(first: TrialRow, row: TrialRow, epochs: list[Epoch]) -> TrialRow:
    """Return the row of a trial after these epochs, ready to continue."""
    names = ["attempts", "started", "host", "device", "threads", "gpu_fraction"]
    if row["attempts"]:  # otherwise `error` says why it did not run
        names.append("error")
    then = first | cast(TrialRow, {name: value for name, value in row.items() if name in names})
    if not epochs:
        return then
    validated = [each for each in epochs if each.val_accuracy is not None]
    best = max(validated, key=lambda each: each.quality, default=None)
    return then | {
        "epochs_run": len(epochs),
        "val_accuracy": validated[-1].val_accuracy if validated else None,
        "val_accuracy_best": best.val_accuracy if best else None,
        "best_epoch": best.epoch if best else None,
        "train_seconds": sum(each.seconds for each in epochs),
    }

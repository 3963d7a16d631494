"""Checks a run's folder against the invariants I1 to I8 of docs/reliability.md.

The checker uses none of tune_kd's readers, so that an error in them cannot hide an error in the records: it reads the
ledger with sqlite3, the tables with pandas, and `study.json` with json. Only the plan (I4) and the output of `status`
(I7) come from tune_kd, since the records must agree with them.
"""

import hashlib
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from faults.processes import ROOT, shared_memory, tagged

Row = dict[str, Any]
TABLES = ("trials", "epochs", "decisions")
MAX_ATTEMPTS = 3  # of a trial under one driver, without a new epoch in between
ENDED = {"completed", "stopped", "failed", "blocked"}

# What may differ between two computations of one trial: times, rates, hosts, attempts, memory, shares, notes.
EPOCH_FREE = {"number", "crc", "run", "attempt", "seconds", "images_per_second", "answer_seconds", "views_answered"}
FREE = {"number", "crc", "run", "train_seconds", "wall_seconds", "gpu_fraction", "peak_memory_bytes", "attempts",
        "error", "host", "started", "fast_paths"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Trials and epochs of one source: the ledger, or the tables (None if a table cannot be read)."""

    name: str
    trials: list[Row] | None
    epochs: list[Row] | None


@dataclass(frozen=True)
class Records:
    """The contents of a run's folder."""

    run: Path
    study: dict[str, Any]
    ledger: Source
    decisions: list[Row]
    tables: Source
    unreadable: list[str]

    @property
    def begun(self) -> bool:
        """Whether a driver has written trials to the ledger. A kill before that leaves nothing to check."""
        return bool(self.ledger.trials or self.ledger.epochs)


def violations(
    run: Path,
    *,
    witness: Sequence[Path] = (),
    reference: Path | None = None,
    exit_status: int | None = None,
    tag: str | None = None,
    shm_before: Iterable[str] | None = None,
) -> list[str]:
    """Return the violations in a run's folder, one line each, starting with the name of the invariant.

    `witness` has one log for each of the run's drivers, in order. `reference` is the folder of the same study, run
    without faults; no arm may be stopped early, since that depends on the order of arrival. `exit_status` is that of
    the last driver. `tag` marks the environment of all processes of the run. `shm_before` lists the files that were in
    /dev/shm before the run.
    """
    try:
        records = read(run)
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        return [f"I2: the records of {run} cannot be read: {type(error).__name__}: {error}"]
    found = [*contiguous(records), *acknowledged(records, witness), *as_planned(records, exit_status)]
    if reference is not None:
        found += same(records, read(reference))
    found += computed_alike(records)
    found += taught(records)
    found += readable(records)
    found += truthful(records, exit_status, len(witness))
    found += left_behind(tag, shm_before)
    return found


def read(run: Path) -> Records:
    """Read a run's folder. Raises errors of json, sqlite3 and the file system, but only notes unreadable tables."""
    study = json.loads((run / "study.json").read_text())
    frames, unreadable = {}, []
    for name in TABLES:
        try:
            frames[name] = _plain(pd.read_parquet(run / f"{name}.parquet"))
        except Exception as error:  # a Parquet reader may raise anything for a damaged file
            unreadable.append(f"{name}.parquet: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    trials, epochs, decisions = (_ledger_rows(run / "ledger.sqlite", name) for name in TABLES)
    tables = Source("tables", frames.get("trials"), frames.get("epochs"))
    return Records(run, study, Source("ledger", trials, epochs), decisions, tables, unreadable)


def contiguous(records: Records) -> Iterator[str]:
    """I1: (run, trial, epoch) is unique, and epochs are numbered from 1 without gaps."""
    for source in (records.ledger, records.tables):
        for trial, epochs in _epochs_by_trial(source).items():
            times = Counter(row["epoch"] for row in epochs)
            yield from (
                f"I1: {source.name}: {trial} epoch {epoch} is duplicated" for epoch, n in times.items() if n > 1
            )
            gaps = set(range(1, max(times) + 1)) - set(times)
            yield from (f"I1: {source.name}: {trial} lacks epoch {epoch}" for epoch in sorted(gaps))
        if foreign := {row["run"] for row in source.epochs or ()} - {records.study["run"]}:
            yield f"I1: {source.name}: epochs of other runs: {sorted(foreign)}"
    known = _epochs_by_trial(records.ledger)
    for row in records.ledger.trials or ():
        count = len(known.get(row["trial_id"], ()))
        if row["epochs_run"] != count:
            yield f"I1: ledger: {row['trial_id']} has {count} epochs, its row says {row['epochs_run']}"


def acknowledged(records: Records, witness: Sequence[Path]) -> Iterator[str]:
    """I2: epochs and outcomes that a driver acknowledged, by the witness's logs, are unchanged in the ledger."""
    epochs = {(row["trial_id"], row["epoch"]): row for row in records.ledger.epochs or ()}
    trials = {row["trial_id"]: row for row in records.ledger.trials or ()}
    for line in (line for log in witness for line in lines(log)):
        where = f"{line['trial_id']} epoch {line['epoch']['epoch']}"
        outcome = line["epoch"].pop("outcome")
        row = epochs.get((line["trial_id"], line["epoch"]["epoch"]))
        if row is None:
            yield f"I2: {where} was acknowledged and is lost"
        elif differences := _differences(line["epoch"], row, EPOCH_FREE):
            yield f"I2: {where} was acknowledged and is changed: {differences}"
        if outcome is None:
            continue
        trial = trials.get(line["trial_id"], {})
        expected = {name: value for name, value in outcome.items() if name in trial}
        if trial.get("status") != "completed":
            yield f"I2: the outcome of {line['trial_id']} was acknowledged and is lost"
        elif differences := _differences(expected, trial, FREE):
            yield f"I2: the outcome of {line['trial_id']} was acknowledged and is changed: {differences}"


def same(records: Records, reference: Records) -> Iterator[str]:
    """I3: the run equals an uninterrupted one in its teachers' weights, and in all columns that must not differ."""
    for source in (records.ledger, records.tables):
        yield from _same_rows(source.name, source.trials, reference.ledger.trials, ("trial_id",), FREE)
        yield from _same_rows(source.name, source.epochs, reference.ledger.epochs, ("trial_id", "epoch"), EPOCH_FREE)
    for row in reference.ledger.trials or ():
        if row["role"] == "teacher":
            here, there = (_weights(each.run, row["trial_id"]) for each in (records, reference))
            if _sha256(here) != _sha256(there):
                yield f"I3: the weights of teacher {row['trial_id']} differ from the reference's"


def computed_alike(records: Records) -> Iterator[str]:
    """I3, as recorded by the driver: an epoch that was computed again equals its record."""
    for row in records.ledger.trials or ():
        if "differs from its record" in (row["error"] or ""):
            yield f"I3: {row['trial_id']}: {row['error']}"


def as_planned(records: Records, exit_status: int | None) -> Iterator[str]:
    """I4: `study.json` has the trials that the study plans. Ledger and tables have these, and the trials that a tuned
    study has drawn or derived from its draws."""
    from tune_kd.records.adaptive_plan import grown
    from tune_kd.study.discover import from_json
    from tune_kd.study.plan import plan

    study = (records.study["extended"] or records.study)["study"]
    fixed = plan(from_json(study), records.study["data"]["digest"], records.study["look"])
    found = [("study.json", fixed, records.study["trials"])]
    if records.begun or exit_status is not None:
        for source in (records.ledger, records.tables):
            if source.trials is not None:
                expected = grown(fixed, source.trials)
                found.append((source.name, expected, [row["trial_id"] for row in source.trials]))
                epochs = dict.fromkeys(row["trial_id"] for row in source.epochs or ())
                unbegun = {trial.trial_id for trial in expected.trials} - set(epochs)
                found.append((f"epochs of {source.name}", expected, [*epochs, *unbegun]))
    for name, expected, trials in found:
        planned = [trial.trial_id for trial in expected.trials]
        missing, surplus = Counter(planned) - Counter(trials), Counter(trials) - Counter(planned)
        yield from (f"I4: {name}: trial {trial} is missing" for trial in missing)
        yield from (f"I4: {name}: trial {trial} is a phantom" for trial in surplus)


def taught(records: Records) -> Iterator[str]:
    """I5: a student starts after its teacher has completed, and learns from the recorded weights."""
    epochs = _epochs_by_trial(records.ledger)
    trials = {row["trial_id"]: row for row in records.ledger.trials or ()}
    for trial_id, row in trials.items():
        if row["role"] == "teacher" and row["status"] == "completed":
            yield from _published(records.run, trial_id)
        teacher = row["teacher_id"]
        if row["role"] == "teacher" or teacher is None or trial_id not in epochs:
            continue
        first = min(each["number"] for each in epochs[trial_id])
        last = max((each["number"] for each in epochs.get(teacher, ())), default=math.inf)
        if first <= last or trials.get(teacher, {}).get("status") != "completed":
            yield f"I5: {trial_id} began before its teacher {teacher} had ended"
        if row["status"] == "completed" and row["teacher_digest"] != _sha256(_weights(records.run, teacher)):
            yield f"I5: {trial_id} learned from other weights than those of its teacher {teacher}"


def readable(records: Records) -> Iterator[str]:
    """I6: every table can be read once an epoch is recorded."""
    if records.ledger.epochs:
        yield from (f"I6: {what}" for what in records.unreadable)


def truthful(records: Records, exit_status: int | None, drivers: int) -> Iterator[str]:
    """I7: exit status, attempts and the output of `status` agree with the ledger."""
    trials = records.ledger.trials or []
    count = Counter(row["status"] for row in trials)
    waiting, bad = count["pending"] + count["running"], count["failed"] + count["blocked"]
    if exit_status == 0 and (waiting or bad or not trials):
        yield f"I7: exit status 0, and the ledger has {dict(count)}"
    if exit_status == 1 and (waiting or not bad):
        yield f"I7: exit status 1, which means that trials failed, and the ledger has {dict(count)}"
    if exit_status in (130, 143) and count["running"]:
        yield f"I7: exit status {exit_status}, and {count['running']} trials are recorded as running"
    if exit_status is not None and 0 <= exit_status != 137 and exit_status not in (0, 1, 130, 143):
        yield f"I7: exit status {exit_status}"
    if drivers:
        yield from _attempts(trials, drivers)
    if trials:
        yield from _status_agrees(records, held=exit_status is None)
    if exit_status is not None and exit_status >= 0:
        yield from _tables_agree(records)


def left_behind(tag: str | None, shm_before: Iterable[str] | None) -> Iterator[str]:
    """I8: no process and no shared memory is left."""
    if tag is not None:
        yield from (f"I8: process {each.pid} ({each.name()}) is left" for each in tagged(tag))
    if shm_before is not None:
        yield from (f"I8: /dev/shm/{name} is left" for name in sorted(shared_memory() - set(shm_before)))


def lines(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a witness's log. A last line that a kill cut off was not acknowledged."""
    if not log.is_file():
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


@dataclass
class Reader:
    """Reads the tables repeatedly during a run, and counts reads and errors (I6). A table may be missing only until it
    is first written."""

    run: Path
    every: float = 0.3  # seconds
    reads: int = 0
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> "Reader":
        self._over = threading.Event()
        self._seen: set[str] = set()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._over.wait(self.every):
            for name in TABLES:
                path = self.run / f"{name}.parquet"
                if name not in self._seen and not path.is_file():
                    continue
                self._seen.add(name)
                try:
                    pd.read_parquet(path)
                    self.reads += 1
                except Exception as error:  # a Parquet reader may raise anything
                    self.errors.append(f"I6: {path.name} during the run: {type(error).__name__}: {error}")


def _plain(table: pd.DataFrame) -> list[Row]:
    """Return a table as rows of Python values, with None for null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _ledger_rows(path: Path, table: str) -> list[Row]:
    """Return all rows ordered by number; none if a kill came before the table was created."""
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [table]).fetchone():
            return []
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY number")]


def _epochs_by_trial(source: Source) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in source.epochs or ():
        found.setdefault(row["trial_id"], []).append(row)
    return found


def _differences(expected: Row, row: Row, free: set[str]) -> str:
    """Return the columns in which a row differs from the expected values; empty if there are none."""
    pairs = {name: (_finite(value), row.get(name)) for name, value in expected.items() if name not in free}
    return ", ".join(f"{name} was {one!r} and is {other!r}" for name, (one, other) in pairs.items() if one != other)


def _finite(value: Any) -> Any:
    """Return None for a number that is not finite: records store it as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _same_rows(
    source: str, rows: list[Row] | None, expected: list[Row] | None, key: tuple[str, ...], free: set[str]
) -> Iterator[str]:
    if rows is None or expected is None:
        return
    here, there = ({tuple(row[name] for name in key): row for row in each} for each in (rows, expected))
    for which in dict.fromkeys((*there, *here)):
        if which not in here or which not in there:
            yield f"I3: {source}: {which} is only in the {'reference' if which in there else 'run'}"
        elif differences := _differences(there[which], here[which], free):
            yield f"I3: {source}: {which}: {differences}"


def _weights(run: Path, teacher_id: str) -> Path:
    return run.parent / "teachers" / teacher_id / "weights.safetensors"


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _published(run: Path, teacher_id: str) -> Iterator[str]:
    """Check that a teacher's card has the digest of its weights."""
    weights = _weights(run, teacher_id)
    card = weights.with_name("card.json")
    recorded = json.loads(card.read_text())["weights_sha256"] if card.is_file() else None
    if recorded is None or recorded != _sha256(weights):
        yield f"I5: the weights of teacher {teacher_id} do not match its card"


def _attempts(trials: list[Row], drivers: int) -> Iterator[str]:
    """Attempts are bounded. Each one after the first needs a recorded loss of a worker, or a new driver."""
    for row in trials:
        explained = len(set(re.findall(r"attempt (\d+): ", row["error"] or "")))
        if row["attempts"] > MAX_ATTEMPTS * (drivers + row["epochs_run"]):
            yield f"I7: {row['trial_id']} was tried {row['attempts']} times by {drivers} drivers"
        if row["attempts"] > explained + drivers:
            yield f"I7: {row['trial_id']} was tried {row['attempts']} times, of which its row explains {explained}"


def _status_agrees(records: Records, held: bool) -> Iterator[str]:
    """`status` prints the trials of the ledger, and those of an extension that no driver has added yet. If `held`, a
    driver may be running."""
    command = [sys.executable, "-m", "tune_kd", "status", str(records.run.absolute()), "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=120)
    if done.returncode:
        yield f"I7: status fails: {done.stderr.strip()[-200:]}"
        return
    printed = json.loads(done.stdout)
    ledger = [{name: value for name, value in row.items() if name not in ("number", "crc")}
              for row in records.ledger.trials or ()]  # fmt: skip
    coming = set(records.study["trials"]) - {row["trial_id"] for row in ledger}
    added = [row for row in printed["trials"] if row["trial_id"] in coming]
    if printed["trials"] != [*ledger, *added] or len(added) != len(coming):
        yield "I7: status reports other trials than the ledger and the plan"
    if {row["status"] for row in added} - {"pending"}:
        yield "I7: status reports that trials ran, and the ledger does not have them"
    counted = Counter((row["phase"], row["status"]) for row in (*ledger, *added))
    if {(phase, status): n for phase, each in printed["phases"].items() for status, n in each.items()} != counted:
        yield f"I7: status counts {printed['phases']}, and the ledger has {dict(counted)}"
    if len(printed["decisions"]) != len(records.decisions):
        yield "I7: status reports other decisions than the ledger"
    if printed["held_by"] is not None and not held:
        yield f"I7: status reports {printed['held_by']} as the holder of a run that has ended"


def _tables_agree(records: Records) -> Iterator[str]:
    """The tables of a driver that was not killed agree with the ledger."""
    for name in ("trials", "epochs"):
        ledger, table = (getattr(source, name) for source in (records.ledger, records.tables))
        expected = [_as_table_row(row) for row in ledger]
        if table is None:
            continue
        further = {key for row in table for key in row} - {key for row in ledger for key in row}
        if [row | {key: row.get(key) for key in further} for row in expected] != table:
            yield f"I7: {name}.parquet differs from the ledger"


def _as_table_row(row: Row) -> Row:
    """Return a ledger's row without the columns that only the ledger has, and with one column per further setting."""
    plain = {name: value for name, value in row.items() if name not in ("number", "crc", "further")}
    return plain | json.loads(row.get("further") or "{}")

"""Says which invariants of a run (RELIABILITY: I1 to I8) its folder breaks.

None of the product's readers is used, so that an error in them cannot hide one in the records: the ledger is read with
sqlite3, the tables with pandas, `study.json` with json. Only what has to be the same is asked of the product: the plan
(I4) and what `status` says (I7).
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
MAX_ATTEMPTS = 3  # of a trial under one driver without a new epoch in between, as promised
ENDED = {"completed", "stopped", "failed", "blocked"}

# What may differ between two computations of one trial: times, rates, hosts, attempts, memory, shares, notes.
EPOCH_FREE = {"number", "crc", "run", "attempt", "seconds", "images_per_second", "answer_seconds", "views_answered"}
FREE = {"number", "crc", "run", "train_seconds", "wall_seconds", "gpu_fraction", "peak_memory_bytes", "attempts",
        "error", "host", "started", "fast_paths"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Trials and epochs as one source tells them: the ledger, or the tables (null where one cannot be read)."""

    name: str
    trials: list[Row] | None
    epochs: list[Row] | None


@dataclass(frozen=True)
class Records:
    """All that is in a run's folder."""

    run: Path
    study: dict[str, Any]
    ledger: Source
    decisions: list[Row]
    tables: Source
    unreadable: list[str]

    @property
    def begun(self) -> bool:
        """Whether its driver came so far that it wrote the trials down; a kill before that leaves nothing to check."""
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
    """What is wrong with a run's folder, a line each, beginning with the invariant's name.

    `witness` has a log for each driver that the run had, in order; `reference` is the folder of the same study, run
    without a fault, in which no arm was stopped early (arrival order decides on that); `exit_status` is the last
    driver's; `tag` marks the environment of all processes of the run; `shm_before` is what lay in /dev/shm before it.
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
    """Raises what json, sqlite3 and the file system raise; tables that cannot be read are noted instead."""
    study = json.loads((run / "study.json").read_text())
    frames, unreadable = {}, []
    for name in TABLES:
        try:
            frames[name] = _plain(pd.read_parquet(run / f"{name}.parquet"))
        except Exception as error:  # whatever a reader of Parquet raises for what is none
            unreadable.append(f"{name}.parquet: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    trials, epochs, decisions = (_ledger_rows(run / "ledger.sqlite", name) for name in TABLES)
    tables = Source("tables", frames.get("trials"), frames.get("epochs"))
    return Records(run, study, Source("ledger", trials, epochs), decisions, tables, unreadable)


def contiguous(records: Records) -> Iterator[str]:
    """I1: (run, trial, epoch) is unique, and epochs go from 1 on without a gap."""
    for source in (records.ledger, records.tables):
        for trial, epochs in _epochs_by_trial(source).items():
            times = Counter(row["epoch"] for row in epochs)
            yield from (f"I1: {source.name}: {trial} epoch {epoch} is doubled" for epoch, n in times.items() if n > 1)
            gaps = set(range(1, max(times) + 1)) - set(times)
            yield from (f"I1: {source.name}: {trial} lacks epoch {epoch}" for epoch in sorted(gaps))
        if strangers := {row["run"] for row in source.epochs or ()} - {records.study["run"]}:
            yield f"I1: {source.name}: epochs of other runs: {sorted(strangers)}"
    known = _epochs_by_trial(records.ledger)
    for row in records.ledger.trials or ():
        count = len(known.get(row["trial_id"], ()))
        if row["epochs_run"] != count:
            yield f"I1: ledger: {row['trial_id']} has {count} epochs, its row says {row['epochs_run']}"


def acknowledged(records: Records, witness: Sequence[Path]) -> Iterator[str]:
    """I2: what a driver has acknowledged, by the witness's logs, is in the ledger with the same values."""
    epochs = {(row["trial_id"], row["epoch"]): row for row in records.ledger.epochs or ()}
    trials = {row["trial_id"]: row for row in records.ledger.trials or ()}
    for line in (line for log in witness for line in lines(log)):
        where = f"{line['trial_id']} epoch {line['epoch']['epoch']}"
        outcome = line["epoch"].pop("outcome")
        row = epochs.get((line["trial_id"], line["epoch"]["epoch"]))
        if row is None:
            yield f"I2: {where} was acknowledged and is lost"
        elif unlike := _unlike(line["epoch"], row, EPOCH_FREE):
            yield f"I2: {where} was acknowledged and is changed: {unlike}"
        if outcome is None:
            continue
        trial = trials.get(line["trial_id"], {})
        expected = {name: value for name, value in outcome.items() if name in trial}
        if trial.get("status") != "completed":
            yield f"I2: the outcome of {line['trial_id']} was acknowledged and is lost"
        elif unlike := _unlike(expected, trial, FREE):
            yield f"I2: the outcome of {line['trial_id']} was acknowledged and is changed: {unlike}"


def same(records: Records, reference: Records) -> Iterator[str]:
    """I3: the run equals one that was never interrupted, in all columns that are not free, and in its weights."""
    for source in (records.ledger, records.tables):
        yield from _same_rows(source.name, source.trials, reference.ledger.trials, ("trial_id",), FREE)
        yield from _same_rows(source.name, source.epochs, reference.ledger.epochs, ("trial_id", "epoch"), EPOCH_FREE)
    for row in reference.ledger.trials or ():
        if row["role"] == "teacher":
            here, there = (_weights(each.run, row["trial_id"]) for each in (records, reference))
            if _sha256(here) != _sha256(there):
                yield f"I3: the weights of teacher {row['trial_id']} differ from the reference's"


def computed_alike(records: Records) -> Iterator[str]:
    """I3, as the driver itself has noticed it: an epoch that was computed twice was the same twice."""
    for row in records.ledger.trials or ():
        if "differs from its record" in (row["error"] or ""):
            yield f"I3: {row['trial_id']}: {row['error']}"


def as_planned(records: Records, exit_status: int | None) -> Iterator[str]:
    """I4: the trials of ledger and tables are those of `study.json`, which are those that the study plans, and what of
    them was drawn or follows from it."""
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
    """I5: a student begins after its teacher has ended, and learns from the weights that are on record."""
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
    """I6: every table can be read, from the first epoch on."""
    if records.ledger.epochs:
        yield from (f"I6: {what}" for what in records.unreadable)


def truthful(records: Records, exit_status: int | None, drivers: int) -> Iterator[str]:
    """I7: exit status, attempts and `status` tell what the ledger tells."""
    trials = records.ledger.trials or []
    count = Counter(row["status"] for row in trials)
    waiting, bad = count["pending"] + count["running"], count["failed"] + count["blocked"]
    if exit_status == 0 and (waiting or bad or not trials):
        yield f"I7: exit status 0, and the ledger has {dict(count)}"
    if exit_status == 1 and (waiting or not bad):
        yield f"I7: exit status 1, which means that trials failed, and the ledger has {dict(count)}"
    if exit_status in (130, 143) and count["running"]:
        yield f"I7: exit status {exit_status}, and {count['running']} trials are running on record"
    if exit_status is not None and 0 <= exit_status != 137 and exit_status not in (0, 1, 130, 143):
        yield f"I7: exit status {exit_status}"
    if drivers:
        yield from _attempts(trials, drivers)
    if trials:
        yield from _status_agrees(records, held=exit_status is None)
    if exit_status is not None and exit_status >= 0:
        yield from _tables_agree(records)


def left_behind(tag: str | None, shm_before: Iterable[str] | None) -> Iterator[str]:
    """I8: no process and no shared memory remains."""
    if tag is not None:
        yield from (f"I8: process {each.pid} ({each.name()}) is left" for each in tagged(tag))
    if shm_before is not None:
        yield from (f"I8: /dev/shm/{name} is left" for name in sorted(shared_memory() - set(shm_before)))


def lines(log: Path) -> list[dict[str, Any]]:
    """What a witness has written; a line that its death cut short was not acknowledged to anyone."""
    if not log.is_file():
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


@dataclass
class Reader:
    """Reads the tables again and again while a run goes on, and counts (I6). A table is missing only before its first
    writing."""

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
                except Exception as error:  # whatever a reader of Parquet raises
                    self.errors.append(f"I6: {path.name} while the run went on: {type(error).__name__}: {error}")


def _plain(table: pd.DataFrame) -> list[Row]:
    """A table as rows of Python values, null as None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _ledger_rows(path: Path, table: str) -> list[Row]:
    """All rows in the order of their numbers; none where a kill came before the table was made."""
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


def _unlike(expected: Row, row: Row, free: set[str]) -> str:
    """In which columns a row differs from what is expected of it; empty where in none."""
    pairs = {name: (_finite(value), row.get(name)) for name, value in expected.items() if name not in free}
    return ", ".join(f"{name} was {one!r} and is {other!r}" for name, (one, other) in pairs.items() if one != other)


def _finite(value: Any) -> Any:
    """A number that is not finite does not apply, and is null in the records."""
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
        elif unlike := _unlike(there[which], here[which], free):
            yield f"I3: {source}: {which}: {unlike}"


def _weights(run: Path, teacher_id: str) -> Path:
    return run.parent / "teachers" / teacher_id / "weights.safetensors"


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _published(run: Path, teacher_id: str) -> Iterator[str]:
    """A teacher's card tells the digest of its weights."""
    weights = _weights(run, teacher_id)
    card = weights.with_name("card.json")
    told = json.loads(card.read_text())["weights_sha256"] if card.is_file() else None
    if told is None or told != _sha256(weights):
        yield f"I5: the weights of teacher {teacher_id} are not those of its card"


def _attempts(trials: list[Row], drivers: int) -> Iterator[str]:
    """Attempts are bounded; each after the first has a lost worker on record, or another driver before it."""
    for row in trials:
        explained = len(set(re.findall(r"attempt (\d+): ", row["error"] or "")))
        if row["attempts"] > MAX_ATTEMPTS * (drivers + row["epochs_run"]):
            yield f"I7: {row['trial_id']} was tried {row['attempts']} times by {drivers} drivers"
        if row["attempts"] > explained + drivers:
            yield f"I7: {row['trial_id']} was tried {row['attempts']} times, of which its row explains {explained}"


def _status_agrees(records: Records, held: bool) -> Iterator[str]:
    """What `status` prints is what the ledger holds, and trials to come of an extension that no driver took over.
    `held`: a driver may be at work."""
    command = [sys.executable, "-m", "tune_kd", "status", str(records.run.absolute()), "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=120)
    if done.returncode:
        yield f"I7: status fails: {done.stderr.strip()[-200:]}"
        return
    told = json.loads(done.stdout)
    ledger = [{name: value for name, value in row.items() if name not in ("number", "crc")}
              for row in records.ledger.trials or ()]  # fmt: skip
    coming = set(records.study["trials"]) - {row["trial_id"] for row in ledger}
    added = [row for row in told["trials"] if row["trial_id"] in coming]
    if told["trials"] != [*ledger, *added] or len(added) != len(coming):
        yield "I7: status tells of other trials than the ledger and the plan"
    if {row["status"] for row in added} - {"pending"}:
        yield "I7: status tells of trials that ran, and the ledger has none of them"
    counted = Counter((row["phase"], row["status"]) for row in (*ledger, *added))
    if {(phase, status): n for phase, each in told["phases"].items() for status, n in each.items()} != counted:
        yield f"I7: status counts {told['phases']}, and the ledger has {dict(counted)}"
    if len(told["decisions"]) != len(records.decisions):
        yield "I7: status tells of other decisions than the ledger"
    if told["held_by"] is not None and not held:
        yield f"I7: status says that {told['held_by']} holds a run that has ended"


def _tables_agree(records: Records) -> Iterator[str]:
    """A driver that has ended itself has left tables that tell all that the ledger tells."""
    for name in ("trials", "epochs"):
        ledger, table = (getattr(source, name) for source in (records.ledger, records.tables))
        told = [_without_own(row) for row in ledger]
        if table is None:
            continue
        further = {key for row in table for key in row} - {key for row in ledger for key in row}
        if [row | {key: row.get(key) for key in further} for row in told] != table:
            yield f"I7: {name}.parquet tells something else than the ledger"


def _without_own(row: Row) -> Row:
    """A ledger's row without the columns that are the ledger's own, and with each further setting in one of its own."""
    plain = {name: value for name, value in row.items() if name not in ("number", "crc", "further")}
    return plain | json.loads(row.get("further") or "{}")

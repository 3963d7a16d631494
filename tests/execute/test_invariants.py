"""No sequence of events loses, duplicates or changes what was acknowledged.

A Hypothesis state machine simulates workers, kills and damage, with the real driver, plan, ledger, tables, lock and
resume. Nothing is trained. A kill copies the folder as it is at that moment, and the next driver uses the copy.
"""

import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bench import HERE, epoch
from tune_kd.execute import driver as driving, verify
from tune_kd.execute.driver import Driver
from tune_kd.execute.worker import Failure, Workplace
from tune_kd.records import extension, lock, reader, rebuild, run_folder as runs
from tune_kd.records.ledger import FAILURES, Ledger, digests
from tune_kd.records.schema import LEDGER
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import ENDED, Decision
from tune_kd.system import crash_points, files as storage
from tune_kd.system.errors import UserError

MEMORY = Path("/dev/shm")  # used if it exists: syncs are fast, and the test needs no durability
EPOCHS = 3
FAILED = ("lost", "storage", "diverged", "error", "out_of_memory", "teacher_failed")
INSIDE = ("ledger.begun", "ledger.written", "ledger.committed", "trial.started", "epoch.committed", "trial.ended",
          "tables.announced", "tables.published", "publish.written", "rebuild.set_aside")  # fmt: skip


def watched() -> Study:
    """Return a study with a teacher, three arms in one stratum, a rung in every epoch, and two looks."""
    return Study(
        name="watched",
        question="Is anything lost?",
        factors=(
            Factor("stem", ("cifar",)),
            Factor("method", ("none", "logit")),
            Factor("temperature", (2.0, 4.0, 8.0)),
        ),
        contrasts=(Compare("method", "logit", "none"),),
        cell=Cell(width=0.0625),
        scale="test",
        data=Data("digits", train=60, validation=20, test=20),
        recipe=Recipe(epochs=EPOCHS, batch_size=16, lr=0.05),
        teacher_recipe=Recipe(epochs=EPOCHS, batch_size=16, lr=0.05),
        screen=Screen(seed=0, grace=1, reduction=2, margin=0.0, min_peers=1),
        confirm=Confirm(seeds=(1, 2), looks=(2, 3)),
    )


SOMEWHERE = st.integers(0, 2**20 - 1)  # a relative position in a file: its size depends on the digits of times


class Killed(BaseException):
    """Raised at a crash point instead of a kill of this process."""


def accuracy(trial_id: str, number: int) -> float:
    """Return the accuracy of a trial's epoch, the same each time."""
    return (int(trial_id[:6], 16) * 31 + 17 * number) % 97 / 97


class Records(RuleBasedStateMachine):
    """Checks a run's folder against what the driver has acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.folder = self.root / "0" / "r"
        self.driver: Driver | None = None
        self.ledger: Ledger | None = None
        self.lock = ExitStack()
        self.last_epoch: dict[str, int] = {}  # the last epoch of each running trial
        self.acknowledged: dict[tuple[str, int], float] = {}
        self.ended: dict[str, str] = {}  # acknowledged final status of trials
        self.decided: list[Decision] = []
        self.read: set[int] = set()  # modification times of the tables that were read
        self.damaged: set[str] = set()  # files damaged on purpose, until a driver repairs them
        self.patches = ExitStack()
        for where, name, value in (
            (storage, "PAUSES", (0.0, 0.0)),
            (lock, "WAIT_SECONDS", 0.0),
            (driving, "TABLES_EVERY", 1e9),
            (driving, "TABLES_AFTER_END", 1e9),
        ):
            self.patches.enter_context(patch.object(where, name, value))

    def teardown(self) -> None:
        self._leave()
        self.patches.close()
        shutil.rmtree(self.root)

    # Events

    @initialize()
    def begin(self) -> None:
        run = runs.Run("r", self.folder, watched(), "0" * 64, None, {})
        self.screen = {trial.trial_id for trial in run.plan.trials if trial.phase == "screen"}
        runs.create(run)

    @precondition(lambda self: self.driver is None)
    @rule()
    def resume(self) -> None:
        """A driver takes over. If the ledger is damaged, it is rebuilt from the tables, or opening it fails."""
        self.lock.enter_context(lock.held(self.folder))
        run = runs.reopen(self.folder)
        try:
            self.ledger = rebuild.opened(run, lambda _: None)
        except FAILURES:
            assert not self._tables_whole()
            self._begin_again()
            return
        self.damaged.discard(LEDGER)
        place = Workplace(None, None, run.teachers, run.checkpoints)
        self.driver = Driver(run.plan, run.name, run.folder, self.ledger, place, cpus=1.0, gpus=0.0)
        self.damaged.clear()
        assert (found := self._found()) == [], found

    @precondition(lambda self: self.driver is not None)
    @rule()
    def second_driver(self) -> None:
        with pytest.raises(UserError, match="has held since"), lock.held(self.folder):
            raise AssertionError("two drivers hold one run")

    @precondition(lambda self: self.driver is not None)
    @rule()
    def start(self) -> None:
        self._start()

    @precondition(lambda self: self.last_epoch)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        self._report(data.draw(st.sampled_from(sorted(self.last_epoch))))

    @precondition(lambda self: self.last_epoch)
    @rule(data=st.data(), reason=st.sampled_from(FAILED))
    def fail(self, data: st.DataObject, reason: Any) -> None:
        trial_id = data.draw(st.sampled_from(sorted(self.last_epoch)))
        assert self.driver is not None
        self.driver.on_end(trial_id, Failure(reason, "x"))
        del self.last_epoch[trial_id]
        self._note_ends()

    @precondition(lambda self: self.driver is not None)
    @rule()
    def write_tables(self) -> None:
        assert self.driver is not None
        self.driver.write_tables()

    @precondition(lambda self: self.driver is not None)
    @rule()
    def run_to_the_end(self) -> None:
        assert self.driver is not None
        while self._start() or self.last_epoch:
            for trial_id in sorted(self.last_epoch):
                self._report(trial_id)
        if not self.driver.stopping:
            assert {row["status"] for row in self.driver.rows.values()} <= set(ENDED)

    @precondition(lambda self: self.driver is not None)
    @rule()
    def drain(self) -> None:
        """A signal: running trials finish their epoch, and the driver writes the tables and exits."""
        assert self.driver is not None
        self.driver.drain()
        for trial_id in sorted(self.last_epoch):
            self._report(trial_id)
        self.driver.write_tables()
        assert not self.last_epoch
        assert "running" not in {row["status"] for row in self.driver.rows.values()}
        self._leave()

    @precondition(lambda self: self.driver is not None)
    @rule()
    def kill(self) -> None:
        self._die()

    @precondition(lambda self: self.driver is not None)
    @rule(place=st.sampled_from(INSIDE), times=st.integers(1, 4), data=st.data())
    def kill_inside(self, place: str, times: int, data: st.DataObject) -> None:
        """Kill the driver at a crash point, if it passes that point in one of these actions."""

        def act() -> None:
            for _ in range(3):
                self._start()
                if self.last_epoch:
                    self._report(data.draw(st.sampled_from(sorted(self.last_epoch))))
            assert self.driver is not None
            self.driver.write_tables()

        self._dying_at(place, times, act)

    @precondition(lambda self: self.driver is None and (self.folder / LEDGER).exists())
    @rule(place=st.sampled_from(INSIDE), times=st.integers(1, 4))
    def kill_in_take_over(self, place: str, times: int) -> None:
        self._dying_at(place, times, self.resume)

    @precondition(lambda self: self.driver is None and (self.folder / LEDGER).exists())
    @rule(data=st.data())
    def damage_ledger(self, data: st.DataObject) -> None:
        """Truncate, change or delete the ledger or its write-ahead log. Only what the tables lack may be lost."""
        name = data.draw(st.sampled_from([LEDGER, f"{LEDGER}-wal"]))
        path = self.folder / name
        if not path.exists() or not path.stat().st_size or rebuild.wrong_with(self.folder) is not None:
            return
        how = data.draw(st.sampled_from(["truncate", "flip", "delete"]))
        place = data.draw(SOMEWHERE) * path.stat().st_size // 2**20
        before = self._on_record(self.folder / LEDGER)
        if how == "delete":
            path.unlink()
        elif how == "truncate":
            with path.open("r+b") as file:
                file.truncate(place)
        else:
            content = bytearray(path.read_bytes())
            content[place] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content)
        if rebuild.wrong_with(self.folder) is None:
            assert self._on_record(self.folder / LEDGER) == before  # the damage does not affect the content
            return
        self.damaged.add(LEDGER)
        assert any(finding.part == "ledger" for finding in verify.verify(self.folder))
        if self._tables_whole():
            kept = pd.read_parquet(self.folder / "epochs.parquet")
            here = set(zip(kept["trial_id"], kept["epoch"], strict=True))
            self.acknowledged = {key: value for key, value in self.acknowledged.items() if key in here}
            trials = pd.read_parquet(self.folder / "trials.parquet").set_index("trial_id")
            complete = {key for key, status in self.ended.items() if trials["status"].get(key) == status
                        and trials["epochs_run"][key] == sum(of == key for of, _ in here)}  # fmt: skip
            # A trial that never ran was stopped with the screen of its arm. If that is decided again, so is the trial.
            screens = trials[trials["phase"] == "screen"]
            of_arm = dict(zip(screens["arm"], screens.index, strict=True))
            self.ended = {
                key: value for key, value in self.ended.items() if key in complete
                and (value != "stopped" or trials["epochs_run"][key] or of_arm[trials["arm"][key]] in complete)
            }  # fmt: skip

    @precondition(lambda self: (self.folder / "trials.parquet").exists())
    @rule(data=st.data(), name=st.sampled_from(["trials", "epochs", "decisions"]))
    def damage_table(self, data: st.DataObject, name: str) -> None:
        """Flip a byte of a table. Readers detect it, and the next driver writes the table again."""
        path = self.folder / f"{name}.parquet"
        if path.name in self.damaged:
            return  # flipping the same byte twice would repair it
        content = bytearray(path.read_bytes())
        content[data.draw(SOMEWHERE) * len(content) // 2**20] ^= 0x10
        path.write_bytes(content)
        self.damaged.add(path.name)
        with pytest.raises(UserError, match="digest is not on record"):
            reader.load(self.folder)
        if self.driver is not None:
            self.driver.write_tables()
            self.damaged.discard(path.name)
            assert self._tables_whole()
        elif rebuild.wrong_with(self.folder) is None:
            self.resume()

    @precondition(lambda self: self.driver is None and (self.folder / LEDGER).exists())
    @rule()
    def extend(self) -> None:
        """Extend the run to the next look, which is possible once, after all trials have ended."""
        if rebuild.wrong_with(self.folder) is not None:
            return
        run = runs.reopen(self.folder)
        statuses = set(self._statuses().values())
        try:
            extension.record_extension(extension.extended(run))
        except UserError:
            assert run.look == 1 or not statuses or statuses & {"pending", "running"}
        else:
            assert not statuses & {"pending", "running"} and run.look == 0
            assert self.damaged or (found := self._found()) == [], found  # pending trials are no damage

    # Invariants

    @invariant()
    def nothing_acknowledged_is_lost_doubled_or_changed(self) -> None:
        path = self.folder / LEDGER
        wrong = rebuild.wrong_with(self.folder)
        assert wrong is None or LEDGER in self.damaged or not path.exists(), wrong  # a kill never damages it
        if wrong is not None or not path.exists():
            return
        epochs = self._on_record(path)
        keys = [(of, number) for of, number, _ in epochs]
        assert len(keys) == len(set(keys))
        found = {(of, number): value for of, number, value in epochs}
        assert {key: found.get(key) for key in self.acknowledged} == self.acknowledged
        for of in {key[0] for key in keys}:
            assert sorted(number for each, number in keys if each == of) == list(
                range(1, 1 + sum(k[0] == of for k in keys))
            )
        assert self._compared(path) == {(of, number) for of, number in keys if of in self.screen and number in (1, 2)}
        statuses = self._statuses()
        assert {of: statuses.get(of) for of in self.ended} == self.ended
        if self.driver is not None:
            assert set(statuses) == {trial.trial_id for trial in self.driver.plan.trials}
            assert self.driver.decisions[: len(self.decided)] == self.decided

    @invariant()
    def every_table_can_be_read(self) -> None:
        """Each table also matches a recorded digest, even if the driver died before it published the next table.

        Skips tables that were damaged on purpose. Pandas reads only tables that are new since the last step.
        """
        known = digests(self.folder) or {}
        for path in self.folder.glob("*.parquet"):
            if path.name not in self.damaged:
                assert hashlib.sha256(path.read_bytes()).hexdigest() in known.get(path.name, ()), path.name
        files = [path for path in sorted(self.folder.glob("*.parquet")) if path.stat().st_mtime_ns not in self.read]
        self.read |= {path.stat().st_mtime_ns for path in files}
        for path in files:
            if path.name not in self.damaged:
                pd.read_parquet(path)

    # Implementation

    def _start(self) -> bool:
        assert self.driver is not None
        task = self.driver.next()
        if task is None:
            return False
        self.driver.on_start(task)
        # A checkpoint is at most one epoch ahead of the last reported epoch, and may be older: odd attempts repeat it.
        self.last_epoch[task.trial.trial_id] = task.acknowledged - (task.attempt % 2 if task.acknowledged else 0)
        return True

    def _report(self, trial_id: str) -> None:
        assert self.driver is not None
        number = self.last_epoch[trial_id] + 1
        value = accuracy(trial_id, number)
        continues = self.driver.on_epoch(trial_id, epoch(number, value, last=number == EPOCHS), HERE)
        self.acknowledged[trial_id, number] = value
        self.last_epoch[trial_id] = number
        if not continues:
            self.driver.on_end(trial_id, None)
            del self.last_epoch[trial_id]
        self.decided = list(self.driver.decisions)
        self._note_ends()

    def _note_ends(self) -> None:
        assert self.driver is not None
        rows = self.driver.rows.items()
        # A blocked trial may run later, if its teacher is available again.
        self.ended |= {of: row["status"] for of, row in rows if row["status"] in ("completed", "stopped", "failed")}

    def _dying_at(self, place: str, times: int, act: Callable[[], None]) -> None:
        def die(*_: object) -> None:
            self._copy()
            raise Killed

        with (
            patch.object(crash_points, "_name", place),
            patch.object(crash_points, "_left", times),
            patch("os.kill", die),
        ):
            try:
                act()
            except Killed:
                self._leave()
                self.folder = self.copy

    def _die(self) -> None:
        self._copy()
        self._leave()
        self.folder = self.copy

    def _copy(self) -> None:
        self.copy = self.root / str(int(self.folder.parent.name) + 1) / "r"
        shutil.copytree(self.folder.parent, self.copy.parent)

    def _leave(self) -> None:
        """Drop the driver and release its lock."""
        if self.ledger is not None:
            self.ledger.close()
        self.lock.close()
        self.driver = self.ledger = None
        self.last_epoch, self.decided = {}, []

    def _begin_again(self) -> None:
        """Start a new run: neither the ledger nor all tables are intact."""
        self._leave()
        self.folder = self.root / str(int(self.folder.parent.name) + 1) / "r"
        self.acknowledged, self.ended, self.damaged = {}, {}, set()
        with patch.object(crash_points, "_name", None):  # a kill before the plan is on disk leaves no run
            self.begin()

    def _found(self) -> list[verify.Finding]:
        """Return what is wrong with the run, except that teachers are missing: none are trained here."""
        return [finding for finding in verify.verify(self.folder) if finding.part != "teachers"]

    def _tables_whole(self) -> bool:
        """Whether all tables match their digests, which `load` checks first. `resume` runs its other checks."""
        known = digests(self.folder)
        files = {name: self.folder / f"{name}.parquet" for name in ("trials", "epochs", "decisions")}
        return known is not None and all(
            path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in known[path.name]
            for path in files.values()
        )

    def _on_record(self, path: Path) -> list[tuple[str, int, float]]:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'epochs'").fetchone():
                return []
            found = connection.execute("SELECT trial_id, epoch, val_accuracy FROM epochs ORDER BY number").fetchall()
        connection.close()
        return found

    def _compared(self, path: Path) -> set[tuple[str, int]]:
        """Return the trial and epoch of each decision."""
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'decisions'").fetchone():
                return set()
            found = connection.execute("SELECT trial_id, epoch FROM decisions").fetchall()
        connection.close()
        return set(found)

    def _statuses(self) -> dict[str, str]:
        with sqlite3.connect(f"file:{self.folder / LEDGER}?mode=ro", uri=True) as connection:
            found = dict(connection.execute("SELECT trial_id, status FROM trials").fetchall())
        connection.close()
        return found


def run_examples(count: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(max_examples=count, stateful_step_count=50, deadline=None, suppress_health_check=quiet)
    run_state_machine_as_test(Records, settings=chosen)


@pytest.mark.long
def test_nothing_is_lost_in_any_sequence_of_events() -> None:
    run_examples(12)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_is_lost_in_two_thousand_sequences_of_events() -> None:
    run_examples(2000)

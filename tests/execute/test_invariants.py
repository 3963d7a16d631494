"""Whatever comes in whatever order, nothing that was acknowledged is lost, doubled or changed.

A machine plays driver, workers, kills and damage over plan, ledger, tables, lock and resume; nothing is trained. A kill
is the folder as it is at that moment: a copy of it is what the next driver finds.
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

MEMORY = Path("/dev/shm")  # where there is one: it syncs in no time, and nobody cuts its power
EPOCHS = 3
FAILED = ("lost", "storage", "diverged", "error", "out_of_memory", "teacher_failed")
INSIDE = ("ledger.begun", "ledger.written", "ledger.committed", "trial.started", "epoch.committed", "trial.ended",
          "tables.announced", "tables.published", "publish.written", "rebuild.set_aside")  # fmt: skip


def watched() -> Study:
    """Three arms in one stratum, with a rung in every epoch, two looks, and a teacher."""
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


SOMEWHERE = st.integers(0, 2**20 - 1)  # in a file, whose size in bytes depends on the clock's digits


class Killed(BaseException):
    """This driver is no more."""


def accuracy(trial_id: str, number: int) -> float:
    """What a trial's epoch comes to, however often it is computed."""
    return (int(trial_id[:6], 16) * 31 + 17 * number) % 97 / 97


class Records(RuleBasedStateMachine):
    """The state that is checked is the folder's; the machine keeps what was acknowledged to it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.folder = self.root / "0" / "r"
        self.driver: Driver | None = None
        self.ledger: Ledger | None = None
        self.lock = ExitStack()
        self.at: dict[str, int] = {}  # by trial that runs: its last epoch
        self.acknowledged: dict[tuple[str, int], float] = {}
        self.ended: dict[str, str] = {}  # how trials ended, as was acknowledged
        self.decided: list[Decision] = []
        self.read: set[int] = set()  # when the tables that were read were written
        self.harmed: set[str] = set()  # what was damaged on purpose, until a driver mends it
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

    # What may happen.

    @initialize()
    def begin(self) -> None:
        run = runs.Run("r", self.folder, watched(), "0" * 64, None, {})
        self.screen = {trial.trial_id for trial in run.plan.trials if trial.phase == "screen"}
        runs.create(run)

    @precondition(lambda self: self.driver is None)
    @rule()
    def resume(self) -> None:
        """A driver takes over. One on a damaged ledger rebuilds it, or says that it cannot."""
        self.lock.enter_context(lock.held(self.folder))
        run = runs.reopen(self.folder)
        try:
            said: list[str] = []
            self.ledger = rebuild.opened(run, said.append)
        except FAILURES:
            assert not self._tables_whole()
            self._begin_again()
            return
        self.harmed.discard(LEDGER)
        place = Workplace(None, None, run.teachers, run.checkpoints)
        self.driver = Driver(run.plan, run.name, run.folder, self.ledger, place, cpus=1.0, gpus=0.0)
        self.harmed.clear()
        assert (found := self._found()) == [], found

    @precondition(lambda self: self.driver is not None)
    @rule()
    def second_driver(self) -> None:
        with pytest.raises(UserError, match="holds since"), lock.held(self.folder):
            raise AssertionError("two drivers hold one run")

    @precondition(lambda self: self.driver is not None)
    @rule()
    def start(self) -> None:
        self._start()

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        self._report(data.draw(st.sampled_from(sorted(self.at))))

    @precondition(lambda self: self.at)
    @rule(data=st.data(), reason=st.sampled_from(FAILED))
    def fail(self, data: st.DataObject, reason: Any) -> None:
        trial_id = data.draw(st.sampled_from(sorted(self.at)))
        assert self.driver is not None
        self.driver.on_end(trial_id, Failure(reason, "x"))
        del self.at[trial_id]
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
        while self._start() or self.at:
            for trial_id in sorted(self.at):
                self._report(trial_id)
        if not self.driver.stopping:
            assert {row["status"] for row in self.driver.rows.values()} <= set(ENDED)

    @precondition(lambda self: self.driver is not None)
    @rule()
    def drain(self) -> None:
        """A signal: what runs ends its epoch, the tables are made, the driver goes."""
        assert self.driver is not None
        self.driver.drain()
        for trial_id in sorted(self.at):
            self._report(trial_id)
        self.driver.write_tables()
        assert not self.at
        assert "running" not in {row["status"] for row in self.driver.rows.values()}
        self._leave()

    @precondition(lambda self: self.driver is not None)
    @rule()
    def kill(self) -> None:
        self._die()

    @precondition(lambda self: self.driver is not None)
    @rule(place=st.sampled_from(INSIDE), times=st.integers(1, 4), data=st.data())
    def kill_inside(self, place: str, times: int, data: st.DataObject) -> None:
        """Die where a driver passes a named place, if it does so in one of these."""

        def act() -> None:
            for _ in range(3):
                self._start()
                if self.at:
                    self._report(data.draw(st.sampled_from(sorted(self.at))))
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
        """Cut it, flip a byte of it, or lose its log. Only what the tables do not hold may be lost then."""
        name = data.draw(st.sampled_from([LEDGER, f"{LEDGER}-wal"]))
        path = self.folder / name
        if not path.exists() or not path.stat().st_size or rebuild.wrong_with(self.folder) is not None:
            return
        how = data.draw(st.sampled_from(["cut", "flip", "lose"]))
        place = data.draw(SOMEWHERE) * path.stat().st_size // 2**20
        before = self._on_record(self.folder / LEDGER)
        if how == "lose":
            path.unlink()
        elif how == "cut":
            with path.open("r+b") as file:
                file.truncate(place)
        else:
            content = bytearray(path.read_bytes())
            content[place] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content)
        if rebuild.wrong_with(self.folder) is None:
            assert self._on_record(self.folder / LEDGER) == before  # a byte that means nothing
            return
        self.harmed.add(LEDGER)
        assert any(finding.part == "ledger" for finding in verify.verify(self.folder))
        if self._tables_whole():
            kept = pd.read_parquet(self.folder / "epochs.parquet")
            here = set(zip(kept["trial_id"], kept["epoch"], strict=True))
            self.acknowledged = {key: value for key, value in self.acknowledged.items() if key in here}
            trials = pd.read_parquet(self.folder / "trials.parquet").set_index("trial_id")
            complete = {key for key, status in self.ended.items() if trials["status"].get(key) == status
                        and trials["epochs_run"][key] == sum(of == key for of, _ in here)}  # fmt: skip
            # What never ran was stopped with the screen of its arm, and is decided again with it.
            screens = trials[trials["phase"] == "screen"]
            of_arm = dict(zip(screens["arm"], screens.index, strict=True))
            self.ended = {
                key: value for key, value in self.ended.items() if key in complete
                and (value != "stopped" or trials["epochs_run"][key] or of_arm[trials["arm"][key]] in complete)
            }  # fmt: skip

    @precondition(lambda self: (self.folder / "trials.parquet").exists())
    @rule(data=st.data(), name=st.sampled_from(["trials", "epochs", "decisions"]))
    def damage_table(self, data: st.DataObject, name: str) -> None:
        """A flipped byte is seen, and the next driver makes the table again."""
        path = self.folder / f"{name}.parquet"
        if path.name in self.harmed:
            return  # a byte that is flipped twice is whole
        content = bytearray(path.read_bytes())
        content[data.draw(SOMEWHERE) * len(content) // 2**20] ^= 0x10
        path.write_bytes(content)
        self.harmed.add(path.name)
        with pytest.raises(UserError, match="digest is not on record"):
            reader.load(self.folder)
        if self.driver is not None:
            self.driver.write_tables()
            self.harmed.discard(path.name)
            assert self._tables_whole()
        elif rebuild.wrong_with(self.folder) is None:
            self.resume()

    @precondition(lambda self: self.driver is None and (self.folder / LEDGER).exists())
    @rule()
    def extend(self) -> None:
        """Go to the next look. Only where everything has ended, and only once."""
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
            assert self.harmed or (found := self._found()) == [], found  # what is to come is no damage

    # What always holds.

    @invariant()
    def nothing_acknowledged_is_lost_doubled_or_changed(self) -> None:
        path = self.folder / LEDGER
        wrong = rebuild.wrong_with(self.folder)
        assert wrong is None or LEDGER in self.harmed or not path.exists(), wrong  # no kill damages it
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
        """And has a digest on record, also where a driver died before it published the next one.

        Damage that was done on purpose apart; those that are new since the last step are read.
        """
        known = digests(self.folder) or {}
        for path in self.folder.glob("*.parquet"):
            if path.name not in self.harmed:
                assert hashlib.sha256(path.read_bytes()).hexdigest() in known.get(path.name, ()), path.name
        files = [path for path in sorted(self.folder.glob("*.parquet")) if path.stat().st_mtime_ns not in self.read]
        self.read |= {path.stat().st_mtime_ns for path in files}
        for path in files:
            if path.name not in self.harmed:
                pd.read_parquet(path)

    # How it happens.

    def _start(self) -> bool:
        assert self.driver is not None
        task = self.driver.next()
        if task is None:
            return False
        self.driver.on_start(task)
        # A checkpoint may be older than what was reported since, and is never more than an epoch ahead of it.
        self.at[task.trial.trial_id] = task.acknowledged - (task.attempt % 2 if task.acknowledged else 0)
        return True

    def _report(self, trial_id: str) -> None:
        assert self.driver is not None
        number = self.at[trial_id] + 1
        value = accuracy(trial_id, number)
        go_on = self.driver.on_epoch(trial_id, epoch(number, value, last=number == EPOCHS), HERE)
        self.acknowledged[trial_id, number] = value
        self.at[trial_id] = number
        if not go_on:
            self.driver.on_end(trial_id, None)
            del self.at[trial_id]
        self.decided = list(self.driver.decisions)
        self._note_ends()

    def _note_ends(self) -> None:
        assert self.driver is not None
        rows = self.driver.rows.items()
        # A blocked trial may be tried again: its teacher may be back.
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
        """This driver is gone, and the lock with it."""
        if self.ledger is not None:
            self.ledger.close()
        self.lock.close()
        self.driver = self.ledger = None
        self.at, self.decided = {}, []

    def _begin_again(self) -> None:
        """Nothing whole is left: the user starts a new run."""
        self._leave()
        self.folder = self.root / str(int(self.folder.parent.name) + 1) / "r"
        self.acknowledged, self.ended, self.harmed = {}, {}, set()
        with patch.object(crash_points, "_name", None):  # a run that is killed before its plan is on disk is none
            self.begin()

    def _found(self) -> list[verify.Finding]:
        """What is wrong with the run. Its teachers, which nobody trains here, are missing."""
        return [finding for finding in verify.verify(self.folder) if finding.part != "teachers"]

    def _tables_whole(self) -> bool:
        """By their digests, as `load` judges them first; it judges the rest where a driver takes over."""
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
        """Trials and epochs of the decisions."""
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


def play(examples: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(max_examples=examples, stateful_step_count=50, deadline=None, suppress_health_check=quiet)
    run_state_machine_as_test(Records, settings=chosen)


@pytest.mark.long
def test_nothing_is_lost_whatever_happens_in_whatever_order() -> None:
    play(12)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_is_lost_whatever_happens_in_two_thousand_orders() -> None:
    play(2000)

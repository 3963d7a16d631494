"""The driver's side of a run: which trial is next, what is committed, what the schedule decides.

Everything that happens to a trial passes through here, one call at a time, whoever runs it: `next`, `on_epoch`,
`on_end`. A row is committed before it counts for anyone. After a kill a new driver on the same ledger goes on.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote

from tune_kd.execute.attempts import MAX_ATTEMPTS, Attempts
from tune_kd.execute.draws import Draws
from tune_kd.execute.worker import Failure, Task, Where, Workplace
from tune_kd.records import adaptive_plan
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, Row, broken, clean, first_row
from tune_kd.records.sync import Sender
from tune_kd.study import sampler
from tune_kd.study.early_stopping import Schedule, stratum
from tune_kd.study.plan import Plan
from tune_kd.study.trial import ENDED, Decision, Epoch, Trial
from tune_kd.system.crash_points import point
from tune_kd.system.object_store import Mirror
from tune_kd.system.secrets import masked
from tune_kd.training.checkpoints import Checkpoints

TABLES_AFTER_END = 5.0  # seconds: tables are made at most this often when trials end
TABLES_EVERY = 30.0  # seconds: tables are made at least this often


class Driver:
    """The state of one run. Not thread-safe: one caller."""

    def __init__(
        self,
        plan: Plan,
        run: str,
        folder: Path,
        ledger: Ledger,
        place: Workplace,
        *,
        cpus: float,
        gpus: float,
        max_concurrent: int | None = None,
        keep_checkpoints: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        recorded = ledger.rows(TRIALS)
        self.plan = adaptive_plan.grown(plan, recorded)
        self.rows: dict[str, Row] = {}
        self.decisions: list[Decision] = []  # of early stopping, in order
        self.stopping = False  # no new trials, the running ones leave at their next epoch
        self.broken: str | None = None  # what the disk did, where that ended the run
        self.run = run
        self._folder = folder
        self._ledger = ledger
        self.place = place
        self._cpus = cpus
        self.gpus = gpus
        self._max_concurrent = max_concurrent
        self._keep_checkpoints = keep_checkpoints
        self._say = say
        self._sender = Sender(folder, say)
        self._searches = {search.name: search for search in plan.searches}
        self._trials = {trial.trial_id: trial for trial in self.plan.trials}
        self._waiting = list(self.plan.trials)
        self._screen = {trial.arm: trial.trial_id for trial in self.plan.trials if trial.phase == "screen"}
        self._immune = {arm.name for arm in plan.arms if arm.immune}
        self._schedule = Schedule(plan.study.screen, plan.study.recipe.epochs)
        for trial in self.plan.trials:
            self._enter(trial)
        self._admitted: dict[str, Task] = {}  # by trial id, until they are over
        self._attempts = Attempts()
        self._heard: set[str] = set()
        self._best: dict[str, tuple[float, float]] = {}  # trial id -> best (validation accuracy, -loss)
        self._began: dict[str, float] = {}  # trial id -> monotonic time at which its attempt began
        self._tables_at = 0.0
        self._tables_due = True
        with suppress(OSError):  # of a driver that was asked to leave
            Mirror.of(place.drain).forget(place.drain)
            place.drain.unlink()
        self._draws = Draws(folder, run, self._searches, say)
        self._take_over(recorded)
        self.write_tables()

    # What runs trials calls these.

    def next(self) -> Task | None:
        """A task that is ready and may start now; null while there is none."""
        if self.stopping or (self._max_concurrent is not None and len(self._admitted) >= self._max_concurrent):
            return None
        for trial in self._waiting:
            if self._ready(trial):
                self._waiting.remove(trial)
                row = self.rows[trial.trial_id]
                # More, where less was not enough; a machine without GPUs has none whatever was asked for before.
                gpus = max(self.gpus, row["gpu_fraction"] or 0.0) if self.gpus else 0.0
                answering = self.plan.answering.get(trial.teacher_id or "")
                taught = self.rows[trial.teacher_id]["weights_digest"] if trial.teacher_id else None
                task = Task(trial, row["attempts"] + 1, row["epochs_run"], self._cpus, gpus, answering, taught)
                self._admitted[trial.trial_id] = task
                return task
        return None

    def on_start(self, task: Task) -> None:
        """Note that an admitted task has its place and begins."""
        row = self.rows[task.trial.trial_id]
        row["status"] = "running"
        row["attempts"] = task.attempt
        row["started"] = row["started"] or time.time()
        row["gpu_fraction"], row["threads"] = task.gpus, task.threads
        self._ledger.put(TRIALS, row)
        point("trial.started")
        self._began[task.trial.trial_id] = time.monotonic()

    def hear(self, sentences: Iterable[str]) -> None:
        """Say what workers have to tell, each thing once a run."""
        for sentence in sentences:
            if sentence not in self._heard:
                self._heard.add(sentence)
                self._say(f"warning: {sentence}")

    def drain(self) -> None:
        """Have the running trials write a checkpoint and leave at the end of their epoch. Nothing else starts."""
        self.stopping = True
        with suppress(OSError):  # a full disk must not keep anybody from leaving
            self.place.drain.parent.mkdir(parents=True, exist_ok=True)
            self.place.drain.touch()
            Mirror.of(self.place.drain).send(self.place.drain)
        point("drain.begun")

    @property
    def running(self) -> int:
        """How many trials run now."""
        return len(self._began)

    @property
    def placeless(self) -> Task | None:
        """A task that was admitted and has not begun; null where there is none."""
        return next((task for trial_id, task in self._admitted.items() if trial_id not in self._began), None)

    @property
    def finished(self) -> bool:
        """Whether no trial will start any more, apart from those that are running."""
        return self.stopping or not self._waiting

    def on_epoch(self, trial_id: str, epoch: Epoch, where: Where) -> bool:
        """Commit an epoch, then ask the schedule. Returns whether the trial goes on."""
        trial, row = self._trials[trial_id], self.rows[trial_id]
        if row["status"] != "running":
            return False  # a report that was under way when the trial was ended
        kept = {key: value for key, value in asdict(epoch).items() if key != "outcome"}
        reported = {"run": self.run, "trial_id": trial_id, "attempt": row["attempts"], **kept}
        measured = {} if epoch.outcome is None else asdict(epoch.outcome)
        outcome = {name: value for name, value in measured.items() if name in row}
        if (problem := _unreadable(row, reported, outcome)) is not None:
            self._refuse(trial, problem)
            return False
        with self._ledger.transaction():
            state = self._ledger.add_epoch(reported)
            if state == "different":
                self._note(row, f"epoch {epoch.epoch} computed again differs from its record")
            if state == "new":
                self._attempts.got_on(trial_id)
                row["epochs_run"] = epoch.epoch
                row["val_accuracy"] = epoch.val_accuracy
                quality = (epoch.val_accuracy, -epoch.val_loss)
                if quality > self._best.get(trial_id, (-1.0, 0.0)):
                    self._best[trial_id] = quality
                    row["val_accuracy_best"], row["best_epoch"] = epoch.val_accuracy, epoch.epoch
                row["train_seconds"] = (row["train_seconds"] or 0.0) + epoch.seconds
            row["host"], row["device"] = where.host, where.device
            decision = None
            if trial.phase == "screen":
                decision = self._schedule.report(trial_id, trial.arm, epoch.epoch, epoch.val_accuracy)
            if decision is not None and state == "new":
                self.decisions.append(decision)
                self._ledger.put(DECISIONS, {"run": self.run, **asdict(decision)})
            if epoch.outcome is not None:
                row.update(outcome)
                self._end(trial, "completed")
            elif decision is not None and decision.action == "stop":
                self._end(trial, "stopped", "asha")
                self._cancel_confirmation(trial.arm, decision)
            else:
                self._ledger.put(TRIALS, row)
        point("epoch.committed")
        self._clear(trial)
        self._tell(trial, decision)
        self.tick()
        return row["status"] == "running" and not self.stopping

    def _refuse(self, trial: Trial, problem: str) -> None:
        """End a trial that reports what no reader of the tables would take, such as a teacher whose card was made by
        hand: now, and not when the run is done and cannot be reported."""
        self._note(self.rows[trial.trial_id], problem)
        with self._ledger.transaction():
            self._end(trial, "failed", "error")
            if trial.role == "teacher":
                self._block_students(trial)
        self._clear(trial)
        self._tell(trial, None)
        self.tick()

    def on_end(self, trial_id: str, failure: Failure | None) -> bool:
        """Note that an attempt is over. Without a failure it ended because `on_epoch` said so. Returns whether the
        trial is tried again."""
        trial, row = self._trials[trial_id], self.rows[trial_id]
        self._admitted.pop(trial_id, None)
        if row["status"] in ENDED:
            return False
        self._count_time(trial_id)
        if self.stopping:  # to be resumed, whatever the haste did to it
            row["status"] = "pending"
            self._waiting.append(trial)
            self._ledger.put(TRIALS, row)
            return False
        assert failure is not None, f"{trial.label} ended without its last epoch"
        if row["status"] == "pending":  # its worker died before it began
            row["attempts"] += 1
        self._note(row, failure.message)
        again = self._attempts.again(row, failure)
        if failure.reason == "storage" and not again:
            self.broken = failure.message
            self.drain()
        with self._ledger.transaction():
            if again or self.broken is not None:  # a trial is not to blame for a disk
                row["status"] = "pending"
                self._waiting.insert(0, trial)
                self._ledger.put(TRIALS, row)
            else:
                blocked = failure.reason == "teacher_failed" and trial.role == "student"
                self._end(
                    trial, "blocked" if blocked else "failed", "error" if failure.reason == "lost" else failure.reason
                )
                if trial.role == "teacher":
                    self._block_students(trial)
        self._clear(trial)
        self._tell(trial, None)
        self.tick()
        return again

    def tick(self) -> None:
        """Make the tables when they are due."""
        now = time.monotonic()
        wait = TABLES_AFTER_END if self._tables_due else TABLES_EVERY
        if now - self._tables_at >= wait:
            self.write_tables()

    def conclude(self) -> None:
        """Make the tables for the last time. Raises `OSError` where a disk ended the run before it was through."""
        self.write_tables()
        self._draws.close()
        self._sender.finish()
        if self.broken is not None:
            raise OSError(
                f"{self.broken}: the disk refused it {MAX_ATTEMPTS} times, so the run was ended. What is on record is "
                f"whole; see that {self._folder} has room and can be written to, then go on with: python -m tune_kd "
                f"resume {quote(str(self._folder))}"
            )

    def write_tables(self) -> None:
        self._ledger.write_tables(self._folder)
        self._sender.offer()
        self._tables_at, self._tables_due = time.monotonic(), False

    # What follows from a state.

    def _ready(self, trial: Trial) -> bool:
        if trial.teacher_id is not None and self.rows[trial.teacher_id]["status"] != "completed":
            return False
        # An arm that early stopping must leave alone need not wait for its screen.
        if trial.phase != "confirm" or trial.arm in self._immune:
            return True
        return self.rows[self._screen[trial.arm]]["status"] in ENDED

    def _note(self, row: Row, what: str) -> None:
        """Add to what a row says of its attempts; nothing said before is lost."""
        row["error"] = "; ".join(filter(None, [row["error"], masked(f"attempt {row['attempts']}: {what}")]))

    def _end(self, trial: Trial, status: str, reason: str | None = None) -> None:
        """Commit how a trial ended."""
        row = self.rows[trial.trial_id]
        row["status"], row["stop_reason"] = status, reason
        self._count_time(trial.trial_id)
        self._ledger.put(TRIALS, row)
        self._tables_due = True
        if trial.phase == "screen":
            if status in ("failed", "blocked"):
                self._schedule.drop(trial.trial_id)
            self._search_on(trial.arm)

    def _search_on(self, arm: str) -> None:
        """Draw what an arm tries next, or plan the confirmation of its best. In the transaction in which a draw ends:
        what is drawn follows from the order in which they end, and not from when anybody asks."""
        if arm not in self._searches:
            return
        here, study = self._searches[arm], self.plan.study
        assert study.tuning is not None
        default = {each.name: study.default(each.name) or 0.0 for each in here.ranges}
        while adaptive_plan.is_due(study.tuning, theirs := adaptive_plan.draws(here, self.rows.values())):
            self._grow(
                adaptive_plan.drawn(self.plan, here, sampler.draw(study.tuning, arm, here.ranges, default, theirs))
            )
        if (best := adaptive_plan.best(study.tuning, theirs)) is not None:
            for trial in adaptive_plan.confirmed(self.plan, here, best):
                self._grow(trial)

    def _grow(self, trial: Trial) -> None:
        """Plan a trial, if it is not planned yet."""
        if trial.trial_id in self._trials:
            return
        self._trials[trial.trial_id] = trial
        self.rows[trial.trial_id] = first_row(self.run, trial)
        self._ledger.put(TRIALS, self.rows[trial.trial_id])
        self._waiting.insert(0, trial)  # others wait for it
        self._enter(trial)

    def _enter(self, trial: Trial) -> None:
        """Have a trial of the screen compete: a draw with those of its arm, an arm with those of its stratum."""
        if trial.phase == "screen":
            tuned, levels = trial.arm in self._searches, asdict(trial.cell)
            group = trial.arm if tuned else stratum(self.plan.study.screen, levels)
            self._schedule.enter(trial.trial_id, group, trial.arm in self._immune)

    def _clear(self, trial: Trial) -> None:
        """Remove the checkpoints of a trial whose end is committed: they are of no more use."""
        if self.rows[trial.trial_id]["status"] in ENDED:
            point("trial.ended")
            if not self._keep_checkpoints:
                Checkpoints(self.place.checkpoints / trial.trial_id).remove()
            self._draws.add(self.rows[trial.trial_id])

    def _count_time(self, trial_id: str) -> None:
        began = self._began.pop(trial_id, None)
        if began is not None:
            row = self.rows[trial_id]
            row["wall_seconds"] = (row["wall_seconds"] or 0.0) + time.monotonic() - began

    def _cancel_confirmation(self, arm: str, decision: Decision) -> None:
        for trial in self._take_waiting(lambda each: each.phase == "confirm" and each.arm == arm):
            self.rows[trial.trial_id]["error"] = f"not run: the screen stopped the arm in epoch {decision.epoch}"
            self._end(trial, "stopped", "asha")

    def _block_students(self, teacher: Trial) -> None:
        for trial in self._take_waiting(lambda each: each.teacher_id == teacher.trial_id):
            self.rows[trial.trial_id]["error"] = f"not run: its teacher {teacher.label} failed"
            self._end(trial, "blocked", "teacher_failed")

    def _take_waiting(self, wanted: Callable[[Trial], bool]) -> Iterator[Trial]:
        taken = [trial for trial in self._waiting if wanted(trial)]
        self._waiting = [trial for trial in self._waiting if not wanted(trial)]
        yield from taken

    def _take_over(self, recorded: list[Row]) -> None:
        """Start from what the ledger holds: new rows for what it lacks, and the schedule as it was."""
        known = {row["trial_id"]: row for row in recorded}
        assert set(known) <= set(self._trials), "the ledger holds trials that are not in the plan"
        with self._ledger.transaction():
            for trial in self.plan.trials:
                row = known.get(trial.trial_id) or first_row(self.run, trial)
                if row["status"] == "running":
                    row["status"] = "pending"  # its driver died
                elif row["status"] == "blocked" and row["attempts"]:
                    row |= {"status": "pending", "stop_reason": None}  # its teacher may be back
                self.rows[trial.trial_id] = row
                if row["status"] != known.get(trial.trial_id, {}).get("status"):
                    self._ledger.put(TRIALS, row)
        self.decisions = [Decision.of(row) for row in self._ledger.rows(DECISIONS)]
        for decision in self.decisions:
            self._schedule.replay(decision)
        for trial in self.plan.trials:
            if trial.phase == "screen" and self.rows[trial.trial_id]["status"] in ("failed", "blocked"):
                self._schedule.drop(trial.trial_id)
        for row in self._ledger.rows(EPOCHS):
            quality = (row["val_accuracy"], -row["val_loss"])
            self._best[row["trial_id"]] = max(quality, self._best.get(row["trial_id"], quality))
        self._waiting = [trial for trial in self.plan.trials if self.rows[trial.trial_id]["status"] not in ENDED]
        for trial in self.plan.trials:  # which a kill may have left there
            self._clear(trial)
        with self._ledger.transaction():  # what an extension added to what is out already
            for decision in self.decisions:
                if decision.action == "stop":
                    self._cancel_confirmation(decision.arm, decision)
            for teacher in self.plan.teachers:
                if self.rows[teacher.trial_id]["status"] == "failed":
                    self._block_students(teacher)
            for arm in self._searches:
                self._search_on(arm)

    def _tell(self, trial: Trial, decision: Decision | None) -> None:
        row = self.rows[trial.trial_id]
        if decision is not None:
            self._say(decision.words)
        if row["status"] == "running":
            return
        text = f"{trial.label} ({trial.phase}) {row['status']}"
        if row["test_accuracy_best"] is not None:
            text += f": test accuracy {100 * row['test_accuracy_best']:.2f} %, {row['train_seconds']:.1f} s"
        elif row["error"]:
            text += f" ({row['stop_reason'] or 'will be tried again'}): {row['error']}"
        self._say(text)


def _unreadable(row: Row, epoch: Row, outcome: Row) -> str | None:
    """Which rule of the tables an epoch would break, or what becomes of its trial's row by it; null where none."""
    after = row | outcome | {"epochs_run": max(row["epochs_run"], epoch["epoch"])}
    if outcome:
        after["status"] = "completed"
    return broken(EPOCHS, clean(EPOCHS, epoch)) or broken(TRIALS, clean(TRIALS, after))

"""The driver of a run: it chooses the next trial, commits rows, and applies early stopping.

The executor of the trials calls `next`, `on_start`, `on_epoch` and `on_end`, one call at a time. A row is committed
before anything relies on it, so after a kill a new driver continues from the same ledger.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import cast

from tune_kd.execute.attempts import MAX_ATTEMPTS, Attempts, ending
from tune_kd.execute.draws import Draws
from tune_kd.execute.resources import Shares
from tune_kd.execute.start_order import first_to_start
from tune_kd.execute.worker import Failure, Task, Where, Workplace
from tune_kd.records import adaptive_plan
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, TrialRow, first_row
from tune_kd.records.sync import Sender
from tune_kd.study import sampler
from tune_kd.study.early_stopping import Schedule
from tune_kd.study.plan import Plan
from tune_kd.study.trial import ENDED, UNSUCCESSFUL, Decision, Epoch, Phase, Role, Row, Status, StopReason, Trial
from tune_kd.system.crash_points import point
from tune_kd.system.object_store import Mirror
from tune_kd.system.secrets import masked
from tune_kd.training.checkpoints import Checkpoints

TABLES_AFTER_END = 5.0  # minimum seconds between two writes of the tables, once a trial has ended
TABLES_EVERY = 30.0  # maximum seconds between two writes of the tables


class Driver:
    """The state of one run. Not thread-safe."""

    def __init__(
        self,
        plan: Plan,
        run: str,
        folder: Path,
        ledger: Ledger,
        place: Workplace,
        *,
        cpus: float,
        gpus: float | Shares,
        max_concurrent: int | None = None,
        keep_checkpoints: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        recorded = ledger.rows(TRIALS)
        self.plan = adaptive_plan.grown(plan, recorded)
        self.rows: dict[str, TrialRow] = {}
        self.decisions: list[Decision] = []  # of early stopping, in order
        self.stopping = False  # no trial starts, and running trials stop after their current epoch
        self.broken: str | None = None  # the disk error that ended the run
        self.run, self._folder, self.place = run, folder, place
        self._ledger = ledger
        self._cpus, self.gpus = cpus, gpus if isinstance(gpus, Shares) else Shares.equal(gpus)
        self._max_concurrent = max_concurrent
        self._keep_checkpoints = keep_checkpoints
        self._say = say
        self._sender = Sender(folder, say)
        self._searches = {search.name: search for search in plan.searches}
        self._trials = {trial.trial_id: trial for trial in self.plan.trials}
        self._waiting = list(self.plan.trials)
        self._screen = {trial.arm: trial.trial_id for trial in self.plan.trials if trial.phase == Phase.SCREEN}
        self._immune = {arm.name for arm in plan.arms if arm.immune}
        self._schedule = Schedule(plan.study.screen, plan.study.most_epochs, self._immune, self._searches)
        self._admitted: dict[str, Task] = {}  # by trial id, from `next` to `on_end`
        self._attempts = Attempts()
        self._heard: set[str] = set()
        self._best: dict[str, tuple[float, float]] = {}  # trial id -> best (validation accuracy, -loss)
        self._began: dict[str, float] = {}  # trial id -> monotonic time at which its attempt began
        self._draws = Draws(folder, run, self._searches, say)
        with suppress(OSError):  # an interrupted driver may have left this file
            Mirror.of(place.drain).forget(place.drain)
            place.drain.unlink()
        self._take_over(recorded)
        self.write_tables()

    # The interface for the executor of the trials

    def next(self) -> Task | None:
        """Admit and return a task that can start now; None if there is none."""
        if self.stopping or (self._max_concurrent is not None and len(self._admitted) >= self._max_concurrent):
            return None
        ready = (trial for trial in self._waiting if self._ready(trial))
        trial = first_to_start(ready, self._admitted.values(), self.rows)
        if trial is None:
            return None
        self._waiting.remove(trial)
        row = self.rows[trial.trial_id]
        # An earlier attempt may have raised the share; keep at least that. 0 on a machine without GPUs.
        gpus = self.gpus.of(trial.role, trial.cell.method)
        gpus = max(gpus, row["gpu_fraction"] or 0.0) if gpus else 0.0
        answering = self.plan.answering.get(trial.teacher_id or "")
        taught = self.rows[trial.teacher_id]["weights_digest"] if trial.teacher_id else None
        task = Task(trial, row["attempts"] + 1, row["epochs_run"], self._cpus, gpus, answering, taught)
        self._admitted[trial.trial_id] = task
        return task

    def on_start(self, task: Task) -> None:
        """Record that an admitted task begins."""
        row = self.rows[task.trial.trial_id]
        row["status"], row["attempts"] = Status.RUNNING, task.attempt
        row["started"] = row["started"] or time.time()
        row["gpu_fraction"], row["threads"] = task.gpus, task.threads
        self._ledger.put(TRIALS, row)
        point("trial.started")
        self._began[task.trial.trial_id] = time.monotonic()

    def hear(self, sentences: Iterable[str]) -> None:
        """Show warnings of workers, each once per run."""
        for sentence in sentences:
            if sentence not in self._heard:
                self._heard.add(sentence)
                self._say(f"warning: {sentence}")

    def drain(self) -> None:
        """Stop the run: no trial starts, and running trials write a checkpoint and stop at the end of their epoch."""
        self.stopping = True
        with suppress(OSError):  # a full disk must not prevent the run from ending
            self.place.drain.parent.mkdir(parents=True, exist_ok=True)
            self.place.drain.touch()
            Mirror.of(self.place.drain).send(self.place.drain)
        point("drain.begun")

    @property
    def running(self) -> int:
        """The number of running trials."""
        return len(self._began)

    @property
    def placeless(self) -> Task | None:
        """A task that was admitted but has not started; None if there is none."""
        return next((task for trial_id, task in self._admitted.items() if trial_id not in self._began), None)

    @property
    def finished(self) -> bool:
        """Whether no further trial will start."""
        return self.stopping or not self._waiting

    def on_epoch(self, trial_id: str, epoch: Epoch, where: Where) -> bool:
        """Commit an epoch and the early-stopping decision. Returns whether the trial continues."""
        trial, row = self._trials[trial_id], self.rows[trial_id]
        if row["status"] != Status.RUNNING:
            return False  # the trial was ended before this report arrived
        reported = {"run": self.run, "trial_id": trial_id, "attempt": row["attempts"], **asdict(epoch)}
        outcome = reported.pop("outcome") or {}
        if (problem := _unreadable(row, reported, outcome)) is not None:
            self._refuse(trial, problem)
            return False
        with self._ledger.transaction():
            state = self._ledger.add_epoch(reported)
            if state == "different":
                self._note(row, f"epoch {epoch.epoch} computed again differs from its record")
            if state == "new":
                self._advance(row, epoch)
            row["host"], row["device"] = where.host, where.device
            decision = None
            if trial.phase == Phase.SCREEN and epoch.val_accuracy is not None:  # every rung is a validated epoch
                decision = self._schedule.report(trial_id, trial.arm, epoch.epoch, epoch.val_accuracy)
            if decision is not None and state == "new":
                self.decisions.append(decision)
                self._ledger.put(DECISIONS, {"run": self.run, **asdict(decision)})
            if epoch.outcome is not None:
                row.update(cast(TrialRow, outcome))
                self._end(trial, Status.COMPLETED)
            elif decision is not None and decision.stops:
                self._end(trial, Status.STOPPED, StopReason.ASHA)
                self._cancel_confirmation(decision)
            else:
                self._ledger.put(TRIALS, row)
        point("epoch.committed")
        self._committed(trial, decision)
        return row["status"] == Status.RUNNING and not self.stopping

    def on_end(self, trial_id: str, failure: Failure | None) -> bool:
        """Record the end of an attempt. `failure` is None if the attempt ended because `on_epoch` returned False.
        Returns whether the trial is retried."""
        trial, row = self._trials[trial_id], self.rows[trial_id]
        self._admitted.pop(trial_id, None)
        if row["status"] in ENDED:
            return False
        self._count_time(trial_id)
        if self.stopping:  # `resume` continues the trial, even if it failed while stopping
            row["status"] = Status.PENDING
            self._waiting.append(trial)
            self._ledger.put(TRIALS, row)
            return False
        assert failure is not None, f"{trial.label} ended without its last epoch"
        if row["status"] == Status.PENDING:  # its worker died before `on_start`
            row["attempts"] += 1
        failure = self._attempts.weighed(trial_id, failure)
        if failure.reason != "mps":
            self._note(row, failure.message)
        again = self._attempts.again(row, failure)
        if failure.reason == "storage" and not again:
            self.broken = failure.message
            self.drain()
        with self._ledger.transaction():
            if again or self.broken is not None:  # a disk error is not a failure of the trial
                row["status"] = Status.PENDING
                self._waiting.insert(0, trial)
                self._ledger.put(TRIALS, row)
            else:
                blocked = failure.reason == StopReason.TEACHER_FAILED and trial.role == Role.STUDENT
                reason = StopReason.ERROR if failure.reason == "lost" else StopReason(failure.reason)
                self._end(trial, Status.BLOCKED if blocked else Status.FAILED, reason)
        self._committed(trial)
        return again

    def tick(self) -> None:
        """Write the tables if they are due."""
        wait = TABLES_AFTER_END if self._tables_due else TABLES_EVERY
        if time.monotonic() - self._tables_at >= wait:
            self.write_tables()

    def conclude(self) -> None:
        """Write the tables for the last time. Raises `OSError` if a disk error ended the run."""
        self.write_tables()
        self._draws.close()
        self._sender.finish()
        if self.broken is not None:
            raise OSError(
                f"{self.broken}: writing failed {MAX_ATTEMPTS} times, so the run was stopped. The records are intact; "
                f"check that {self._folder} has free space and is writable, then continue with: python -m tune_kd "
                f"resume {quote(str(self._folder))}"
            )

    def write_tables(self) -> None:
        self._ledger.write_tables(self._folder)
        self._sender.offer()
        self._tables_at, self._tables_due = time.monotonic(), False

    def _ready(self, trial: Trial) -> bool:
        """Whether a trial's teacher is trained and, for a confirmation, the screen of its arm has ended."""
        if trial.teacher_id is not None and self.rows[trial.teacher_id]["status"] != Status.COMPLETED:
            return False
        # Immune arms are always confirmed.
        if trial.phase != Phase.CONFIRM or trial.arm in self._immune:
            return True
        return self.rows[self._screen[trial.arm]]["status"] in ENDED

    def _note(self, row: TrialRow, what: str) -> None:
        """Append a sentence about the current attempt to the row's `error`."""
        row["error"] = "; ".join(filter(None, [row["error"], masked(f"attempt {row['attempts']}: {what}")]))

    def _advance(self, row: TrialRow, epoch: Epoch) -> None:
        """Update a trial's row with a new epoch."""
        self._attempts.got_on(row["trial_id"])
        row["epochs_run"] = epoch.epoch
        if epoch.val_accuracy is not None:
            row["val_accuracy"] = epoch.val_accuracy
        reached = epoch.quality
        if reached > self._best.get(row["trial_id"], (-1.0, 0.0)):
            self._best[row["trial_id"]] = reached
            row["val_accuracy_best"], row["best_epoch"] = epoch.val_accuracy, epoch.epoch
        row["train_seconds"] = (row["train_seconds"] or 0.0) + epoch.seconds

    def _refuse(self, trial: Trial, problem: str) -> None:
        """Fail a trial whose report violates the schema. Otherwise the whole run could not be reported later."""
        self._note(self.rows[trial.trial_id], problem)
        with self._ledger.transaction():
            self._end(trial, Status.FAILED, StopReason.ERROR)
        self._committed(trial)

    def _committed(self, trial: Trial, decision: Decision | None = None) -> None:
        """Show a committed change of a trial, and do what follows from it."""
        self._clear(trial)
        if decision is not None:
            self._say(decision.words)
        if self.rows[trial.trial_id]["status"] != Status.RUNNING:
            self._say(ending(trial, self.rows[trial.trial_id]))
        self.tick()

    def _end(self, trial: Trial, status: Status, reason: StopReason | None = None) -> None:
        """Record the end of a trial and the consequences for its arm and its students. Call it in a transaction."""
        row = self.rows[trial.trial_id]
        row["status"], row["stop_reason"] = status, reason
        self._count_time(trial.trial_id)
        self._ledger.put(TRIALS, row)
        self._tables_due = True
        if trial.phase == Phase.SCREEN:
            if status in UNSUCCESSFUL:
                self._schedule.drop(trial.trial_id)
            self._search_on(trial.arm)
        if status == Status.FAILED and trial.role == Role.TEACHER:
            self._block_students(trial)

    def _search_on(self, arm: str) -> None:
        """Draw the next settings of a tuned arm, or plan the confirmation of its best settings. Call it in the
        transaction in which a draw ends, so that draws depend only on the order in which earlier draws end."""
        if arm in self._searches:
            for trial in adaptive_plan.due(self.plan, self._searches[arm], self.rows, sampler.draw):
                self._grow(trial)

    def _grow(self, trial: Trial) -> None:
        """Add a trial to the plan unless the plan has it."""
        if trial.trial_id in self._trials:
            return
        self._trials[trial.trial_id] = trial
        self.rows[trial.trial_id] = first_row(self.run, trial)
        self._ledger.put(TRIALS, self.rows[trial.trial_id])
        self._waiting.insert(0, trial)  # first, since the search of its arm waits for it
        self._schedule.admit(trial)

    def _clear(self, trial: Trial) -> None:
        """Remove the checkpoints of a trial whose end is committed."""
        if self.rows[trial.trial_id]["status"] in ENDED:
            point("trial.ended")
            if not self._keep_checkpoints:
                Checkpoints(self.place.checkpoints / trial.trial_id).remove()
            self._draws.add(self.rows[trial.trial_id])

    def _count_time(self, trial_id: str) -> None:
        if (began := self._began.pop(trial_id, None)) is not None:
            row = self.rows[trial_id]
            row["wall_seconds"] = (row["wall_seconds"] or 0.0) + time.monotonic() - began

    def _cancel_confirmation(self, stop: Decision) -> None:
        why = f"not run: the screen stopped the arm in epoch {stop.epoch}"
        self._cancel(
            lambda each: each.phase == Phase.CONFIRM and each.arm == stop.arm, why, Status.STOPPED, StopReason.ASHA
        )

    def _block_students(self, teacher: Trial) -> None:
        why = f"not run: its teacher {teacher.label} failed"
        self._cancel(lambda each: each.teacher_id == teacher.trial_id, why, Status.BLOCKED, StopReason.TEACHER_FAILED)

    def _cancel(self, which: Callable[[Trial], bool], why: str, status: Status, reason: StopReason) -> None:
        cancelled = [trial for trial in self._waiting if which(trial)]
        self._waiting = [trial for trial in self._waiting if not which(trial)]
        for trial in cancelled:
            self.rows[trial.trial_id]["error"] = why
            self._end(trial, status, reason)

    def _take_over(self, recorded: list[TrialRow]) -> None:
        """Restore the state from the ledger, and add rows for trials that the ledger lacks."""
        known = {row["trial_id"]: row for row in recorded}
        assert set(known) <= set(self._trials), "the ledger has trials that are not in the plan"
        with self._ledger.transaction():
            for trial in self.plan.trials:
                row = known.get(trial.trial_id) or first_row(self.run, trial)
                before = row["status"] if trial.trial_id in known else None
                if before == Status.RUNNING:
                    row["status"] = Status.PENDING  # its driver died
                elif before == Status.BLOCKED and row["attempts"]:
                    row |= {"status": Status.PENDING, "stop_reason": None}  # its teacher may have been restored
                self.rows[trial.trial_id] = row
                if row["status"] != before:
                    self._ledger.put(TRIALS, row)
        for trial in self.plan.trials:
            self._schedule.admit(trial)
        self.decisions = [Decision.of(row) for row in self._ledger.rows(DECISIONS)]
        for decision in self.decisions:
            self._schedule.replay(decision)
        for trial in self.plan.trials:
            if trial.phase == Phase.SCREEN and self.rows[trial.trial_id]["status"] in UNSUCCESSFUL:
                self._schedule.drop(trial.trial_id)
        for each in self._ledger.rows(EPOCHS):
            reached = Epoch.of(each).quality
            self._best[each["trial_id"]] = max(reached, self._best.get(each["trial_id"], reached))
        self._waiting = [trial for trial in self.plan.trials if self.rows[trial.trial_id]["status"] not in ENDED]
        for trial in self.plan.trials:  # a kill may have left checkpoints of ended trials
            self._clear(trial)
        with self._ledger.transaction():  # an extension may have added trials to stopped or blocked arms
            for decision in self.decisions:
                if decision.stops:
                    self._cancel_confirmation(decision)
            for teacher in self.plan.teachers:
                if self.rows[teacher.trial_id]["status"] == Status.FAILED:
                    self._block_students(teacher)
            for arm in self._searches:
                self._search_on(arm)


def _unreadable(row: TrialRow, epoch: Row, outcome: Row) -> str | None:
    """Return the schema rule that an epoch or the updated row of its trial would violate; None if both are valid."""
    after = {**row, **outcome, "epochs_run": max(row["epochs_run"], epoch["epoch"])}
    if outcome:
        after["status"] = Status.COMPLETED
    return EPOCHS.broken(EPOCHS.clean(epoch)) or TRIALS.broken(TRIALS.clean(after))

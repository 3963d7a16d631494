"""The driver: when trials are ready, what follows from their end, and restarts after a kill. Nothing is trained."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pandas as pd
import pytest

from bench import HERE, Bench, epoch
from conftest import contested
from forms import SHORT
from tune_kd.execute.attempts import MAX_INNOCENT, ending
from tune_kd.execute.resources import Shares
from tune_kd.execute.worker import Failure, Task, Workplace
from tune_kd.records import rebuild
from tune_kd.records.reader import check
from tune_kd.records.run_folder import Run, create
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, TrialRow, first_row
from tune_kd.study.plan import plan
from tune_kd.study.spec import Confirm, Factor, Screen, Study
from tune_kd.study.trial import Decision, Epoch
from tune_kd.system import crash_points


@pytest.fixture
def bench(study: Study, tmp_path: Path) -> Bench:
    return Bench(study, tmp_path)


def test_controls_wait_for_no_trial_and_students_only_for_their_own_teacher(bench: Bench) -> None:
    admitted: list[Task] = []
    while (task := bench.driver.next()) is not None:
        admitted.append(task)
    assert sorted((task.trial.arm, task.trial.phase) for task in admitted) == sorted(
        (f"{stem}/{arm}", phase)
        for stem in ("imagenet", "cifar")
        for arm, phase in (("teacher", "teacher"), ("none", "screen"), ("none", "confirm"), ("none", "confirm"))
    )
    done = next(task for task in admitted if task.trial.role == "teacher")
    bench.driver.on_start(done)
    bench.finish(done)
    stem = done.trial.cell.stem
    task = bench.start()
    assert task.trial.cell.stem == stem
    assert task.trial.teacher_id == done.trial.trial_id


def test_an_arm_that_can_be_stopped_is_confirmed_only_after_its_screen(bench: Bench) -> None:
    for _ in range(2):
        bench.finish(bench.start())
    admitted: list[Task] = []
    while (task := bench.driver.next()) is not None:
        bench.driver.on_start(task)
        admitted.append(task)
    confirmed = {task.trial.arm for task in admitted if task.trial.phase == "confirm"}
    assert "cifar/logit/T=4" in confirmed  # never stopped, so it is confirmed without waiting for its screen
    assert "cifar/logit/T=2" not in confirmed
    screened = next(t for t in admitted if t.trial.phase == "screen" and t.trial.arm == "cifar/logit/T=2")
    bench.finish(screened, 0.9)
    assert bench.start().trial.arm == "cifar/logit/T=2"


def with_t4_first(study: Study) -> Study:
    """Return the study with T=4 before T=2 in the order of screening: the first arm at a rung is never stopped."""

    def order(screen: Screen) -> list[str]:
        return [trial.arm for trial in plan(replace(study, screen=screen)).trials if trial.phase == "screen"]

    screens = (replace(study.screen, order_seed=seed) for seed in range(50))
    found = next(
        each for each in screens if order(each).index("cifar/logit/T=4") < order(each).index("cifar/logit/T=2")
    )
    return replace(study, screen=found)


def poor(task: Task) -> float:
    """Return an accuracy that is poor at T=2."""
    return 0.1 if "T=2" in task.trial.arm else 0.9


def test_a_stopped_arm_has_no_final_accuracy_and_is_not_confirmed(study: Study, tmp_path: Path) -> None:
    bench = Bench(with_t4_first(study), tmp_path)
    bench.run(poor)
    (stopped,) = bench.rows(arm="cifar/logit/T=2", phase="screen")
    assert (stopped["status"], stopped["stop_reason"], stopped["epochs_run"]) == ("stopped", "asha", 1)
    assert stopped["test_accuracy"] is stopped["test_accuracy_best"] is stopped["ece"] is None
    confirm = bench.rows(arm="cifar/logit/T=2", phase="confirm")
    assert [(row["status"], row["stop_reason"], row["epochs_run"]) for row in confirm] == [("stopped", "asha", 0)] * 2


def test_arms_of_several_budgets_are_compared_at_the_rungs_of_the_longest(study: Study, tmp_path: Path) -> None:
    screen = replace(study.screen, grace=2, strata=("stem", "method", "epochs"))
    varied = replace(study, factors=(*study.factors, Factor("epochs", (4, 8))), screen=screen)
    bench = Bench(varied, tmp_path)
    bench.run()
    assert {row["status"] for row in bench.rows()} == {"completed"}
    at = {(f"epochs={budget}" in each.arm, each.epoch) for budget in (4,) for each in bench.driver.decisions}
    assert at == {(True, 2), (False, 2), (False, 4)}
    assert {each.stratum for each in bench.driver.decisions} >= {"cifar/logit/4", "cifar/logit/8"}


def test_every_comparison_is_a_row(bench: Bench) -> None:
    tasks = bench.run()
    decisions = bench.ledger.rows(DECISIONS)
    screens = [task.trial.arm for task in tasks if task.trial.phase == "screen"]
    assert [row["arm"] for row in decisions] == screens
    assert {row["reason"] for row in decisions} <= {"too_few_peers", "ahead", "near_tie", "immune"}


def test_a_failed_teacher_blocks_its_students_with_that_reason_and_nothing_else(bench: Bench) -> None:
    teacher = bench.start()
    bench.driver.on_end(teacher.trial.trial_id, Failure("diverged", "the training loss of epoch 1 is nan"))
    bench.run()
    stem = teacher.trial.cell.stem
    (row,) = bench.rows(trial_id=teacher.trial.trial_id)
    assert (row["status"], row["stop_reason"]) == ("failed", "diverged")
    for row in bench.rows(role="student"):
        blocked = row["stem"] == stem and row["method"] != "none"
        assert row["status"] == ("blocked" if blocked else "completed")
        assert row["stop_reason"] == ("teacher_failed" if blocked else None)


def test_a_diverged_trial_is_not_tried_again(bench: Bench) -> None:
    task = bench.start()
    bench.driver.on_end(task.trial.trial_id, Failure("diverged", "nan"))
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert (row["status"], row["stop_reason"], row["attempts"]) == ("failed", "diverged", 1)
    assert "nan" in row["error"]


def test_a_trial_that_lost_its_worker_continues_after_its_last_epoch_a_bounded_number_of_times(bench: Bench) -> None:
    task = bench.start()
    bench.driver.on_epoch(task.trial.trial_id, epoch(1), HERE)
    for attempt in (1, 2):
        bench.driver.on_end(task.trial.trial_id, Failure("lost", "its worker died"))
        task = bench.start()
        assert (task.attempt, task.acknowledged) == (attempt + 1, 1)
    bench.driver.on_end(task.trial.trial_id, Failure("lost", "its worker died"))
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert (row["status"], row["stop_reason"], row["attempts"]) == ("failed", "error", 3)
    assert row["device"] == "cpu"


def test_a_trial_ended_by_another_on_its_gpu_is_retried_without_a_recorded_error_but_not_for_ever(bench: Bench) -> None:
    ended = Failure("mps", "CUDA error: the MPS client has been terminated", broken=True)
    task = bench.start()
    bench.driver.on_epoch(task.trial.trial_id, epoch(1), HERE)
    for _ in range(MAX_INNOCENT):
        bench.driver.on_end(task.trial.trial_id, ended)
        (row,) = bench.rows(trial_id=task.trial.trial_id)
        assert (row["status"], row["stop_reason"], row["error"]) == ("pending", None, None)
        assert bench.messages[-1].endswith("pending (will be retried): another trial on its GPU ended it")
        task = bench.start()
        assert task.acknowledged == 1
    for _ in range(2):  # the failures before did not count
        bench.driver.on_end(task.trial.trial_id, ended)
        task = bench.start()
    bench.driver.on_end(task.trial.trial_id, ended)
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert (row["status"], row["stop_reason"]) == ("failed", "error")
    assert row["error"].count("the MPS client has been terminated") == 3


def test_a_new_epoch_resets_the_count_of_failures_caused_by_other_trials(bench: Bench) -> None:
    task = bench.start()
    for _ in range(MAX_INNOCENT):
        bench.driver.on_end(task.trial.trial_id, Failure("mps", "MPS"))
        task = bench.start()
    bench.driver.on_epoch(task.trial.trial_id, epoch(1), HERE)
    bench.driver.on_end(task.trial.trial_id, Failure("mps", "MPS"))
    assert bench.rows(trial_id=task.trial.trial_id)[0]["error"] is None


def test_a_trial_whose_worker_never_starts_fails_after_three_attempts(bench: Bench) -> None:
    task = bench.driver.next()
    for _ in range(3):
        assert task is not None
        first = task.trial.trial_id
        bench.driver.on_end(first, Failure("lost", "its worker died"))
        task = bench.driver.next()
    assert bench.rows(trial_id=first)[0]["status"] == "failed"


def test_a_trial_with_new_epochs_between_the_deaths_of_its_workers_does_not_fail(bench: Bench) -> None:
    """On preemptible nodes, a long trial may lose more workers than the limit for a trial without new epochs."""
    for number, deaths in ((1, 2), (2, 1)):
        for _ in range(deaths):
            task = bench.start()
            bench.driver.on_end(task.trial.trial_id, Failure("lost", "its worker died"))
        task = bench.start()
        bench.driver.on_epoch(task.trial.trial_id, epoch(number, last=number == 2), HERE)
        if number == 1:
            bench.driver.on_end(task.trial.trial_id, Failure("lost", "its worker died"))
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert row["status"] == "completed"
    assert row["attempts"] == 5 == 1 + row["error"].count("its worker died")


def test_repeated_disk_errors_end_the_run_and_fail_no_trial(bench: Bench) -> None:
    other = bench.start()
    for attempt in (1, 2, 3):
        task = bench.start()
        assert task.attempt == attempt
        bench.driver.on_end(task.trial.trial_id, Failure("storage", "OSError: [Errno 28] No space left on device"))
    assert bench.driver.next() is None  # a disk error affects all trials
    assert not bench.driver.on_epoch(other.trial.trial_id, epoch(1), HERE)
    bench.driver.on_end(other.trial.trial_id, None)
    with pytest.raises(OSError, match=r"No space left on device.*writing failed 3 times.*resume"):
        bench.driver.conclude()
    assert {row["status"] for row in bench.rows()} == {"pending"}
    assert Bench(bench.driver.plan.study, bench.folder).start().trial.trial_id


def test_lost_workers_and_disk_errors_are_counted_separately(bench: Bench) -> None:
    for reason in ("storage", "lost", "storage", "lost"):
        task = bench.start()
        bench.driver.on_end(task.trial.trial_id, Failure(reason, reason))
    assert bench.start().trial == task.trial
    bench.driver.on_end(task.trial.trial_id, Failure("storage", "a disk"))
    assert bench.rows(trial_id=task.trial.trial_id)[0]["status"] == "pending"
    assert bench.driver.broken == "a disk"


@pytest.mark.parametrize(
    ("reported", "words"),
    [
        (epoch(1, last=True), "trials.status is completed after 1 of 2 epochs; allowed: after all 2"),
        (epoch(1, 1.5), "epochs.val_accuracy is 1.5; allowed: null, or from 0 to 1"),
    ],
)
def test_a_trial_that_reports_invalid_values_fails_at_once_and_the_run_can_be_reported(
    bench: Bench, reported: Epoch, words: str
) -> None:
    teacher = bench.start()
    assert teacher.trial.role == "teacher"
    assert not bench.driver.on_epoch(teacher.trial.trial_id, reported, HERE)
    assert not bench.driver.on_end(teacher.trial.trial_id, None)
    (row,) = bench.rows(trial_id=teacher.trial.trial_id)
    assert (row["status"], row["stop_reason"], row["error"]) == ("failed", "error", f"attempt 1: {words}")
    bench.run()
    assert {row["status"] for row in bench.rows(teacher_id=teacher.trial.trial_id, role="student")} == {"blocked"}
    bench.driver.conclude()
    for schema in (TRIALS, EPOCHS):
        assert check(schema, pd.read_parquet(bench.folder / f"{schema.name}.parquet"))[1] == []


def test_an_epoch_without_validation_keeps_the_known_accuracies_and_leads_to_no_decision(
    study: Study, tmp_path: Path
) -> None:
    recipe = replace(study.recipe, epochs=5, validate_every=2)
    seldom = replace(study, recipe=recipe, screen=replace(study.screen, grace=2))
    bench = Bench(seldom, tmp_path)
    while (task := bench.start()).trial.phase != "screen":
        bench.finish(task)
    known: list[tuple[object, ...]] = []
    for number, accuracy in enumerate((None, 0.6, None, 0.5, 0.4), 1):
        each = replace(epoch(number, last=number == 5), val_accuracy=accuracy, val_loss=accuracy and 1.0)
        assert bench.driver.on_epoch(task.trial.trial_id, each, HERE) == (number < 5)
        if number == 3:  # its driver dies
            bench.driver.on_end(task.trial.trial_id, Failure("lost", "its worker died"))
            bench = Bench(seldom, tmp_path)
            while bench.start().trial != task.trial:
                pass
        row = bench.driver.rows[task.trial.trial_id]
        known.append((row["epochs_run"], row["val_accuracy"], row["val_accuracy_best"], row["best_epoch"]))
    assert known[:4] == [(1, None, None, None), (2, 0.6, 0.6, 2), (3, 0.6, 0.6, 2), (4, 0.5, 0.6, 2)]
    assert known[4][:2] == (5, 0.4)
    assert [each.epoch for each in bench.driver.decisions] == [2, 4]


def test_no_decision_is_made_without_a_validation_accuracy(bench: Bench) -> None:
    while (task := bench.start()).trial.phase != "screen":
        bench.finish(task)
    assert bench.driver.on_epoch(task.trial.trial_id, replace(epoch(1), val_accuracy=None, val_loss=None), HERE)
    assert bench.driver.decisions == []


def test_a_student_whose_teacher_changed_is_blocked_until_the_next_driver(bench: Bench) -> None:
    while (task := bench.start()).trial.phase != "teacher":
        bench.finish(task)
    bench.finish(task)
    while not (task := bench.start()).trial.teacher_id:
        bench.finish(task)
    bench.driver.on_end(task.trial.trial_id, Failure("teacher_failed", "its digest differs"))
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert (row["status"], row["stop_reason"]) == ("blocked", "teacher_failed")
    again = Bench(bench.driver.plan.study, bench.folder)
    assert again.driver.rows[task.trial.trial_id]["status"] == "pending"


def test_a_run_that_is_resumed_without_a_gpu_requests_none(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path, gpus=0.25)
    bench.start()
    assert Bench(study, tmp_path, gpus=0.0).start().gpus == 0.0
    assert Bench(study, tmp_path, gpus=0.5).start().gpus == 0.5


def test_the_error_of_a_trial_is_recorded_without_the_secret_in_it(bench: Bench) -> None:
    task = bench.start()
    bench.driver.on_end(task.trial.trial_id, Failure("error", f"cannot open https://me:{SHORT}@example.org/x"))
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert SHORT not in row["error"] and "example.org" in row["error"]


def test_a_drain_creates_a_file_that_tells_trials_to_stop(bench: Bench, tmp_path: Path) -> None:
    """It is a file, since a worker may be on another machine. The next driver removes it."""
    drain = Workplace(None, None, tmp_path, tmp_path / "checkpoints").drain
    assert not drain.exists()
    bench.driver.drain()
    assert drain.exists()
    Bench(bench.driver.plan.study, bench.folder)
    assert not drain.exists()


def test_the_next_driver_removes_checkpoints_of_an_ended_trial_that_a_kill_left(bench: Bench, tmp_path: Path) -> None:
    task = bench.start()
    bench.finish(task)
    left = tmp_path / "checkpoints" / task.trial.trial_id
    left.mkdir(parents=True)
    Bench(bench.driver.plan.study, bench.folder)
    assert not left.exists()


def test_a_trial_that_is_out_of_memory_is_retried_with_a_larger_share(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path, gpus=0.25)
    task = bench.start()
    bench.driver.on_end(task.trial.trial_id, Failure("out_of_memory", "CUDA out of memory"))
    again = bench.start()
    assert (again.trial, again.gpus) == (task.trial, 0.5)
    bench.finish(again)
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert (row["status"], row["gpu_fraction"], row["attempts"]) == ("completed", 0.5, 2)
    assert "CUDA out of memory" in row["error"]


KINDS = Shares(light=0.125, heavy=0.5, teacher=1.0, methods=("feature",))


def test_each_trial_gets_the_share_of_its_kind(one_stem: Study, tmp_path: Path) -> None:
    bench = Bench(one_stem, tmp_path, gpus=KINDS)
    assert bench.driver.gpus == KINDS
    done = bench.run()
    for task in done:
        kind = "teacher" if task.trial.phase == "teacher" else task.trial.cell.method
        assert task.gpus == {"teacher": 1.0, "feature": 0.5, "none": 0.125, "logit": 0.125}[kind]
    assert {row["gpu_fraction"] for row in bench.rows()} == {1.0, 0.5, 0.125}


def test_a_raised_share_is_kept_and_applies_only_to_its_trial(one_stem: Study, tmp_path: Path) -> None:
    bench = Bench(one_stem, tmp_path, gpus=KINDS)
    bench.finish(bench.start())
    task = bench.start()
    assert (task.trial.cell.method, task.gpus) == ("feature", 0.5)
    bench.driver.on_end(task.trial.trial_id, Failure("out_of_memory", "too large"))
    assert bench.start().gpus == 1.0
    again = Bench(one_stem, tmp_path, gpus=replace(KINDS, heavy=0.25)).run()
    features = [task.gpus for task in again if task.trial.cell.method == "feature"]
    assert features == [1.0, 0.25, 0.25], "the next driver keeps the raised share, and only that"


def test_the_driver_knows_an_admitted_task_that_has_not_started_and_its_share(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path, gpus=0.25)
    task = bench.start()
    assert bench.driver.placeless is None
    bench.driver.on_end(task.trial.trial_id, Failure("out_of_memory", "too large"))
    again = bench.driver.next()
    assert again is bench.driver.placeless and again is not None and again.gpus == 0.5
    bench.driver.on_start(again)
    assert bench.driver.placeless is None


def test_no_more_than_max_concurrent_trials_run(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path, max_concurrent=1)
    task = bench.start()
    assert bench.driver.next() is None
    bench.finish(task)
    assert bench.driver.next() is not None


def test_a_new_driver_continues_where_a_killed_one_stopped(study: Study, tmp_path: Path) -> None:
    def accuracy(task: Task) -> float:
        return int(task.trial.trial_id[:4], 16) / 2**16

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = Bench(study, tmp_path / "whole")
    whole.run(accuracy)

    first = Bench(study, tmp_path / "cut")
    for _ in range(7):
        task = first.start()
        first.finish(task, accuracy(task))
    task = first.start()
    first.driver.on_epoch(task.trial.trial_id, epoch(1, accuracy(task)), HERE)
    first.ledger.close()  # as in a kill

    second = Bench(study, tmp_path / "cut")
    again = second.start()
    assert (again.trial, again.attempt, again.acknowledged) == (task.trial, 2, 1)
    second.finish(again, accuracy(again))
    second.run(accuracy)
    timeless = [name for name in TRIALS.columns if name not in ("wall_seconds", "attempts", "started")]
    for one, other in zip(whole.rows(), second.rows(), strict=True):
        assert {name: one[name] for name in timeless} == {name: other[name] for name in timeless}
    assert whole.ledger.rows(DECISIONS) == second.ledger.rows(DECISIONS)
    assert len(whole.ledger.rows(EPOCHS)) == len(second.ledger.rows(EPOCHS))


def test_a_trial_whose_driver_died_is_recorded_as_pending(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    trial = bench.start().trial.trial_id
    assert bench.rows(trial_id=trial)[0]["status"] == "running"
    bench.ledger.close()
    after = Bench(study, tmp_path)
    assert after.rows(trial_id=trial)[0]["status"] == "pending"


def test_an_epoch_that_is_repeated_with_other_values_is_recorded_as_a_violation(bench: Bench) -> None:
    task = bench.start()
    bench.driver.on_epoch(task.trial.trial_id, epoch(1, 0.5), HERE)
    bench.driver.on_epoch(task.trial.trial_id, epoch(1, 0.6), HERE)
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert "epoch 1 computed again differs from its record" in row["error"]
    assert bench.ledger.rows(EPOCHS)[0]["val_accuracy"] == 0.5


def test_a_stopping_run_starts_no_trial_and_leaves_its_trials_to_the_next_driver(bench: Bench) -> None:
    task = bench.start()
    bench.driver.stopping = True
    assert not bench.driver.on_epoch(task.trial.trial_id, epoch(1), HERE)
    bench.driver.on_end(task.trial.trial_id, None)
    assert bench.driver.next() is None
    assert bench.driver.finished
    second = Bench(bench.driver.plan.study, bench.folder)
    assert second.start().trial == task.trial


def test_the_tables_can_be_read_from_the_start(bench: Bench) -> None:
    trials = pd.read_parquet(bench.folder / "trials.parquet")
    assert set(trials["status"]) == {"pending"}
    assert len(trials) == len(bench.driver.plan.trials)


def test_a_teacher_is_described_by_its_own_row_and_a_control_has_none(bench: Bench) -> None:
    (teacher,) = bench.rows(role="teacher", stem="cifar")
    assert teacher["teacher_id"] == teacher["trial_id"]
    assert (teacher["student"], teacher["method"], teacher["temperature"]) == (None, None, None)
    control = bench.rows(arm="cifar/none")[0]
    assert (control["teacher"], control["teacher_id"], control["alpha"]) == (None, None, None)
    feature = bench.rows(arm="cifar/feature")[0]
    assert (feature["teacher_id"], feature["temperature"]) == (teacher["trial_id"], None)


def test_the_rows_contain_the_values_of_the_recipe(study: Study, tmp_path: Path) -> None:
    bench = Bench(replace(study, recipe=replace(study.recipe, lr=0.07)), tmp_path)
    assert {row["lr"] for row in bench.rows(role="student")} == {0.07}
    assert {row["epochs_planned"] for row in bench.rows()} == {2}


def test_a_run_killed_within_a_rung_makes_the_same_decisions_as_an_uninterrupted_one(
    one_stem: Study, tmp_path: Path
) -> None:
    """All arms report side by side, epoch by epoch, with accuracies from a fixed random sequence."""
    study = contested(one_stem)
    chance = random.Random("a recorded sequence")
    sequence = [(chance.random(), arm, number) for arm in range(7) for number in range(1, 9)]
    metrics = {(arm, number): metric for metric, arm, number in sequence}

    def decisions(folder: Path, kill_after: int) -> list[dict[str, Any]]:
        folder.mkdir()
        bench = Bench(study, folder)
        reports = 0
        for teacher in [task for task in iter(bench.driver.next, None) if task.trial.role == "teacher"]:
            bench.driver.on_start(teacher)
            bench.finish(teacher)
        bench.ledger.close()
        bench = Bench(study, folder)
        screens = sorted(trial.trial_id for trial in bench.driver.plan.trials if trial.phase == "screen")
        for number in range(1, 9):
            for place, trial_id in enumerate(screens):
                (row,) = bench.rows(trial_id=trial_id)
                if row["status"] == "stopped":
                    continue
                if reports == kill_after:
                    bench.ledger.close()
                    bench = Bench(study, folder)
                while (task := bench.driver.next()) is not None:
                    bench.driver.on_start(task)
                reports += 1
                if not bench.driver.on_epoch(trial_id, epoch(number, metrics[place, number], last=number == 8), HERE):
                    bench.driver.on_end(trial_id, None)
        return bench.ledger.rows(DECISIONS)

    whole = decisions(tmp_path / "whole", -1)
    assert {row["action"] for row in whole} == {"stop", "continue"}
    for kill_after in (3, 9, 10, 17, 25):
        assert decisions(tmp_path / str(kill_after), kill_after) == whole


@pytest.mark.parametrize("published", [1, 2, 3])
def test_a_ledger_rebuilt_from_tables_of_two_ages_has_no_epoch_without_its_decision(
    one_stem: Study, tmp_path: Path, published: int
) -> None:
    """A kill between the writes of two tables, then a damaged ledger: the rebuilt ledger is consistent."""
    run = Run("r", tmp_path, contested(one_stem), "0" * 64, None, {})
    create(run)
    bench = Bench(run.study, tmp_path)
    teacher = bench.start()
    bench.finish(teacher)
    control, arm = (bench.start().trial for _ in range(2))
    for number in range(1, run.study.screen.grace):
        for trial in (control, arm):
            bench.driver.on_epoch(trial.trial_id, epoch(number), HERE)
    bench.driver.write_tables()
    for trial in (control, arm):
        assert bench.driver.on_epoch(trial.trial_id, epoch(run.study.screen.grace), HERE)
    assert len(bench.driver.decisions) == 2
    at = patch.multiple(crash_points, _name="tables.published", _left=published)
    with at, patch("os.kill", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        bench.driver.write_tables()
    bench.ledger.close()
    bench.ledger.path.write_bytes(b"")
    ledger = rebuild.opened(run, lambda _: None)
    recorded = {row["trial_id"] for row in ledger.rows(EPOCHS) if row["epoch"] == run.study.screen.grace}
    compared = {row["trial_id"] for row in ledger.rows(DECISIONS)}
    assert compared == recorded - {teacher.trial.trial_id}
    assert len(compared) == (2 if published == 3 else 0)


def test_seeds_added_to_a_stopped_arm_or_a_failed_teacher_are_not_run(study: Study, tmp_path: Path) -> None:
    study = with_t4_first(study)
    bench = Bench(study, tmp_path)
    teacher = next(task for task in iter(bench.driver.next, None) if task.trial.arm == "imagenet/teacher")
    bench.driver.on_start(teacher)
    bench.driver.on_end(teacher.trial.trial_id, Failure("diverged", "NaN"))
    bench.ledger.close()
    bench = Bench(study, tmp_path)
    bench.run(poor)
    bench.ledger.close()
    more = Bench(replace(study, confirm=Confirm(seeds=(1, 2, 3))), tmp_path)
    added = {row["arm"]: (row["status"], row["error"]) for row in more.rows(phase="confirm", seed=3)}
    assert added.pop("cifar/logit/T=2") == ("stopped", "not run: the screen stopped the arm in epoch 1")
    for arm in ("imagenet/logit/T=2", "imagenet/logit/T=4", "imagenet/feature"):
        assert added.pop(arm)[0] == "blocked"
    assert {status for status, _ in added.values()} == {"pending"}


def test_every_comparison_is_logged_as_it_is_recorded(study: Study, tmp_path: Path) -> None:
    bench = Bench(with_t4_first(study), tmp_path)
    bench.run(poor)
    decisions = [Decision.of(row) for row in bench.ledger.rows(DECISIONS)]
    assert bench.driver.decisions == decisions
    assert [sentence for sentence in bench.messages if " at epoch " in sentence] == [each.words for each in decisions]
    (stop,) = (each for each in decisions if each.arm == "cifar/logit/T=2")
    assert stop.words == (
        "cifar/logit/T=2 at epoch 1: stopped (behind), 10.00 %, cutoff 90.00 %, rank 2 of 2 in cifar/logit"
    )


def test_a_warning_from_several_workers_is_logged_once(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.hear(["a step cannot be captured here"])
    bench.driver.hear([])
    assert bench.messages == ["warning: a step cannot be captured here"]


@pytest.mark.parametrize(
    ("phase", "wall", "words"),
    [
        ("teacher", 40.0, "completed: test accuracy 90.00 %, 30.0 s of training"),
        ("teacher", 1.0, "reused from another run: test accuracy 90.00 %, 30.0 s of training"),
        ("confirm", 40.0, "completed: test accuracy 90.00 %"),
        ("screen", 40.0, "completed: validation accuracy 80.00 %"),
    ],
)
def test_the_message_about_an_end_names_reuse_and_no_test_accuracy_of_the_screen(
    study: Study, phase: str, wall: float, words: str
) -> None:
    trial = next(each for each in plan(study).trials if each.phase == phase)
    measured = {"test_accuracy_best": 0.9, "val_accuracy_best": 0.8, "train_seconds": 30.0, "wall_seconds": wall}
    row = cast(TrialRow, first_row("r", trial) | {"status": "completed"} | measured)
    assert ending(trial, row).startswith(f"{trial.label} ({phase}) {words}")

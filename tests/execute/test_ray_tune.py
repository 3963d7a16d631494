"""Studies on Ray Tune: same records as in this process, failures of workers, resume, and the dashboard."""

import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from inspect import getsource, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import ray
import ray.tune.experiment
import torch
from ray import tune
from ray.air.execution._internal import RayActorManager

from commands import (
    STUDY,
    assert_contiguous_epochs,
    assert_same_records,
    command,
    driver,
    epochs_on_record,
    in_this_process,
    kill_a_worker,
    token,
    wait_for,
    without_stops,
)
from conftest import contested
from tune_kd.analysis.simulate import Curve, replay
from tune_kd.execute import ray_tune, tune_internals
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.resources import Shares
from tune_kd.execute.worker import Task, Work, Workplace
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import EPOCHS, TRIALS
from tune_kd.study.discover import find, resolve
from tune_kd.study.early_stopping import stratum
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import Epoch, Outcome


def run_with_ray(study: Study, folder: Path, beat: Callable[[], None] = lambda: None, **options: Any) -> Driver:
    made, place = driver(study, folder, **options)
    ray_tune.run_on_ray(made, place, slots=2, beat=beat)
    return made


@pytest.mark.long
def test_with_ray_and_in_this_process_a_study_gives_the_same_records(
    ray_session: str, study: Study, tmp_path: Path
) -> None:
    unstopped = without_stops(study)
    share = 0.0 if torch.cuda.is_available() else 0.5  # of a logical GPU; trials compute on the CPU
    finished = run_with_ray(unstopped, tmp_path / "ray", gpus=share)
    made, place = driver(unstopped, tmp_path / "here")
    run_in_process(made, place)
    assert_same_records(tmp_path / "ray", tmp_path / "here")
    assert_contiguous_epochs(tmp_path / "ray")
    assert {row["status"] for row in finished.rows.values()} == {"completed"}
    assert {row["gpu_fraction"] for row in finished.rows.values()} == {share}
    assert not any((tmp_path / "ray" / "checkpoints").glob("*"))


def recorded(metrics: dict[tuple[str, int], float]) -> Work:
    """Return work that trains nothing and reports the given validation accuracies of (arm, epoch)."""

    def work(task: Task, place: Workplace) -> Generator[Epoch]:
        total = task.trial.recipe.epochs
        for number in range(1, total + 1):
            accuracy = metrics.get((task.trial.arm, number), 0.5)
            outcome = Outcome(number, accuracy, accuracy, accuracy, None, None, None, 0.1, 1, "none", None, None)
            loss, ended = 1.0, outcome if number == total else None
            yield Epoch(number, accuracy, loss, loss, accuracy, loss, None, 0.1, 1.0, 1e-3, 1.0, outcome=ended)

    return work


def test_a_recorded_sequence_gives_the_same_decisions_on_ray_in_this_process_and_simulated(
    ray_session: str, study: Study, tmp_path: Path
) -> None:
    study = contested(study)
    chance = random.Random("a recorded sequence")
    arms = [arm.name for arm in plan(study).arms]
    metrics = {(arm, number): chance.random() for arm in arms for number in range(1, 9)}

    through_ray, place = driver(study, tmp_path / "ray", max_concurrent=1)
    ray_tune.run_on_ray(through_ray, place, slots=1, beat=lambda: None, work=recorded(metrics))
    here, place = driver(study, tmp_path / "here")
    run_in_process(here, place, recorded(metrics))
    assert through_ray.decisions == here.decisions
    assert {each.action for each in here.decisions} == {"stop", "continue"}

    ids = {trial.arm: trial.trial_id for trial in here.plan.trials if trial.phase == "screen"}
    grid = tuple(
        Curve(ids[arm.name], arm.name, stratum(study.screen, arm.cell.levels), arm.immune,
              tuple(metrics[arm.name, number] for number in range(1, 9)))
        for arm in here.plan.arms
    )  # fmt: skip
    order = list(dict.fromkeys(each.arm for each in here.decisions))
    simulated = replay(study.screen, grid, order)
    by_arm = sorted(here.decisions, key=lambda each: (each.rung, order.index(each.arm)))
    assert simulated == by_arm


@pytest.mark.slow  # the tests of the driver cover this in less time
def test_trials_run_with_the_shares_of_their_kinds(ray_session: str, one_stem: Study, tmp_path: Path) -> None:
    """Tune reuses the process of a finished trial, unless the next trial has a different share."""
    shares = Shares(light=0.25, heavy=0.5, teacher=2.0, methods=("feature",))  # a teacher takes all GPUs
    made, place = driver(without_stops(one_stem), tmp_path, cpus=0.25, gpus=shares)
    ray_tune.run_on_ray(made, place, slots=8, beat=lambda: None, work=recorded({}))
    found = {(row["role"], row["method"], row["gpu_fraction"], row["status"]) for row in made.rows.values()}
    students = {
        ("student", method, shares.of("student", method), "completed") for method in ("none", "logit", "feature")
    }
    assert found == {("teacher", None, 2.0, "completed"), *students}


def test_a_finished_trial_takes_little_memory_in_the_driver(
    ray_session: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune keeps all trials, by default with the last report, statistics and an object reference of each."""
    ended: list[Any] = []
    on_trial_complete = ray_tune._Events.on_trial_complete

    def seen(self: Any, trial: Any, **info: Any) -> None:
        assert {"epoch", "config"} <= set(trial.run_metadata.last_result) and trial.run_metadata.metric_analysis
        on_trial_complete(self, trial=trial, **info)
        ended.append(trial)

    monkeypatch.setattr(ray_tune._Events, "on_trial_complete", seen)
    made, place = driver(study, tmp_path)
    ray_tune.run_on_ray(made, place, slots=2, beat=lambda: None, work=recorded({}))
    assert len(ended) == sum(row["attempts"] for row in made.rows.values())
    for trial in ended:
        assert len(json.dumps(trial.run_metadata.get_json_state())) < 3000
        assert not any(isinstance(each, ray.ObjectRef) for each in vars(trial).values())


def ask(url: str, path: str, bearer: str | None) -> Any:
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=10) as answer:
        return json.loads(answer.read())["data"]["result"]["result"]


@pytest.mark.long
def test_a_running_trial_is_in_the_dashboard_under_its_readable_name(
    ray_session: str, one_stem: Study, tmp_path: Path
) -> None:
    seen: dict[str, set[str]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for task in ask(ray_session, "/api/v0/tasks?detail=1&limit=10000", token()):
                seen.setdefault(task["name"], set()).add(task["state"])
            time.sleep(0.3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_with_ray(one_stem, tmp_path)
        time.sleep(2)  # Ray sends the states of tasks once a second
    finally:
        over.set()
        watcher.join()
    shown = {name for name in seen if " seed " in name}
    run = [row for row in pd.read_parquet(tmp_path / "trials.parquet").to_dict("records") if row["attempts"]]
    assert {f"{row['arm']} seed {row['seed']}" for row in run} <= shown
    assert any("RUNNING" in seen[name] for name in shown)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(ray_session, "/api/v0/tasks", None)


@pytest.mark.long
def test_a_killed_worker_costs_one_attempt_and_changes_no_result(
    ray_session: str, one_stem: Study, tmp_path: Path
) -> None:
    killed: list[int] = []
    unstopped = without_stops(one_stem)

    def beat() -> None:
        """Kill the process of a trial once, after its first epoch is on record."""
        begun = [row for row in made.rows.values() if row["status"] == "running" and row["epochs_run"] == 1]
        if begun and not killed:
            killed.extend(filter(None, [kill_a_worker()]))

    made, place = driver(unstopped, tmp_path / "killed")
    ray_tune.run_on_ray(made, place, slots=2, beat=beat)
    assert killed
    whole, place = driver(unstopped, tmp_path / "whole")
    run_in_process(whole, place)
    assert_same_records(tmp_path / "killed", tmp_path / "whole")
    assert_contiguous_epochs(tmp_path / "killed")
    attempts = pd.read_parquet(tmp_path / "killed" / "trials.parquet")["attempts"]
    assert attempts.max() == 2


def errors_of_ray() -> list[type[ray.exceptions.RayError]]:
    """Return all errors of Ray except the one that wraps an exception of the trial."""
    kinds = [kind for kind in vars(ray.exceptions).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, ray.exceptions.RayError)
            and not issubclass(kind, ray.exceptions.RayTaskError)]  # fmt: skip


@pytest.mark.parametrize("kind", errors_of_ray(), ids=lambda kind: kind.__name__)
def test_tune_treats_every_error_of_ray_as_a_lost_worker(
    kind: type[ray.exceptions.RayError], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[Exception] = []
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", lambda *_, exception, **__: passed.append(exception))
    noted: list[ray.exceptions.RayError | None] = []
    error, own = kind.__new__(kind), ray.exceptions.RayTaskError.__new__(ray.exceptions.RayTaskError)
    with tune_internals.every_ray_error_a_lost_worker(noted.append):
        for each in (error, own):
            RayActorManager._actor_task_failed(SimpleNamespace(), tracked_actor_task=None, exception=each)
            silent = each is own or isinstance(each, ray.exceptions.RayActorError)
            assert noted[-1] is (None if silent else each)
    assert isinstance(passed[0], ray.exceptions.RayActorError) and passed[1] is own


def test_private_parts_of_tune_are_unchanged() -> None:
    """If this fails, read what changed in Ray, and adapt `tune_internals`."""
    assert list(signature(RayActorManager._actor_task_failed).parameters) == ["self", "tracked_actor_task", "exception"]
    source = getsource(RayActorManager._actor_task_failed)
    assert "isinstance(exception, RayActorError)" in source and "raise RuntimeError(" in source
    assert "_actor_task_failed" in getsource(RayActorManager._schedule_tracked_actor_task)
    assert "_setup_signal_catching" in tune.run.__code__.co_names
    assert not signature(sys.modules["ray.tune.tune"]._setup_signal_catching).parameters
    trial = tune.experiment.Trial("PPO", stub=True)
    assert trial._default_result_or_future is None
    trial.update_last_result({"done": True, "epoch": 1})
    assert "epoch" in trial.last_result and "epoch" in trial.metric_analysis and "epoch" in trial.metric_n_steps
    trial.set_ray_actor(SimpleNamespace(get_auto_filled_metrics=SimpleNamespace(remote=lambda **_: "a reference")))
    assert trial._default_result_or_future == "a reference"
    tune_internals.forget(trial)
    assert trial._default_result_or_future is None and not trial.metric_analysis and not trial.metric_n_steps
    assert "epoch" not in trial.last_result


@pytest.mark.long
def test_a_worker_that_the_memory_monitor_kills_costs_one_attempt(
    ray_session: str, one_stem: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error replaces one report, in the form that Tune's actor manager receives."""
    struck: list[str] = []
    resolved = RayActorManager._actor_task_resolved

    def strike(self: Any, tracked_actor_task: Any, result: Any) -> None:
        if struck or not (isinstance(result, dict) and "epoch" in result):
            resolved(self, tracked_actor_task, result)
            return
        struck.append(result["config"]["task"].trial.trial_id)
        error = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on ...")
        self._actor_task_failed(tracked_actor_task=tracked_actor_task, exception=error)

    monkeypatch.setattr(RayActorManager, "_actor_task_resolved", strike)
    made, place = driver(without_stops(one_stem), tmp_path)
    ray_tune.run_on_ray(made, place, slots=2, beat=lambda: None, work=recorded({}))
    assert {row["status"] for row in made.rows.values()} == {"completed"}
    assert [(row["trial_id"], row["attempts"], row["error"]) for row in made.rows.values() if row["attempts"] > 1] == [
        (struck[0], 2, "attempt 1: its worker died (OutOfMemoryError: Task was killed due to the node running low on "
         "memory.)")
    ]  # fmt: skip


@pytest.mark.long
def test_an_error_of_ray_inside_a_worker_costs_one_attempt(ray_session: str, one_stem: Study, tmp_path: Path) -> None:
    """For example if a node dies that held the data."""
    normal_work = recorded({})

    def failing_once(task: Task, place: Workplace) -> Generator[Epoch]:
        if task.attempt == 1 and task.trial.phase == "screen":
            raise ray.exceptions.OutOfMemoryError("the node runs low on memory")
        yield from normal_work(task, place)

    made, place = driver(without_stops(one_stem), tmp_path)
    ray_tune.run_on_ray(made, place, slots=2, beat=lambda: None, work=failing_once)
    rows = list(made.rows.values())
    assert [row["error"] for row in rows if row["status"] != "completed"] == []
    assert {(row["phase"] == "screen", row["attempts"]) for row in rows} == {(True, 2), (False, 1)}
    assert {row["error"] for row in rows if row["error"]} == {
        "attempt 1: Ray failed it: OutOfMemoryError: the node runs low on memory"
    }


@pytest.mark.long
@pytest.mark.parametrize("moment", ["add_epoch", pytest.param("put", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_the_error_of_the_ledger(
    ray_session: str, one_stem: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Tune would wrap the error in its own, and the command would exit with the status for failed trials."""
    made, place = driver(one_stem, tmp_path)

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Ledger, moment, full)
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        ray_tune.run_on_ray(made, place, slots=2, beat=lambda: None)


@pytest.mark.long
def test_resume_completes_a_killed_run_with_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    run = tmp_path / "results" / "cut"
    killed = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "cut")
    wait_for(lambda: epochs_on_record(run) >= 12)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = Ledger(run / "ledger.sqlite", read_only=True).rows(EPOCHS)
    assert len(pd.read_parquet(run / "trials.parquet")) == 9  # a teacher, and four arms on two seeds

    resumed = command(tmp_path, "resume", "cut", "--json")
    answer, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert "Traceback" not in errors
    after = Ledger(run / "ledger.sqlite", read_only=True).rows(EPOCHS)
    assert after[: len(before)] == before
    assert_contiguous_epochs(run)
    keys = {"runs", "report", "summary", "arms", "contrasts", "exploratory", "settings", "budgets"}
    assert set(json.loads(answer)) == keys
    assert_same_records(run, in_this_process(run, tmp_path))


@pytest.mark.slow
def test_a_killed_tuned_run_draws_the_same_settings_after_resume(tmp_path: Path) -> None:
    run, changed = tmp_path / "results" / "cut", ("recipe.epochs=4", "screen.grace=2", "tuning.budget=5")
    settings = [part for setting in changed for part in ("--set", setting)]
    killed = command(tmp_path, "run", "tuned", "--scale", "smoke", "--name", "cut", *settings)
    wait_for(lambda: epochs_on_record(run) >= 20)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert sum(row["phase"] == "screen" for row in Ledger(run / "ledger.sqlite", read_only=True).rows(TRIALS)) < 15
    resumed = command(tmp_path, "resume", "cut", "--json")
    answer, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert {arm["draws"] for arm in json.loads(answer)["budgets"]} == {5}
    made, place = driver(resolve(find("tuned"), "smoke", None, changed), tmp_path / "here")
    run_in_process(made, place)
    assert_same_records(run, tmp_path / "here")
    assert_contiguous_epochs(run)


@pytest.mark.slow  # shorter: `test_an_interrupted_run_ends_correctly_and_its_records_are_intact`
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupted_run_exits_with_its_signal_and_says_how_to_resume(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    run = tmp_path / "results" / "cut"
    # Long enough that it still runs when the second driver starts, also on a fast machine.
    begun = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "cut", "--set", "recipe.epochs=1000")
    wait_for(lambda: epochs_on_record(run) >= 3)
    second = command(tmp_path, "resume", "cut")
    _, refused = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"process {begun.pid}" in refused
    begun.send_signal(number)
    output, errors = begun.communicate(timeout=60)
    assert begun.returncode == 128 + number, errors
    assert "resume results/cut" in output
    rows = Ledger(run / "ledger.sqlite", read_only=True).rows(TRIALS)
    assert any(row["status"] == "pending" for row in rows)
    assert_contiguous_epochs(run)

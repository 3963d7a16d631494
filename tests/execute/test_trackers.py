"""TensorBoard, MLflow and Weights & Biases, checked with the readers of these tools."""

import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pandas as pd
import pytest

from bench import epoch
from commands import assert_same_records, driver, without_stops
from conftest import ODD_NAMES
from forms import SECRETS
from tune_kd.execute import ray_tune, trackers
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.trackers import background, mlflow, wandb
from tune_kd.execute.trackers.background import Background, name_of
from tune_kd.execute.worker import Task, Workplace
from tune_kd.study.spec import Study
from tune_kd.system.errors import UserError


def on_ray(driver: Driver, place: Workplace, trackers: Sequence[Background]) -> None:
    ray_tune.run_on_ray(driver, place, slots=2, beat=lambda: None, trackers=trackers)


def in_this_process(driver: Driver, place: Workplace, trackers: Sequence[Background]) -> None:
    run_in_process(driver, place, trackers=trackers)


def one_stem() -> Study:
    from conftest import tiny

    study = without_stops(tiny())
    return replace(study, factors=(replace(study.factors[0], levels=("cifar",)), *study.factors[1:]), moderator=None)


@pytest.fixture(scope="module", params=[on_ray, in_this_process])
def tracked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Driver]:
    """A run with TensorBoard, MLflow and a tracker that fails at its third epoch."""
    if request.param is on_ray:
        request.getfixturevalue("ray_session")
    folder = tmp_path_factory.mktemp("tracked") / "shown"
    messages: list[str] = []
    made, place = driver(one_stem(), folder, gpus=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of MLflow's dependencies
        whole = trackers.made(["tensorboard", "mlflow"], "tiny", "shown", folder, messages.append)
        request.param(made, place, [*whole, Background("brittle", Brittle, messages.append)])
    assert [each for each in messages if each.startswith("warning: ")] == [
        "warning: brittle failed (the server is gone); the run continues without it"
    ]
    return folder, made


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without trackers."""
    folder = tmp_path_factory.mktemp("untracked") / "shown"
    run_in_process(*driver(one_stem(), folder, gpus=0.0))
    return folder


class Silent:
    """A tracker that does nothing."""

    def on_start(self, name: str, settings: dict[str, Any]) -> None: ...

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None: ...

    def on_end(self, name: str, failed: bool) -> None: ...

    def close(self) -> None: ...


class Brittle(Silent):
    left = 3

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise ConnectionError("the server is gone")
        assert self.left > 0, "it was called again after it failed"


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    trials = pd.read_parquet(folder / "trials.parquet").set_index("trial_id")
    return trials, pd.read_parquet(folder / "epochs.parquet")


def names(made: Driver) -> dict[str, str]:
    """Trial ids by the name that trackers show."""
    return {
        f"{each.label} (screen)" if each.phase == "screen" else each.label: each.trial_id for each in made.plan.trials
    }


def test_tensorboard_shows_every_trial_under_its_name_with_what_is_on_record(tracked: tuple[Path, Driver]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, made = tracked
    trials, epochs = tables(folder)
    home = folder / "tensorboard"
    found = {str(path.parent.relative_to(home)): path.parent for path in home.rglob("events.out.tfevents*")}
    assert found.keys() == names(made).keys()
    for name, trial_id in names(made).items():
        events = EventAccumulator(str(found[name]))
        events.Reload()
        theirs = epochs[epochs["trial_id"] == trial_id].sort_values("epoch")
        for measure in ("val_accuracy", "train_loss"):
            scalars = events.Scalars(f"ray/tune/{measure}")
            assert [each.step for each in scalars] == list(theirs["epoch"])
            assert [each.value for each in scalars] == pytest.approx(list(theirs[measure]), rel=1e-6)
        (last,) = events.Scalars("ray/tune/test_accuracy_best")
        assert last.value == pytest.approx(trials.loc[trial_id, "test_accuracy_best"], rel=1e-6)


def test_mlflow_has_every_trial_with_its_settings_and_measures(tracked: tuple[Path, Driver]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        folder, made = tracked
        trials, epochs = tables(folder)
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        (experiment,) = (each for each in client.search_experiments() if each.name == "shown")
        runs = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
        assert runs.keys() == names(made).keys()
        for name, trial_id in names(made).items():
            run, row = runs[name], trials.loc[trial_id]
            assert run.info.status == "FINISHED" and run.data.tags["study"] == "tiny"
            assert (run.data.params["arm"], run.data.params["seed"]) == (row["arm"], str(row["seed"]))
            assert float(run.data.params["lr"]) == row["lr"]
            assert ("temperature" in run.data.params) == (not pd.isna(row["temperature"]))
            assert not any(word in run.data.params for word in ("task", "place", "work"))
            assert run.data.metrics["test_accuracy_best"] == row["test_accuracy_best"]
            history = client.get_metric_history(run.info.run_id, "val_accuracy")
            theirs = epochs[epochs["trial_id"] == trial_id].sort_values("epoch")
            assert [(each.step, each.value) for each in sorted(history, key=lambda each: each.step)] == list(
                zip(theirs["epoch"], theirs["val_accuracy"], strict=True)
            )


def test_a_run_with_trackers_has_the_records_of_a_run_without(tracked: tuple[Path, Driver], untracked: Path) -> None:
    folder, made = tracked
    assert {row["status"] for row in made.rows.values()} == {"completed"}
    assert_same_records(folder, untracked)


def test_an_unknown_or_missing_tracker_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.check(["tensorboard", "mlflow"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        trackers.check(["tensorbord", "wandb"])
    assert refused.value.problems == (
        "--track is tensorbord; allowed: tensorboard, mlflow, wandb",
        "--track is wandb, whose package is not installed; run `pip install 'tune_kd[wandb]'`",
    )


def test_a_second_attempt_has_its_own_name(study: Study, tmp_path: Path) -> None:
    made, _ = driver(study, tmp_path)
    task = made.next()
    assert task is not None
    assert name_of(replace(task, attempt=2)) == f"{name_of(task)} attempt 2"
    made.conclude()


@pytest.mark.parametrize(("every", "batch", "seen"), [(10.0, 900, 0), (-1.0, 900, 5), (10.0, 7, 4)])
def test_mlflow_gets_measures_in_batches_and_those_of_a_long_trial_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, batch: int, seen: int
) -> None:
    monkeypatch.setattr(mlflow, "METRICS_A_BATCH", batch)
    monkeypatch.setattr(mlflow, "BATCH_EVERY", every)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        tracker = mlflow.MLflow("tiny", "long", tmp_path)
        for name in ("one", "other"):
            tracker.on_start(name, {"arm": name})
        for epoch in range(1, 6):
            for name in ("one", "other"):
                tracker.on_epoch(name, epoch, {"val_accuracy": 0.1 * epoch, "lr": 1})
        client = MlflowClient(f"sqlite:///{tmp_path / trackers.DATABASE}")
        (experiment,) = (each for each in client.search_experiments() if each.name == "long")

        def known() -> list[int]:
            runs = client.search_runs([experiment.experiment_id])
            return [len(client.get_metric_history(each.info.run_id, "val_accuracy")) for each in runs]

        assert known() == [seen, seen]
        for name in ("one", "other"):
            tracker.on_end(name, failed=False)
        assert known() == [5, 5]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_mlflows_database_is_in_the_runs_folder_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # MLflow pastes the working directory into SQL, where an apostrophe ends it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = mlflow.MLflow("tiny", "odd", folder)
        tracker.on_start("a trial", {"arm": "kd"})
        tracker.on_epoch("a trial", 1, {"val_accuracy": 0.5})
        tracker.on_end("a trial", failed=True)
    with closing(sqlite3.connect(folder / trackers.DATABASE)) as stored:
        assert stored.execute("SELECT name, status FROM runs").fetchall() == [("a trial", "FAILED")]
        assert stored.execute("SELECT key, value FROM metrics").fetchall() == [("val_accuracy", 0.5)]
    assert [path.name for path in folder.iterdir()] == [trackers.DATABASE]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {name}


def test_a_tracker_that_calls_sys_exit_ends_only_itself() -> None:
    messages: list[str] = []
    Background("gone", lambda: sys.exit("no account"), messages.append).close()
    assert messages == ["warning: gone failed (no account); the run continues without it"]


class Hanging(Silent):
    def __init__(self) -> None:
        self.leave = Event()

    def on_start(self, name: str, settings: dict[str, Any]) -> None:
        self.leave.wait(60)
        raise ConnectionError("the server was away")


def test_a_trackers_error_is_shortened_after_its_secrets_are_masked() -> None:
    text, hidden = SECRETS["GitHub"]
    messages: list[str] = []
    Background("shy", lambda: sys.exit(f"{'x' * 188} {text}"), messages.append).close()
    assert "xxx ***)" in messages[0] and hidden[:3] not in messages[0]


def test_a_hanging_tracker_blocks_nothing_and_is_abandoned_at_the_end(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.2)
    messages: list[str] = []
    hanging = Hanging()
    shown = Background("stuck", lambda: hanging, messages.append)
    began = time.monotonic()
    for task in tasks(study, tmp_path):
        shown.on_start(task)
    shown.close()
    assert time.monotonic() - began < 30
    assert messages == ["warning: stuck did not finish within 0 s; it may miss a part of this run"]
    hanging.leave.set()

    monkeypatch.setattr(background, "PATIENCE", 30.0)  # the second tracker fails while it closes
    hanging = Hanging()
    shown = Background("late", lambda: hanging, messages.append)
    for task in tasks(study, tmp_path / "again"):
        shown.on_start(task)
    Timer(0.5, hanging.leave.set).start()
    shown.close()
    assert messages[1:] == ["warning: late failed (the server was away); the run continues without it"]


def tasks(study: Study, folder: Path) -> list[Task]:
    """The first two trials of a study."""
    made, _ = driver(study, folder)
    found = [made.next(), made.next()]
    made.conclude()
    return [each for each in found if each is not None]


def test_weights_and_biases_writes_a_trial_to_its_folder_without_a_network(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (shown,) = trackers.made(["wandb"], "tiny", "far", tmp_path, lambda message: pytest.fail(message))
    task = tasks(study, tmp_path)[0]
    shown.on_start(task)
    for number in (1, 2):
        shown.on_epoch(task, epoch(number, last=True))
    shown.on_end(task, failed=False)
    shown.close()
    (file,) = (tmp_path / "wandb" / f"{task.trial.label}").glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for each in (b"val_accuracy", b"tune_kd-tiny", b"far", task.trial.arm.encode()):
        assert each in written


def test_a_process_of_weights_and_biases_that_fails_says_why(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    messages: list[str] = []
    shown = Background("wandb", lambda: wandb.WandB("tiny", "far", tmp_path), messages.append)
    shown.on_start(tasks(study, tmp_path)[0])
    shown.close()
    (warning,) = messages
    assert "warning: wandb failed (" in warning and "mode" in warning


def test_on_end_is_not_called_for_an_attempt_that_never_started(study: Study, tmp_path: Path) -> None:
    """For example if its worker died before."""
    messages: list[str] = []

    class Ending(Silent):
        def on_end(self, name: str, failed: bool) -> None:
            raise AssertionError("on_end was called")

    shown = Background("ending", Ending, messages.append)
    shown.on_end(tasks(study, tmp_path)[0], failed=True)
    shown.close()
    assert messages == []


def test_a_trackers_package_is_imported_in_the_thread_that_imports_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune imports MLflow if it is installed. If two threads import it at once, one sees a half-initialized module."""
    (tmp_path / "shown_there.py").write_text("import threading\nTHREAD = threading.current_thread()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.PACKAGES, "there", "shown_there")
    monkeypatch.setitem(trackers.PACKAGES, "broken", "not_there")
    for name in ("there", "broken"):
        monkeypatch.setitem(trackers.ADAPTERS, name, lambda *_: Brittle())
    for each in trackers.made(["broken", "there"], "study", "run", tmp_path, print):
        each.close()
    assert sys.modules["shown_there"].THREAD is threading.current_thread()

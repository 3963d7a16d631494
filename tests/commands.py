"""Start commands and runs on Ray, and compare runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tune_kd import cli
from tune_kd.data import datasets
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records.ledger import Ledger
from tune_kd.records.run_folder import Run, create, reopen
from tune_kd.records.schema import EPOCHS, LEDGER
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study

# Columns that may differ between two computations of one trial: times, rates, hosts, attempts, memory, GPU shares.
FREE = ["run", "train_seconds", "wall_seconds", "gpu_fraction", "peak_memory_bytes", "attempts", "error", "host",
        "started", "fast_paths"]  # fmt: skip


EPOCH_FREE = ["run", *EPOCHS.timing]  # includes views_answered: which student needs a view first is chance


def driver(study: Study, folder: Path, **options: Any) -> tuple[Driver, Workplace]:
    folder.mkdir(parents=True, exist_ok=True)
    spec = study.data
    digest = datasets.load(spec.name, train=spec.train, validation=spec.validation, test=spec.test).digest
    place = Workplace(None, None, folder / "teachers", folder / "checkpoints", checkpoint_every=0.0)
    ledger = Ledger(folder / "ledger.sqlite")
    shares = {"cpus": 1.0, "gpus": 0.0, **options}
    return Driver(plan(study, digest), "r", folder, ledger, place, **shares), place


def table(folder: Path, name: str, free: list[str]) -> pd.DataFrame:
    read = pd.read_parquet(folder / f"{name}.parquet").drop(columns=free)
    return read.sort_values(list(read.columns[:2])).reset_index(drop=True)


def assert_same_records(one: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(table(one, "trials", FREE), table(other, "trials", FREE), check_exact=True)
    pd.testing.assert_frame_equal(
        table(one, "epochs", EPOCH_FREE), table(other, "epochs", EPOCH_FREE), check_exact=True
    )


def assert_contiguous_epochs(folder: Path) -> None:
    """Assert that each trial has each epoch once, numbered from 1, and as many as its row says."""
    trials = pd.read_parquet(folder / "trials.parquet").set_index("trial_id")
    epochs = pd.read_parquet(folder / "epochs.parquet")
    for trial_id, each in epochs.groupby("trial_id"):
        assert sorted(each["epoch"]) == list(range(1, len(each) + 1))
        assert trials.loc[trial_id, "epochs_run"] == len(each)


def in_this_process(run: Path, folder: Path) -> Path:
    """Repeat a run in this process. Returns the new run's folder."""
    planned = reopen(run)
    here = Run("here", folder / "here", planned.study, planned.data_digest, None, planned.settings)
    create(here)
    place = Workplace(None, None, here.teachers / "apart", here.checkpoints)
    ledger = Ledger(here.folder / LEDGER)
    run_in_process(Driver(here.plan, "here", here.folder, ledger, place, cpus=1.0, gpus=0.0), place)
    return here.folder


def without_stops(study: Study) -> Study:
    """Return the study without early stopping, which would depend on the order of reports."""
    return replace(study, screen=replace(study.screen, min_peers=99))


def token() -> str:
    return (Path.home() / ".ray" / "auth_token").read_text().strip()


def kill_a_worker() -> int | None:
    """Kill a worker process and return its id; None if no worker runs."""
    for process in psutil.process_iter(["cmdline"]):
        if any("TrialRunner" in word for word in process.info["cmdline"] or ()):
            process.kill()
            return process.pid
    return None


STUDY = """
from dataclasses import replace
from search_spaces.ablation import smoke
from tune_kd import Compare, Factor

def study():
    base = smoke()
    return replace(
        base, scale="own", moderator=None, screen=replace(base.screen, min_peers=99),
        factors=(Factor("stem", ("cifar",)), *base.factors[1:]), recipe=replace(base.recipe, epochs=4),
        contrasts=(Compare("method", "logit", "none"), Compare("method", "feature", "none")),
    )
"""


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "tune_kd", *arguments],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a command in this process and return its exit status."""
    monkeypatch.setattr("sys.argv", ["tune-kd", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.05)


def epochs_on_record(folder: Path) -> int:
    path = folder / "ledger.sqlite"
    if not path.exists():
        return 0
    try:
        return len(Ledger(path, read_only=True).rows(EPOCHS))
    except Exception:  # the driver is still creating the tables
        return 0

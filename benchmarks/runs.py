"""Whole runs: what is lost between trials, and what records and checkpoints cost."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.measure import Result, result
from tune_kd import data
from tune_kd.answers import CHUNK
from tune_kd.checkpoints import Checkpoints
from tune_kd.execute import on_ray
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Task, Workplace
from tune_kd.plan import plan
from tune_kd.records import TRIALS, Ledger, load
from tune_kd.study import Cell, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.trial import Epoch, Outcome
from tune_kd.view import View

SLOTS = 2


def controls(trials: int, cell: Cell, recipe: Recipe) -> Study:
    """One arm without a teacher, with as many seeds as trials."""
    return Study(
        name="controls",
        question="What does a run cost besides its training?",
        factors=(Factor("method", ("none",)),),
        contrasts=(),
        cell=cell,
        data=Data("digits"),
        recipe=recipe,
        screen=Screen(grace=1),
        confirm=Confirm(seeds=tuple(range(1, trials))),
    )


def nothing(task: Task, place: Workplace) -> Generator[Epoch]:
    """A trial without training: its one epoch, as a worker would report it."""
    outcome = Outcome(1, 0.5, 0.5, 0.5, None, None, None, 0.1, 1, "none", None, None)
    yield Epoch(1, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1e-3, 1.0, outcome=outcome)


def empty_run(trials: int, cluster: on_ray.Cluster) -> tuple[float, float]:
    """A run of empty trials on two slots with all records: wall seconds a trial from the start of the first to the
    end of the run, and the seconds before, in which Ray's workers start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
        ledger = Ledger(folder / "ledger.sqlite")
        share = cluster.cpus / SLOTS
        with View(Console(file=io.StringIO()), "empty") as view:
            planned = plan(controls(trials, Cell(width=0.125), Recipe(epochs=1)), "0" * 64)
            called = time.time()
            driver = Driver(planned, "empty", folder, ledger, place, cpus=share, gpus=0.0, say=view.say)
            on_ray.run_on_ray(driver, place, SLOTS, lambda: view.show(list(driver.rows.values())), nothing)
            ended = time.time()
        rows = ledger.rows(TRIALS)
        assert len(rows) == trials and all(row["status"] == "completed" for row in rows)
        assert (folder / "trials.parquet").is_file()
        ledger.close()
    first = min(row["started"] for row in rows)
    return (ended - first) / trials, first - called


def empty_trials(count: int) -> list[Result]:
    """300 and 3,000 empty trials in the same Ray, whose own start is not part of either."""
    cluster = on_ray.connect(None)
    try:
        few = [empty_run(300, cluster) for _ in range(count)]
        many = [empty_run(3000, cluster) for _ in range(max(1, count // 5))]
    finally:
        on_ray.disconnect(cluster)
    start = result("", [start for _, start in few]).figure
    one = result(
        "added wall time a trial, 300 empty trials on 2 slots",
        [seconds for seconds, _ in few],
        unit="s",
        bar="<= 0.06",
        detail=f"start-up of Ray's workers, {start:.1f} s, not counted",
    )
    ratios = [seconds / one.figure for seconds, _ in many]
    detail = f"{many[0][0]:.4f} s a trial"
    return [one, result("the same at 3,000 empty trials / at 300", ratios, bar="<= 1.3", detail=detail)]


def share_of_records(epochs: int = 20) -> Result:
    """The share of a run's time in which nothing but checkpoints and records are written, at the usual intervals.

    A whole run in this process, on one thread: two trials, each with a checkpoint every 30 seconds and one at its end.
    """
    spent = [0.0]

    def timed(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - started

        setattr(kind, name, measured)

    for kind, name in ((Checkpoints, "save"), (Checkpoints, "load"), (Driver, "on_start"), (Driver, "on_epoch")):
        timed(kind, name)  # the driver's calls hold the ledger's: rows, commits, tables
    digest = data.load("digits").digest
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
        ledger = Ledger(folder / "ledger.sqlite")
        full_width = Cell(stem="imagenet", width=1.0)
        planned = plan(controls(2, full_width, Recipe(epochs=epochs, batch_size=64)), digest)
        started = time.perf_counter()
        run_in_process(Driver(planned, "checkpoints", folder, ledger, place, cpus=1.0, gpus=0.0), place)
        seconds = time.perf_counter() - started
        assert all(row["status"] == "completed" for row in ledger.rows(TRIALS))
        ledger.close()
    return result(
        "time in checkpoints and ledger / run time, ResNet-18 at width 1",
        [spent[0] / seconds],
        bar="<= 0.02",
        detail=f"{spent[0]:.2f} of {seconds:.0f} s, {len(planned.trials)} trials of {epochs} epochs",
    )


def laptop_ablation() -> list[Result]:
    """`run ablation --scale laptop`, as a user starts it, and what its own records say of it."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "tune_kd", "run", "ablation", "--scale", "laptop", "--name", "run"]
        started = time.time()
        subprocess.run([*command, "--out", name], check=True, stdout=subprocess.DEVNULL)
        minutes = (time.time() - started) / 60
        records = load(Path(name, "run"))
        distinct = sum(_answered(table) for table in Path(name, "teachers").glob("*/answers/*/views-*"))
    trials = records.trials[records.trials.epochs_run > 0]
    first, last = trials.started.min(), (trials.started + trials.wall_seconds).max()
    train = trials.train_seconds.sum() / (os.cpu_count() or 1)  # a slot a core, which is the default
    computed = int(records.epochs.views_answered.sum())
    means = trials[trials.method.eq("none") & trials.phase.eq("confirm")].groupby("stem").test_accuracy_best.mean()
    teachers = trials[trials.role.eq("teacher")].set_index("stem").test_accuracy_best
    accuracies = ", ".join(f"{stem} {100 * teachers[stem]:.2f} / {100 * means[stem]:.2f} %" for stem in means.index)
    return [
        result("views computed / distinct views, laptop ablation", [computed / distinct], bar="<= 1.00",
               detail=f"{computed} computed, {distinct} distinct"),
        result("wall time / (sum of train seconds / slots), laptop ablation", [(last - first) / train], bar="<= 1.15",
               detail=f"{last - first:.0f} s from the first trial's start; {first - started:.0f} s before it: "
               "imports, data, Ray and its workers"),
        result("run ablation --scale laptop, all in all", [minutes], unit="min", bar="<= 4",
               detail=f"{len(trials)} trials; test accuracy of teacher / control: {accuracies}"),
    ]  # fmt: skip


def _answered(table: Path, classes: int = 10) -> int:
    """How many rows of a table of answers are there."""
    rows = (table / "logits.f32").stat().st_size // (4 * classes)
    done = np.frombuffer((table / "digests.sha256").read_bytes(), np.uint8).reshape(-1, 32).any(axis=1)
    return sum(min(CHUNK, rows - chunk * CHUNK) for chunk in np.flatnonzero(done).tolist())

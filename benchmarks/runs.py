"""Whole runs: what is lost between trials, and what records and checkpoints cost."""

import io
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from rich.console import Console

from benchmarks.measure import Result, result
from tune_kd.execute import on_ray
from tune_kd.execute.driver import Driver
from tune_kd.execute.worker import Task, Workplace
from tune_kd.plan import plan
from tune_kd.records import TRIALS, Ledger
from tune_kd.study import Cell, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.trial import Epoch, Outcome
from tune_kd.view import View

SLOTS = 2


def empty_study(trials: int) -> Study:
    """One arm, one epoch, and as many seeds as trials."""
    return Study(
        name="empty",
        question="What does a trial cost in which nothing happens?",
        factors=(Factor("method", ("none",)),),
        contrasts=(),
        cell=Cell(width=0.125),
        data=Data("digits"),
        recipe=Recipe(epochs=1),
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
            planned = plan(empty_study(trials), "0" * 64)
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

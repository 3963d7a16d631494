"""Whole runs: the overhead per trial, and the cost of records and checkpoints."""

import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console

from benchmarks.measure import Result, result
from tune_kd.data import datasets
from tune_kd.execute import cluster as connection, ray_tune
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Task, Workplace
from tune_kd.records.ledger import Ledger
from tune_kd.records.reader import load
from tune_kd.records.run_folder import Run, create
from tune_kd.records.schema import TRIALS
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.study.plan import plan
from tune_kd.study.spec import Cell, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import Epoch, Outcome
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.logit_cache import CHUNK

SLOTS = 2


def controls(trials: int, cell: Cell, recipe: Recipe) -> Study:
    """Return a study of one arm without a teacher, with as many seeds as trials."""
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
    """A trial without training: yields one epoch, as a worker would report it."""
    outcome = Outcome(1, 0.5, 0.5, 0.5, None, None, None, 0.1, 1, "none", None, None)
    yield Epoch(1, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1e-3, 1.0, outcome=outcome)


def empty_run(trials: int, cluster: connection.Cluster) -> tuple[float, float]:
    """Run empty trials on two slots with all records. Returns the total seconds, and the seconds before the first
    trial, in which Ray's workers start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
        ledger = Ledger(folder / "ledger.sqlite")
        share = cluster.cpus / SLOTS
        with ProgressDisplay(Console(file=io.StringIO()), "empty") as view:
            planned = plan(controls(trials, Cell(width=0.125), Recipe(epochs=1)), "0" * 64)
            called = time.time()
            driver = Driver(planned, "empty", folder, ledger, place, cpus=share, gpus=0.0, say=view.say)
            ray_tune.run_on_ray(driver, place, SLOTS, lambda: view.show(list(driver.rows.values()), []), nothing)
            ended = time.time()
        rows = ledger.rows(TRIALS)
        assert len(rows) == trials and all(row["status"] == "completed" for row in rows)
        assert (folder / "trials.parquet").is_file()
        ledger.close()
    return ended - called, min(row["started"] for row in rows) - called


def empty_trials(count: int) -> list[Result]:
    """Measure 300 and 3,000 empty trials in turn, on the same Ray. The start of Ray is not included."""
    few, many = 300, 3000
    cluster = connection.connect(None)
    try:
        runs = [(empty_run(few, cluster), empty_run(many, cluster)) for _ in range(count)]
    finally:
        connection.disconnect(cluster)
    starts = result("", [start for (_, start), _ in runs]).figure
    longer = result("", [seconds / many for _, (seconds, _) in runs]).figure
    return [
        result(
            f"added wall time per trial, {few} empty trials on {SLOTS} slots",
            [seconds / few for (seconds, _), _ in runs],
            unit="s",
            bar="<= 0.06",
            detail=f"including the start of Ray's workers, {starts:.1f} s of each run",
        ),
        result(
            f"the same at {many:,} empty trials / at {few}, without the start of workers",
            [((all_ - before) / many) / ((seconds - start) / few) for (seconds, start), (all_, before) in runs],
            bar="<= 1.3",
            detail=f"{longer:.4f} s per trial",
        ),
    ]


@dataclass(frozen=True)
class Large:
    """The cost of a run of many empty trials, from its plan to its report."""

    a_trial: float  # seconds per trial, without the start of Ray's workers
    memory: int  # peak bytes of the driver, including Ray's library
    disk: int  # bytes of the run's folder
    plan: float  # seconds
    status: float  # seconds of the command
    report: float  # seconds of the command
    lines: int  # number of lines that `status` prints


def large_run(trials: int) -> Large:
    """Plan and run in this process, with the display of a terminal, then call the commands on the run."""
    with tempfile.TemporaryDirectory() as name:
        study = controls(trials, Cell(width=0.125), Recipe(epochs=1))
        run = Run("large", Path(name) / "large", study, "0" * 64, None, {})
        called = time.perf_counter()
        planned = run.plan
        plan_seconds = time.perf_counter() - called
        create(run)
        cluster = connection.connect(None)
        try:
            place = Workplace(None, None, run.teachers, run.checkpoints)
            ledger = Ledger(run.folder / "ledger.sqlite")
            with Path(os.devnull).open("w") as nowhere, ProgressDisplay(_terminal(nowhere), run.name) as view:
                called = time.time()
                share = cluster.cpus / SLOTS
                driver = Driver(planned, run.name, run.folder, ledger, place, cpus=share, gpus=0.0, say=view.say)
                beat = lambda: view.show(list(driver.rows.values()), driver.decisions)  # noqa: E731
                ray_tune.run_on_ray(driver, place, SLOTS, beat, nothing)
                ended = time.time()
            began = min(row["started"] for row in ledger.rows(TRIALS))
            ledger.close()
        finally:
            connection.disconnect(cluster)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        disk = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
        seconds, printed = [], ""
        for command in ("status", "report"):
            called = time.perf_counter()
            words = [sys.executable, "-m", "tune_kd", command, str(run.folder)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - called)
            printed = printed or done.stdout
    return Large((ended - began) / trials, memory, disk, plan_seconds, *seconds, len(printed.splitlines()))


def _terminal(file: TextIO) -> Console:
    return Console(file=file, force_terminal=True, width=120, height=50)


def large_study(count: int, many: int = 10_000, few: int = 300) -> list[Result]:
    """Measure many and few empty trials, each run in its own process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        pairs = [(processes.submit(large_run, few).result(), processes.submit(large_run, many).result())
                 for _ in range(count)]  # fmt: skip
    large = [each for _, each in pairs]
    return [
        result(f"seconds per trial, {many:,} empty trials / {few}",
               [all_.a_trial / some.a_trial for some, all_ in pairs], bar="<= 1.5",
               detail=f"{large[0].a_trial:.4f} s per trial, with a terminal"),
        result(f"memory of the driver, {many:,} trials", [each.memory / 1e9 for each in large], unit="GB", bar="<= 2",
               detail=f"{pairs[0][0].memory / 1e9:.2f} GB at {few}"),
        result(f"size on disk, {many:,} trials", [each.disk / 1e6 for each in large], unit="MB"),
        result(f"plan of {many:,} trials", [each.plan for each in large], unit="s"),
        result(f"`status` of {many:,} trials", [each.status for each in large], unit="s",
               detail=f"{large[0].lines} lines"),
        result(f"`report` of {many:,} trials", [each.report for each in large], unit="s"),
    ]  # fmt: skip


def share_of_records(count: int, epochs: int = 20) -> Result:
    """Measure the share of a run's time that is spent on checkpoints and records, at the usual intervals.

    Runs are in this process, on one thread: two trials, each with a checkpoint every 30 seconds and one at its end.
    """
    digest = datasets.load("digits").digest
    full_width = Cell(stem="imagenet", width=1.0)
    planned = plan(controls(2, full_width, Recipe(epochs=epochs, batch_size=64)), digest)
    # The driver's calls include the ledger's: rows, commits, tables.
    what = ((Checkpoints, "save"), (Checkpoints, "load"), (Driver, "on_start"), (Driver, "on_epoch"))
    runs = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name, clocked(*what) as spent:
            folder = Path(name)
            place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
            ledger = Ledger(folder / "ledger.sqlite")
            started = time.perf_counter()
            run_in_process(Driver(planned, "checkpoints", folder, ledger, place, cpus=1.0, gpus=0.0), place)
            runs.append((sum(spent), time.perf_counter() - started))
            assert all(row["status"] == "completed" for row in ledger.rows(TRIALS))
            ledger.close()
    return result(
        "time in checkpoints and ledger / run time, ResNet-18 at width 1",
        [records / seconds for records, seconds in runs],
        bar="<= 0.02",
        detail=f"{runs[0][0]:.2f} of {runs[0][1]:.0f} s, {len(planned.trials)} trials of {epochs} epochs",
    )


@contextmanager
def clocked(*methods: tuple[type, str], clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """Within this context, append the seconds of every call of these methods to the yielded list."""
    spent: list[float] = []
    before = [(kind, name, getattr(kind, name)) for kind, name in methods]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            started = clock()
            try:
                return method(*arguments, **options)
            finally:
                spent.append(clock() - started)

        return measured

    for kind, name, method in before:
        setattr(kind, name, timed(method))
    try:
        yield spent
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


@dataclass(frozen=True)
class LaptopRun:
    """The cost of one `run ablation --scale laptop`, and measures from its records."""

    minutes: float  # of the whole command
    before: float  # seconds until the first trial started: imports, data, Ray and its workers
    span: float  # seconds from the start of the first trial to the end of the last one
    train: float  # seconds of training and evaluation of all trials, divided by slots
    trials: int
    computed: int  # views whose logits were computed
    distinct: int  # views whose logits are cached
    accuracies: str
    watching: dict[str, float]  # CPU seconds of the driver in metrics and trackers, if measured


def laptop_run(python: Sequence[str] = ("-m", "tune_kd"), *options: str) -> LaptopRun:
    """Run the command as a user does, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, *python, "run", "ablation", "--scale", "laptop", "--name", "run", *options]
        started = time.time()
        subprocess.run([*command, "--out", name], check=True, stdout=subprocess.DEVNULL)
        minutes = (time.time() - started) / 60
        records = load(Path(name, "run"))
        spent = Path(name, "spent")
        watching = json.loads(spent.read_text()) if spent.is_file() else {}
        distinct = sum(_answered(table) for table in Path(name, "teachers").glob("*/answers/*/views-*"))
    trials = records.trials[records.trials.epochs_run > 0]
    first, last = trials.started.min(), (trials.started + trials.wall_seconds).max()
    means = trials[trials.method.eq("none") & trials.phase.eq("confirm")].groupby("stem").test_accuracy_best.mean()
    teachers = trials[trials.role.eq("teacher")].set_index("stem").test_accuracy_best
    return LaptopRun(
        minutes=minutes,
        before=first - started,
        span=last - first,
        train=trials.train_seconds.sum() / (os.cpu_count() or 1),  # one slot per core, the default
        trials=len(trials),
        computed=int(records.epochs.views_answered.sum()),
        distinct=distinct,
        watching=watching,
        accuracies=", ".join(f"{stem} {100 * teachers[stem]:.2f} / {100 * means[stem]:.2f} %" for stem in means.index),
    )


def laptop_ablation(count: int) -> list[Result]:
    """Measure `run ablation --scale laptop`, `count` times."""
    runs = [laptop_run() for _ in range(count)]
    one = runs[0]
    return [
        result("views computed / distinct views, laptop ablation", [each.computed / each.distinct for each in runs],
               bar="<= 1.00", detail=f"{one.computed} computed, {one.distinct} distinct"),
        result("wall time / (sum of train seconds / slots), laptop ablation", [each.span / each.train for each in runs],
               bar="<= 1.15", detail=f"{one.span:.0f} s from the first trial's start; {one.before:.0f} s before it: "
               "imports, data, Ray and its workers"),
        result("run ablation --scale laptop, whole command", [each.minutes for each in runs], unit="min", bar="<= 4",
               detail=f"{one.trials} trials; test accuracy of teacher / control: {one.accuracies}"),
    ]  # fmt: skip


UNWATCHED = """
from tune_kd.cli import main
from tune_kd.execute.metrics import Metrics

Metrics.renew = Metrics.reported = Metrics.retried = lambda *_: None
main()
"""
WATCHED = """
import json, sys, time
from contextlib import ExitStack
from benchmarks.runs import clocked
from tune_kd.cli import main
from tune_kd.execute.metrics import Metrics
from tune_kd.execute.trackers.mlflow import MLflow
from tune_kd.execute.trackers.tensorboard import TensorBoard

calls = ["on_start", "on_epoch", "on_end"]
what = {"metrics": [(Metrics, name) for name in ("renew", "reported", "retried")],
        "tensorboard": [(TensorBoard, name) for name in calls],
        "mlflow": [(MLflow, name) for name in calls],
        "mlflow's database": [(MLflow, "__init__")]}
with ExitStack() as stack:
    spent = {name: stack.enter_context(clocked(*methods, clock=time.thread_time)) for name, methods in what.items()}
    try:
        main()
    finally:
        with open(sys.argv[sys.argv.index("--out") + 1] + "/spent", "w") as file:
            json.dump({name: sum(seconds) for name, seconds in spent.items()}, file)
"""


def watching(count: int) -> list[Result]:
    """Compare the laptop ablation with and without metrics, TensorBoard and MLflow, in turn."""
    sides = (("-c", WATCHED), "--track", "tensorboard", "--track", "mlflow"), (("-c", UNWATCHED),)
    found: tuple[list[LaptopRun], list[LaptopRun]] = ([], [])
    for number in range(count):
        for side in (1, 0) if number % 2 else (0, 1):
            found[side].append(laptop_run(*sides[side]))
    watched, unwatched = found
    pairs = list(zip(watched, unwatched, strict=True))

    def share(*parts: str) -> list[float]:
        """Return the share of the time of all cores since the first trial."""
        return [sum(each.watching[part] for part in parts) / ((os.cpu_count() or 1) * each.span) for each in watched]

    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in watched[0].watching.items())
    return [
        result("run with metrics, TensorBoard and MLflow / without, laptop ablation",
               [one.span / no.span for one, no in pairs],
               detail="from the first trial's start to the last one's end"),
        result("the same, whole commands", [one.minutes / no.minutes for one, no in pairs]),
        result("CPU time in metrics / time of all cores", share("metrics"), bar="<= 0.01", detail=seconds),
        result("the same in metrics and TensorBoard", share("metrics", "tensorboard"), bar="<= 0.01"),
        result("the same in metrics, TensorBoard and MLflow", share("metrics", "tensorboard", "mlflow"), bar="<= 0.01"),
    ]  # fmt: skip


def _answered(table: Path, classes: int = 10) -> int:
    """Return the number of rows of a table of cached logits that have been computed."""
    rows = (table / "logits.f32").stat().st_size // (4 * classes)
    done = np.frombuffer((table / "digests.sha256").read_bytes(), np.uint8).reshape(-1, 32).any(axis=1)
    return sum(min(CHUNK, rows - chunk * CHUNK) for chunk in np.flatnonzero(done).tolist())

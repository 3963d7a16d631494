"""Metrics of a run for Prometheus, exported through Ray. `METRICS` lists them; docs/monitoring.md explains them.

Ray adds the prefix `ray_` to each name and the suffix `_total` to each counter. It drops a gauge that is no longer set,
so gauges of running trials disappear when the trials end.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Literal

from ray.util.metrics import Counter as RayCounter, Gauge

from tune_kd.execute.driver import Driver
from tune_kd.execute.resources import Shares
from tune_kd.records.adaptive_plan import with_those_to_come
from tune_kd.records.eta import pace
from tune_kd.records.schema import TRIALS, TrialRow
from tune_kd.study.cost import images_of
from tune_kd.study.plan import Plan
from tune_kd.study.trial import Phase, Status, Trial
from tune_kd.system import overhead

EVERY = 2.0  # seconds between updates of the gauges; Ray drops a gauge that is not set for 2 to 20 seconds


@dataclass(frozen=True)
class Metric:
    """A metric and its labels besides `run`. A gauge is a current value; a counter starts at 0 with each driver."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    labels: tuple[str, ...]
    what: str

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


METRICS = (
    Metric("tune_kd_trials", "gauge", "trials", ("phase", "status"), "trials by phase and status"),
    Metric("tune_kd_epochs", "counter", "epochs", (), "reported epochs"),
    Metric("tune_kd_images", "counter", "images", (), "training images of reported epochs"),
    Metric("tune_kd_val_accuracy", "gauge", "fraction", ("arm",), "mean validation accuracy of running trials"),
    Metric("tune_kd_arms_stopped", "gauge", "arms", (), "arms whose screen was stopped early"),
    Metric("tune_kd_confirm_pairs", "gauge", "pairs", (), "completed pairs with the same seed, over all effects"),
    Metric("tune_kd_confirm_pairs_planned", "gauge", "pairs", (), "planned pairs with the same seed, over all effects"),
    Metric("tune_kd_trial_seconds", "gauge", "seconds", (), "total time of all trials on their workers"),
    Metric("tune_kd_trial_seconds_planned", "gauge", "seconds", (), "the same if every trial ran to its end"),
    Metric("tune_kd_gpu_seconds", "gauge", "GPU seconds", (), "total trial time, weighted by each trial's GPU share"),
    Metric("tune_kd_gpu_seconds_planned", "gauge", "GPU seconds", (), "the same if every trial ran to its end"),
    Metric("tune_kd_retries", "counter", "attempts", ("reason",), "failed attempts that are retried"),
    Metric("tune_kd_ledger_seconds", "counter", "seconds", (), "driver's time in commits and tables"),
    Metric("tune_kd_checkpoint_seconds", "counter", "seconds", (), "workers' time in writing and reading checkpoints"),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """The value of a gauge, with labels."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


def samples(plan: Plan, rows: Sequence[TrialRow], stopped: Iterable[str], gpus: Shares) -> Iterator[Sample]:
    """Yield the gauges of a run.

    `rows` are the trials, including future draws; `stopped` are the arms that early stopping stopped; `gpus` are the
    GPU shares of trials that have not started.
    """
    counts = Counter((row["phase"], row["status"]) for row in rows)
    for phase in TRIALS.levels["phase"]:
        for status in TRIALS.levels["status"]:
            yield Sample("tune_kd_trials", counts[phase, status], (("phase", phase), ("status", status)))
    running: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == Status.RUNNING and row["val_accuracy"] is not None:
            running.setdefault(row["arm"], []).append(row["val_accuracy"])
    for arm, accuracies in running.items():
        name = arm.encode("ascii", errors="backslashreplace").decode()  # Ray accepts only ASCII
        yield Sample("tune_kd_val_accuracy", sum(accuracies) / len(accuracies), (("arm", name),))
    yield Sample("tune_kd_arms_stopped", len(set(stopped)))
    done, planned = _pairs(plan, rows)
    yield Sample("tune_kd_confirm_pairs", done)
    yield Sample("tune_kd_confirm_pairs_planned", planned)
    yield from _seconds(rows, gpus)


def _pairs(plan: Plan, rows: Sequence[TrialRow]) -> tuple[int, int]:
    """Return the numbers of completed and planned pairs of trials with the same seed, over the study's effects."""
    confirm = [row for row in rows if row["phase"] == Phase.CONFIRM]
    confirmed = {(row["arm"], row["seed"]) for row in confirm}
    # With several teachers, an arm has one trial per teacher and seed.
    completed = confirmed - {(row["arm"], row["seed"]) for row in confirm if row["status"] != Status.COMPLETED}
    seeds = {seed for _, seed in confirmed}
    pairs = [
        {(arm, seed) for arm, _ in contrast.weights}
        for contrast in plan.contrasts
        if contrast.kind == "effect"
        for seed in seeds
    ]
    return sum(pair <= completed for pair in pairs), sum(pair <= confirmed for pair in pairs)


def _seconds(rows: Sequence[TrialRow], gpus: Shares) -> Iterator[Sample]:
    """Yield the seconds spent. Once a trial has run an epoch, also yield those of the whole plan at this run's pace."""
    spent = [max(row["wall_seconds"] or 0.0, row["train_seconds"] or 0.0) for row in rows]
    shares = [
        gpus.of(row["role"], row["method"]) if row["gpu_fraction"] is None else row["gpu_fraction"] for row in rows
    ]
    yield Sample("tune_kd_trial_seconds", sum(spent))
    yield Sample("tune_kd_gpu_seconds", sum(map(mul, spent, shares)))
    if (seconds := pace(rows)) is not None:
        # The seconds spent include time outside of epochs.
        planned = [max(took, row["epochs_planned"] * seconds(row)) for took, row in zip(spent, rows, strict=True)]
        yield Sample("tune_kd_trial_seconds_planned", sum(planned))
        yield Sample("tune_kd_gpu_seconds_planned", sum(map(mul, planned, shares)))


class Metrics:
    """Exports the metrics of a driver's run. Must be in the process that is Ray's driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        run = {"run": driver.run}
        kinds = {"gauge": Gauge, "counter": RayCounter}
        self._ray = {
            metric.name: kinds[metric.kind](metric.name, metric.what, ("run", *metric.labels)).set_default_tags(run)
            for metric in METRICS
        }
        self._ledger_seconds = overhead.spent["ledger"]
        self._set_at = 0.0

    def reported(self, trial: Trial, checkpoint_seconds: float) -> None:
        """Count an epoch of a trial, and its worker's seconds on checkpoints since the previous epoch."""
        self._count("tune_kd_epochs", 1)
        self._count("tune_kd_images", images_of(trial).train)
        self._count("tune_kd_checkpoint_seconds", checkpoint_seconds)

    def retried(self, reason: str) -> None:
        """Count a failed attempt that is retried."""
        self._count("tune_kd_retries", 1, reason=reason)

    def renew(self) -> None:
        """Update the gauges if `EVERY` seconds have passed."""
        now = time.monotonic()
        if now - self._set_at < EVERY:
            return
        self._set_at = now
        driver = self._driver
        rows = with_those_to_come(driver.plan, driver.run, list(driver.rows.values()))
        stopped = (decision.arm for decision in driver.decisions if decision.stops)
        for sample in samples(driver.plan, rows, stopped, driver.gpus):
            self._ray[sample.name].set(sample.value, dict(sample.labels))
        self._count("tune_kd_ledger_seconds", overhead.spent["ledger"] - self._ledger_seconds)
        self._ledger_seconds = overhead.spent["ledger"]

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray refuses to add 0
            self._ray[name].inc(amount, labels)

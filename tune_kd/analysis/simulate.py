"""Replay early stopping over recorded curves: the arms it would have stopped, the epochs saved, and the accuracy lost.

If all trials run at the same speed, the schedule's decisions depend only on the order in which arms start, whatever the
number of slots. So a replay is given by an order, and replay i is the study with `screen.order_seed = i`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tune_kd.analysis import statistics
from tune_kd.analysis.accuracy import column_of
from tune_kd.records.reader import Records
from tune_kd.records.schema import TRIALS
from tune_kd.study.early_stopping import Schedule, stratum
from tune_kd.study.plan import arrival_order
from tune_kd.study.spec import CELL_FIELDS, Screen, Study
from tune_kd.study.trial import ArmRole, Decision, Role, Status
from tune_kd.study.validate import margin_problems
from tune_kd.system.errors import UserError, raise_problems


@dataclass(frozen=True)
class Curve:
    """The learning curve of a completed trial."""

    trial_id: str
    arm: str
    stratum: str
    immune: bool  # never stopped: a control, or the reference arm of a contrast
    accuracy: tuple[float, ...]  # validation accuracy, one value per epoch


Grid = tuple[Curve, ...]  # the trials of one screen, with one seed and one budget

Grids = Mapping[tuple[int, int], Grid]  # by (seed, budget)


@dataclass(frozen=True)
class Result:
    """Means over the replays of one rule that selects arms."""

    epochs_saved: float  # fraction
    mean_regret: float  # best final validation accuracy of all arms minus that of the kept arms
    best_lost: float  # fraction of replays that kept none of the arms with the best final accuracy


@dataclass(frozen=True)
class Outcome:
    """One stratum under early stopping and under two baselines, which keep as many arms as each replay does.

    `cut` keeps the best arms at the first rung. `random` picks arms at random and trains no others.
    """

    arms: int
    immune: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int  # budget
    stopping: Result
    cut: Result
    random: Result
    stopped: dict[str, dict[int, float]]  # arm -> epoch -> fraction of replays that stopped it at that epoch
    final: dict[str, float]  # arm -> mean validation accuracy at its last epoch
    rank_correlation: dict[int, statistics.RankCorrelation]  # by epoch: correlation with final accuracy, over trials


@dataclass(frozen=True)
class Curves:
    """Recorded curves as grids, and a phrase for each kind of excluded trial."""

    grids: Grids
    left_out: tuple[str, ...]

    @property
    def strata(self) -> list[str]:
        return list(dict.fromkeys(curve.stratum for grid in self.grids.values() for curve in grid))


def curves(records: Records, study: Study, strata: Sequence[str] | None) -> Curves:
    """The curves of the completed student trials of one run.

    `strata` names the columns that define a stratum; None puts all arms into one stratum. A trial without a level in
    one of these columns (a control, if strata are teachers) is excluded. The run's study defines the immune arms; in
    tables without a study they are the arms with the method `study.control`. Raises `UserError` if nothing can be
    replayed.
    """
    for each in records.studies.values():
        if each.get("searches"):
            raise UserError(
                "--curves is a run of a tuned study, whose draws are not a grid of arms; allowed: a run without tuning"
            )
        if (every := each["study"].get("recipe", {}).get("validate_every", 1)) > 1:
            raise UserError(
                f"--curves is a run with recipe.validate_every={every}, so its curves have gaps; allowed: a run with "
                "recipe.validate_every=1"
            )
    trials = records.trials[records.trials["role"] == Role.STUDENT]
    if trials.empty:
        raise UserError("--curves has no student trial; allowed: tables with one, in a phase other than `teacher`")
    names = list(strata or ())
    _check_strata(names, trials)
    nowhere, ended = trials[list(map(column_of, names))].isna().any(axis=1), trials["status"] == Status.COMPLETED
    screen = Screen(strata=None if strata is None else tuple(names))
    again = _with_another_teacher(trials)
    grids, gaps = _grids(records, trials[ended & ~nowhere & ~again], study, screen)
    kinds = (
        (nowhere.sum(), f"trials without a level of {' or '.join(names)} belong to no stratum"),
        ((again & ~nowhere).sum(), "trials repeat an arm and a seed with another teacher; a screen has one"),
        ((~ended & ~nowhere & ~again).sum(), "trials did not complete"),
        (gaps, "trials have no complete curve of val_accuracy"),
    )
    found = Curves(grids, tuple(f"{count} {what}" for count, what in kinds if count))
    _check(found)
    return found


def _with_another_teacher(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Which trials repeat an arm and a seed with a teacher other than the first trial's."""
    first = trials.groupby(["arm", "seed"])["teacher_id"].transform("first")
    return (trials["teacher_id"] != first).fillna(False).astype(bool)


def _check_strata(names: Sequence[str], trials: pd.DataFrame) -> None:
    further = (str(name) for name in trials if name not in TRIALS.columns)
    possible = dict.fromkeys((*CELL_FIELDS, "epochs", "lr", "weight_decay", *further))
    known = [name for name in possible if (each := column_of(name)) in trials and trials[each].notna().any()]
    if any(name not in known for name in names):
        raise UserError(
            f"--strata is {','.join(names)!r}; allowed: none, or columns of the curves ({', '.join(known)})"
        )
    if len(set(names)) < len(names):
        raise UserError(f"--strata is {','.join(names)!r}; allowed: each column once")


def _grids(records: Records, trials: pd.DataFrame, study: Study, screen: Screen) -> tuple[Grids, int]:
    """Grids in order of seed and budget, and the number of trials whose curve has gaps."""
    accuracy = dict(iter(records.epochs.sort_values("epoch").groupby("trial_id")["val_accuracy"]))
    studies = records.studies.values()
    roles = {arm["name"]: arm["role"] for each in studies for arm in (each.get("extended") or each)["arms"]}
    grids: dict[tuple[int, int], list[Curve]] = {}
    rows: list[dict[Any, Any]] = trials.to_dict("records")
    for row in rows:
        values = accuracy.get(row["trial_id"], pd.Series(dtype="float64"))
        if values.empty or values.isna().any():
            continue
        immune = roles[row["arm"]] != ArmRole.COMPARED if row["arm"] in roles else row["method"] == study.control
        curve = Curve(row["trial_id"], row["arm"], stratum(screen, row), bool(immune), tuple(map(float, values)))
        grids.setdefault((int(row["seed"]), len(values)), []).append(curve)
    gaps = len(rows) - sum(map(len, grids.values()))
    return {key: tuple(grid) for key, grid in sorted(grids.items())}, gaps


def _check(curves: Curves) -> None:
    if not curves.grids:
        raise UserError(f"--curves has no completed student trial ({'; '.join(curves.left_out) or 'none'})")
    problems = []
    for name in curves.strata:
        budgets = {epochs for (_, epochs), grid in curves.grids.items() for each in grid if each.stratum == name}
        if len(budgets) > 1:
            said = " and ".join(map(str, sorted(budgets)))
            problems.append(f"--curves has trials with {said} epochs in the stratum {name}")
    for (seed, _), grid in curves.grids.items():
        twice = [arm for arm, count in Counter(curve.arm for curve in grid).items() if count > 1]
        problems += [f"--curves has more than one trial of the arm {arm} at seed {seed}" for arm in twice]
    if problems:
        advice = "add the column in which they differ to --strata, or exclude a phase with --phase NAME=teacher"
        raise UserError(*(f"{problem}; {advice}" for problem in problems))


def check_screen(screen: Screen, curves: Curves) -> None:
    """Raise `UserError` if the settings of early stopping do not fit the budgets of the curves."""
    problems = []
    for epochs in sorted({epochs for _, epochs in curves.grids}):
        if screen.grace > epochs:
            problems.append(f"screen.grace is {screen.grace}, longer than curves of {epochs} epochs")
        else:
            problems += margin_problems(screen, epochs)
    raise_problems(problems)


def replay(screen: Screen, grid: Grid, order: Sequence[str]) -> list[Decision]:
    """The schedule's decisions if the arms of a grid report at each rung in this order."""
    epochs, going = len(grid[0].accuracy), {curve.arm: curve for curve in grid}
    schedule = Schedule(screen, epochs)
    for curve in grid:
        schedule.enter(curve.trial_id, curve.stratum, curve.immune)
    made: list[Decision] = []
    for epoch in screen.rungs(epochs):
        for arm in [arm for arm in order if arm in going]:
            decision = schedule.report(going[arm].trial_id, arm, epoch, going[arm].accuracy[epoch - 1])
            assert decision is not None
            made.append(decision)
            if decision.stops:
                del going[arm]
    return made


def simulate(
    screen: Screen, curves: Curves, orders: int, beat: Callable[[], object] = lambda: None
) -> dict[str, Outcome]:
    """Replay each grid under `orders` arrival orders; one outcome per stratum. `beat` is called after each replay."""
    check_screen(screen, curves)
    tallies = {name: _Tally(name, screen, curves) for name in curves.strata}
    for (seed, _), grid in curves.grids.items():
        arms = [curve.arm for curve in grid]
        for number in range(orders):
            made = replay(screen, grid, arrival_order(arms, number))
            stops = {each.arm: each.epoch for each in made if each.stops}
            for tally in tallies.values():
                tally.add(grid, stops, np.random.default_rng([number, seed]))
            beat()
    return {name: tally.outcome() for name, tally in tallies.items()}


class _Tally:
    """Accumulates the replays of one stratum."""

    def __init__(self, name: str, screen: Screen, curves: Curves) -> None:
        self._name = name
        self._curves = [(seed, each) for (seed, _), grid in curves.grids.items() for each in grid
                        if each.stratum == name]  # fmt: skip
        self._epochs = len(self._curves[0][1].accuracy)
        self._first = min(screen.grace, self._epochs)
        self._stops: Counter[tuple[str, int]] = Counter()
        self._replays: Counter[str] = Counter()  # by arm, since an arm may lack seeds
        self._found: dict[str, list[tuple[float, float]]] = {"stopping": [], "cut": [], "random": []}

    def add(self, grid: Grid, stops: Mapping[str, int], chance: np.random.Generator) -> None:
        mine = [curve for curve in grid if curve.stratum == self._name]
        if not mine:
            return
        final = np.array([curve.accuracy[-1] for curve in mine])
        ran = np.array([stops.get(curve.arm, self._epochs) for curve in mine])
        kept = ran == self._epochs
        self._replays.update(curve.arm for curve in mine)
        self._stops.update((curve.arm, stops[curve.arm]) for curve in mine if curve.arm in stops)
        self._note("stopping", final, kept, ran)
        free = np.flatnonzero([not curve.immune for curve in mine])
        places = int(kept[free].sum())  # kept arms that are not immune
        early = np.array([curve.accuracy[self._first - 1] for curve in mine])
        by_then = free[np.argsort(-early[free], kind="stable")]
        for name, chosen, cost in (("cut", by_then, self._first), ("random", chance.permutation(free), 0)):
            kept = np.ones(len(mine), dtype=bool)
            kept[chosen[places:]] = False
            self._note(name, final, kept, np.where(kept, self._epochs, cost))

    def _note(self, how: str, final: NDArray[np.float64], kept: NDArray[np.bool_], ran: NDArray[Any]) -> None:
        saved = 1 - float(ran.sum()) / (self._epochs * len(ran))
        self._found[how].append((saved, float(final.max() - final[kept].max())))

    def outcome(self) -> Outcome:
        arms = list(dict.fromkeys(curve.arm for _, curve in self._curves))
        last = {arm: [curve.accuracy[-1] for _, curve in self._curves if curve.arm == arm] for arm in arms}
        stopped: dict[str, dict[int, float]] = {arm: {} for arm in arms}
        for (arm, epoch), count in sorted(self._stops.items()):
            stopped[arm][epoch] = count / self._replays[arm]
        by_epoch = list(zip(*(curve.accuracy for _, curve in self._curves), strict=True))  # [epochs][trials]
        return Outcome(
            arms=len(arms),
            immune=tuple(dict.fromkeys(curve.arm for _, curve in self._curves if curve.immune)),
            seeds=tuple(dict.fromkeys(seed for seed, _ in self._curves)),
            epochs=self._epochs,
            stopping=self._result("stopping"),
            cut=self._result("cut"),
            random=self._result("random"),
            stopped=stopped,
            final={arm: float(np.mean(values)) for arm, values in last.items()},
            rank_correlation={
                epoch: statistics.rank_correlation(by_epoch[epoch - 1], by_epoch[-1])
                for epoch in range(1, self._epochs)
            },
        )

    def _result(self, how: str) -> Result:
        saved, regret = map(np.array, zip(*self._found[how], strict=True))
        return Result(float(saved.mean()), float(regret.mean()), float((regret > 0).mean()))

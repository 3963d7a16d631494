"""Draw the next configuration of an arm with Optuna's samplers, one for each arm. The only file that imports Optuna.

A draw depends only on the seed, the arm, its number and the results of the arm's earlier draws. After a kill, the
ledger therefore has everything that a sampler needs.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL

from tune_kd.study.trial import UNENDED, Row, Status, StopReason, level_in
from tune_kd.study.tuning import Choice, Integer, LogUniform, Over, Range, Tuning

STORAGE = "optuna.sqlite"  # in a run's folder, for Optuna's dashboard; written from the ledger and never read
TRIES = 20  # attempts to draw a new configuration
DIGITS = 4  # significant digits of a drawn number, so that people can copy it
WORDS = logging.getLogger("optuna")

Ranges = Sequence[Range]


def draw(
    tuning: Tuning, arm: str, ranges: Ranges, default: Mapping[str, float], theirs: Sequence[Row]
) -> dict[str, float]:
    """The next configuration of an arm with the earlier draws `theirs`. It differs from all of them and from the
    default, which is confirmed anyway."""
    number = len(theirs)
    seed = _seed(tuning, arm, number)
    study = _study(ranges, theirs)
    study.sampler = _sampler(tuning, seed)
    seen = [tuple(float(level_in(row, each.name)) for each in ranges) for row in (default, *theirs)]
    for attempt in range(TRIES):
        if tuning.sampler == "quasi-random":
            study.enqueue_trial(_quasi_random(tuning, arm, ranges, number + attempt * tuning.budget))
        asked = study.ask(_distributions(ranges))
        values = {each.name: _rounded(asked.params[each.name], each.over) for each in ranges}
        if tuple(values.values()) not in seen:
            return values
        study.tell(asked, state=TrialState.FAIL)
    counted = itertools.product(*(each.configurations or (values[each.name],) for each in ranges))
    left = [each for each in counted if each not in seen]
    assert left, f"{arm} has no configuration left to draw"  # `validate.check` counts them
    chosen = left[int(np.random.default_rng(seed).integers(len(left)))]
    return {each.name: value for each, value in zip(ranges, chosen, strict=True)}


def importances(ranges: Ranges, theirs: Sequence[Row]) -> dict[str, float]:
    """The share of each range in the variance of validation accuracy over completed draws, from Optuna's functional
    ANOVA (Hutter et al. 2014). Shares sum to 1. Empty if there are fewer than two different accuracies."""
    ended = [row for row in theirs if row["status"] == Status.COMPLETED]
    if len({row["val_accuracy_best"] for row in ended}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with _quietly():
        found = optuna.importance.get_param_importances(_study(ranges, ended), evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


class Storage:
    """Ended draws in an Optuna database. `optuna-dashboard sqlite:///RUN/optuna.sqlite` shows them."""

    def __init__(self, path: Path, run: str) -> None:
        """Create an empty database and delete an old one. Raises any error of Optuna and its database."""
        for end in ("", "-journal", "-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        self._run = run
        with _quietly():
            self._storage = optuna.storages.RDBStorage(url(path))

    def add(self, arm: str, ranges: Ranges, row: Row) -> None:
        """Add a draw that has ended. Raises any error of Optuna and its database."""
        with _quietly():
            study = optuna.create_study(
                storage=self._storage, study_name=f"{self._run}: {arm}", direction="maximize", load_if_exists=True
            )
            study.add_trial(_trial(ranges, row))

    def close(self) -> None:
        self._storage.engine.dispose()


def url(path: Path) -> str:
    """The URL with which SQLAlchemy, and thus Optuna and MLflow, opens an SQLite file of any name.

    It also names the driver: for URLs that start with sqlite:///, MLflow would create the folder under its quoted
    name."""
    return URL.create("sqlite+pysqlite", database=str(path.absolute())).render_as_string()


def _study(ranges: Ranges, theirs: Sequence[Row]) -> optuna.Study:
    with _quietly():
        study = optuna.create_study(direction="maximize")
        study.add_trials([_trial(ranges, row) for row in theirs])
    return study


def _trial(ranges: Ranges, row: Row) -> FrozenTrial:
    """A draw as an Optuna trial. Stopped and diverged draws rank below completed ones, by their last accuracy. A failed
    draw gives no information."""
    values = {each: level_in(row, each.name) for each in ranges}
    params = {each.name: int(value) if isinstance(each.over, Integer) else value for each, value in values.items()}
    steps = {int(row["epochs_run"]): float(row["val_accuracy"] or 0.0)}
    if row["status"] == Status.COMPLETED:
        state, value = TrialState.COMPLETE, float(row["val_accuracy_best"])
    elif row["status"] == Status.STOPPED or row["stop_reason"] == StopReason.DIVERGED:
        state, value = TrialState.PRUNED, None
    else:
        state, value = (TrialState.RUNNING if row["status"] in UNENDED else TrialState.FAIL), None
    distributions = _distributions(ranges)
    kept = {} if state == TrialState.RUNNING else steps
    return optuna.trial.create_trial(
        state=state, value=value, params=params, distributions=distributions, intermediate_values=kept
    )


def _distributions(ranges: Ranges) -> dict[str, BaseDistribution]:
    return {each.name: _distribution(each.over) for each in ranges}


def _distribution(over: Over) -> BaseDistribution:
    if isinstance(over, Choice):
        return CategoricalDistribution(over.levels)
    if isinstance(over, Integer):
        return IntDistribution(over.low, over.high)
    return FloatDistribution(over.low, over.high, log=isinstance(over, LogUniform))


def _sampler(tuning: Tuning, seed: int) -> optuna.samplers.BaseSampler:
    if tuning.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(
        n_startup_trials=tuning.startup, constant_liar=tuning.parallel > 1, multivariate=True, seed=seed
    )


def _quasi_random(tuning: Tuning, arm: str, ranges: Ranges, number: int) -> dict[str, float]:
    """A point of the arm's scrambled Sobol sequence."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(ranges), seed=np.random.default_rng(_seed(tuning, arm, 0)))
    if number:
        sequence.fast_forward(number)
    shares = sequence.random(1)[0].tolist()
    return {each.name: _at(each.over, share) for each, share in zip(ranges, shares, strict=True)}


def _at(over: Over, share: float) -> float:
    """The value at a share of a range. `share` is in [0, 1)."""
    if isinstance(over, Choice):
        return over.levels[int(share * len(over.levels))]
    if isinstance(over, Integer):
        return over.low + int(share * (over.high - over.low + 1))
    if isinstance(over, LogUniform):
        return float(over.low * (over.high / over.low) ** share)
    return over.low + share * (over.high - over.low)


def _rounded(value: float, over: Over) -> float:
    if isinstance(over, Choice | Integer):
        return float(value)
    return min(over.high, max(over.low, float(f"{value:.{DIGITS}g}")))


def _seed(tuning: Tuning, arm: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{tuning.seed} {arm} {number}".encode()).digest()[:4])


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence Optuna's log of every trial and its warnings about experimental features."""
    before = WORDS.level
    WORDS.setLevel(logging.ERROR)
    try:
        yield
    finally:
        WORDS.setLevel(before)

"""Simulated false-positive rate of a study when all arms are identical, from screen to verdict.

A trial's learning curve and test accuracy are drawn; scheduling and analysis are those of real runs. Two common
alternative practices are applied to the same draws.
"""

import gc
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np

from tune_kd.analysis import accuracy, contrasts, statistics
from tune_kd.analysis.simulate import Curve, replay
from tune_kd.analysis.verdicts import ALPHA
from tune_kd.records.adaptive_plan import to_come
from tune_kd.records.reader import Records
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, TrialRow, first_row
from tune_kd.records.tables import frame
from tune_kd.study.contrasts import Contrast
from tune_kd.study.early_stopping import stratum
from tune_kd.study.plan import Plan, arrival_order, plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import ArmRole, Phase, Status, StopReason, Trial

PRACTICES = {
    "designed": "as designed: screen, confirm on fresh seeds, Holm, the declared looks",
    "plain_asha": "plain ASHA over arms and seeds, means of those that finish, Welch, Holm",
    "until_significant": "no screen, paired t tests, Holm; more seeds until something is significant",
}
ACCURACY = 0.95  # at the end, of every arm
EARLY_NOISE = 15  # sd of validation accuracy at the full learning rate, in standard deviations between seeds


@dataclass(frozen=True)
class Rate:
    """How many of `studies` null studies had at least one false finding."""

    found: int
    studies: int

    @property
    def share(self) -> float:
        return self.found / self.studies

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / self.studies)


@dataclass(frozen=True)
class Calibration:
    """The false-positive rate of each practice, and the selection bias of plain ASHA."""

    rates: dict[str, Rate]
    finished: float  # fraction of plain ASHA's trials that complete
    bias: float  # mean error of their accuracy, in standard deviations between seeds


@dataclass(frozen=True)
class Found:
    """The outcome of one null study."""

    false: dict[str, bool]  # by practice: whether it claims a difference
    finished: tuple[float, ...]  # plain ASHA: accuracy of each completed trial minus the true one
    tried: int  # plain ASHA: number of competing trials


def calibrate(study: Study, studies: int, processes: int, beat: Callable[[], object] = lambda: None) -> Calibration:
    """The false-positive rate of each practice over `studies` replays of a study whose arms are identical.

    `beat` is called after each replay. Replay i is seeded with i alone.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_prepare) as pool:
        found = []
        for one in pool.map(partial(null_study, study), range(studies), chunksize=4):
            found.append(one)
            beat()
    errors = [error for one in found for error in one.finished]
    return Calibration(
        {name: Rate(sum(one.false[name] for one in found), studies) for name in PRACTICES},
        len(errors) / max(1, sum(one.tried for one in found)),
        float(np.mean(errors)) / study.deviation if errors else 0.0,
    )


def _prepare() -> None:
    """Exclude imported modules from garbage collection, which statsmodels triggers at every Holm adjustment (0.1 s)."""
    import statsmodels.stats.multitest  # noqa: F401

    gc.freeze()


def null_study(study: Study, number: int) -> Found:
    """Draw a null study with this seed and apply each practice to it."""
    everything = plan(study, "0" * 64, len(study.confirm.looks or (0,)) - 1)
    nature = _Draws(study, number)
    finished, tried = _finishers(everything, nature, number)
    false = {
        "designed": _designed(study, nature, number),
        "plain_asha": _differ(everything, finished),
        "until_significant": _until_significant(everything, nature),
    }
    controls = {arm.name for arm in everything.arms if arm.role == ArmRole.CONTROL}
    competed = [value for arm, values in finished.items() if arm not in controls for value in values]
    return Found(false, tuple(value - ACCURACY for value in competed), tried)


class _Draws:
    """Draws learning curves and test accuracies with the same distribution for every arm.

    As in the published curves, validation and test accuracy share half of the variance between seeds; the other half
    affects the test accuracy alone. The noise of validation accuracy is proportional to the learning rate.
    """

    def __init__(self, study: Study, number: int) -> None:
        recipe = study.recipe
        epochs = np.arange(1, recipe.epochs + 1)
        rate = (1 + np.cos(np.pi * epochs / recipe.epochs)) / 2
        self._noise = study.deviation * EARLY_NOISE * rate
        self._mean = ACCURACY * (1 - np.exp(-3 * epochs / recipe.epochs) / 2)
        self._half = study.deviation / math.sqrt(2)
        self._number = number
        self._drawn: dict[tuple[str, int], tuple[tuple[float, ...], float]] = {}

    def trial(self, arm: str, seed: int) -> tuple[tuple[float, ...], float]:
        """Validation accuracy by epoch, and test accuracy."""
        if (arm, seed) not in self._drawn:
            chance = np.random.default_rng([self._number, seed, *arm.encode()])
            luck = self._half * chance.standard_normal()
            curve = self._mean + luck + self._noise * chance.standard_normal(len(self._mean))
            test = ACCURACY + luck + self._half * chance.standard_normal()
            self._drawn[arm, seed] = tuple(np.clip(curve, 0, 1).tolist()), float(test)
        return self._drawn[arm, seed]


def _designed(study: Study, nature: _Draws, number: int) -> bool:
    """Whether the designed procedure claims a difference: screen, confirmation, contrasts and Holm at each look."""
    at = [plan(study, "0" * 64, look) for look in range(len(study.confirm.looks or (0,)))]
    arms, seed = at[0].arms, study.screen.seed
    grid = tuple(
        Curve(arm.name, arm.name, stratum(study.screen, asdict(arm.cell)), arm.immune, nature.trial(arm.name, seed)[0])
        for arm in arms
    )
    made = replay(study.screen, grid, arrival_order([arm.name for arm in arms], number))
    stopped = {decision.arm for decision in made if decision.stops}
    return any(_claims(planned, look, stopped, nature) for look, planned in enumerate(at))


def _claims(planned: Plan, look: int, stopped: set[str], nature: _Draws) -> bool:
    """Whether the verdict on any contrast of a look is better or worse."""
    trials = (*planned.trials, *to_come(planned))  # as if the best draw of a tuned arm were as good as any
    rows = [_row(trial, trial.arm in stopped, nature) for trial in trials if trial.phase == Phase.CONFIRM]
    record = {
        "study": asdict(planned.study),
        "look": look,
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
    }
    records = Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {"null": record})
    return bool(contrasts.contrasts(records)["verdict"].isin(["better", "worse"]).any())


def _row(trial: Trial, stopped: bool, nature: _Draws) -> TrialRow:
    row = first_row("null", trial)
    if stopped:
        return row | {"status": Status.STOPPED, "stop_reason": StopReason.ASHA}
    test = nature.trial(trial.arm, trial.seed)[1]
    return row | {"status": Status.COMPLETED, "epochs_run": trial.recipe.epochs, accuracy.HEADLINE: test}


def _finishers(planned: Plan, nature: _Draws, number: int) -> tuple[dict[str, list[float]], int]:
    """Plain ASHA over all arms and seeds together: test accuracies of completed trials by arm, and the number of
    competing trials. The control is a baseline and always completes."""
    study = planned.study
    screen = replace(study.screen, strata=None, margin=0.0, min_peers=1)
    controls = {arm.name for arm in planned.arms if arm.role == ArmRole.CONTROL}
    trials = {f"{arm.name} {seed}": (arm.name, seed) for arm in planned.arms for seed in study.confirm.all_seeds}
    grid = tuple(
        Curve(name, name, "all", arm in controls, nature.trial(arm, seed)[0]) for name, (arm, seed) in trials.items()
    )
    made = replay(screen, grid, arrival_order(list(trials), number))
    stopped = {decision.arm for decision in made if decision.stops}
    finished: dict[str, list[float]] = {arm.name: [] for arm in planned.arms}
    for name, (arm, seed) in trials.items():
        if name not in stopped:
            finished[arm].append(nature.trial(arm, seed)[1])
    return finished, sum(arm not in controls for arm, _ in trials.values())


def _differ(planned: Plan, finished: dict[str, list[float]]) -> bool:
    """Whether Welch's tests on the completed trials claim a difference."""
    effects = [contrast for contrast in planned.contrasts if contrast.kind == "effect"]
    return _significant([statistics.welch(*(finished[arm] for arm, _ in effect.weights)).p for effect in effects])


def _until_significant(planned: Plan, nature: _Draws) -> bool:
    """Whether a contrast becomes significant as seeds are added; without looks, their number doubles twice."""
    confirm = planned.study.confirm
    first = len(confirm.seeds)
    looks = confirm.looks or (first, 2 * first, 4 * first)
    seeds = replace(confirm, looks=looks).all_seeds
    return any(
        _significant([_paired_p(contrast, seeds[:count], nature) for contrast in planned.contrasts]) for count in looks
    )


def _paired_p(contrast: Contrast, seeds: tuple[int, ...], nature: _Draws) -> float | None:
    from scipy.stats import ttest_1samp

    values = [sum(weight * nature.trial(arm, seed)[1] for arm, weight in contrast.weights) for seed in seeds]
    return float(ttest_1samp(values, 0.0).pvalue) if len(values) > 1 else None


def _significant(p_values: list[float | None]) -> bool:
    return bool((statistics.holm([math.nan if p is None else p for p in p_values]) < ALPHA).any())

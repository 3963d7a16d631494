"""The screen of a simulated study, and two common practices in place of its design: plain ASHA, and adding seeds until
something is significant.

These use the scheduler of real runs, so they replay one study at a time. Study i is drawn from seeds that begin with i.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from tune_kd.analysis import statistics
from tune_kd.analysis.block_model import Array, Flags, estimate
from tune_kd.analysis.scenarios import ACCURACY, Design
from tune_kd.analysis.simulate import Curve, replay
from tune_kd.analysis.verdicts import ALPHA
from tune_kd.study.early_stopping import stratum
from tune_kd.study.plan import Plan, arrival_order
from tune_kd.study.spec import Study
from tune_kd.study.trial import ArmRole

EARLY_NOISE = 15  # sd of validation accuracy at the full learning rate, as a multiple of the sd between seeds


def trials(study: Study, count: int, chance: np.random.Generator) -> tuple[Array, Array]:
    """Draw trials of equally good arms: curves of validation accuracy [count, epochs], and test accuracies [count].

    As in the published curves, validation and test accuracy share half of the variance between seeds; the other half
    affects the test accuracy alone. The noise of validation accuracy is proportional to the learning rate.
    """
    epochs = np.arange(1, study.most_epochs + 1)
    rate = (1 + np.cos(np.pi * epochs / study.most_epochs)) / 2
    mean = ACCURACY * (1 - np.exp(-3 * epochs / study.most_epochs) / 2)
    half = study.deviation / math.sqrt(2)
    luck = half * chance.standard_normal(count)
    noise = study.deviation * EARLY_NOISE * rate * chance.standard_normal((count, len(epochs)))
    test = ACCURACY + luck + half * chance.standard_normal(count)
    return np.clip(mean + luck[:, None] + noise, 0, 1), test


def stopped(planned: Plan, number: int) -> Flags:
    """The arms [A] that the screen stops in study `number`.

    All arms are equally good and have the study's deviation. Confirmation uses other seeds, so its draws are
    independent of the screen's in every scenario.
    """
    study, arms = planned.study, planned.arms
    curves, _ = trials(study, len(arms), np.random.default_rng([number, *b"screen"]))
    grid = tuple(
        Curve(arm.name, arm.name, stratum(study.screen, arm.cell.levels), arm.immune, tuple(curve))
        for arm, curve in zip(arms, curves.tolist(), strict=True)
    )
    made = replay(study.screen, grid, arrival_order([arm.name for arm in arms], number))
    lost = {decision.arm for decision in made if decision.stops}
    return np.array([arm.name in lost for arm in arms])


def until_significant(design: Design, values: Array, looks: tuple[int, ...]) -> Flags:
    """Whether paired t tests with Holm claim a difference at any of `looks`, in each study of `values` [N, A, S]."""
    found = np.zeros(len(values), dtype=bool)
    for count in looks:
        pairs = estimate(values[..., :count], design.strata, design.weights, pairs_alone=True)
        found |= (statistics.holm(pairs.two_sided()) < ALPHA).any(-1)
    return found


@dataclass(frozen=True)
class Asha:
    """A study whose arms are all alike, under plain ASHA."""

    claims: bool  # whether a difference is found
    errors: tuple[float, ...]  # test accuracy of each trial that competed and completed, minus the true one
    tried: int  # number of competing trials


def plain_asha(planned: Plan, number: int) -> Asha:
    """Plain ASHA over all arms and seeds together, then Welch's tests with Holm on the completed trials.

    The control is a baseline and always completes.
    """
    study = planned.study
    screen = replace(study.screen, strata=None, margin=0.0, min_peers=1)
    controls = {arm.name for arm in planned.arms if arm.role == ArmRole.CONTROL}
    owners = [arm.name for arm in planned.arms for _ in study.confirm.all_seeds]
    curves, tests = trials(study, len(owners), np.random.default_rng([number, *b"plain_asha"]))
    grid = tuple(
        Curve(f"{arm} {place}", f"{arm} {place}", "all", arm in controls, tuple(curve))
        for place, (arm, curve) in enumerate(zip(owners, curves.tolist(), strict=True))
    )
    made = replay(screen, grid, arrival_order([curve.arm for curve in grid], number))
    lost = {decision.arm for decision in made if decision.stops}
    finished: dict[str, list[float]] = {arm.name: [] for arm in planned.arms}
    for curve, arm, test in zip(grid, owners, tests.tolist(), strict=True):
        if curve.arm not in lost:
            finished[arm].append(test)
    errors = [value - ACCURACY for arm, values in finished.items() if arm not in controls for value in values]
    return Asha(_differ(planned, finished), tuple(errors), sum(arm not in controls for arm in owners))


def _differ(planned: Plan, finished: dict[str, list[float]]) -> bool:
    """Whether Welch's tests on the completed trials claim a difference."""
    effects = [contrast for contrast in planned.contrasts if contrast.kind == "effect"]
    p = [statistics.welch(*(finished[arm] for arm, _ in effect.weights)).p for effect in effects]
    return bool((statistics.holm([math.nan if each is None else each for each in p]) < ALPHA).any())

"""The power that a plan reports for its seeds, against simulated studies."""

from dataclasses import replace

import numpy as np
import pytest

from search_spaces import ablation
from tune_kd.analysis import block_model, power, statistics, verdicts
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import Confirm


def simulated(planned: Plan, name: str, difference: float, seeds: int, studies: int = 4000) -> float:
    """The share of studies that find a true difference of one contrast, in its family."""
    primary = [each for each in planned.contrasts if each.family == "primary"]
    arms = [arm.name for arm in planned.arms]
    weights = np.array([[dict(each.weights).get(arm, 0.0) for arm in arms] for each in primary])
    place = [each.name for each in primary].index(name)
    values = planned.study.deviation * np.random.default_rng(7).standard_normal((studies, len(arms), seeds))
    values += difference * (weights[place] / (weights[place] ** 2).sum())[:, None]
    found = block_model.estimate(values, [arm.cell.stem for arm in planned.arms], weights)
    alone = found.two_sided()[:, place] * len(primary)  # at Holm's strictest level
    return float(np.mean((alone < verdicts.ALPHA) & (found.value[:, place] > 0)))


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize("name", ["none: cifar - imagenet", "cifar: logit - none", "(logit - none): cifar - imagenet"])
def test_about_80_percent_of_simulated_studies_find_the_detectable_difference(name: str, seeds: int) -> None:
    planned = plan(replace(ablation.study(), confirm=Confirm(seeds=tuple(range(1, seeds + 1)))))
    found = {each.contrast: each for each in power.powers(planned, seeds, 0.05)}[name]
    assert found.detectable is not None
    assert 0.78 < simulated(planned, name, found.detectable, seeds) < 0.85


def test_the_seeds_for_a_difference_are_the_fewest_that_detect_it() -> None:
    planned = plan(ablation.study())
    for difference, needed in power.powers(planned, 5, 0.05)[1].seeds.items():
        assert needed is not None
        enough, short = (power.powers(planned, seeds, 0.05)[1].detectable for seeds in (needed, needed - 1))
        assert enough is not None and short is not None and enough <= difference < short


def test_two_arms_alone_have_the_power_of_a_paired_t_test() -> None:
    study = ablation.study()
    two = replace(study, factors=(replace(study.factors[1], levels=("none", "feature")),), moderator=None,
                  contrasts=study.contrasts[2:3], reference=())  # fmt: skip
    (found,) = power.powers(plan(two), 5, 0.05)
    assert found.detectable == statistics.detectable(5, two.deviation * 2**0.5)


def test_the_cost_of_a_seed_matches_a_plan_with_one_more_seed() -> None:
    study = ablation.study()
    whole, more = power.slot_seconds(plan(study))
    again, _ = power.slot_seconds(plan(replace(study, confirm=Confirm(seeds=(1, 2, 3, 4, 5, 6)))))
    assert whole + more == pytest.approx(again)

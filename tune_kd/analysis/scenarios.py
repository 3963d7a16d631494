"""Simulated test accuracies of a study whose arms are all equally good. Scenarios differ in the spread between seeds.

A scenario is drawn from `numpy.random.default_rng([*NAME.encode(), FIRST])`, where FIRST is the number of the batch's
first study. So its studies are always the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tune_kd.analysis.block_model import Array, Flags
from tune_kd.study.plan import Plan
from tune_kd.study.spec import Study

ACCURACY = 0.95  # true, of every arm
STEMS = {"imagenet": 22 / 15, "cifar": 14 / 15}
"""Published deviations of a ResNet-18 without distillation, divided by the 0.15 points that a study expects by default.
"""


@dataclass(frozen=True)
class Scenario:
    """The spread of accuracies. Deviations between seeds are relative to the study's `deviation`."""

    words: str
    by_stem: Mapping[str, float] = field(default_factory=lambda: STEMS)  # used for studies with several stems
    by_method: Mapping[str, float] = field(default_factory=dict)
    by_arm: float = 0.0  # an arm's deviation is multiplied by e**by_arm or e**-by_arm, at random in each study
    correlation: float = 0.0  # between arms of a stratum that have a teacher, at each seed
    blocks: Literal["none", "shared", "own"] = "none"  # whether a seed has an effect on all arms, or one per stratum
    looks: tuple[int, ...] | None = None  # None: the looks of the study


SCENARIOS = {
    "alike": Scenario("one spread for all", by_stem={}),
    "equal": Scenario("equal within a stem"),
    "unequal_arms": Scenario("spread x e^±0.4 by arm", by_arm=0.4),
    "unequal_methods": Scenario(".14/.11/.17 by method", by_method={"logit": 11 / 14, "feature": 17 / 14}),
    "very_unequal_methods": Scenario(".14/.08/.20 by method", by_method={"logit": 8 / 14, "feature": 20 / 14}),
    "correlated": Scenario("KD arms correlate 0.3", correlation=0.3),
    "very_correlated": Scenario("KD arms correlate 0.5", correlation=0.5),
    "shared_blocks": Scenario("seed effect on all arms", blocks="shared"),
    "own_blocks": Scenario("seed effect by stratum", blocks="own"),
    "looks_5_10_20": Scenario("looks at 5, 10, 20", looks=(5, 10, 20)),
}


def scenarios(study: Study) -> dict[str, Scenario]:
    """The scenarios by name. For a study with declared looks, one more scenario has only the first look."""
    found = dict(SCENARIOS)
    if study.confirm.looks:
        first = study.confirm.looks[0]
        found["one_look"] = replace(found["equal"], words=f"one look, at {first} seeds", looks=(first,))
    return found


def looks(study: Study, scenario: Scenario) -> tuple[int, ...]:
    """The numbers of seeds at the looks of a study."""
    return scenario.looks or study.confirm.looks or (len(study.confirm.seeds),)


@dataclass(frozen=True)
class Design:
    """The C contrasts of A arms that a plan declares, as arrays."""

    planned: Plan
    strata: tuple[tuple[str, ...], ...]  # [A]
    weights: Array  # [C, A]

    @classmethod
    def of(cls, planned: Plan) -> "Design":
        levels = [[str(arm.cell.level(name)) for name in planned.study.strata] for arm in planned.arms]
        weights = [[dict(each.weights).get(arm.name, 0.0) for arm in planned.arms] for each in planned.contrasts]
        return cls(planned, tuple(map(tuple, levels)), np.array(weights))

    @property
    def places(self) -> list[int]:
        """The number of each arm's stratum [A]."""
        known = list(dict.fromkeys(self.strata))
        return [known.index(each) for each in self.strata]

    @property
    def across(self) -> Flags:
        """The contrasts [C] whose weights do not sum to 0 in each stratum."""
        by_stratum = self.weights @ np.eye(len(self.strata))[self.places]
        return np.asarray((np.abs(by_stratum) > 1e-9).any(1))

    @property
    def families(self) -> list[str]:
        return [str(each.family) for each in self.planned.contrasts]


def draw(name: str, scenario: Scenario, design: Design, first: int, studies: int) -> Array:
    """Test accuracies [studies, arms, seeds] of equally good arms. `first` is the number of the first study."""
    study, arms, places = design.planned.study, design.planned.arms, design.places
    chance = np.random.default_rng([*name.encode(), first])
    shape = studies, len(arms), looks(study, scenario)[-1]
    noise = chance.standard_normal(shape)
    if scenario.correlation:
        taught = np.array([arm.cell.teacher is not None for arm in arms])
        common = chance.standard_normal((studies, max(places) + 1, shape[-1]))[:, places]
        both = math.sqrt(1 - scenario.correlation) * noise + math.sqrt(scenario.correlation) * common
        noise = np.where(taught[:, None], both, noise)
    noise *= spreads(scenario, design)[:, None]
    if scenario.by_arm:
        noise *= np.exp(scenario.by_arm * chance.choice([-1.0, 1.0], (*shape[:2], 1)))
    if scenario.blocks != "none":
        of_arm = places if scenario.blocks == "own" else [0] * len(places)
        noise += chance.standard_normal((studies, max(of_arm) + 1, shape[-1]))[:, of_arm]
    return np.asarray(ACCURACY + study.deviation * noise)


def spreads(scenario: Scenario, design: Design) -> Array:
    """The standard deviation of each arm [A] between seeds, divided by the deviation that the study expects."""
    by_stem = scenario.by_stem if len(design.planned.study.levels("stem")) > 1 else {}
    return np.array(
        [by_stem.get(arm.cell.stem, 1.0) * scenario.by_method.get(arm.cell.method, 1.0) for arm in design.planned.arms]
    )

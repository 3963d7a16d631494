"""Calibrate a study's verdicts: false findings, coverage and power in simulated studies, by scenario.

The screen, estimates and verdicts are computed as in real runs, for many studies at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tune_kd.analysis import practices, verdicts
from tune_kd.analysis.block_model import Array, Estimates, Flags, estimate
from tune_kd.analysis.scenarios import SCENARIOS, Design, Scenario, draw, looks, scenarios, spreads
from tune_kd.analysis.statistics import MARGIN, spent
from tune_kd.analysis.verdicts import ALPHA
from tune_kd.study.contrasts import Contrast
from tune_kd.study.plan import plan
from tune_kd.study.spec import Family, Study
from tune_kd.system.errors import UserError

DIFFERENCES = (0.001, 0.002, 0.003, 0.005)  # true differences for which power is simulated
CHUNK = 2_000  # studies per batch
MOST_ASHA = 200  # studies of plain ASHA, which cannot be batched
PRACTICES = {
    "designed": "as designed: screen, confirm on fresh seeds, block model, Holm in each family",
    "before_0_7": "as before 0.7: the same trials, paired t tests, Holm over all contrasts",
    "until_significant": "no screen, paired t tests, Holm; more seeds until something is significant",
    "plain_asha": "plain ASHA over arms and seeds, means of those that finish, Welch, Holm",
}


@dataclass(frozen=True)
class Rule:
    """The rule for contrasts. `pairs_alone` selects paired t tests with Holm over all contrasts, as before 0.7."""

    prior_df: float | None = None  # of the block model; None for `shipped_prior`
    pairs_alone: bool = False


@dataclass(frozen=True)
class Rate:
    """The number `found` of `studies` simulated studies in which an event occurred."""

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
class Performance:
    """The performance of a rule in the simulated studies of a scenario."""

    scenario: Scenario
    looks: tuple[int, ...]
    false: dict[str, Rate]  # at least one finding although all arms are equally good; by family, and `any`
    coverage: dict[str, Rate]  # by contrast: its intervals contain the true difference at all looks
    power: dict[str, dict[float, Rate]]  # by primary contrast of two arms and true difference: found, with its sign

    def covered(self, names: Sequence[str]) -> tuple[float, float] | None:
        """Mean and lowest coverage of some contrasts. None if none of them has an interval in any study."""
        shares = [self.coverage[name].share for name in names if name in self.coverage]
        return (float(np.mean(shares)), min(shares)) if shares else None


@dataclass(frozen=True)
class Calibration:
    """The performance of a study in each scenario, and the false findings of common practices if all arms are alike."""

    contrasts: tuple[Contrast, ...]
    across: tuple[str, ...]  # contrasts across strata
    shown: str | None  # the primary contrast whose power is shown: the one that is easiest to find
    scenarios: dict[str, Performance]
    before: Performance  # of the rule before 0.7
    false: dict[str, Rate]  # false-positive rate by practice
    finished: float  # fraction of plain ASHA's trials that complete
    bias: float  # mean error of their accuracy, in standard deviations between seeds

    @property
    def groups(self) -> dict[str, list[str]]:
        """Groups of contrasts whose coverage is reported: each family, and contrasts across strata."""
        found: dict[str, list[str]] = {str(family): [] for family in Family}
        for each in self.contrasts:
            found[str(each.family)].append(each.name)
        return found | {"across_strata": list(self.across)}


def steps(study: Study, studies: int) -> int:
    """The number of times that `calibrate` calls `beat`."""
    return studies + min(studies, MOST_ASHA) + (len(scenarios(study)) + 2) * math.ceil(studies / CHUNK)


def calibrate(study: Study, studies: int, beat: Callable[[], object] = lambda: None) -> Calibration:
    """Simulate `studies` studies of each scenario. Raises `UserError` for a study without contrasts."""
    design = Design.of(plan(study, "0" * 64))
    if not len(design.weights):
        raise UserError(f"STUDY is {study.name}, which declares no contrasts; allowed: a study with contrasts")
    stopped = screened(design, studies, beat)
    found = {name: performance(design, name, each, stopped, beat=beat) for name, each in scenarios(study).items()}
    before = performance(design, "alike", SCENARIOS["alike"], stopped, Rule(pairs_alone=True), beat)
    asha = []
    for number in range(min(studies, MOST_ASHA)):
        asha.append(practices.plain_asha(design.planned, number))
        beat()
    errors = [error for one in asha for error in one.errors]
    false = {
        "designed": found["alike"].false["any"],
        "before_0_7": before.false["any"],
        "until_significant": _until_significant(design, studies, beat),
        "plain_asha": Rate(sum(one.claims for one in asha), len(asha)),
    }
    across = tuple(
        each.name for each, is_across in zip(design.planned.contrasts, design.across, strict=True) if is_across
    )
    finished = len(errors) / max(1, sum(one.tried for one in asha))
    bias = float(np.mean(errors)) / study.deviation if errors else 0.0
    return Calibration(design.planned.contrasts, across, _shown(design), found, before, false, finished, bias)


def screened(design: Design, studies: int, beat: Callable[[], object] = lambda: None) -> Flags:
    """The arms [studies, A] that each study's screen stops; they are the same in all scenarios."""
    found = []
    for number in range(studies):
        found.append(practices.stopped(design.planned, number))
        beat()
    return np.array(found)


def performance(
    design: Design,
    name: str,
    scenario: Scenario,
    stopped: Flags,
    rule: Rule = Rule(),
    beat: Callable[[], object] = lambda: None,
) -> Performance:
    """Judge simulated studies of a scenario, one for each row of `stopped` [studies, A]."""
    counts = looks(design.planned.study, scenario)
    found = []
    for first in range(0, len(stopped), CHUNK):
        chunk = stopped[first : first + CHUNK]
        values = draw(name, scenario, design, first, len(chunk))
        at = [estimates(values[..., :count], chunk, design, rule) for count in counts]
        found.append((*_false(at, counts, design, rule), _power(at, counts, design, rule)))
        beat()
    false, covered, judged, powers = (np.sum([each[part] for each in found], axis=0) for part in range(4))
    contrasts, studies = design.planned.contrasts, len(stopped)
    return Performance(
        scenario,
        counts,
        {str(name): Rate(int(count), studies) for name, count in zip((*Family, "any"), false, strict=True)},
        {each.name: Rate(int(held), int(n)) for each, held, n in zip(contrasts, covered, judged, strict=True) if n},
        {
            contrasts[place].name: {size: Rate(int(n), studies) for size, n in zip(DIFFERENCES, row, strict=True)}
            for place, row in zip(_effects(design), powers, strict=True)
        },
    )


def estimates(values: Array, stopped: Flags, design: Design, rule: Rule) -> Estimates:
    """Estimate the contrasts in each study of `values` [N, A, S], without the `stopped` arms [N, A].

    All fields of the result are [N, C]. Studies with the same arms are estimated together.
    """
    patterns, which = np.unique(stopped, axis=0, return_inverse=True)
    shape = len(values), len(design.weights)
    whole: dict[str, Any] = {}
    for number, pattern in enumerate(patterns):
        theirs = which == number
        kept = np.where(pattern[:, None], np.nan, values[theirs])
        part = estimate(kept, design.strata, design.weights, prior_df=rule.prior_df, pairs_alone=rule.pairs_alone)
        for each in fields(Estimates):
            value = np.asarray(getattr(part, each.name))
            whole.setdefault(each.name, np.empty(shape, value.dtype))[theirs] = value
    return Estimates(**whole)


def p_values(at: Sequence[Estimates], counts: Sequence[int], families: Sequence[str]) -> Array:
    """Adjusted p values [N, C] for no difference, after all looks."""
    return verdicts.adjusted(at, spent(counts), families, MARGIN)[0]


def _false(at: Sequence[Estimates], counts: Sequence[int], design: Design, rule: Rule) -> tuple[Array, Array, Array]:
    """Count studies with a false finding, by family and in any; for each contrast, studies whose intervals contain 0,
    and studies that have intervals."""
    families = np.array(design.families)
    claims = p_values(at, counts, _families(design, rule)) < ALPHA
    within = [claims[:, families == family].any(1).sum() for family in Family]
    missed = np.zeros_like(claims)
    for each, level in zip(at, spent(counts), strict=True):
        low, high = each.interval(1 - level)
        missed |= (low > 0) | (high < 0)
    judged = ~np.isnan(low)
    return np.array([*within, claims.any(1).sum()]), (judged & ~missed).sum(0), judged.sum(0)


def _power(at: Sequence[Estimates], counts: Sequence[int], design: Design, rule: Rule) -> Array:
    """Count studies that find each primary contrast of two arms, by true difference [E, D]."""
    families = np.array(_families(design, rule))
    found = []
    for place in _effects(design):
        theirs = np.flatnonzero(families == families[place])
        shift = design.weights[theirs] @ _treated(design, place)
        here = int(np.flatnonzero(theirs == place)[0])
        parts = [_only(each, theirs) for each in at]
        row = []
        for size in DIFFERENCES:
            moved = [_shifted(each, size * shift) for each in parts]
            p = p_values(moved, counts, families[theirs].tolist())
            row.append(((p[:, here] < ALPHA) & (moved[-1].value[:, here] > 0)).sum())
        found.append(row)
    return np.array(found, dtype=int).reshape(len(found), len(DIFFERENCES))


def _families(design: Design, rule: Rule) -> list[str]:
    return ["all"] * len(design.weights) if rule.pairs_alone else design.families


def _effects(design: Design) -> list[int]:
    """The indices of the primary contrasts of two arms."""
    contrasts = design.planned.contrasts
    return [place for place, each in enumerate(contrasts) if each.family == Family.PRIMARY and len(each.weights) == 2]


def _shown(design: Design) -> str | None:
    """The name of the contrast of two arms with the least variance in the scenario `equal`. None if there is none."""
    variances = design.weights**2 @ spreads(SCENARIOS["equal"], design) ** 2
    places = sorted(_effects(design), key=lambda place: (design.across[place], variances[place]))
    return design.planned.contrasts[places[0]].name if places else None


def _treated(design: Design, place: int) -> Flags:
    """The arms [A] that a true difference of this contrast shifts: the treated arm, or all arms of a treated method in
    its stratum."""
    planned, treated = design.planned, np.asarray(design.weights[place] > 0)
    if planned.contrasts[place].factor != "method":
        return treated
    alike = [(arm.cell.method, stratum) for arm, stratum in zip(planned.arms, design.strata, strict=True)]
    return np.array([each == alike[int(treated.argmax())] for each in alike])


def _only(found: Estimates, places: Any) -> Estimates:
    return Estimates(**{each.name: getattr(found, each.name)[:, places] for each in fields(Estimates)})


def _shifted(found: Estimates, by: Array) -> Estimates:
    """The estimates if the true difference of each contrast [C] were larger by `by`. Errors do not change."""
    return replace(found, value=found.value + by)


def _until_significant(design: Design, studies: int, beat: Callable[[], object]) -> Rate:
    """The false-positive rate of adding seeds until something is significant.

    Without declared looks, the number of seeds doubles twice.
    """
    confirm, found = design.planned.study.confirm, 0
    first = len(confirm.seeds)
    counts = confirm.looks or (first, 2 * first, 4 * first)
    scenario = replace(SCENARIOS["alike"], looks=counts)
    for start in range(0, studies, CHUNK):
        values = draw("until_significant", scenario, design, start, min(CHUNK, studies - start))
        found += int(practices.until_significant(design, values, counts).sum())
        beat()
    return Rate(found, studies)

"""The power of a plan's primary contrasts, under the rule that will judge them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tune_kd.analysis import statistics
from tune_kd.analysis.block_model import shipped_prior
from tune_kd.records.adaptive_plan import to_come
from tune_kd.study.contrasts import Contrast
from tune_kd.study.cost import estimate
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import Family

DIFFERENCES = (0.001, 0.002, 0.003, 0.005)  # true differences, in accuracy


@dataclass(frozen=True)
class Power:
    """The true difference that a contrast finds with 80 % power at Holm's strictest level, and the seeds for others.

    `seeds` has the least number of seeds for each of `DIFFERENCES`; None above 2**20. Assumes the deviation between
    seeds that the study expects, and that all arms are confirmed.
    """

    contrast: str
    detectable: float | None
    seeds: dict[float, int | None]


def powers(planned: Plan, seeds: int, level: float) -> list[Power]:
    """The power of each primary contrast at `seeds` seeds. `level` is the significance level of the family."""
    primary = [each for each in planned.contrasts if each.family == Family.PRIMARY]
    alpha, found, known = level / max(1, len(primary)), [], {}
    for contrast in primary:
        squares, spare = sum(weight**2 for _, weight in contrast.weights), _spare(planned, contrast)
        sd, df = planned.study.deviation * squares**0.5, _freedom(spare)
        if (key := (squares, spare)) not in known:
            needed = {each: statistics.pairs_needed(each, sd, df=df, alpha=alpha) for each in DIFFERENCES}
            known[key] = statistics.detectable(seeds, sd, df=df, alpha=alpha), needed
        found.append(Power(contrast.name, *known[key]))
    return found


def _spare(planned: Plan, contrast: Contrast) -> int:
    """Degrees of freedom that the other arms of its strata add to a contrast's variance, per seed after the first.

    0 for contrasts across strata, which are judged by their pairs alone.
    """
    strata = {arm.name: tuple(arm.cell.level(name) for name in planned.study.strata) for arm in planned.arms}
    sums: dict[tuple[object, ...], float] = {}
    for arm, weight in contrast.weights:
        sums[strata[arm]] = sums.get(strata[arm], 0.0) + weight
    if any(sums.values()):
        return 0
    return sum(sum(each == stratum for each in strata.values()) - 1 for stratum in sums) - 1


def _freedom(spare: int) -> Callable[[int], float]:
    return lambda n: n - 1 + min(float(shipped_prior(n - 1)), spare * (n - 1))


def slot_seconds(planned: Plan) -> tuple[float, float]:
    """The seconds that one slot takes for the whole plan, and the seconds that one more seed of every arm adds."""
    confirm = planned.study.confirm
    more = replace(confirm, seeds=(*confirm.seeds_at(0), max(confirm.all_seeds) + 1), looks=None)
    less = replace(confirm, seeds=confirm.seeds_at(0), looks=None)
    one, other = (_seconds(plan(replace(planned.study, confirm=each))) for each in (less, more))
    return one, other - one


def _seconds(planned: Plan) -> float:
    return estimate((*planned.trials, *to_come(planned)), planned.answering, planned.study.rate).slot_seconds

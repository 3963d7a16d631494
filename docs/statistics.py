"""`python -m docs.statistics`: make the tables of docs/statistics.md by simulation, in ten minutes of CPU time.

20,000 studies per row. `--only NAME` makes a single table: priors, seeds, across, teachers, shipped.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy import special

from docs.blocks import put, table
from search_spaces.ablation import study
from tune_kd.analysis.block_model import fit
from tune_kd.analysis.calibrate import Performance, Rate, Rule, performance, screened
from tune_kd.analysis.scenarios import SCENARIOS, Design, draw
from tune_kd.analysis.teachers import crossed
from tune_kd.study.plan import plan

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
STUDIES = 20_000
PROCESSES = os.cpu_count() or 1
BEFORE = Rule(pairs_alone=True)
RULES = {
    "pairs, Holm over all (before 0.7)": BEFORE,
    "pairs, Holm in each family": Rule(prior_df=0.0),
    "prior of 4": Rule(prior_df=4.0),
    "prior of 6": Rule(prior_df=6.0),
    "**prior of 8 (shipped)**": Rule(),
    "prior of 12": Rule(prior_df=12.0),
    "prior of 20: all degrees of freedom": Rule(prior_df=float("inf")),
}
HARD = ("equal", "unequal_arms", "unequal_methods", "very_unequal_methods", "correlated", "very_correlated")
LOGIT, STEM = "cifar: logit - none", "none: cifar - imagenet"
SEEDS = (3, 4, 5, 10)
SIZES = (0.001, 0.002, 0.003, 0.005)

Work = tuple[str, Rule, int | None]  # scenario, rule, and the number of seeds; None for the scenario's


@cache
def _design() -> Design:
    return Design.of(plan(study(), "0" * 64))


@cache
def _stopped() -> np.ndarray:
    return screened(_design(), STUDIES)


def _simulated(work: Work) -> Performance:
    name, rule, seeds = work
    scenario = replace(SCENARIOS[name], looks=(seeds,)) if seeds else SCENARIOS[name]
    return performance(_design(), name, scenario, _stopped(), rule)


def simulated(pool: ProcessPoolExecutor, work: Iterable[Work]) -> dict[Work, Performance]:
    every = list(work)
    return dict(zip(every, pool.map(_simulated, every), strict=True))


def percent(rate: Rate) -> str:
    return f"{100 * rate.share:.1f}"


def worst(found: Performance) -> str:
    """The lowest coverage of a contrast."""
    return f"{100 * min(rate.share for rate in found.coverage.values()):.1f}"


def covered(found: Performance, family: str) -> str:
    """Mean and lowest coverage of the contrasts of a family."""
    names = [each.name for each in _design().planned.contrasts if each.family == family]
    mean, least = found.covered(names) or (np.nan, np.nan)
    return f"{100 * mean:.1f} ({100 * least:.1f})"


def priors(pool: ProcessPoolExecutor) -> None:
    """False findings and power by the prior's degrees of freedom."""
    found = simulated(pool, ((name, rule, None) for rule in RULES.values() for name in HARD))
    rows = []
    for called, rule in RULES.items():
        theirs = [found[name, rule, None] for name in HARD]
        family = "any" if rule.pairs_alone else "primary"
        power = theirs[0].power[LOGIT]
        rows.append([called, *(percent(each.false[family]) for each in theirs),
                     percent(power[0.003]), percent(power[0.005]), min(map(worst, theirs))])  # fmt: skip
    heads = ["rule", *(SCENARIOS[name].words for name in HARD), "power at 0.3", "power at 0.5", "worst coverage"]
    put(PAGE, "priors", table(heads, rows))


def seeds(pool: ProcessPoolExecutor) -> None:
    """False findings by the number of seeds, with fixed priors and with the shipped one."""
    rules = {"4": Rule(prior_df=4.0), "8": Rule(prior_df=8.0), "shipped": Rule()}
    found = simulated(pool, ((name, rule, count) for count in SEEDS for rule in rules.values() for name in HARD))
    rows = [
        [str(count), prior, *(percent(found[name, rule, count].false["primary"]) for name in HARD)]
        for count in SEEDS
        for prior, rule in rules.items()
    ]
    put(PAGE, "seeds", table(["seeds", "prior", *(SCENARIOS[name].words for name in HARD)], rows))


def shipped(pool: ProcessPoolExecutor) -> None:
    """The shipped rule in each scenario, compared with the rule before 0.7."""
    found = simulated(pool, ((name, rule, None) for name in SCENARIOS for rule in (Rule(), BEFORE)))
    rows = []
    for name, scenario in SCENARIOS.items():
        new, old = found[name, Rule(), None], found[name, BEFORE, None]
        rows.append([
            scenario.words, percent(new.false["primary"]), percent(new.false["secondary"]), percent(old.false["any"]),
            covered(new, "primary"), covered(new, "secondary"), percent(new.coverage[STEM]),
            _powers(new), _powers(old),
        ])  # fmt: skip
    heads = ["scenario", "false, primary", "false, secondary", "false, before 0.7", "coverage, primary",
             "coverage, secondary", "coverage, stem", "power at 0.1 / 0.2 / 0.3 / 0.5", "before 0.7"]  # fmt: skip
    put(PAGE, "shipped", table(heads, rows))


def _powers(found: Performance) -> str:
    return " / ".join(f"{100 * found.power[LOGIT][size].share:.0f}" for size in SIZES)


def across(_: ProcessPoolExecutor) -> None:
    """Coverage of the stem's effect, judged by the model and, as shipped, by its pairs."""
    of = _design()
    (place,) = np.flatnonzero(of.across)
    rows = []
    for name in ("equal", "shared_blocks", "own_blocks"):
        values = draw(name, SCENARIOS[name], of, 0, STUDIES)
        found = performance(of, name, SCENARIOS[name], np.zeros((STUDIES, len(of.strata)), dtype=bool))
        rows.append([SCENARIOS[name].words, f"{100 * _by_model(values, of, of.weights[place]):.1f}",
                     percent(found.coverage[STEM])])  # fmt: skip
    put(PAGE, "across", table(["scenario", "judged by the model", "judged by pairs"], rows))


def teachers(_: ProcessPoolExecutor) -> None:
    """Coverage with several teachers, and the median half width of the intervals."""
    rows = []
    for count, per_seed, students in ((2, 2, 5), (3, 3, 5), (5, 5, 5), (10, 10, 5), (3, 2, 6), (5, 3, 10), (5, 1, 10)):
        layout = "all" if per_seed == count else str(per_seed)
        found = [_over_teachers(count, students, per_seed, spread) for spread in (0.0, 0.001, 0.002)]
        rows.append(
            [str(count), str(students), layout, *(f"{100 * share:.1f} (±{100 * half:.2f})" for share, half in found)]
        )
    heads = ["teachers", "seeds", "teachers per seed", *(f"teachers differ by {each}" for each in ("0", "0.1", "0.2"))]
    put(PAGE, "teachers", table(heads, rows))


def _over_teachers(count: int, seeds: int, per_seed: int, spread: float) -> tuple[float, float]:
    """Coverage and median half width if students and controls have a deviation of 0.15 points."""
    drawn = np.random.default_rng([count, seeds, per_seed, round(1e5 * spread)])
    normal = drawn.standard_normal
    differences = spread * normal((STUDIES, count, 1)) + 0.0015 * (
        normal((STUDIES, count, seeds)) - normal((STUDIES, 1, seeds))
    )
    met = np.add.outer(-np.arange(count), np.arange(seeds)) % count
    found = crossed(np.where((count - met) % count < per_seed, differences, np.nan))
    low, high = found.interval()
    return float(np.mean((low <= 0) & (high >= 0))), float(np.median(high - low) / 2)


def _by_model(values: np.ndarray, of: Design, weights: np.ndarray) -> float:
    """Coverage of the interval with the residual variances of both strata, as if blocks cancelled."""
    groups = [np.array(of.places) == place for place in sorted(set(of.places))]
    fits = [fit(values[:, group]) for group in groups]
    shares = np.stack([each.variance * (weights[group] ** 2).sum() for each, group in zip(fits, groups, strict=True)])
    df = shares.sum(0) ** 2 / sum(share**2 / each.df for share, each in zip(shares, fits, strict=True))
    half = special.stdtrit(df, 0.975) * np.sqrt(shares.sum(0) / values.shape[-1])
    return float((np.abs(weights @ values.mean(-1).T) <= half).mean())


def main(names: Sequence[str]) -> None:
    if set(names) - {"across", "teachers"}:
        _stopped()  # before the fork, so that processes share it
    with ProcessPoolExecutor(PROCESSES) as pool:
        for name in names:
            PARTS[name](pool)


PARTS = {"priors": priors, "seeds": seeds, "across": across, "teachers": teachers, "shipped": shipped}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    main(parser.parse_args().only or list(PARTS))

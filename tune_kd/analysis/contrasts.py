"""Summaries of arms, contrasts with verdicts, and exploratory comparisons, as DataFrames.

Accuracies and differences are fractions (0.001 is 0.1 points), seconds are wall-clock. Claims rest on completed trials
with planned confirmation seeds; everything else is exploratory and labelled so.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis import statistics, verdicts
from tune_kd.analysis.accuracy import (
    COMPARABLE,
    CONTEXT,
    HEADLINE,
    by_context,
    completed_trials,
    confirmation,
    confirmed,
    confirmed_trials,
    differing,
    judged_look,
)
from tune_kd.analysis.block_model import NO_SPREAD, Array, Estimates, estimate
from tune_kd.analysis.statistics import MARGIN
from tune_kd.analysis.verdicts import ALPHA, EARLIER
from tune_kd.records.reader import Records
from tune_kd.records.tables import as_typed, typed
from tune_kd.study.spec import APPLIES
from tune_kd.study.trial import ENDED
from tune_kd.system.errors import UserError

CONTRAST_COLUMNS = (
    "run contrast family verdict n planned estimate low high sd error df p_holm p p_equivalence low_pairs high_pairs "
    "p_pairs p_exact smallest_exact_p effect_size pairs_needed rule kind factor note words"
)
BY_MODEL = "block model"
BY_PAIRS = "pairs"
DECLARED_EARLIER = "pairs, one family, as declared by an earlier version"


def contrasts(records: Records, margin: float = MARGIN) -> pd.DataFrame:
    """One row per declared contrast: its estimate, and a verdict.

    A contrast within strata is judged by the block model (`rule`), which uses all seeds; `n` counts those that have all
    of its arms. One across strata is judged by its pairs, since blocks need not cancel there. `error` and `df` are of
    the test; `low_pairs`, `high_pairs` and `p_pairs` are of the t test of the pairs alone. `p_holm` and
    `p_equivalence` are adjusted by Holm over the contrasts of the `family`, also those without a p value: a family that
    shrank with the data would make p values too small. `pairs_needed` are the seeds for 80 % power at this difference
    and error, and an unadjusted level of 0.05. A contrast has no estimate if an arm was stopped, or if its arms differ
    in other settings (`note` names them).

    With declared looks, each look has a share of 0.05 (`statistics.spent`). An adjusted p value is then the minimum
    over the looks so far, each scaled from its share to 0.05, so that a finding stands at later looks; the intervals of
    all looks hold jointly at 95 %. Estimates, errors and `p` use all seeds so far.

    A run whose record has no families was declared by a version before 0.7: all of its contrasts are one family, and
    are judged by their pairs.
    """
    found = [_contrasts_of(records.of(run), margin) for run in records.runs if run in records.studies]
    return pd.concat(found, ignore_index=True) if found else typed([], CONTRAST_COLUMNS)


def _contrasts_of(records: Records, margin: float) -> pd.DataFrame:
    (run,), study = records.runs, records.study
    declared = study["contrasts"]
    if not declared:
        return typed([], CONTRAST_COLUMNS)
    levels, seeds, counts = looks_so_far(records)
    earlier = any(contrast.get("family") is None for contrast in declared)
    families = ["all" if earlier else str(contrast["family"]) for contrast in declared]
    notes = reasons(records, seeds, declared)
    judged = np.array([not note for note in notes])
    values, strata, weights = arrays(records, seeds, declared)
    weights[~judged] = 0.0
    looks = [estimate(values[:, :count], strata, weights, pairs_alone=earlier) for count in counts]
    last, now = looks[-1], verdicts.adjusted(looks[-1:], levels[-1:], families, margin)
    p_holm, p_equivalence = verdicts.adjusted(looks, levels, families, margin)
    before = (np.fmin(p_holm, p_equivalence) < ALPHA) & ~(np.fmin(*now) < ALPHA)
    columns: dict[str, Any] = {
        "run": run,
        "contrast": [contrast["name"] for contrast in declared],
        "kind": [contrast["kind"] for contrast in declared],
        "factor": [contrast.get("factor") for contrast in declared],
        "family": families,
        "n": last.pairs,
        "planned": len(seeds),
        "estimate": last.value,
        "error": last.error,
        "df": np.where(judged, last.df, np.nan),
        "sd": last.spread,
        "effect_size": last.paired / np.where(last.spread > NO_SPREAD, last.spread, np.nan),
        "p": last.two_sided(),
        "p_holm": p_holm,
        "p_equivalence": p_equivalence,
        "p_pairs": last.pairs_alone().two_sided(),
        "rule": [DECLARED_EARLIER if earlier else BY_MODEL if each else BY_PAIRS for each in last.by_model],
    }
    columns["low"], columns["high"] = last.interval(1 - levels[-1])
    columns["low_pairs"], columns["high_pairs"] = last.pairs_alone().interval(1 - levels[-1])
    missing = [f"{len(seeds) - n} of {len(seeds)} seeds are missing" if n < len(seeds) else "" for n in last.pairs]
    said = [[note or lost, EARLIER if old else ""] for note, lost, old in zip(notes, missing, before, strict=True)]
    columns["note"] = ["; ".join(filter(None, each)) for each in said]
    table = pd.DataFrame(columns).assign(**_of_pairs(last, values, weights))
    verdict = [verdicts.verdict(row) for row in table.to_dict("records")]
    table = table.assign(verdict=verdict)
    table["words"] = [verdicts.words(row, margin) for row in table.to_dict("records")]
    return as_typed(table, CONTRAST_COLUMNS)


def looks_so_far(records: Records) -> tuple[list[float], list[int], list[int]]:
    """The share of 0.05 of each look that is judged, the seeds of the last one, and the number of seeds of each."""
    confirm, look = confirmation(records.study), judged_look(records)
    levels = statistics.spent(confirm.looks)[: look + 1] if confirm.looks else [ALPHA]
    return levels, list(confirm.seeds_at(look)), [len(confirm.seeds_at(each)) for each in range(len(levels))]


def arrays(
    records: Records, seeds: Sequence[int], declared: Sequence[Any], column: str = HEADLINE
) -> tuple[Array, list[Any], Array]:
    """Values [arms, seeds] with NaN where a trial is missing, the stratum of each arm, weights [contrasts, arms].

    `column` of the trials has the values. An arm whose own trials differ in other settings has none.
    """
    (run,), study, trials = records.runs, records.study, confirmed_trials(records)
    arms = [arm["name"] for arm in study["arms"]]
    values = confirmed(records, column).reindex(pd.MultiIndex.from_product([[run], seeds]), columns=arms)
    found = values.to_numpy(dtype=float, na_value=np.nan).T.copy()
    of_arm, strata = dict(list(trials.groupby("arm"))), []
    for place, arm in enumerate(arms):
        theirs = of_arm.get(arm)
        first = None if theirs is None else theirs[list(study["study"].get("strata", ["stem"]))].iloc[0]
        strata.append(None if first is None else tuple(map(str, first)))
        if theirs is not None and differing(theirs):
            found[place] = np.nan
    weights = np.array([[dict(each["weights"]).get(arm, 0.0) for arm in arms] for each in declared])
    return found, strata, weights.reshape(len(declared), len(arms))


def reasons(records: Records, seeds: Sequence[int], declared: Sequence[Any]) -> list[str]:
    """Why each contrast cannot be judged; empty where it can."""
    study, trials = records.study, confirmed_trials(records)
    trials, ended = trials[trials["seed"].isin(seeds)], set(confirmed(records).columns)
    unended = trials.loc[~trials["status"].isin(ENDED), "arm"]
    alike = COMPARABLE[:-1] if study["study"].get("tuning") else COMPARABLE  # tuned arms differ in their recipes
    notes = []
    for contrast in declared:
        arms = [arm for arm, _ in contrast["weights"]]
        missing = [arm for arm in arms if arm not in ended]
        if waiting := int(unended.isin(arms).sum()):
            notes.append(f"{waiting} of its trials wait or run")
        elif missing:
            notes.append(f"{missing[0]} has no confirmed trial that ran to its end")
        else:
            notes.append(differing(trials[trials["arm"].isin(arms)], alike))
    return notes


def _of_pairs(found: Estimates, values: Array, weights: Array) -> dict[str, list[Any]]:
    """The sign-flip test of each contrast's pairs, its least p value, and the pairs that a finding would need."""
    exact, smallest, needed = [], [], []
    for place, (row, n) in enumerate(zip(weights, found.pairs, strict=True)):
        paired = row[row != 0] @ values[row != 0]
        exact.append(statistics.sign_flip(paired[~np.isnan(paired)].tolist()) if n else None)
        smallest.append(statistics.smallest_exact_p(int(n)) if n else None)
        spread, prior = found.error[place] * n**0.5, found.df[place] - (n - 1)
        needed.append(statistics.pairs_needed(found.value[place], spread, prior=prior) if spread > 0 else None)
    return {"p_exact": exact, "smallest_exact_p": smallest, "pairs_needed": needed}


def compare(records: Records, factor: str, treated: Any, against: Any) -> pd.DataFrame:
    """Compare two levels of a column of the trials where all other settings are equal; no study has to declare it.

    A setting that does not apply to one arm (a control has no temperature) counts as equal. Paired by seed where every
    seed has both levels, else by Welch's test; p values are adjusted by Holm over the rows. The comparison is
    exploratory, so it has no verdict. Raises `UserError` for an unknown column or level.
    """
    trials = completed_trials(records).dropna(subset=HEADLINE)
    if factor not in trials:
        raise UserError(
            f"factor is {factor!r}; allowed: a column of the trials, such as {', '.join(CONTEXT[1:])}, method"
        )
    levels = trials[factor].dropna().unique().tolist()
    if unknown := [level for level in (treated, against) if level not in levels]:
        named = " and ".join(map(repr, unknown))
        raise UserError(f"{factor} has no level {named}; allowed: {', '.join(map(str, levels))}")
    studied = dict.fromkeys((*CONTEXT, "method", *APPLIES, "lr", "weight_decay", *COMPARABLE))
    context = [name for name in studied if name != factor]
    sides = [list(by_context(trials[trials[factor] == level], context)) for level in (treated, against)]
    rows = []
    for (where, one), (there, other) in itertools.product(*sides):
        if any(where[name] != there[name] and not (name in APPLIES and None in (where[name], there[name]))
               for name in context):  # fmt: skip
            continue
        both = {name: there[name] if where[name] is None else where[name] for name in context}
        named = "/".join(str(both[name]) for name in context if both[name] is not None and trials[name].nunique() > 1)
        row = {"context": named, "contrast": f"{treated} - {against}", "n_treated": len(one), "n_control": len(other)}
        rows.append(row | _compared(one.set_index("seed")[HEADLINE], other.set_index("seed")[HEADLINE]))
    table = typed(rows, "context contrast how n n_treated n_control estimate low high p effect_size")
    table["p_holm"] = statistics.holm(table["p"])
    return table


def _compared(treated: "pd.Series[float]", control: "pd.Series[float]") -> dict[str, Any]:
    """Compare accuracies by seed: paired where both have the same seeds, each once, else by Welch's test."""
    if treated.index.is_unique and control.index.is_unique and set(treated.index) == set(control.index):
        return {"how": "paired"} | asdict(statistics.paired(treated.tolist(), control[treated.index].tolist()))
    return {"how": "welch"} | asdict(statistics.welch(treated.tolist(), control.tolist()))

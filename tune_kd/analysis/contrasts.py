"""Summaries of arms, contrasts with verdicts, and exploratory comparisons, as DataFrames.

Accuracies and differences are fractions (0.001 is 0.1 points), seconds are wall-clock. Claims rest on completed trials
with planned confirmation seeds; everything else is exploratory, and labelled as such.
"""

import itertools
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis import block_model, statistics, teachers, verdicts
from tune_kd.analysis.accuracy import (
    COMPARABLE,
    CONTEXT,
    HEADLINE,
    by_context,
    by_seed,
    column_of,
    completed_trials,
    random_teachers,
    teachers_per_seed,
    without_factors,
)
from tune_kd.analysis.block_model import NO_SPREAD, Estimates
from tune_kd.analysis.evidence import Evidence, arrays, looks_so_far, reasons
from tune_kd.analysis.statistics import MARGIN
from tune_kd.analysis.verdicts import ALPHA, EARLIER
from tune_kd.records.reader import Records
from tune_kd.records.schema import TRIALS
from tune_kd.records.tables import as_typed, typed
from tune_kd.study.plan import TEACHER_FIELDS
from tune_kd.study.trial import Role, Status
from tune_kd.system.errors import UserError

CONTRAST_COLUMNS = (
    "run contrast family verdict n planned teachers estimate low high sd error df p_holm p p_equivalence low_pairs "
    "high_pairs p_pairs p_exact smallest_exact_p effect_size pairs_needed rules_out rule kind factor note words"
)


def contrasts(records: Records, margin: float = MARGIN) -> pd.DataFrame:
    """One row per declared contrast: its estimate, and a verdict.

    `rule` names the test. The block model judges contrasts within strata and uses all seeds; `n` counts the seeds that
    have all arms of the contrast. Pairs judge contrasts across strata, since block effects need not cancel there. If
    students are crossed with several teachers, contrasts of arms that have a teacher are judged with teachers as a
    random effect, from their own cells of teacher and seed; `teachers` counts the teachers and is null for other
    contrasts. The pairs of such a contrast are means over teachers, and their test holds for these teachers alone.

    `error` and `df` are those of the test; `low_pairs`, `high_pairs` and `p_pairs` are those of the t test of the pairs
    alone. `p_holm` and `p_equivalence` are adjusted by Holm over all contrasts of the `family`, including those without
    a p value: a family that shrank with the data would make p values too small. `pairs_needed` is the number of seeds
    for 80 % power at this difference and error, and an unadjusted level of 0.05. A contrast has no estimate if an arm
    was stopped, or if its arms differ in other settings (`note` names them).

    With declared looks, each look has a share of 0.05 (`statistics.spent`). An adjusted p value is then the minimum
    over the looks so far, each scaled from its share to 0.05, so a finding stands at later looks. The intervals of all
    looks hold jointly at 95 %. Estimates, errors and `p` use all seeds so far.

    If a run's record has no families, a version before 0.7 declared it: all of its contrasts are one family, and are
    judged by their pairs. If its seeds took turns over several teachers, its verdicts hold for these teachers.
    """
    return records.kept(f"contrasts within {margin}", lambda: _contrasts(records, margin))


def _contrasts(records: Records, margin: float) -> pd.DataFrame:
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
    evidence = Evidence.of(records, seeds, declared, judged)
    looks = [evidence.at(count, pairs_alone=earlier) for count in counts]
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
        "teachers": pd.array(evidence.counts, dtype="Int64"),
        "estimate": last.value,
        "error": last.error,
        "df": np.where(judged, last.df, np.nan),
        "sd": last.spread,
        "effect_size": last.paired / np.where(last.spread > NO_SPREAD, last.spread, np.nan),
        "p": last.two_sided(),
        "p_holm": p_holm,
        "p_equivalence": p_equivalence,
        "p_pairs": last.pairs_alone().two_sided(),
        "rule": evidence.rules(last, earlier),
    }
    columns["low"], columns["high"] = last.interval(1 - levels[-1])
    columns["low_pairs"], columns["high_pairs"] = last.pairs_alone().interval(1 - levels[-1])
    missing = evidence.missing(last, teachers_per_seed(records, run))
    said = [[note or lost, EARLIER if old else ""] for note, lost, old in zip(notes, missing, before, strict=True)]
    columns["note"] = ["; ".join(filter(None, each)) for each in said]
    table = pd.DataFrame(columns).assign(**_of_pairs(last, evidence))
    verdict = [verdicts.verdict(row) for row in table.to_dict("records")]
    table = table.assign(verdict=verdict)
    table["rules_out"] = [verdicts.rules_out(row) for row in table.to_dict("records")]
    table["words"] = [verdicts.words(row, margin) for row in table.to_dict("records")]
    return as_typed(table, CONTRAST_COLUMNS)


def _of_pairs(found: Estimates, evidence: Evidence) -> dict[str, list[Any]]:
    """The sign-flip test of each contrast's pairs, its smallest possible p value, and the pairs that a finding needs.

    Contrasts over teachers have no number of pairs: more seeds alone do not lower the error below that of the teachers.
    """
    exact, smallest, needed = [], [], []
    for place, n in enumerate(found.pairs):
        exact.append(statistics.sign_flip(evidence.by_seed(place).tolist()) if n else None)
        smallest.append(statistics.smallest_exact_p(int(n)) if n else None)
        spread, prior = found.error[place] * n**0.5, found.df[place] - (n - 1)
        df, judgeable = partial(statistics.less_one, more=prior), spread > 0 and not evidence.taught[place]
        needed.append(statistics.pairs_needed(found.value[place], spread, df=df) if judgeable else None)
    return {"p_exact": exact, "smallest_exact_p": smallest, "pairs_needed": needed}


def factors(records: Records) -> pd.DataFrame:
    """F test of any effect of a factor in the block model, one for each context with several of its contrasts.

    It complements the contrasts; no verdict depends on it. Arms without an accuracy at a seed are handled as in the
    contrasts. Stopped arms are excluded, and so are runs that are judged over several teachers.
    """
    alone = [run for run in records.runs if run in records.studies and not random_teachers(records, run)]
    return typed(
        [row for run in alone for row in _factors_of(records.of(run))], "run factor context contrasts F df df_error p"
    )


def _factors_of(records: Records) -> list[dict[str, Any]]:
    (run,), declared = records.runs, records.study["contrasts"]
    _, seeds, _ = looks_so_far(records)
    values, strata, weights = arrays(records, seeds, declared)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, (contrast, note) in enumerate(zip(declared, reasons(records, seeds, declared), strict=True)):
        if contrast["kind"] == "effect" and not note and contrast.get("factor"):
            against = min(contrast["weights"], key=lambda arm: arm[1])[0]
            groups.setdefault((contrast["factor"], against), []).append(place)
    rows = []
    for (factor, _), places in groups.items():
        theirs = weights[places]
        inside = {stratum for stratum, used in zip(strata, (theirs != 0).any(0), strict=True) if used}
        if len(places) < 2 or len(inside) > 1:
            continue
        own = np.array([stratum in inside for stratum in strata])
        f, df, df_error, p = block_model.joint(values[own], theirs[:, own])
        context = declared[places[0]]["name"].rpartition(": ")[0]
        row = {"run": run, "factor": factor, "context": context, "contrasts": len(places)}
        rows.append(row | {"F": f, "df": df, "df_error": df_error, "p": p})
    return rows


def variances(records: Records) -> pd.DataFrame:
    """One row per contrast that is judged over several teachers: the standard deviations of its differences between
    teachers, between seeds (of students and control) and of the rest, and the share of each in the variance of one
    difference.

    Null with fewer than two teachers or seeds. If seeds take turns over teachers, the layout cannot separate seeds from
    the rest, and the values of seeds are null.
    """
    rows = []
    for run in (run for run in records.runs if random_teachers(records, run)):
        of_run = records.of(run)
        declared, (_, seeds, _) = of_run.study["contrasts"], looks_so_far(of_run)
        if not declared:
            continue
        judged = np.array([not note for note in reasons(of_run, seeds, declared)])
        evidence = Evidence.of(of_run, seeds, declared, judged)
        for place in np.flatnonzero(evidence.taught):
            found = teachers.crossed(evidence.differences[place])
            total = np.nansum(found.variances)
            row = {"run": run, "contrast": declared[place]["name"], "n": found.seeds, "teachers": found.teachers}
            for name, variance in zip(teachers.COMPONENTS, found.variances, strict=True):
                row |= {f"sd_{name}": variance**0.5, f"share_{name}": variance / total if total > 0 else np.nan}
            rows.append(row)
    sizes = " ".join(f"{what}_{name}" for what in ("sd", "share") for name in teachers.COMPONENTS)
    return typed(rows, f"run contrast n teachers {sizes}")


def compare(records: Records, factor: str, treated: Any, against: Any) -> pd.DataFrame:
    """Compare two levels of a column of the trials while all other settings are equal. No study has to declare it.

    A setting that does not apply to one arm (a control has no temperature) counts as equal. Paired by seed if every
    seed has both levels, else by Welch's test; p values are adjusted by Holm over the rows. The comparison is
    exploratory, so it has no verdict. Raises `UserError` for an unknown column or level.
    """
    trials = without_factors(records, completed_trials(records).dropna(subset=HEADLINE))
    factor = column_of(factor)
    if factor not in trials:
        raise UserError(
            f"factor is {factor!r}; allowed: a column of the trials, such as {', '.join(CONTEXT[1:])}, method"
        )
    levels = trials[factor].dropna().unique().tolist()
    if unknown := [level for level in (treated, against) if level not in levels]:
        named = " and ".join(map(repr, unknown))
        raise UserError(f"{factor} has no level {named}; allowed: {', '.join(map(str, levels))}")
    table = typed(
        _levels_compared(trials, factor, treated, against),
        "context contrast how n n_treated n_control estimate low high p effect_size",
    )
    table["p_holm"] = statistics.holm(table["p"])
    return table


def teachers_compared(records: Records) -> pd.DataFrame:
    """The accuracy of each kind of teacher, then the effects on teachers of those declared factors that apply to them.

    They belong to no family. With one seed per teacher, an effect has neither an interval nor a p value.
    """
    rows: list[dict[str, Any]] = []
    for run in records.runs:
        of_run = records.of(run)
        taught = of_run.trials[(of_run.trials["role"] == Role.TEACHER) & (of_run.trials["status"] == Status.COMPLETED)]
        taught = taught.dropna(subset=HEADLINE)
        for arm, group in taught.groupby("arm", sort=False):
            rows.append({"run": run, "teacher": arm} | asdict(statistics.summary(group[HEADLINE].tolist())))
        declared = records.studies[run]["study"]["contrasts"] if run in records.studies else []
        effects = [each for each in declared if each["factor"] in TEACHER_FIELDS]
        for each in dict.fromkeys((each["factor"], each["treated"], each["against"]) for each in effects):
            for found in _levels_compared(taught, *each):
                context = f"{found['context']}: " if found["context"] else ""
                rows.append(found | {"run": run, "teacher": f"{context}{each[0]} {found['contrast']}"})
    return typed(rows, "run teacher n mean sd estimate low high p")


def _levels_compared(trials: pd.DataFrame, factor: str, treated: Any, against: Any) -> list[dict[str, Any]]:
    """A row for each pair of groups of trials that differ only in this factor."""
    further = [str(name) for name in trials if name not in TRIALS.columns]
    settings = [name for name in ("temperature", "alpha", "beta", *further) if trials[name].nunique() > 1]
    of_method = trials.groupby(["run", "method"])[settings].nunique().max()  # 1: only the methods' defaults differ
    partial = ("teacher", *(name for name in settings if of_method[name] > 1))  # these may not apply to every method
    studied = dict.fromkeys((*CONTEXT, "method", *partial, "lr", "weight_decay", *COMPARABLE))
    context = [name for name in studied if name != factor]
    sides = [list(by_context(trials[trials[factor] == level], context)) for level in (treated, against)]
    rows = []
    for (where, one), (there, other) in itertools.product(*sides):
        if any(where[name] != there[name] and not (name in partial and None in (where[name], there[name]))
               for name in context):  # fmt: skip
            continue
        both = {name: there[name] if where[name] is None else where[name] for name in context}
        named = "/".join(str(both[name]) for name in context if both[name] is not None and trials[name].nunique() > 1)
        row = {"context": named, "contrast": f"{treated} - {against}", "n_treated": len(one), "n_control": len(other)}
        rows.append(row | _compared(by_seed(one), by_seed(other)))
    return rows


def _compared(treated: "pd.Series[float]", control: "pd.Series[float]") -> dict[str, Any]:
    """Compare accuracies by seed: paired if both have the same seeds, each once, else by Welch's test."""
    if treated.index.is_unique and control.index.is_unique and set(treated.index) == set(control.index):
        return {"how": "paired"} | asdict(statistics.paired(treated.tolist(), control[treated.index].tolist()))
    return {"how": "welch"} | asdict(statistics.welch(treated.tolist(), control.tolist()))

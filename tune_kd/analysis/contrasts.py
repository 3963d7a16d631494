"""Summaries of arms, contrasts with verdicts, and exploratory comparisons, as DataFrames.

Accuracies and differences are fractions (0.001 is 0.1 points), seconds are wall-clock. Claims rest on completed trials
with planned confirmation seeds; everything else is exploratory and labelled so.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed
from tune_kd.study.spec import APPLIES, Confirm
from tune_kd.study.trial import ENDED, Phase, Role, Status
from tune_kd.system.errors import UserError

HEADLINE: Final = "test_accuracy_best"
ALPHA = 0.05
ADJUSTED = ["p_holm", "p_equivalence"]
EARLIER = "as it stood at an earlier look"
COMPARABLE = ("epochs_planned", "dataset", "data_digest", "scale", "recipe_id")  # equal in arms that are compared
CONTEXT = ("run", "student", "teacher", "stem", "weights", "width")  # arms of one context differ in other settings
CONTRAST_COLUMNS = (
    "run contrast verdict n planned estimate low high sd p_holm p p_exact smallest_exact_p effect_size "
    "p_equivalence pairs_needed kind note words"
)


def planned_seeds(records: Records, run: str) -> list[int] | None:
    """The confirmation seeds of a run's study, up to the run's current look. None for tables without a study."""
    study = records.studies.get(run)
    return None if study is None else list(confirmation(study).seeds_at(study.get("look", 0)))


def confirmation(study: Mapping[str, Any]) -> Confirm:
    """The confirmation seeds and looks that a run's `study.json` declares."""
    declared = study["study"]["confirm"]
    looks = declared.get("looks")
    return Confirm(tuple(declared["seeds"]), None if looks is None else tuple(looks))


def judged_look(records: Records) -> int:
    """The last look (from 0) whose planned seeds are all present and ended, else 0.

    Contrasts exclude the seeds of a later look until all have ended: using them before would be another look.
    """
    confirm, look, trials = confirmation(records.study), records.study.get("look", 0), confirmed_trials(records)
    ended = set(trials["seed"]) - set(trials.loc[~trials["status"].isin(ENDED), "seed"])
    return max((each for each in range(look + 1) if set(confirm.seeds_at(each)) <= ended), default=0)


def confirmed_trials(records: Records) -> pd.DataFrame:
    """Student trials of planned arms with planned confirmation seeds, of any status, by arm in the study's order."""
    trials = records.trials[(records.trials["phase"] == Phase.CONFIRM) & (records.trials["role"] == Role.STUDENT)]
    kept = []
    for run, of_run in trials.groupby("run", sort=False):
        seeds = planned_seeds(records, str(run))
        if seeds is None:
            kept.append(of_run)
            continue
        places = {arm["name"]: place for place, arm in enumerate(records.studies[str(run)]["arms"])}
        planned = of_run[of_run["seed"].isin(seeds) & of_run["arm"].isin(places)]
        kept.append(planned.iloc[planned["arm"].map(places).argsort(kind="stable")])
    return pd.concat(kept) if kept else trials


def completed_trials(records: Records) -> pd.DataFrame:
    """The completed ones of `confirmed_trials`."""
    trials = confirmed_trials(records)
    return trials[trials["status"] == Status.COMPLETED]


def confirmed(records: Records) -> pd.DataFrame:
    """The headline accuracy of completed confirmed trials, by run and seed (rows) and arm (columns).

    Raises `ValueError` if an arm has a seed twice.
    """
    ended = completed_trials(records)
    if (twice := ended.duplicated(["run", "arm", "seed"])).any():
        first = ended[twice].iloc[0]
        raise ValueError(
            f"{int(twice.sum())} confirmed trials have the run, arm and seed of another, such as {first['arm']} "
            f"at seed {first['seed']}; an arm has to name all in which its trials differ"
        )
    table = ended.pivot(index=["run", "seed"], columns="arm", values=HEADLINE)
    return table.astype("float64")


def arms(records: Records) -> pd.DataFrame:
    """One row per arm: n, mean, sd and 95 % interval of its confirmed accuracy, and a note if seeds are missing.

    `planned` counts the seeds of the study, or the seeds present in tables without a study. An arm whose own trials
    differ in planned epochs, data or recipe has no mean, and the note names the columns.
    """
    trials, values = confirmed_trials(records), confirmed(records)
    rows: list[dict[str, Any]] = []
    for run, name, role, tried in _arms(records, trials):
        known = values.loc[[run], name].dropna().tolist() if name in values and run in values.index else []
        seeds = planned_seeds(records, run)
        planned = tried["seed"].nunique() if seeds is None else len(seeds)
        statuses = set(tried["status"])
        note = differing(tried)
        if note:
            known = []
        elif statuses == {Status.STOPPED}:
            note = "stopped in the screen"
        elif not statuses <= set(ENDED):
            note = "not finished"
        elif len(known) < planned:
            note = "incomplete"
        described = asdict(statistics.summary(known))
        n = described.pop("n")
        rows.append({"run": run, "arm": name, "role": role, "n": n, "planned": planned, **described, "note": note})
    return typed(rows, "run arm role n planned mean sd low high note")


def _arms(records: Records, trials: pd.DataFrame) -> list[tuple[str, str, str, pd.DataFrame]]:
    """Run, name, role and confirmed trials of each arm, in the study's order."""
    found = []
    for run in records.runs:
        of_run = trials[trials["run"] == run]
        by_arm = dict(list(of_run.groupby("arm", sort=False)))
        if run in records.studies:
            roles = {arm["name"]: arm["role"] for arm in records.studies[run]["arms"]}
        else:
            roles = dict.fromkeys(map(str, by_arm), "")
        found += [(run, name, role, by_arm.get(name, of_run.iloc[:0])) for name, role in roles.items()]
    return found


def exploratory(records: Records) -> pd.DataFrame:
    """One row per arm and phase of exploratory trials: the screen, draws, and added seeds or arms.

    `tried` is the number of arms, or draws, that competed: the best of many is biased upwards (selection).
    """
    trials = records.trials[records.trials["role"] == Role.STUDENT]
    trials = trials[~trials.index.isin(confirmed_trials(records).index)]
    rows = []
    for (run, phase), of_phase in trials.groupby(["run", "phase"], sort=False):
        tried = of_phase["arm"].nunique()
        study = records.studies.get(str(run), {})
        fixed = [arm["name"] for arm in study.get("arms", [])]
        drawn = bool(study.get("searches")) and phase == Phase.SCREEN
        for arm, group in of_phase.groupby("arm", sort=False):
            ended = group[group["status"] == Status.COMPLETED]
            rows.append(
                {
                    "run": run,
                    "what": "draws" if drawn else _explored(str(phase), arm in fixed),
                    "arm": arm,
                    "tried": len(group) if drawn else tried,
                    "trials": len(group),
                    "n": len(ended),
                    "stopped": int((group["status"] == Status.STOPPED).sum()),
                    "epochs_run": float(group["epochs_run"].astype("float64").mean()),
                    "val_accuracy_best": group["val_accuracy_best"].dropna().mean(),
                    "mean": ended[HEADLINE].dropna().mean(),
                    "sd": statistics.summary(ended[HEADLINE].dropna().tolist()).sd,
                }
            )
    table = typed(rows, "run what arm tried trials n stopped epochs_run val_accuracy_best mean sd")
    return table.sort_values(["run", "what", "val_accuracy_best"], ascending=[True, False, False], ignore_index=True)


def _explored(phase: str, fixed: bool) -> str:
    return "screen" if phase == Phase.SCREEN else "added seeds" if fixed else "added arm"


def contrasts(records: Records, margin: float = MARGIN) -> pd.DataFrame:
    """One row per declared contrast: its estimate over the seeds that have all of its arms, and a verdict.

    Differences are paired by seed. `p_holm` and `p_equivalence` are adjusted by Holm over all declared contrasts of the
    run, also those without a p value: a family that shrank with the data would make p values too small. `pairs_needed`
    assumes 80 % power at this difference and spread, and an unadjusted level of 0.05. A contrast has no estimate if an
    arm was stopped, or if its arms differ in other settings (`note` names them).

    With declared looks, each look has a share of 0.05 (`statistics.spent`). An adjusted p value is then the minimum
    over the looks so far, each scaled from its share to 0.05, so that a finding stands at later looks; the intervals of
    all looks hold jointly at 95 %. Estimates, deviations and `p` use all seeds so far.
    """
    found = [_contrasts_of(records.of(run), margin) for run in records.runs if run in records.studies]
    return pd.concat(found, ignore_index=True) if found else typed([], CONTRAST_COLUMNS)


def _contrasts_of(records: Records, margin: float) -> pd.DataFrame:
    (run,), study = records.runs, records.study
    confirm, look = confirmation(study), judged_look(records)
    levels = statistics.spent(confirm.looks)[: look + 1] if confirm.looks else [ALPHA]
    seeds = confirm.seeds_at(look)
    differences = _differences(records, seeds)
    rows = [
        {"run": run, "contrast": contrast["name"], "kind": contrast["kind"], "planned": len(seeds), "note": note}
        | _judged(paired.tolist(), margin, levels[-1])
        for contrast, (paired, note) in zip(study["contrasts"], differences, strict=True)
    ]
    table = typed(rows, CONTRAST_COLUMNS)
    current = _adjusted(table, levels[-1])
    adjusted = [current]
    for earlier, level in enumerate(levels[:-1]):
        then = [paired[paired.index.isin(confirm.seeds_at(earlier))].tolist() for paired, _ in differences]
        found = _adjusted(typed([_judged(values, margin, level) for values in then], CONTRAST_COLUMNS), level)
        # A finding lapses if the estimate has changed sign, become zero, or left the margin since.
        turned = (found["estimate"] * table["estimate"] <= 0) | (table["estimate"].abs() <= statistics.NO_SPREAD)
        found["p_holm"] = found["p_holm"].mask(turned, 1.0)
        found["p_equivalence"] = found["p_equivalence"].mask(table["estimate"].abs() >= margin, 1.0)
        adjusted.append(found)
    for name in ADJUSTED:
        table[name] = pd.concat([each[name] for each in adjusted], axis=1).min(axis=1).clip(upper=1.0)
    now = (current[ADJUSTED] < ALPHA).any(axis=1)
    before = (table[ADJUSTED] < ALPHA).any(axis=1) & ~now
    table["note"] = table["note"].mask(before, (table["note"] + "; ").where(table["note"] != "", "") + EARLIER)
    return _with_verdicts(table, margin, ", given one teacher" if len(study["study"]["teacher_seeds"]) == 1 else "")


def _differences(records: Records, seeds: Sequence[int]) -> "list[tuple[pd.Series[float], str]]":
    """The paired differences of each contrast by seed, and its note."""
    (run,), study, trials, values = records.runs, records.study, confirmed_trials(records), confirmed(records)
    trials = trials[trials["seed"].isin(seeds)]
    values = values[values.index.isin(seeds, level="seed")]
    unended = trials.loc[~trials["status"].isin(ENDED), "arm"]
    tuned = study["study"].get("tuning") is not None
    alike = COMPARABLE[:-1] if tuned else COMPARABLE  # tuned arms differ in their recipes
    found: list[tuple[pd.Series[float], str]] = []
    for contrast in study["contrasts"]:
        weights = dict(contrast["weights"])
        missing = [arm for arm in weights if arm not in values]
        paired = pd.Series(dtype="float64")
        if waiting := int(unended.isin(weights).sum()):
            note = f"{waiting} of its trials wait or run"
        elif missing:
            note = f"{missing[0]} has no confirmed trial that ran to its end"
        elif not (note := differing(trials[trials["arm"].isin(weights)], alike)):
            paired = sum(weight * values.loc[run, arm] for arm, weight in weights.items()).dropna()
            note = f"{len(seeds) - len(paired)} of {len(seeds)} seeds are missing" if len(paired) < len(seeds) else ""
        found.append((paired, note))
    return found


def _adjusted(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """A look's table with its p values adjusted by Holm over all contrasts, and scaled from its level to 0.05."""
    scale = ALPHA / level
    return table.assign(p_holm=holm(table["p"]) * scale, p_equivalence=holm(table["p_equivalence"]) * scale)


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
    table["p_holm"] = holm(table["p"])
    return table


def _compared(treated: "pd.Series[float]", control: "pd.Series[float]") -> dict[str, Any]:
    """Compare accuracies by seed: paired where both have the same seeds, each once, else by Welch's test."""
    if treated.index.is_unique and control.index.is_unique and set(treated.index) == set(control.index):
        return {"how": "paired"} | asdict(statistics.paired(treated.tolist(), control[treated.index].tolist()))
    return {"how": "welch"} | asdict(statistics.welch(treated.tolist(), control.tolist()))


def by_context(trials: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Group trials by columns: the levels of each group, and its trials. Nulls form a level, given as None."""
    for levels, group in trials.groupby(list(columns), dropna=False, sort=False):
        known: list[Any] = list(levels)
        yield {name: None if pd.isna(level) else level for name, level in zip(columns, known, strict=True)}, group


def differing(trials: pd.DataFrame, columns: Sequence[str] = COMPARABLE) -> str:
    """Settings in which compared trials wrongly differ, as text; empty if there are none."""
    said = []
    for name in columns:
        levels = trials[name].dropna().unique().tolist()
        if len(levels) > 1:
            said.append(f"{name} is {' and '.join(str(level)[:16] for level in levels)}")
    return "; ".join(said)


def _judged(paired: list[float], margin: float, alpha: float) -> dict[str, Any]:
    judged = asdict(statistics.differences(paired, 1 - alpha))
    needed = None
    if judged["sd"] is not None:
        needed = statistics.pairs_needed(judged["estimate"], judged["sd"])
    p_equivalence = statistics.equivalence(paired, margin)
    smallest = statistics.smallest_exact_p(len(paired)) if paired else None
    return judged | {"smallest_exact_p": smallest, "p_equivalence": p_equivalence, "pairs_needed": needed}


def _with_verdicts(table: pd.DataFrame, margin: float, given: str) -> pd.DataFrame:
    verdicts = [verdict(row) for row in table.to_dict("records")]
    table["verdict"] = pd.Series(verdicts, index=table.index, dtype="string")
    sentences = [words(row, margin, given) for row in table.to_dict("records")]
    table["words"] = pd.Series(sentences, index=table.index, dtype="string")
    return table


def holm(p_values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Adjust p values over all rows (Holm). A missing p value stays missing, and counts as 1 in the family."""
    adjusted = pd.Series(statistics.holm(p_values.fillna(1.0).tolist()), index=p_values.index, dtype="float64")
    return adjusted.where(p_values.notna())


def verdict(row: Mapping[Any, Any]) -> str:
    """better, worse, equivalent, inconclusive or not judged, at a level of 0.05 over all contrasts and looks."""
    if row["n"] == 0:
        return "not judged"
    if row["p_holm"] < ALPHA:
        return "better" if row["estimate"] > 0 else "worse"
    return "equivalent" if row["p_equivalence"] < ALPHA else "inconclusive"


def words(row: Mapping[Any, Any], margin: float, given: str) -> str:
    """The row as one self-contained sentence that begins with the verdict."""
    if row["verdict"] == "not judged":
        return f"not judged: {row['note']}"
    seeds = f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    if row["n"] < row["planned"]:
        seeds = f"{row['n']} of {row['planned']} seeds"
    found = f"{_points(row['estimate'])} points over {seeds}"
    if not pd.isna(row["low"]) and row["sd"] > statistics.NO_SPREAD:
        found += f", 95 % interval {_points(row['low'])} to {_points(row['high'])}"
    if EARLIER in row["note"]:
        found += f", {EARLIER}"
    close = f"the difference is less than {100 * margin:g} points"
    if row["verdict"] == "equivalent":
        return f"equivalent: {close} ({found}){given}"
    if row["verdict"] != "inconclusive":
        return f"{row['verdict']}: {found}{f'; yet {close}' if row['p_equivalence'] < 0.05 else ''}{given}"
    return f"inconclusive: {found}; {_power(row)}{given}"


def _points(difference: float) -> str:
    """A signed difference in points; +0.00 if it rounds to zero."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


def _power(row: Mapping[Any, Any]) -> str:
    """The number of pairs that 80 % power needs, for a single test without Holm."""
    if row["n"] == 1:
        return "one seed shows no spread"
    if row["sd"] <= statistics.NO_SPREAD:
        return "without a spread there is nothing to judge it by"
    if pd.isna(row["pairs_needed"]):
        return "so small a difference is not to be found with a million pairs"
    return f"if that is the difference and its spread, {row['pairs_needed']:,} pairs give 80 % power before Holm"

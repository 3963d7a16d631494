"""From records to results, as DataFrames: what helps, by how much, how sure that is, and what it cost.

Accuracies and differences are fractions (0.001 is 0.1 points), seconds are wall-clock. Claims rest on trials that ran
to their end on seeds that were planned for the confirmation; everything else is exploratory and says so.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records.reader import Records, typed
from tune_kd.study.spec import APPLIES, Confirm
from tune_kd.system.errors import UserError

HEADLINE = "test_accuracy_best"
ALPHA = 0.05
UNENDED = ("pending", "running")
EARLIER = "as it stood at an earlier look"
COMPARABLE = ("epochs_planned", "dataset", "data_digest", "scale", "recipe_id")  # alike in arms that are contrasted
CONTEXT = ("run", "student", "teacher", "stem", "weights", "width")  # where arms differ in what is studied alone
CONTRAST_COLUMNS = (
    "run contrast verdict n planned estimate low high sd p_holm p p_exact smallest_exact_p effect_size "
    "p_equivalence pairs_needed kind note words"
)


def planned_seeds(records: Records, run: str) -> list[int] | None:
    """The seeds that a run's study fixed for its confirmation, up to the look that the run is at; null for tables
    without a study."""
    study = records.studies.get(run)
    return None if study is None else list(confirmation(study).seeds_at(study.get("look", 0)))


def confirmation(study: Mapping[str, Any]) -> Confirm:
    """What a run's `study.json` fixed of seeds and looks before the first trial."""
    declared = study["study"]["confirm"]
    looks = declared.get("looks")
    return Confirm(tuple(declared["seeds"]), None if looks is None else tuple(looks))


def judged_look(records: Records) -> int:
    """The look (from 0) up to which one run can be judged: the last whose planned seeds are all there and have ended.
    The seeds of one that goes on are in no contrast yet, since every glance at them would be one more look. 0 where the
    first goes on."""
    confirm, look, trials = confirmation(records.study), records.study.get("look", 0), confirmed_trials(records)
    ended = set(trials["seed"]) - set(trials.loc[trials["status"].isin(UNENDED), "seed"])
    return max((each for each in range(look + 1) if set(confirm.seeds_at(each)) <= ended), default=0)


def confirmed_trials(records: Records) -> pd.DataFrame:
    """The students' trials of planned arms on planned confirmation seeds, whatever became of them, arm by arm in the
    study's order."""
    trials = records.trials[(records.trials["phase"] == "confirm") & (records.trials["role"] == "student")]
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


def confirmed(records: Records) -> pd.DataFrame:
    """The headline accuracy by arm (columns) and by run and seed (rows), of confirmed trials that ran to their end.

    Raises `ValueError` where an arm has a seed twice.
    """
    ended = confirmed_trials(records)
    ended = ended[ended["status"] == "completed"]
    if (twice := ended.duplicated(["run", "arm", "seed"])).any():
        first = ended[twice].iloc[0]
        raise ValueError(
            f"{int(twice.sum())} confirmed trials have the run, arm and seed of another, such as {first['arm']} "
            f"at seed {first['seed']}; an arm has to name all in which its trials differ"
        )
    table = ended.pivot(index=["run", "seed"], columns="arm", values=HEADLINE)
    return table.astype("float64")


def arms(records: Records) -> pd.DataFrame:
    """A row an arm: n, mean, sd, and the 95 % interval of its confirmed accuracy; a note where seeds are missing.

    `planned` are the seeds that the study fixed; in tables of others those that are there. An arm whose own trials
    differ in planned epochs, data or recipe has no mean, and the note says in what they differ.
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
        elif statuses == {"stopped"}:
            note = "stopped in the screen"
        elif statuses & set(UNENDED):
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
    """A row an arm and phase of what claims nothing: the screen, what was drawn, and seeds that were added to the plan.

    `tried` is how many arms, or draws, the best of them was the best of: the maximum of many is too good (selection).
    """
    trials = records.trials[records.trials["role"] == "student"]
    trials = trials[~trials.index.isin(confirmed_trials(records).index)]
    rows = []
    for (run, phase), of_phase in trials.groupby(["run", "phase"], sort=False):
        tried = of_phase["arm"].nunique()
        study = records.studies.get(str(run), {})
        fixed = [arm["name"] for arm in study.get("arms", [])]
        tuned = bool(study.get("searches"))
        for arm, group in of_phase.groupby("arm", sort=False):
            ended = group[group["status"] == "completed"]
            rows.append(
                {
                    "run": run,
                    "what": "draws" if tuned and phase == "screen" else _explored(str(phase), arm in fixed),
                    "arm": arm,
                    "tried": len(group) if tuned and phase == "screen" else tried,
                    "trials": len(group),
                    "n": len(ended),
                    "stopped": int((group["status"] == "stopped").sum()),
                    "epochs_run": float(group["epochs_run"].astype("float64").mean()),
                    "val_accuracy_best": _mean(group["val_accuracy_best"]),
                    "mean": _mean(ended[HEADLINE]),
                    "sd": statistics.summary(ended[HEADLINE].dropna().tolist()).sd,
                }
            )
    table = typed(rows, "run what arm tried trials n stopped epochs_run val_accuracy_best mean sd")
    return table.sort_values(["run", "what", "val_accuracy_best"], ascending=[True, False, False], ignore_index=True)


def _explored(phase: str, fixed: bool) -> str:
    return "screen" if phase == "screen" else "added seeds" if fixed else "added arm"


def contrasts(records: Records, margin: float = MARGIN) -> pd.DataFrame:
    """A row for each contrast that a study fixed: its estimate over the seeds that have all of its arms, and a verdict.

    Paired by seed; `p_holm` and `p_equivalence` are adjusted by Holm over all contrasts that the run fixed, those
    without a p value among them: a family that shrinks with what the data did would make its p values too small.
    `pairs_needed` is for 80 % power at this difference and spread and an unadjusted 0.05. A contrast has no estimate
    where an arm was stopped, or where its arms differ in more than they should (`note` says in what).

    Where the study declared looks, each has its share of 0.05 (`stats.spent`). An adjusted p value is then the smallest
    over the looks so far, each scaled from its share to 0.05, so that what once stood goes on standing; intervals are
    so wide that those of all looks together hold with 95 %. Estimates, deviations and `p` are of all seeds so far.
    """
    found = [_contrasts_of(records.of(run), margin) for run in records.runs if run in records.studies]
    return pd.concat(found, ignore_index=True) if found else typed([], CONTRAST_COLUMNS)


def _contrasts_of(records: Records, margin: float) -> pd.DataFrame:
    (run,), study, values, trials = records.runs, records.study, confirmed(records), confirmed_trials(records)
    confirm, look = confirmation(study), judged_look(records)
    levels = statistics.spent(confirm.looks)[: look + 1] if confirm.looks else [ALPHA]
    differences: list[pd.Series[float]] = []  # of each contrast, by seed
    notes: list[str] = []
    seeds = confirm.seeds_at(look)
    trials = trials[trials["seed"].isin(seeds)]
    values = values[values.index.isin(seeds, level="seed")]
    unended = trials[trials["status"].isin(UNENDED)]
    for contrast in study["contrasts"]:
        weights = dict(contrast["weights"])
        missing = [arm for arm in weights if arm not in values]
        if waiting := int(unended["arm"].isin(weights).sum()):
            note = f"{waiting} of its trials wait or run"
        elif missing:
            note = f"{missing[0]} has no confirmed trial that ran to its end"
        else:
            tuned = study["study"].get("tuning") is not None  # so that recipes differ by what was drawn
            note = differing(trials[trials["arm"].isin(weights)], COMPARABLE[:-1] if tuned else COMPARABLE)
        if note:
            paired = pd.Series(dtype="float64")
        else:
            paired = sum(weight * values.loc[run, arm] for arm, weight in weights.items()).dropna()
            note = f"{len(seeds) - len(paired)} of {len(seeds)} seeds are missing" if len(paired) < len(seeds) else ""
        differences.append(paired)
        notes.append(note)
    rows = [
        {"run": run, "contrast": contrast["name"], "kind": contrast["kind"], "planned": len(seeds), "note": note}
        | _judged(paired.tolist(), margin, levels[-1])
        for contrast, paired, note in zip(study["contrasts"], differences, notes, strict=True)
    ]
    table = typed(rows, CONTRAST_COLUMNS)
    adjusted = [_adjusted(table)]
    for earlier, level in enumerate(levels[:-1]):
        then = [paired[paired.index.isin(confirm.seeds_at(earlier))].tolist() for paired in differences]
        judged = typed([_judged(values, margin, level) for values in then], CONTRAST_COLUMNS)
        found = _adjusted(judged) * (ALPHA / level)
        # What has turned or come to nothing since, or has left the margin, stands no longer.
        turned = (judged["estimate"] * table["estimate"] <= 0) | (table["estimate"].abs() <= statistics.NO_SPREAD)
        found["p_holm"] = found["p_holm"].mask(turned, 1.0)
        found["p_equivalence"] = found["p_equivalence"].mask(table["estimate"].abs() >= margin, 1.0)
        adjusted.append(found)
    adjusted[0] *= ALPHA / levels[-1]
    for name in ("p_holm", "p_equivalence"):
        table[name] = pd.concat([each[name] for each in adjusted], axis=1).min(axis=1).clip(upper=1.0)
    now = (adjusted[0] < ALPHA).any(axis=1)
    before = (table[["p_holm", "p_equivalence"]] < ALPHA).any(axis=1) & ~now
    table["note"] = table["note"].mask(before, (table["note"] + "; ").where(table["note"] != "", "") + EARLIER)
    return _with_verdicts(table, margin, given=_given(len(study["study"]["teacher_seeds"])))


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """The p values of one look, after Holm over all contrasts."""
    return pd.DataFrame({"p_holm": holm(table["p"]), "p_equivalence": holm(table["p_equivalence"])})


def compare(records: Records, factor: str, treated: Any, against: Any) -> pd.DataFrame:
    """Two levels of a column of the trials, wherever everything else that was studied is alike: for tables that no
    study fixed contrasts for. What does not apply to one of two arms (a temperature, to a control) is no difference.
    Paired by seed where every seed has both levels, else after Welch; adjusted by Holm over the rows.

    It was not fixed before the data were seen, so it is exploratory, and has no verdict. Raises `UserError` for a
    column or a level that is not there.
    """
    trials = confirmed_trials(records)
    trials = trials[(trials["status"] == "completed") & trials[HEADLINE].notna()]
    if factor not in trials:
        raise UserError(
            f"factor is {factor!r}; allowed: a column of the trials, such as {', '.join(CONTEXT[1:])}, method"
        )
    levels = trials[factor].dropna().unique().tolist()
    if unknown := [level for level in (treated, against) if level not in levels]:
        named = " and ".join(map(repr, unknown))
        raise UserError(f"{factor} has no level {named}; allowed: {', '.join(map(str, levels))}")
    context = [name for name in (*CONTEXT, "method", *APPLIES, "lr", "weight_decay", *COMPARABLE) if name != factor]
    context = list(dict.fromkeys(context))
    sides = [list(by_context(trials[trials[factor] == level], context)) for level in (treated, against)]
    rows = []
    for (where, one), (there, other) in itertools.product(*sides):
        if any(where[name] != there[name] and not (name in APPLIES and None in (where[name], there[name]))
               for name in context):  # fmt: skip
            continue
        both = {name: there[name] if where[name] is None else where[name] for name in context}
        named = "/".join(str(both[name]) for name in context if both[name] is not None and trials[name].nunique() > 1)
        row = {"context": named, "contrast": f"{treated} - {against}", "n_treated": len(one), "n_control": len(other)}
        first, second = one.set_index("seed")[HEADLINE], other.set_index("seed")[HEADLINE]
        if set(first.index) == set(second.index) and first.index.is_unique and second.index.is_unique:
            rows.append(
                row | {"how": "paired"} | asdict(statistics.paired(first.tolist(), second[first.index].tolist()))
            )
        else:
            rows.append(row | {"how": "welch"} | asdict(statistics.welch(first.tolist(), second.tolist())))
    table = typed(rows, "context contrast how n n_treated n_control estimate low high p effect_size")
    table["p_holm"] = holm(table["p"])
    return table


def by_context(trials: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Trials that agree in these columns, with what they agree in. Nulls agree with each other, and are None."""
    for levels, group in trials.groupby(list(columns), dropna=False, sort=False):
        known: list[Any] = list(levels)
        yield {name: None if pd.isna(level) else level for name, level in zip(columns, known, strict=True)}, group


def differing(trials: pd.DataFrame, columns: Sequence[str] = COMPARABLE) -> str:
    """In what trials differ that are held against each other, and should not; empty where in nothing."""
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
    equal = statistics.equivalent_to_zero(paired, margin)
    smallest = statistics.smallest_exact_p(len(paired)) if paired else None
    return judged | {"smallest_exact_p": smallest, "p_equivalence": equal.p, "pairs_needed": needed}


def _with_verdicts(table: pd.DataFrame, margin: float, given: str) -> pd.DataFrame:
    verdicts = [verdict(row) for row in table.to_dict("records")]
    table["verdict"] = pd.Series(verdicts, index=table.index, dtype="string")
    sentences = [words(row, margin, given) for row in table.to_dict("records")]
    table["words"] = pd.Series(sentences, index=table.index, dtype="string")
    return table


def holm(p_values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Adjusted over all rows; one without a p value stays without, and counts as one that finds nothing."""
    adjusted = pd.Series(statistics.holm(p_values.fillna(1.0).tolist()), index=p_values.index, dtype="float64")
    return adjusted.where(p_values.notna())


def verdict(row: Mapping[Any, Any]) -> str:
    """better, worse, equivalent, inconclusive, or not judged; at 0.05 over all contrasts and looks."""
    if row["n"] == 0:
        return "not judged"
    if row["p_holm"] < ALPHA:
        return "better" if row["estimate"] > 0 else "worse"
    return "equivalent" if row["p_equivalence"] < ALPHA else "inconclusive"


def words(row: Mapping[Any, Any], margin: float, given: str) -> str:
    """The verdict as a sentence for readers who see nothing else of the row."""
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
    """A difference in points, signed; what rounds to zero has no sign."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


def _power(row: Mapping[Any, Any]) -> str:
    """What more seeds would bring. For one test by itself: Holm asks for more."""
    if row["n"] == 1:
        return "one seed shows no spread"
    if row["sd"] <= statistics.NO_SPREAD:
        return "without a spread there is nothing to judge it by"
    if pd.isna(row["pairs_needed"]):
        return "so small a difference is not to be found with a million pairs"
    return f"if that is the difference and its spread, {row['pairs_needed']:,} pairs give 80 % power before Holm"


def _given(teachers: int) -> str:
    return ", given one teacher" if teachers == 1 else ""


def _mean(values: "pd.Series[Any]") -> float | None:
    known = values.dropna()
    return float(known.mean()) if len(known) else None

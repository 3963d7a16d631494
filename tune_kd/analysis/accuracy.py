"""Test accuracy of the confirmed trials, on which claims rest, and of the exploratory others, as DataFrames."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed
from tune_kd.study.spec import Confirm
from tune_kd.study.trial import ENDED, Phase, Role, Status

HEADLINE: Final = "test_accuracy_best"
COMPARABLE = ("epochs_planned", "dataset", "data_digest", "scale", "recipe_id")  # equal in arms that are compared
CONTEXT = ("run", "student", "teacher", "stem", "weights", "width")  # arms of one context differ in other settings


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


def confirmed(records: Records, column: str = HEADLINE) -> pd.DataFrame:
    """The headline accuracy, or another measure, of completed confirmed trials, by run and seed (rows) and arm
    (columns).

    Raises `ValueError` if an arm has a seed twice.
    """
    ended = completed_trials(records)
    if (twice := ended.duplicated(["run", "arm", "seed"])).any():
        first = ended[twice].iloc[0]
        raise ValueError(
            f"{int(twice.sum())} confirmed trials have the run, arm and seed of another, such as {first['arm']} "
            f"at seed {first['seed']}; an arm has to name all in which its trials differ"
        )
    table = ended.pivot(index=["run", "seed"], columns="arm", values=column)
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
        elif statuses == {"stopped"}:
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

"""Test accuracy as DataFrames: of confirmed trials, on which claims rest, and of exploratory trials."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from tune_kd.analysis import statistics, teachers
from tune_kd.analysis.block_model import Array
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed
from tune_kd.study.spec import RECIPE_FACTORS, Confirm, Study
from tune_kd.study.trial import ENDED, Phase, Role, Status, recipe_id

HEADLINE: Final = "test_accuracy_best"
COMPARABLE = ("epochs_planned", "dataset", "data_digest", "scale", "recipe_id")  # equal in compared arms
CONTEXT = ("run", "student", "teacher", "stem", "weights", "width")  # equal in arms of one context


def control_of(records: Records, run: str) -> str:
    """The control method of a run; the default if the tables have no study or the study no control."""
    declared = records.studies[run]["study"].get("control") if run in records.studies else None
    return str(declared or Study.control)


def planned_seeds(records: Records, run: str) -> list[int] | None:
    """The confirmation seeds of a run's study up to the current look. None for tables without a study."""
    study = records.studies.get(run)
    return None if study is None else list(confirmation(study).seeds_at(study.get("look", 0)))


def confirmation(study: Mapping[str, Any]) -> Confirm:
    """The confirmation seeds, looks and layout that a run's `study.json` declares."""
    declared = study["study"]["confirm"]
    looks = declared.get("looks")
    return Confirm(tuple(declared["seeds"]), None if looks is None else tuple(looks), declared.get("teachers_per_seed"))


def judged_look(records: Records) -> int:
    """The last look (from 0) whose planned seeds are all present and ended, else 0.

    Contrasts exclude the seeds of a later look until all of them have ended, since using them earlier would be an
    additional look.
    """
    confirm, look, trials = confirmation(records.study), records.study.get("look", 0), confirmed_trials(records)
    ended = set(trials["seed"]) - set(trials.loc[~trials["status"].isin(ENDED), "seed"])
    return max((each for each in range(look + 1) if set(confirm.seeds_at(each)) <= ended), default=0)


def confirmed_trials(records: Records) -> pd.DataFrame:
    """Student trials of planned arms with planned confirmation seeds, of any status, by arm in the study's order."""
    return records.kept("confirmed trials", lambda: _confirmed_trials(records))


def _confirmed_trials(records: Records) -> pd.DataFrame:
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
    """The headline accuracy, or another measure, of completed confirmed trials: rows are run and seed, columns arms.

    An arm with several teachers at a seed has the mean over them. Raises `ValueError` if an arm has two trials with the
    same seed and teacher.
    """
    ended = completed_trials(records)
    if (twice := ended.duplicated(["run", "arm", "seed", "teacher_id"])).any():
        first = ended[twice].iloc[0]
        raise ValueError(
            f"{int(twice.sum())} confirmed trials have the run, arm and seed of another, such as {first['arm']} "
            f"at seed {first['seed']}; give trials that differ in a setting different arms"
        )
    return ended.groupby(["run", "seed", "arm"])[column].mean().unstack("arm").astype("float64")


def random_teachers(records: Records, run: str) -> list[int]:
    """The seeds of the teachers over which the verdicts of a run generalise.

    Empty with one teacher, and if a version before 0.7 declared the study: there, seeds took turns over the teachers,
    and the verdicts hold only for these teachers.
    """
    study = records.studies.get(run)
    return study["study"]["teacher_seeds"] if study is not None and is_crossed(study) else []


def is_crossed(study: Mapping[str, Any]) -> bool:
    """Whether a run's `study.json` declares several teachers over which verdicts generalise."""
    return len(study["study"]["teacher_seeds"]) > 1 and "teachers_per_seed" in study["study"]["confirm"]


def teachers_per_seed(records: Records, run: str) -> int:
    """The number of planned trials per confirmation seed of an arm that has a teacher."""
    count = len(random_teachers(records, run))
    return min(records.studies[run]["study"]["confirm"]["teachers_per_seed"] or count, count) if count else 1


def cells(records: Records, run: str, ended: pd.DataFrame, seeds: Sequence[int]) -> Array:
    """The accuracies [T, S] of an arm's completed trials by `random_teachers` and seed; NaN where a trial is missing.

    An arm without a teacher has the same accuracies for every teacher.
    """
    of_run = records.trials[(records.trials["run"] == run) & (records.trials["role"] == Role.TEACHER)]
    seed_of = dict(zip(of_run["trial_id"], of_run["seed"], strict=True))
    rows = {seed: place for place, seed in enumerate(random_teachers(records, run))}
    columns = {seed: place for place, seed in enumerate(seeds)}
    found = np.full((len(rows), len(columns)), np.nan)
    if not rows:
        return found
    known = ended[ended["seed"].isin(seeds) & ended[HEADLINE].notna()]
    for teacher_id, seed, value in zip(known["teacher_id"], known["seed"], known[HEADLINE], strict=True):
        if pd.isna(teacher_id):
            found[:, columns[seed]] = value
        elif seed_of.get(teacher_id) in rows:
            found[rows[seed_of[teacher_id]], columns[seed]] = value
    return found


def summary(records: Records, run: str, ended: pd.DataFrame) -> statistics.Summary:
    """Mean, standard deviation and 95 % interval, within 0 and 1, of an arm's completed trials.

    If students are crossed with several teachers, the interval is for the mean over teachers and seeds.
    """
    described = statistics.summary(ended[HEADLINE].dropna().tolist())
    if random_teachers(records, run) and ended["teacher_id"].notna().any():
        low, high = teachers.crossed(cells(records, run, ended, ended["seed"].unique().tolist())).interval()
        described = replace(described, low=float(low), high=float(high))
    # A t interval may extend beyond 0 or 1.
    if described.low is None or described.high is None:
        return described
    return replace(described, low=max(0.0, described.low), high=min(1.0, described.high))


def arms(records: Records) -> pd.DataFrame:
    """One row per arm: n, mean, sd and 95 % interval of its confirmed accuracy, and a note if seeds are missing.

    `planned` counts the planned trials; in tables without a study, the seeds that are present. An arm whose own trials
    differ in planned epochs, data or recipe has no mean, and the note names the columns.
    """
    trials = confirmed_trials(records)
    confirmed(records)  # raises if a trial is duplicated
    rows: list[dict[str, Any]] = []
    for run, name, role, tried in _arms(records, trials):
        ended = tried[(tried["status"] == Status.COMPLETED) & tried[HEADLINE].notna()]
        seeds = planned_seeds(records, run)
        planned = tried["seed"].nunique() if seeds is None else len(seeds)
        if seeds is not None and tried["teacher_id"].notna().any():
            planned *= teachers_per_seed(records, run)
        statuses = set(tried["status"])
        note = differing(tried)
        if note:
            ended = ended.iloc[:0]
        elif statuses == {"stopped"}:
            note = "stopped in the screen"
        elif not statuses <= set(ENDED):
            note = "not finished"
        elif len(ended) < planned:
            note = "incomplete"
        described = asdict(summary(records, run, ended))
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

    `tried` is the number of competing arms or draws: the best of many is biased upwards (selection).
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


def by_seed(trials: pd.DataFrame) -> "pd.Series[float]":
    """The accuracies of an arm's trials by seed; the mean over teachers if a seed has several."""
    again = trials.groupby(["seed", "teacher_id"], dropna=False).cumcount()  # repeats of a seed and teacher stay apart
    return trials.groupby([trials["seed"], again])[HEADLINE].mean().droplevel(1)


def by_context(trials: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Group trials by columns. Yields each group's levels and trials. Null counts as a level and is given as None."""
    for levels, group in trials.groupby(list(columns), dropna=False, sort=False):
        known: list[Any] = list(levels)
        yield {name: None if pd.isna(level) else level for name, level in zip(columns, known, strict=True)}, group


def column_of(factor: str) -> str:
    """The column of the trials that holds a factor's levels."""
    return "epochs_planned" if factor == "epochs" else factor


def varied(study: Mapping[str, Any]) -> list[str]:
    """The recipe fields that a run's factors vary."""
    return [each["name"] for each in study["study"].get("factors", ()) if each["name"] in RECIPE_FACTORS]


def without_factors(records: Records, trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with a `recipe_id` that ignores the recipe fields that factors vary.

    Arms of such a factor differ in their recipes on purpose. A recipe that differs in other fields keeps its own id.
    """
    ids = trials["recipe_id"].copy()
    for run, of_run in trials.groupby("run", sort=False):
        study = records.studies.get(str(run))
        names = [] if study is None else varied(study)
        if study is None or not names:
            continue
        recipe = study["study"]["recipe"]
        rest = recipe_id({name: value for name, value in recipe.items() if name not in names})
        columns = [column_of(name) for name in names]
        for levels, group in of_run.groupby([*columns, "recipe_id"], dropna=False, sort=False):
            *values, found = tuple(levels)
            as_declared = {name: _as_in(recipe[name], value) for name, value in zip(names, values, strict=True)}
            if found == recipe_id(recipe | as_declared):
                ids[group.index] = rest
    return trials.assign(recipe_id=ids)


def _as_in(declared: Any, value: Any) -> Any:
    """A level from a table, converted to the type of the recipe's field."""
    return value if pd.isna(value) else type(declared)(value)


def differing(trials: pd.DataFrame, columns: Sequence[str] = COMPARABLE) -> str:
    """Settings in which compared trials wrongly differ, as text; empty if there are none."""
    said = []
    for name in columns:
        levels = trials[name].dropna().unique().tolist()
        if len(levels) > 1:
            said.append(f"{name} is {' and '.join(str(level)[:16] for level in levels)}")
    return "; ".join(said)

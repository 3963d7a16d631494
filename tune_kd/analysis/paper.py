"""The table of a paper: accuracy by teacher-student pair or stem (rows) and method (columns)."""

from typing import Any

import pandas as pd

from tune_kd.analysis.accuracy import CONTEXT, HEADLINE, arms, column_of, confirmed_trials, control_of
from tune_kd.analysis.contrasts import contrasts
from tune_kd.analysis.statistics import summary
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed
from tune_kd.study.arms import level_name
from tune_kd.study.spec import Family
from tune_kd.study.trial import Role, Row

COLUMNS = " ".join([*CONTEXT, "column arm n mean sd verdict teacher_n teacher_accuracy teacher_accuracy_sd"])


def paper(records: Records) -> pd.DataFrame:
    """One row per cell of the paper's table: the context of its row, its `column`, its arm with n, mean and sample
    standard deviation, and the mean accuracy of the row's teacher.

    An arm has a cell if it is at the study's reference, or if a declared effect compares it. A control has a cell in
    the row of each teacher whose students are compared with it. `verdict` is that of the declared effect of the cell's
    method against the control of its row; null if there is none, or if its family is secondary. A run without a study,
    or with fewer than two measured arms, has no rows.
    """
    found = [_paper_of(records.of(run)) for run in records.runs if run in records.studies]
    return pd.concat(found, ignore_index=True) if found else typed([], COLUMNS)


def _paper_of(records: Records) -> pd.DataFrame:
    measured: dict[Any, Any] = arms(records).set_index("arm")[["n", "mean", "sd"]].to_dict("index")
    verdicts = _verdicts(records)
    rows: list[Row] = []
    for context, of_row in _rows(records).items():
        teacher = _teacher(records, list(of_row))
        for arm, column in of_row.items():
            cell = {"column": column, "arm": arm, "verdict": verdicts.get(arm)} | measured[arm] | teacher
            rows.append(dict(zip(CONTEXT, context, strict=True)) | cell)
    enough = len({row["arm"] for row in rows if row["n"]}) > 1
    return typed(rows if enough else [], COLUMNS)


def _rows(records: Records) -> dict[tuple[Any, ...], dict[str, str]]:
    """Rows by context; each row maps its arms to their columns, in the study's order of arms."""
    study, trials = records.study, confirmed_trials(records).drop_duplicates("arm").astype(object)
    compared = {name for each in study["contrasts"] if each["kind"] == "effect" for name, _ in each["weights"]}
    found = [dict(zip(trials.columns, row, strict=True)) for row in trials.where(trials.notna(), None).to_numpy()]
    shown = [arm for arm in found if arm["arm"] in compared or _at_reference(study["study"], arm)]
    teachers: dict[tuple[Any, ...], list[str]] = {}
    for arm in shown:
        if arm["teacher"] is not None:
            teachers.setdefault(_context(arm, None), []).append(arm["teacher"])
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for arm in shown:
        own = [arm["teacher"]]
        for teacher in own if own != [None] else dict.fromkeys(teachers.get(_context(arm, None), own)):
            rows.setdefault(_context(arm, teacher), {})[arm["arm"]] = _column(study["study"], arm)
    return rows


def _context(arm: Row, teacher: str | None) -> tuple[Any, ...]:
    """The arm's levels of `CONTEXT`, with this teacher."""
    return tuple(teacher if name == "teacher" else arm[name] for name in CONTEXT)


def _at_reference(study: Row, arm: Row) -> bool:
    varied = [each["name"] for each in study["factors"] if each["name"] not in CONTEXT]
    fixed = [(name, level) for name, level in study.get("reference", ()) if name in varied]
    return all(arm[column_of(name)] in (None, level) for name, level in fixed)


def _column(study: Row, arm: Row) -> str:
    """The method, and the levels of other factors that are not in the context: `logit T=4`."""
    names = [each["name"] for each in study["factors"] if each["name"] not in (*CONTEXT, "method")]
    levels = [level_name(name, level) for name in names if (level := arm[column_of(name)]) is not None]
    tuned = [arm["arm"].rpartition("/")[2]] if study.get("tuning") else []
    return " ".join([arm["method"] or "", *levels, *tuned]).strip()


def _teacher(records: Records, arms: list[str]) -> dict[str, Any]:
    """The mean accuracy of the teachers of these arms, over the seeds of the teacher."""
    students, trials = confirmed_trials(records), records.trials
    ids = students.loc[students["arm"].isin(arms), "teacher_id"].dropna().unique()
    taught = trials[trials["trial_id"].isin(ids) & (trials["role"] == Role.TEACHER)]
    theirs = summary(taught[HEADLINE].dropna().tolist())
    return {"teacher_n": theirs.n or None, "teacher_accuracy": theirs.mean, "teacher_accuracy_sd": theirs.sd}


def _verdicts(records: Records) -> dict[str, str]:
    """The verdict of each arm against its control, if a contrast of the primary family compares them.

    Runs of versions before 0.7 have one family, which counts as primary.
    """
    methods = confirmed_trials(records).drop_duplicates("arm").set_index("arm")["method"].to_dict()
    control = control_of(records, records.runs[0])
    found: dict[str, str] = {}
    for each, verdict in zip(records.study["contrasts"], contrasts(records)["verdict"], strict=True):
        treated, against = ([arm for arm, weight in each["weights"] if sign * weight > 0] for sign in (1, -1))
        with_control = [methods.get(arm) for arm in against] == [control] != [methods.get(arm) for arm in treated]
        if with_control and each.get("family") != Family.SECONDARY:
            found |= dict.fromkeys(treated, str(verdict))
    return found

"""Measures beyond accuracy: agreement with the teacher, calibration error, cost, and response to a factor.

Each function returns a DataFrame over completed confirmed trials. Null means that a value does not apply.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis.accuracy import (
    COMPARABLE,
    CONTEXT,
    HEADLINE,
    by_context,
    column_of,
    completed_trials,
    control_of,
    summary,
    varied,
    without_factors,
)
from tune_kd.records.reader import Records
from tune_kd.records.schema import TRIALS
from tune_kd.records.tables import typed
from tune_kd.study.spec import TEXTS
from tune_kd.study.trial import Role, Status

MEASURES = ("agreement", "kl_t1", "kl_t4", "ece", "test_accuracy", "val_accuracy_best")
CONTEXT_SHOWN = tuple(name for name in CONTEXT if name != "teacher")
ALIKE_WITH_CONTROL = (*CONTEXT_SHOWN, *COMPARABLE)  # equal in a control and the arms compared with it


def measures(records: Records) -> pd.DataFrame:
    """One row per arm: means and standard deviations of the measures on the test images.

    `agreement` with the teacher and `ece` (expected calibration error) are fractions, `kl_t1` and `kl_t4` the KL
    divergence from the teacher in nats at temperatures 1 and 4.
    """
    ended = completed_trials(records)
    grouped = ended.groupby(["run", "arm"], sort=False)[list(MEASURES)]
    table = grouped.size().rename("n").to_frame()
    for name, of in (("", "mean"), ("_sd", "std")):
        found = grouped.agg(of).astype("float64")
        table = table.join(found.add_suffix(name))
    columns = [f"{name}{end}" for name in MEASURES for end in ("", "_sd")]
    return table[["n", *columns]].reset_index()


def target_accuracy(records: Records) -> float | None:
    """The default target of `costs`: 99 % of the validation accuracy of a run's worst control."""
    ended = completed_trials(records)
    controls = ended[_is_control(records, ended)]
    means = controls.groupby("arm")["val_accuracy_best"].mean().dropna()
    return 0.99 * float(means.min()) if len(means) else None


def costs(records: Records, target: float | None = None) -> pd.DataFrame:
    """One row per arm: the mean cost of a trial, and the epochs to `target` (default: `target_accuracy` of each run).

    `train_seconds` is the time for training and evaluation, `answer_seconds` the wait for teacher logits,
    `wall_seconds` the whole trial; `gpu_seconds` and `cpu_seconds` are `wall_seconds` times the trial's GPU share and
    threads. Training of the teacher is never included. `reached` counts the trials whose validation accuracy reached
    `target`; `epochs_to_target` is the mean of the first such epoch, null unless all trials reached it. Epochs without
    validation do not count as reaching it.
    """
    found = [_costs_of(records.of(run), target) for run in records.runs]
    return pd.concat(found, ignore_index=True)


def _costs_of(records: Records, target: float | None) -> pd.DataFrame:
    target = target_accuracy(records) if target is None else target
    ended = completed_trials(records)
    wanted = pd.MultiIndex.from_frame(ended[["run", "trial_id"]])
    waited = records.epochs.groupby(["run", "trial_id"])["answer_seconds"].sum(min_count=1).reindex(wanted)
    ended = ended.assign(
        answer_seconds=waited.to_numpy(dtype="float64", na_value=np.nan),
        gpu_seconds=ended["wall_seconds"] * ended["gpu_fraction"],
        cpu_seconds=ended["wall_seconds"] * ended["threads"].astype("float64"),
        epochs_to_target=_first_epoch(records.epochs, ended, target),
    )
    names = ["train_seconds", "answer_seconds", "wall_seconds", "gpu_seconds", "cpu_seconds", "epochs_to_target"]
    grouped = ended.groupby(["run", "arm"], sort=False)
    table = grouped[[HEADLINE, *names]].mean().astype("float64").rename(columns={HEADLINE: "mean"})
    table.insert(0, "n", grouped.size())
    table["reached"] = grouped["epochs_to_target"].count()
    table["epochs_to_target"] = table["epochs_to_target"].where(table["reached"] == table["n"])
    table["target"] = np.nan if target is None else target
    return table.reset_index()


def _first_epoch(epochs: pd.DataFrame, trials: pd.DataFrame, target: float | None) -> "pd.Series[Any]":
    """The first epoch of each trial with at least this validation accuracy, by the trials' index; null if none."""
    if target is None or epochs.empty:
        return pd.Series(np.nan, index=trials.index)
    good = epochs.loc[epochs["val_accuracy"] >= target, ["run", "trial_id", "epoch"]]
    first = good.groupby(["run", "trial_id"])["epoch"].min()
    wanted = pd.MultiIndex.from_frame(trials[["run", "trial_id"]])
    return pd.Series(first.reindex(wanted).to_numpy(dtype="float64", na_value=np.nan), index=trials.index)


def response(records: Records, factor: str) -> pd.DataFrame:
    """The confirmed accuracy over the levels of a numeric factor: one row per context, method and level.

    Empty unless a method has several levels of the factor. `control` is the mean of the context's control. It is null
    in the control's own rows, and if no control has the same data, budget and recipe.
    """
    column, ended = column_of(factor), without_factors(records, completed_trials(records).dropna(subset=HEADLINE))
    in_recipe = [column_of(name) for study in records.studies.values() for name in varied(study)]
    further = [str(name) for name in ended if name not in TRIALS.columns]
    alike = list(dict.fromkeys((*ALIKE_WITH_CONTROL, *in_recipe)))
    settings = dict.fromkeys(("teacher", "method", "temperature", "alpha", "beta", *further, *in_recipe))
    others, controls = [name for name in settings if name != column], _controls(records, ended, alike)
    rows = []
    together = [name for name in dict.fromkeys((*alike, *others)) if name != column]
    for where, group in by_context(ended[ended[column].notna()], together):
        if group[column].nunique() < 2:
            continue
        of_control = where["method"] == control_of(records, str(where["run"]))
        for level, of_level in group.groupby(column):
            described = asdict(summary(records, str(where["run"]), of_level))
            beside = None if of_control else controls.get(tuple((where | {column: level})[name] for name in alike))
            rows.append(where | {factor: level, **described, "control": beside})
    return typed(rows, " ".join([*CONTEXT_SHOWN, *others, factor, "n mean sd low high control"]))


def responses(records: Records) -> list[str]:
    """The factors that have a `response`: temperature, alpha, and each numeric setting or recipe field that a factor
    varies."""
    declared = [each["name"] for study in records.studies.values() for each in study["study"].get("factors", ())]
    numbers = (name for name in declared if name not in (*TEXTS, *CONTEXT) and column_of(name) in records.trials)
    return list(dict.fromkeys(("temperature", "alpha", *numbers)))


def gaps(records: Records) -> pd.DataFrame:
    """The gap between teacher and control, and the gain of each arm over the control: one row per arm."""
    ended = completed_trials(records).dropna(subset=HEADLINE)
    controls = _controls(records, ended, ALIKE_WITH_CONTROL)
    taught = records.trials[(records.trials["role"] == Role.TEACHER) & (records.trials["status"] == Status.COMPLETED)]
    teachers = taught.set_index(["run", "trial_id"])[HEADLINE].dropna().to_dict()
    rows = []
    for where, group in by_context(ended[~_is_control(records, ended)], [*ALIKE_WITH_CONTROL, "teacher", "arm"]):
        known = [teachers.get(key) for key in zip(group["run"], group["teacher_id"], strict=True)]
        beside = controls.get(tuple(where[name] for name in ALIKE_WITH_CONTROL))
        if beside is None or None in known:
            continue
        teacher, mean = float(np.mean(np.asarray(known, dtype=float))), float(group[HEADLINE].mean())
        found = {"teacher_accuracy": teacher, "control": beside, "mean": mean}
        rows.append(where | {"n": len(group), **found, "gap": teacher - beside, "gain": mean - beside})
    return typed(rows, " ".join([*CONTEXT_SHOWN, "teacher", "arm", "n teacher_accuracy control mean gap gain"]))


def _is_control(records: Records, trials: pd.DataFrame) -> "pd.Series[bool]":
    """Which trials are controls of their run."""
    return (trials["method"] == trials["run"].map(lambda run: control_of(records, run))).fillna(False).astype(bool)


def _controls(records: Records, ended: pd.DataFrame, alike: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """The mean accuracy of the controls, by the settings `alike` that they share with the compared arms."""
    found = by_context(ended[_is_control(records, ended)], alike)
    return {tuple(where.values()): float(group[HEADLINE].mean()) for where, group in found}

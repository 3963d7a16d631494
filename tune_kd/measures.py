"""More than accuracy: likeness to the teacher, calibration, cost, and how accuracy answers to a factor.

Each function gives a DataFrame over confirmed trials that ran to their end. Null where it does not apply.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from tune_kd import stats
from tune_kd.results import CONTEXT, HEADLINE, confirmed_trials
from tune_kd.tables import Records, typed

MEASURES = ("agreement", "kl_t1", "kl_t4", "ece", "test_accuracy", "val_accuracy_best")


def measures(records: Records) -> pd.DataFrame:
    """A row an arm: means and deviations over confirmed trials of what else was measured on the test images.

    `agreement` with the teacher and `ece` (expected calibration error) are fractions, `kl_t1` and `kl_t4` the
    divergence from the teacher in nats at temperatures 1 and 4.
    """
    ended = confirmed_trials(records)
    ended = ended[ended["status"] == "completed"]
    grouped = ended.groupby(["run", "arm"], sort=False)[list(MEASURES)]
    table = grouped.size().rename("n").to_frame()
    for name, of in (("", "mean"), ("_sd", "std")):
        found = grouped.agg(of).astype("float64")
        table = table.join(found.add_suffix(name))
    columns = [f"{name}{end}" for name in MEASURES for end in ("", "_sd")]
    return table[["n", *columns]].reset_index()


def target_accuracy(records: Records) -> float | None:
    """The accuracy that `costs` measures the way to by default: 99 % of what the worst of all controls reached."""
    controls = confirmed_trials(records)
    controls = controls[(controls["method"] == "none") & (controls["status"] == "completed")]
    means = controls.groupby(["run", "arm"])["val_accuracy_best"].mean()
    return 0.99 * float(means.min()) if len(means) else None


def costs(records: Records, target: float | None = None) -> pd.DataFrame:
    """A row an arm: what a confirmed trial that ran to its end cost, and how many epochs it took to `target`.

    `train_seconds` are of training with its evaluations, `wall_seconds` of all of the trial; `gpu_seconds` and
    `cpu_seconds` are wall seconds times its share of a GPU and its threads. `reached` counts the trials whose
    validation accuracy came to `target`, `epochs_to_target` is the mean of the first epoch in which it did.
    """
    target = target_accuracy(records) if target is None else target
    ended = confirmed_trials(records)
    ended = ended[ended["status"] == "completed"]
    first = _first_epoch(records.epochs, ended, target)
    ended = ended.assign(
        gpu_seconds=ended["wall_seconds"] * ended["gpu_fraction"],
        cpu_seconds=ended["wall_seconds"] * ended["threads"].astype("float64"),
        epochs_to_target=first,
    )
    names = ["train_seconds", "wall_seconds", "gpu_seconds", "cpu_seconds", "epochs_to_target"]
    grouped = ended.groupby(["run", "arm"], sort=False)
    table = grouped[[HEADLINE, *names]].mean().astype("float64").rename(columns={HEADLINE: "mean"})
    table.insert(0, "n", grouped.size())
    table["reached"] = grouped["epochs_to_target"].count()
    table["target"] = np.nan if target is None else target
    return table.reset_index()


def _first_epoch(epochs: pd.DataFrame, trials: pd.DataFrame, target: float | None) -> "pd.Series[Any]":
    """The first epoch of each trial with at least this validation accuracy, by the trials' index; null without."""
    if target is None or epochs.empty:
        return pd.Series(np.nan, index=trials.index)
    good = epochs.loc[epochs["val_accuracy"] >= target, ["run", "trial_id", "epoch"]]
    first = good.groupby(["run", "trial_id"])["epoch"].min()
    wanted = pd.MultiIndex.from_frame(trials[["run", "trial_id"]])
    return pd.Series(first.reindex(wanted).to_numpy(dtype="float64", na_value=np.nan), index=trials.index)


def response(records: Records, factor: str) -> pd.DataFrame:
    """The confirmed accuracy over the levels of a numeric factor: a row a context, method and level.

    Empty where no method has more than one level of it. `control` is the mean of the context's control.
    """
    ended = confirmed_trials(records)
    ended = ended[(ended["status"] == "completed") & ended[HEADLINE].notna()]
    context = [name for name in CONTEXT if name != "teacher"]
    controls = ended[ended["method"] == "none"].groupby(context, dropna=False)[HEADLINE].mean()
    others = [name for name in ("teacher", "method", "temperature", "alpha", "beta") if name != factor]
    rows = []
    for levels, group in ended[ended[factor].notna()].groupby([*context, *others], dropna=False, sort=False):
        if group[factor].nunique() < 2:
            continue
        where = dict(zip([*context, *others], levels, strict=True))
        control = controls.get(tuple(levels[: len(context)]), np.nan)
        for level, of_level in group.groupby(factor):
            described = asdict(stats.summary(of_level[HEADLINE].tolist()))
            rows.append(where | {factor: level, **described, "control": control})
    return typed(rows, " ".join([*context, *others, factor, "n mean sd low high control"]))


def gaps(records: Records) -> pd.DataFrame:
    """How much better the teacher is than the control, beside what each arm gains on the control: a row an arm."""
    ended = records.trials[(records.trials["status"] == "completed") & records.trials[HEADLINE].notna()]
    teachers = ended[ended["role"] == "teacher"].set_index(["run", "trial_id"])[HEADLINE]
    students = confirmed_trials(records).loc[lambda trials: trials.index.isin(ended.index)]
    context = [name for name in CONTEXT if name != "teacher"]
    controls = students[students["method"] == "none"].groupby(context, dropna=False)[HEADLINE].mean()
    rows = []
    taught = students[students["method"] != "none"]
    for levels, group in taught.groupby([*context, "teacher", "arm"], dropna=False, sort=False):
        known = [teachers.get((run, teacher)) for run, teacher in zip(group["run"], group["teacher_id"], strict=True)]
        control = controls.get(tuple(levels[: len(context)]))
        if control is None or any(each is None for each in known):
            continue
        teacher, mean = float(np.mean(np.asarray(known, dtype=float))), float(group[HEADLINE].mean())
        rows.append(
            dict(zip([*context, "teacher", "arm"], levels, strict=True))
            | {"n": len(group), "teacher_accuracy": teacher, "control": float(control), "mean": mean,
               "gap": teacher - float(control), "gain": mean - float(control)}
        )  # fmt: skip
    return typed(rows, " ".join([*context, "teacher", "arm", "n teacher_accuracy control mean gap gain"]))

"""Audit of early stopping: its decisions, rank correlations between epochs and final accuracy, and a timeline."""

from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed
from tune_kd.study.discover import from_json
from tune_kd.study.early_stopping import stratum
from tune_kd.study.spec import Study
from tune_kd.study.trial import Role, Status
from tune_kd.system.errors import UserError

TOUCH = 0.05  # seconds by which the recorded times of successive trials on a slot may overlap


def decisions(records: Records) -> pd.DataFrame:
    """Counts of early stopping's decisions: one row per run, action and reason."""
    grouped = records.decisions.groupby(["run", "action", "reason"], sort=True)
    table = grouped.size().rename("comparisons").to_frame()
    table["arms"] = grouped["arm"].nunique()
    return table.reset_index()


def audit(records: Records) -> pd.DataFrame:
    """One row per comparison of early stopping: `metric` is the validation accuracy at the rung, `final` the one at the
    last epoch. `final` is null for stopped trials, whose final accuracy is unknown.
    """
    trials = records.trials.set_index(["run", "trial_id"])
    ended = trials.loc[trials["status"] == Status.COMPLETED, "val_accuracy"]
    wanted = pd.MultiIndex.from_frame(records.decisions[["run", "trial_id"]])
    columns = ["run", "arm", "stratum", "epoch", "rung", "metric", "cutoff", "rank", "peers", "action", "reason"]
    return records.decisions[columns].assign(final=ended.reindex(wanted).to_numpy(dtype="float64", na_value=np.nan))


def rank_correlations(records: Records, *, everywhere: bool = False) -> pd.DataFrame:
    """Spearman's correlation between validation accuracy at a rung and at the last epoch, with its 95 % interval. One
    row per run, stratum and rung, over completed student trials.

    With `everywhere`, one row per validated epoch (at most a thousand, and the rungs); `rung` is null between rungs.
    Stopped trials are missing, so the correlations describe the surviving arms. The correlation is null for fewer than
    three trials, its interval for fewer than four.
    """
    rows: list[dict[str, Any]] = []
    for run, study in records.studies.items():
        declared, trials = from_json(study["study"]), records.trials[records.trials["run"] == run]
        screen, every = declared.screen, declared.recipe.validate_every
        ended = trials[(trials["role"] == Role.STUDENT) & (trials["status"] == Status.COMPLETED)]
        levels: list[dict[Any, Any]] = ended.to_dict("records")
        named = ended.assign(
            stratum=[stratum(screen, row) for row in levels], budget=ended["epochs_planned"].astype(int)
        )
        for budget in named["budget"].unique().tolist():
            rungs = screen.rungs(budget)
            wanted = _some(budget, every, rungs) if everywhere else rungs
            curves = _curves(records.epochs, [*wanted, budget])
            for name, group in named[named["budget"] == budget].groupby("stratum", sort=False):
                table = curves.reindex(pd.MultiIndex.from_frame(group[["run", "trial_id"]])).dropna()
                for epoch in wanted:
                    found = statistics.rank_correlation(table[epoch].tolist(), table[budget].tolist())
                    rung = rungs.index(epoch) if epoch in rungs else None
                    row = {"run": run, "stratum": name, "epoch": epoch, "rung": rung, "n": found.n, "rho": found.rho}
                    rows.append(row | {"rho_low": found.low, "rho_high": found.high})
    return typed(rows, "run stratum epoch rung n rho rho_low rho_high")


def _some(budget: int, every: int, rungs: list[int]) -> list[int]:
    """The validated epochs before the last epoch of a budget: all of them, or a thousand and the rungs."""
    return sorted({*range(every, budget, every * -(-budget // (1000 * every))), *rungs})


def _curves(epochs: pd.DataFrame, wanted: list[int]) -> pd.DataFrame:
    """Validation accuracy at these epochs (columns) by run and trial (rows)."""
    kept = epochs[epochs["epoch"].isin(wanted)]
    table = kept.pivot(index=["run", "trial_id"], columns="epoch", values="val_accuracy").astype("float64")
    return table.reindex(columns=wanted)


def noise_margins(records: Records, study: Study) -> list[float]:
    """The screen's margin at each rung of a study: `statistics.noise_margin` of the spread between the seeds of an
    earlier run's controls at that epoch.

    Raises `UserError` unless a control has two completed seeds with the study's data and budget.
    """
    trials, budget, rungs = records.trials, study.most_epochs, study.screen.rungs(study.most_epochs)
    controls = trials[(trials["role"] == Role.STUDENT) & (trials["method"] == study.control)
                      & (trials["status"] == Status.COMPLETED) & (trials["epochs_planned"] == budget)
                      & (trials["dataset"].isna() | (trials["dataset"] == study.data.name))
                      & (trials["scale"].isna() | (trials["scale"] == study.scale))]  # fmt: skip
    curves = _curves(records.epochs, [*rungs, budget])
    groups = [curves.reindex(pd.MultiIndex.from_frame(of_arm[["run", "trial_id"]])).dropna()
              for _, of_arm in controls.groupby(["run", "arm"])]  # fmt: skip
    if not rungs:
        raise UserError(
            f"--margin-from is given, but screen.grace {study.screen.grace} of {budget} epochs leaves no rung for a "
            "margin; allowed: a shorter grace period"
        )
    margins = [statistics.noise_margin([group[epoch].tolist() for group in groups]) for epoch in rungs if groups]
    if not margins or None in margins:
        raise UserError(
            f"--margin-from is {', '.join(records.runs)}, where no control ({study.control}) has two seeds that "
            f"completed {budget} epochs on {study.data.name} at scale {study.scale}, validated at the rungs "
            f"({', '.join(map(str, rungs))}); name a run with such a control"
        )
    return [round(margin, 6) for margin in margins if margin is not None]


def timeline(records: Records) -> pd.DataFrame:
    """The slot and the times of each trial: `begin` and `end` are in seconds since the run's first trial began.

    Slots are not recorded, so each trial is assigned to the first free slot of its host. Pauses between the attempts of
    a trial are not included.
    """
    ran = records.trials[records.trials["started"].notna() & records.trials["wall_seconds"].notna()]
    rows = []
    for run, of_run in ran.sort_values("started", kind="stable").groupby("run", sort=False):
        origin = float(of_run["started"].min())
        free: dict[str, list[float]] = {}  # by host: the time at which each slot becomes free
        for row in of_run.assign(host=of_run["host"].fillna("")).to_dict("records"):
            begin, ends = row["started"] - origin, free.setdefault(row["host"], [])
            slot = next((number for number, end in enumerate(ends) if end <= begin + TOUCH), len(ends))
            ends[slot : slot + 1] = [begin + row["wall_seconds"]]
            kept = {name: row[name] for name in ("host", "arm", "phase", "role", "method", "seed", "status")}
            rows.append({"run": run, "slot": slot, "begin": begin, "end": ends[slot], **kept})
    return typed(rows, "run host slot begin end arm phase role method seed status")

"""What early stopping did, what came of it, and when which trial ran: for those who want to check."""

from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.records.reader import Records, typed
from tune_kd.study.discover import from_json
from tune_kd.study.early_stopping import stratum
from tune_kd.study.spec import Study
from tune_kd.system.errors import UserError

TOUCH = 0.05  # seconds by which trials that follow each other on a slot may seem to overlap


def decisions(records: Records) -> pd.DataFrame:
    """How often early stopping said what, and why: a row a run, action and reason."""
    grouped = records.decisions.groupby(["run", "action", "reason"], sort=True)
    table = grouped.size().rename("comparisons").to_frame()
    table["arms"] = grouped["arm"].nunique()
    return table.reset_index()


def audit(records: Records) -> pd.DataFrame:
    """Each comparison of early stopping beside where the trial ended: `metric` at the rung, `final` validation
    accuracy at its last epoch. `final` is null for trials that were stopped: what they would have reached is not known.
    """
    trials = records.trials.set_index(["run", "trial_id"])
    ended = trials.loc[trials["status"] == "completed", "val_accuracy"]
    wanted = pd.MultiIndex.from_frame(records.decisions[["run", "trial_id"]])
    columns = ["run", "arm", "stratum", "epoch", "rung", "metric", "cutoff", "rank", "peers", "action", "reason"]
    return records.decisions[columns].assign(final=ended.reindex(wanted).to_numpy(dtype="float64", na_value=np.nan))


def rank_correlations(records: Records, *, everywhere: bool = False) -> pd.DataFrame:
    """How well a rung foretold the end: a row a run, stratum and rung, with Spearman's correlation of the validation
    accuracy then with that of the last epoch, and its 95 % interval, over the stratum's trials that ran to their end.

    With `everywhere`, for every epoch (of more than a thousand, for a thousand and the rungs), and `rung` is null where
    the study compared nothing. Trials that were stopped
    are missing, so it tells of arms that were alike. Null for fewer than three trials, the interval for fewer than
    four.
    """
    rows: list[dict[str, Any]] = []
    for run, study in records.studies.items():
        screen, trials = from_json(study["study"]).screen, records.trials
        ended = trials[(trials["run"] == run) & (trials["role"] == "student") & (trials["status"] == "completed")]
        levels: list[dict[Any, Any]] = ended.to_dict("records")
        named = ended.assign(
            stratum=[stratum(screen, row) for row in levels], budget=ended["epochs_planned"].astype(int)
        )
        for budget in named["budget"].unique().tolist():
            rungs = screen.rungs(budget)
            wanted = _some(budget, rungs) if everywhere else rungs
            curves = _curves(records.epochs, [*wanted, budget])
            for name, group in named[named["budget"] == budget].groupby("stratum", sort=False):
                table = curves.reindex(pd.MultiIndex.from_frame(group[["run", "trial_id"]])).dropna()
                for epoch in wanted:
                    found = statistics.rank_correlation(table[epoch].tolist(), table[budget].tolist())
                    rung = rungs.index(epoch) if epoch in rungs else None
                    row = {"run": run, "stratum": name, "epoch": epoch, "rung": rung, "n": found.n, "rho": found.rho}
                    rows.append(row | {"rho_low": found.low, "rho_high": found.high})
    return typed(rows, "run stratum epoch rung n rho rho_low rho_high")


def _some(budget: int, rungs: list[int]) -> list[int]:
    """Epochs before the last of a budget: all, or a thousand of them and the rungs."""
    return sorted({*range(1, budget, -(-budget // 1000)), *rungs})


def _curves(epochs: pd.DataFrame, wanted: list[int]) -> pd.DataFrame:
    """Validation accuracy by (run, trial) and epoch, for the epochs that are wanted."""
    kept = epochs[epochs["epoch"].isin(wanted)]
    table = kept.pivot(index=["run", "trial_id"], columns="epoch", values="val_accuracy").astype("float64")
    return table.reindex(columns=wanted)


def noise_margins(records: Records, study: Study) -> list[float]:
    """The margin at each rung of a study below which equals differ, from the spread of an earlier run's controls
    between seeds at that epoch (`stats.noise_margin`).

    Raises `UserError` where no control has two seeds of the study's data and budget that ran to their end.
    """
    trials, budget, rungs = records.trials, study.recipe.epochs, study.screen.rungs(study.recipe.epochs)
    controls = trials[(trials["role"] == "student") & (trials["method"] == study.control)
                      & (trials["status"] == "completed") & (trials["epochs_planned"] == budget)
                      & (trials["dataset"].isna() | (trials["dataset"] == study.data.name))
                      & (trials["scale"].isna() | (trials["scale"] == study.scale))]  # fmt: skip
    curves = _curves(records.epochs, [*rungs, budget])
    groups = [curves.reindex(pd.MultiIndex.from_frame(of_arm[["run", "trial_id"]])).dropna()
              for _, of_arm in controls.groupby(["run", "arm"])]  # fmt: skip
    if not rungs:
        raise UserError(
            f"--margin-from is given, and screen.grace {study.screen.grace} of {budget} epochs leaves no rung for a "
            "margin; allowed: a shorter grace period"
        )
    margins = [statistics.noise_margin([group[epoch].tolist() for group in groups]) for epoch in rungs if groups]
    if not margins or None in margins:
        raise UserError(
            f"--margin-from is {', '.join(records.runs)}, where no control ({study.control}) has two seeds that ran "
            f"{budget} epochs on {study.data.name} at scale {study.scale} to their end; name a run that has"
        )
    return [round(margin, 6) for margin in margins if margin is not None]


def timeline(records: Records) -> pd.DataFrame:
    """When each trial ran and on which slot: `begin` and `end` in seconds since the run's first trial began.

    Slots are not on record; each trial is put on the first one of its host that was free. A trial that was tried more
    than once is shown as if it had run without a pause.
    """
    ran = records.trials[records.trials["started"].notna() & records.trials["wall_seconds"].notna()]
    rows = []
    for run, of_run in ran.sort_values("started", kind="stable").groupby("run", sort=False):
        origin = float(of_run["started"].min())
        free: dict[str, list[float]] = {}  # by host: when each of its slots is free again
        for row in of_run.assign(host=of_run["host"].fillna("")).to_dict("records"):
            begin, ends = row["started"] - origin, free.setdefault(row["host"], [])
            slot = next((number for number, end in enumerate(ends) if end <= begin + TOUCH), len(ends))
            ends[slot : slot + 1] = [begin + row["wall_seconds"]]
            kept = {name: row[name] for name in ("host", "arm", "phase", "role", "method", "seed", "status")}
            rows.append({"run": run, "slot": slot, "begin": begin, "end": ends[slot], **kept})
    return typed(rows, "run host slot begin end arm phase role method seed status")

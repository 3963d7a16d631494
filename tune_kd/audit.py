"""What early stopping did, what came of it, and when which trial ran: for those who want to check."""

import numpy as np
import pandas as pd

from tune_kd.tables import Records, typed

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


def rank_correlations(records: Records) -> pd.DataFrame:
    """Spearman's correlation of the accuracy at a rung with that at the end, over the arms that went on: a row a run
    and epoch. Null for fewer than three. The stopped ones are missing, so it tells of those that were alike."""
    from scipy.stats import spearmanr

    rows = []
    for (run, epoch), group in audit(records).dropna(subset=["final"]).groupby(["run", "epoch"]):
        varied = len(group) >= 3 and group["metric"].nunique() > 1 and group["final"].nunique() > 1
        rho = float(spearmanr(group["metric"], group["final"]).statistic) if varied else None
        rows.append({"run": run, "epoch": epoch, "n": len(group), "spearman": rho})
    return typed(rows, "run epoch n spearman")


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

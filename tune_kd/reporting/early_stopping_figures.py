"""Figures of early stopping and of the schedule of trials."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tune_kd.analysis import early_stopping
from tune_kd.records.reader import Records
from tune_kd.reporting import style
from tune_kd.reporting.style import Made, Styles
from tune_kd.study.discover import from_json
from tune_kd.study.early_stopping import stratum
from tune_kd.study.trial import Action, DecisionReason, Role

MANY = 500  # bars of a timeline; with more, they are rasterized


def rungs(records: Records, _: Styles) -> Made:
    """Final accuracy against the accuracy at each comparison of early stopping."""
    table = early_stopping.audit(records)
    if table.empty or table["final"].isna().all():
        return None
    figure = Figure(figsize=(style.COLUMN_INCHES, 2.6))
    axes = figure.subplots()
    colours = (*(look.colour for look in style.METHOD_STYLES.values()), *style.OTHER_COLOURS)
    floor = 100 * float(table["final"].min())
    for place, (epoch, group) in enumerate(table.groupby("epoch")):
        colour, mark, label = colours[place % 8], "os^Dv"[place % 5], f"epoch {epoch}"
        ended = group[group["final"].notna()]
        near = ended["reason"] == DecisionReason.NEAR_TIE
        for chosen, fill in ((ended[~near], colour), (ended[near], "white")):
            axes.plot(100 * chosen["metric"], 100 * chosen["final"], mark, color=colour, mfc=fill, label=label)
            label = "_"
        stopped = group[group["final"].isna() & (group["action"] == Action.STOP)]
        axes.plot(100 * stopped["metric"], np.full(len(stopped), floor - 1.0), "x", color=colour)
    axes.set(xlabel="validation accuracy at the rung (%)", ylabel="final (%)")
    axes.legend(loc="best")
    return (
        "Every comparison of early stopping: validation accuracy at the rung, and final accuracy. White markers are "
        "near ties. Crosses at the bottom are stopped trials, whose final accuracy is unknown.",
        f"Scatter of {int(table['final'].notna().sum())} comparisons whose trials completed, and "
        f"{int((table['action'] == Action.STOP).sum())} that stopped a trial.",
        figure,
    )


def rank_correlation(records: Records, styles: Styles) -> Made:
    """Rank correlation between the accuracy at each epoch and final accuracy, one panel per stratum."""
    table = early_stopping.rank_correlations(records, everywhere=True).dropna(subset=["rho_low"])
    if table.empty:
        return None
    names, more = style.first_panels(table["stratum"].unique().tolist(), "strata")
    methods = _methods_by_stratum(records)
    figure, panels = style.stacked(len(names), 1.1, 0.5, sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        group = table[table["stratum"] == name]
        colour = styles[methods[name][0]].colour if len(methods[name]) == 1 else style.OTHER_COLOURS[0]
        axes.axhline(0, color="#666666", lw=0.8)
        x, rho, low, high = (group[each].to_numpy(float) for each in ("epoch", "rho", "rho_low", "rho_high"))
        style.band(axes, x, rho, low, high, colour)
        for epoch in group.loc[group["rung"].notna(), "epoch"]:
            axes.axvline(float(epoch), color="#666666", ls=":", lw=0.8)
        axes.set_ylim(-1.05, 1.05)
        axes.set_title(f"{style.readable(name)} ({int(group['n'].max())} trials)", loc="left")
    panels[len(panels) // 2].set_ylabel("rank correlation")
    panels[-1].set_xlabel("epoch")
    rungs = table[table["rung"].notna()].to_dict("records")
    said = "; ".join(f"{row['stratum']} {row['rho']:+.2f} at epoch {row['epoch']}" for row in rungs)
    return (
        "Rank correlation (Spearman) between validation accuracy at an epoch and at the last epoch, over completed "
        f"trials, with its 95 % interval. Dotted lines are rungs.{more}",
        f"Rank correlation by epoch in {len(names)} strata: {said or 'no rungs'}.",
        figure,
    )


def _methods_by_stratum(records: Records) -> dict[str, list[str]]:
    """The methods of the students in each stratum of early stopping."""
    screen = from_json(records.study["study"]).screen
    students = records.trials[records.trials["role"] == Role.STUDENT]
    methods: dict[str, list[str]] = {}
    rows: list[dict[Any, Any]] = students.drop_duplicates("arm").to_dict("records")
    for row in rows:
        found = methods.setdefault(stratum(screen, row), [])
        found += [] if row["method"] in found else [str(row["method"])]
    return methods


def timeline(records: Records, styles: Styles) -> Made:
    """The slot and the times of each trial."""
    table = early_stopping.timeline(records)
    if table.empty:
        return None
    table = table.assign(place=table.groupby(["host", "slot"], sort=True).ngroup())
    table["method"] = table["method"].fillna("teacher")
    count, last = int(table["place"].max()) + 1, float(table["end"].max())
    figure = Figure(figsize=(style.COLUMN_INCHES, 0.9 + 0.28 * min(20, count)))
    axes = figure.subplots()
    for method in table["method"].unique():
        look: dict[str, Any] = {"facecolor": styles[method].colour, "hatch": styles[method].hatch, "edgecolor": "white"}
        look |= {"lw": 0.4 if len(table) <= MANY else 0.0, "rasterized": len(table) > MANY}
        label = style.readable(method)
        for place, bars in table[table["method"] == method].groupby("place"):
            spans = list(zip(bars["begin"].to_numpy(float), (bars["end"] - bars["begin"]).to_numpy(float), strict=True))
            axes.broken_barh(spans, (float(place) - 0.4, 0.8), label=label, **look)
            label = "_"
    axes.set_yticks(range(count), [str(place + 1) for place in range(count)])
    axes.set(xlabel="seconds since the first trial began", ylabel="slot")
    style.legend_above(figure, 4)
    share = float((table["end"] - table["begin"]).sum()) / (last * count)
    said = f"the slots were in use {100 * share:.0f} % of the time"
    if (records.trials["attempts"] > 1).any():  # their seconds are a sum over attempts, without the pauses
        said = "retried trials are shown without the pauses between their attempts"
    return (
        f"Trials over slots: {said}.",
        f"Timeline of {len(table)} trials on {count} slots over {last:.0f} seconds.",
        figure,
    )

"""Pictures of results, one function each: at a column's width, safe for colour-blind eyes, and readable in grey.

A method has its colour (Okabe and Ito 2008), its marker and its line, so that no two are told apart by colour alone.
"""

import io
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tune_kd.analysis import contrasts, early_stopping, measures, tuned
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records import adaptive_plan
from tune_kd.records.reader import Records
from tune_kd.study.plan import SYMBOLS
from tune_kd.study.tuning import LogUniform, number

WIDTH = 3.4  # inches: a column of a paper
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names are names, whatever signs they have
    "svg.fonttype": "path",
    "svg.hashsalt": "tune_kd",  # the same picture is the same file
}
COLOURS = {"none": "#000000", "logit": "#0072B2", "feature": "#D55E00", "teacher": "#999999"}
MARKERS = {"none": "s", "logit": "o", "feature": "^", "teacher": "D"}
LINES = {"none": "-", "logit": "--", "feature": "-."}
HATCHES = {"teacher": "////", "feature": "...."}
MANY = 500  # bars of a timeline, which are then drawn as pixels
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
NAME = 24  # letters of a contrast's name in a line
LONGEST = 4 * NAME  # letters of any name; what is longer is cut in its middle
CURVES = 8  # arms in one panel; more cannot be told apart
LINES_SHOWN = 200  # contrasts in one picture
PANELS = 24  # in one picture


@dataclass(frozen=True)
class Picture:
    """A figure with its file's name, what it shows, and a text for those who do not see it."""

    name: str
    caption: str
    alternative: str
    figure: Figure


def draw(records: Records) -> list[Picture]:
    """Every picture for which there is something to show, run by run."""
    found = []
    for run in records.runs:
        one, many = records.of(run), len(records.runs) > 1
        for name, picture in PICTURES.items():
            with rc_context(STYLE):
                made = picture(one)
            if made is not None:
                caption, alternative, figure = made
                ending, of = (f"-{run}", f" ({run})") if many else ("", "")
                found.append(Picture(f"{name}{ending}", f"{caption}{of}", alternative, figure))
    return found


def rendered(figure: Figure, kind: str) -> bytes:
    """The bytes of a figure as `png` (200 dots an inch) or `svg`."""
    sink = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(sink, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return sink.getvalue()


Made = tuple[str, str, Figure] | None  # caption, alternative, figure


def _name(name: object) -> str:
    """A name as it stands in a picture. In a legend one that begins with `_` would be left out."""
    text = str(name)
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[3 - LONGEST // 2 :]}"
    text = "\n".join(textwrap.wrap(text, 2 * NAME))
    return f" {text}" if text.startswith("_") else text


def _left_out(there: int, shown: int, what: str) -> str:
    """A sentence for a caption, where a picture would be too high with all."""
    return f" {there - shown} more {what} are left out." if there > shown else ""


def forest(records: Records) -> Made:
    """Each contrast with its interval; effects by context, then how they change with the moderator."""
    table = contrasts.contrasts(records)
    table = table[table["n"] > 0]
    if table.empty:
        return None
    context = table["contrast"].str.partition(":")[0].where(table["kind"] == "effect", "")
    places = {name: place for place, name in enumerate([*context[context != ""].unique(), ""])}
    table = table.iloc[context.map(places).argsort(kind="stable")].reset_index(drop=True)  # one context after another
    more = _left_out(len(table), LINES_SHOWN, "contrasts")
    table = table.head(LINES_SHOWN)
    names = ["\n".join(textwrap.wrap(_name(name), NAME)) for name in table["contrast"]]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.2 * len(table) + 0.1 * sum("\n" in name for name in names)))
    axes = figure.subplots()
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#dddddd", lw=0)
    axes.axvline(0, color="#666666", lw=0.8)
    for place, row in enumerate(table.to_dict("records")):
        sure = row["verdict"] in ("better", "worse")
        treated = row["contrast"].split(" - ")[0]
        method = next((name for name in ("logit", "feature", "none") if name in treated), "logit")
        colour = COLOURS[method] if row["kind"] == "effect" else "#000000"
        if row["low"] == row["low"]:
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, solid_capstyle="butt")
        axes.plot(
            100 * row["estimate"], place, color=colour, mfc=colour if sure else "white", zorder=3,
            marker="D" if row["verdict"] == "equivalent" else MARKERS[method] if row["kind"] == "effect" else "o",
        )  # fmt: skip
    axes.set_yticks(range(len(table)), names)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlabel("points of test accuracy")
    rows = table.to_dict("records")
    said = "; ".join(f"{row['contrast']} {100 * row['estimate']:+.2f}, {row['verdict']}" for row in rows)
    return (
        "Effects with 95 % intervals, paired by seed. A full marker is a difference that stands after Holm, a diamond "
        f"is equivalence; the grey band is the margin of {100 * MARGIN:g} points.{more}",
        f"Forest plot of {len(table)} contrasts in points of test accuracy. {said}.",
        figure,
    )


def curves(records: Records) -> Made:
    """Validation accuracy over epochs: mean and standard deviation of each arm over confirmed seeds."""
    trials = contrasts.confirmed_trials(records)
    trials = trials[trials["status"] == "completed"]
    rows = records.epochs.merge(trials[["run", "trial_id", "arm", "stem", "method"]], on=["run", "trial_id"])
    if rows.empty:
        return None
    rows = rows.assign(stem=rows["stem"].fillna(""))
    there = set(rows["stem"])
    stems = [stem for stem in trials["stem"].fillna("").unique() if stem in there]  # in the study's order
    stems, more = stems[:PANELS], _left_out(len(stems), PANELS, "stems")
    figure = Figure(figsize=(WIDTH, 2.1 * len(stems)))
    panels = figure.subplots(len(stems), 1, sharex=True, squeeze=False)[:, 0]
    left_out, order = 0, contrasts.arms(records)["arm"].tolist()
    for axes, stem in zip(panels, stems, strict=True):
        of_stem = rows[rows["stem"] == stem]
        names = [name for name in order if (of_stem["arm"] == name).any()]
        left_out += max(0, len(names) - CURVES)
        for name in names[:CURVES]:
            of_arm = of_stem[of_stem["arm"] == name]
            spread = of_arm.groupby("epoch")["val_accuracy"].agg(["mean", "std"]).astype("float64").fillna(0.0)
            colour, line = _of_arm(name, dict(zip(of_stem["arm"], of_stem["method"], strict=True)), names)
            epochs, mean, std = spread.index.to_numpy(float), 100 * spread["mean"], 100 * spread["std"]
            axes.fill_between(epochs, mean - std, np.minimum(mean + std, 100), color=colour, alpha=0.15, lw=0)
            axes.plot(epochs, mean, color=colour, ls=line, label=_name(_short(name, stem)))
        lower = of_stem.groupby("arm")["val_accuracy"].quantile(0.25)
        axes.set_ylim(bottom=max(0.0, 100 * float(lower.min()) - 2))
        axes.set_title(f"{_name(stem)} stem" if stem else "", loc="left")
        axes.set_ylabel("val. accuracy (%)")
        narrow = len(names) > 4 and max(map(len, names)) <= 2 * NAME
        axes.legend(loc="lower right", ncols=2 if narrow else 1, handlelength=2.4)
    panels[-1].set_xlabel("epoch")
    more += _left_out(left_out, 0, "arms")
    return (
        "Learning curves: mean over confirmed seeds, the band is one standard deviation; cut below, where arms begin."
        f"{more}",
        f"Learning curves of {rows['arm'].nunique()} arms: validation accuracy over {int(rows['epoch'].max())} epochs "
        f"for the stem {' and '.join(map(_name, stems))}.",
        figure,
    )


def _of_arm(name: str, methods: dict[str, str], names: list[str]) -> tuple[str, Any]:
    """Colour and line of an arm among the others of its panel. The arms of a method differ in their dashes."""
    alike = [each for each in names if methods[each] == methods[name]]
    dashes = (0, (1 + 2 * alike.index(name), 1))
    return _colour(methods[name]), dashes if len(alike) > 1 else LINES.get(methods[name], ":")


def _colour(method: str) -> str:
    return COLOURS.get(method, OTHERS[0])


def _short(arm: str, stem: str) -> str:
    """An arm's name without the stem that stands above it."""
    return "/".join(part for part in arm.split("/") if part != stem) or arm


def temperature(records: Records) -> Made:
    """Accuracy over temperature."""
    return _response(records, "temperature")


def alpha(records: Records) -> Made:
    """Accuracy over alpha."""
    return _response(records, "alpha")


def _response(records: Records, factor: str) -> Made:
    table = measures.response(records, factor)
    if table.empty:
        return None
    contexts = [
        name for name in ("student", "teacher", "stem", "weights", "width", "method") if table[name].nunique() > 1
    ]
    grouped = list(table.groupby(contexts, sort=False)) if contexts else [((), table)]
    grouped, more = grouped[:PANELS], _left_out(len(grouped), PANELS, "contexts")
    levels_shown = sorted(table[factor].unique())
    figure = Figure(figsize=(WIDTH, 1.5 * len(grouped) + 0.4))
    panels = figure.subplots(len(grouped), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (levels, group) in zip(panels, grouped, strict=True):
        x = group[factor].to_numpy(float)
        mean, low, high = (100 * group[name].to_numpy(float) for name in ("mean", "low", "high"))
        method = str(group["method"].iloc[0])
        axes.errorbar(
            x, mean, [mean - low, high - mean], color=_colour(method), marker=MARKERS.get(method, "v"), capsize=2
        )
        if group["control"].notna().any():
            axes.axhline(100 * float(group["control"].iloc[0]), color="#000000", ls=":", label="control")
            axes.legend(loc="best")
        if factor == "temperature" and min(levels_shown) > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(levels_shown, list(map(number, levels_shown)))
        axes.set_title(", ".join(map(_name, levels)), loc="left")
        axes.set_ylabel("test acc. (%)")
    panels[-1].set_xlabel(factor)
    said = "; ".join(
        f"{row['stem']} {factor} {number(row[factor])}: {100 * row['mean']:.2f}" for row in table.to_dict("records")
    )
    return (
        f"Test accuracy by {factor}: mean and 95 % interval over confirmed seeds; the dotted line is the control. "
        f"Levels that the screen stopped are missing, and the line passes over them.{more}",
        f"Response to {factor}: {said}.",
        figure,
    )


def rungs(records: Records) -> Made:
    """Accuracy at each comparison of early stopping against accuracy at the end."""
    table = early_stopping.audit(records)
    if table.empty or table["final"].isna().all():
        return None
    figure = Figure(figsize=(WIDTH, 2.6))
    axes = figure.subplots()
    marks = "os^Dv"
    floor = 100 * float(table["final"].min())
    for place, (epoch, group) in enumerate(table.groupby("epoch")):
        colour = (*COLOURS.values(), *OTHERS)[place % 8]
        ended, stopped = group[group["final"].notna()], group[group["final"].isna()]
        near = ended["reason"] == "near_tie"
        label, mark = f"epoch {epoch}", marks[place % 5]
        for chosen, fill in ((ended[~near], colour), (ended[near], "white")):
            axes.plot(100 * chosen["metric"], 100 * chosen["final"], mark, color=colour, mfc=fill, label=label)
            label = "_"
        stopped = stopped[stopped["action"] == "stop"]
        axes.plot(100 * stopped["metric"], np.full(len(stopped), floor - 1.0), "x", color=colour)
    axes.set_xlabel("validation accuracy at the rung (%)")
    axes.set_ylabel("at the end (%)")
    axes.legend(loc="best")
    return (
        "Every comparison of early stopping: accuracy then, and at the end. White markers were near ties; crosses "
        "below were stopped, and nobody knows their end.",
        f"Scatter of {int(table['final'].notna().sum())} comparisons whose trials ran to the end, and "
        f"{int((table['action'] == 'stop').sum())} that stopped a trial.",
        figure,
    )


def foretelling(records: Records) -> Made:
    """How well each epoch foretold the end, stratum by stratum."""
    table = early_stopping.rank_correlations(records, everywhere=True).dropna(subset=["rho_low"])
    if table.empty:
        return None
    names = table["stratum"].unique().tolist()
    names, more = names[:PANELS], _left_out(len(names), PANELS, "strata")
    figure = Figure(figsize=(WIDTH, 1.1 * len(names) + 0.5))
    panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        group = table[table["stratum"] == name]
        epochs = group["epoch"].to_numpy(float)
        colour = next((COLOURS[method] for method in COLOURS if method in name.split("/")), OTHERS[0])
        axes.axhline(0, color="#666666", lw=0.8)
        axes.fill_between(
            epochs, group["rho_low"].to_numpy(), group["rho_high"].to_numpy(), color=colour, alpha=0.15, lw=0
        )
        axes.plot(epochs, group["rho"].to_numpy(), color=colour)
        for epoch in group.loc[group["rung"].notna(), "epoch"]:
            axes.axvline(float(epoch), color="#666666", ls=":", lw=0.8)
        axes.set_ylim(-1.05, 1.05)
        axes.set_title(f"{_name(name)} ({int(group['n'].max())} trials)", loc="left")
    panels[len(panels) // 2].set_ylabel("rank correlation with the end")
    panels[-1].set_xlabel("epoch")
    rungs = table[table["rung"].notna()].to_dict("records")
    said = "; ".join(f"{row['stratum']} {row['rho']:+.2f} at epoch {row['epoch']}" for row in rungs)
    return (
        "How well an epoch foretold the end: Spearman's correlation of validation accuracy then with that of the last "
        f"epoch, over the trials that ran to their end, with its 95 % interval. Dotted lines are rungs.{more}",
        f"Rank correlation by epoch in {len(names)} strata: {said or 'no rungs'}.",
        figure,
    )


def timeline(records: Records) -> Made:
    """Which trial ran when, on which slot."""
    table = early_stopping.timeline(records)
    if table.empty:
        return None
    slots = table.groupby(["host", "slot"], sort=True).ngroup()
    figure = Figure(figsize=(WIDTH, 0.9 + 0.28 * min(20, int(slots.max()) + 1)))
    axes = figure.subplots()
    kinds = table["method"].fillna("teacher")
    for kind in kinds.unique():
        label = _name(kind)
        for slot, of_slot in table[kinds == kind].groupby(slots):
            begin, length = of_slot["begin"].to_numpy(float), (of_slot["end"] - of_slot["begin"]).to_numpy(float)
            axes.broken_barh(
                list(zip(begin, length, strict=True)),
                (float(slot) - 0.4, 0.8),
                facecolor=_colour(str(kind)),
                edgecolor="white",
                lw=0.4 if len(table) <= MANY else 0.0,
                hatch=HATCHES.get(str(kind), ""),
                rasterized=len(table) > MANY,
                label=label,
            )
            label = "_"
    axes.set_yticks(sorted(set(slots)), [str(slot + 1) for slot in sorted(set(slots))])
    axes.set_ylabel("slot")
    axes.set_xlabel("seconds since the first trial began")
    figure.legend(loc="outside upper center", ncols=4)
    busy = float((table["end"] - table["begin"]).sum())
    share = busy / (float(table["end"].max()) * (int(slots.max()) + 1))
    said = f"{100 * share:.0f} % of the time that slots were there, a trial ran on them"
    if (records.trials["attempts"] > 1).any():  # their seconds are summed over attempts, whatever lay in between
        said = "trials that were tried again are shown without the time in between"
    return (
        f"Trials over slots: {said}.",
        f"Timeline of {len(table)} trials on {int(slots.max()) + 1} slots over {table['end'].max():.0f} seconds.",
        figure,
    )


def cost(records: Records) -> Made:
    """Accuracy against what a trial cost."""
    costs, arms = measures.costs(records), contrasts.arms(records).set_index("arm")
    costs = costs[costs["train_seconds"].notna()]
    if costs.empty:
        return None
    trials = contrasts.confirmed_trials(records).drop_duplicates("arm").set_index("arm")
    stems_of = trials["stem"].fillna("").to_dict()
    stems = list(dict.fromkeys(map(str, stems_of.values())))
    stems, more = stems[:PANELS], _left_out(len(stems), PANELS, "stems")
    figure = Figure(figsize=(WIDTH, 1.8 * len(stems) + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.16))  # inches
    panels = figure.subplots(len(stems), 1, squeeze=False)[:, 0]
    for axes, stem in zip(panels, stems, strict=True):
        labelled: set[str] = set()
        for row in costs.to_dict("records"):
            arm = row["arm"]
            if stems_of[arm] != stem:
                continue
            method = str(trials.loc[arm, "method"])
            mean, low, high = (100 * float(arms.loc[arm, name]) for name in ("mean", "low", "high"))
            error = None if math.isnan(low) else [[mean - low], [high - mean]]
            axes.errorbar(
                row["train_seconds"],
                mean,
                error,
                marker=MARKERS.get(method, "o"),
                color=_colour(method),
                ls="",
                elinewidth=0.7,
                label="_" if method in labelled else _name(method),
            )
            labelled.add(method)
        axes.set_title(f"{_name(stem)} stem" if stem else "", loc="left")
        axes.set_xlim(left=0)
        axes.set_ylabel("test accuracy (%)")
    both = [axes.get_legend_handles_labels() for axes in panels]
    marks = {label: handle for handles, labels in both for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(marks.values()), list(marks), loc="outside upper center", ncols=4)
    panels[-1].set_xlabel("seconds of training a trial")
    rows = costs.to_dict("records")
    said = "; ".join(f"{row['arm']} {100 * row['mean']:.2f} in {row['train_seconds']:.0f} s" for row in rows)
    return (
        "Test accuracy (mean and 95 % interval) against the training time of a trial, without what its teacher "
        f"cost.{more}",
        f"Accuracy against cost: {said}.",
        figure,
    )


def tuning(records: Records) -> Made:
    """Validation accuracy of what was drawn, over each setting: where an arm is at its best, and how sharply."""
    found = list(tuned.searches(records))
    settings = list(dict.fromkeys(each.name for _, _, search, _ in found for each in search.ranges))
    ended = [100 * row["val_accuracy_best"] for *_, theirs in found for row in theirs if row["status"] == "completed"]
    if not ended:
        return None
    floor = max(ended) - 4 * max(0.25, max(ended) - float(np.median(ended)))  # what lies below is drawn at its edge
    figure = Figure(figsize=(WIDTH, 1.3 * len(settings) + 0.5))
    panels = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    colours = {search.name: OTHERS[place % len(OTHERS)] for place, (_, _, search, _) in enumerate(found)}
    for axes, setting in zip(panels, settings, strict=True):
        for _, study, search, theirs in found:
            over = next((each.over for each in search.ranges if each.name == setting), None)
            if over is None:
                continue
            assert study.tuning is not None
            best, method = adaptive_plan.best(study.tuning, theirs), str(theirs[0]["method"])
            alone = sum(str(other[0]["method"]) == method for *_, other in found) == 1
            look = {"color": COLOURS[method] if alone else colours[search.name], "marker": MARKERS[method], "ls": ""}
            done = [row for row in theirs if row["status"] == "completed"]
            height = [max(floor, 100 * row["val_accuracy_best"]) for row in done]
            axes.plot([row[setting] for row in done], height, mfc="white", label=_name(search.name), **look)
            if best is not None:
                axes.plot(best[setting], max(floor, 100 * best["val_accuracy_best"]), zorder=3, **look)
            axes.axvline(study.default(setting) or 0.0, color="#666666", lw=0.8, ls=":")
            if isinstance(over, LogUniform):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=floor - 0.05 * (max(ended) - floor))
        axes.set_xlabel(SYMBOLS.get(setting, setting))
    figure.supylabel("validation accuracy (%)", size=STYLE["axes.labelsize"])
    marks = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(marks.values()), list(marks), loc="outside upper center", ncols=3)
    said = "; ".join(f"{row['arm']} {row['setting']} {row['tuned']:.3g} (default {row['default']:.3g})"
                     for row in tuned.settings(records).dropna(subset=["tuned"]).to_dict("records"))  # fmt: skip
    return (
        "What was drawn for each arm and ran to its end, over each setting. Full markers are the best, dotted lines "
        "the defaults; what is far below stands at the lower edge.",
        f"Validation accuracy of draws over {len(settings)} settings. Tuned: {said}.",
        figure,
    )


PICTURES: dict[str, Callable[[Records], Made]] = {
    "effects": forest,
    "curves": curves,
    "temperature": temperature,
    "alpha": alpha,
    "tuning": tuning,
    "cost": cost,
    "rungs": rungs,
    "foretelling": foretelling,
    "timeline": timeline,
}

"""Figures of accuracy: effects, learning curves, response to a factor, cost and tuning."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tune_kd.analysis import accuracy, contrasts, measures, tuned
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records import adaptive_plan
from tune_kd.records.reader import Records
from tune_kd.records.schema import TrialRow
from tune_kd.reporting import style
from tune_kd.reporting.style import Made, MethodStyle, Styles
from tune_kd.study.arms import SYMBOLS
from tune_kd.study.spec import Study
from tune_kd.study.trial import Status, level_in
from tune_kd.study.tuning import LogUniform, number

CURVES = 8  # arms in one panel; more cannot be told apart
SHORT = 14  # characters of an arm's name; with longer names, a legend inside the panel would hide the curves
LINES_SHOWN = 200  # contrasts in one figure
MODERATION = MethodStyle("#000000", "o", "-")


def effects(records: Records, styles: Styles) -> Made:
    """Each contrast with its interval, by family; within a family, effects by context, then moderations."""
    table = contrasts.contrasts(records)
    table = table[table["n"] > 0]
    if table.empty:
        return None
    context = table["contrast"].str.partition(":")[0].where(table["kind"] == "effect", "")
    places = {name: place for place, name in enumerate([*context[context != ""].unique(), ""])}
    table = table.iloc[context.map(places).argsort(kind="stable")]  # one context after another
    table = table.sort_values("family", kind="stable")
    more = style.left_out(len(table) - LINES_SHOWN, "contrasts")
    rows = table.head(LINES_SHOWN).to_dict("records")
    names = ["\n".join(textwrap.wrap(style.readable(row["contrast"]), style.NAME_LETTERS)) for row in rows]
    figure = Figure(figsize=(style.COLUMN_INCHES, 0.5 + 0.2 * len(rows) + 0.1 * sum("\n" in name for name in names)))
    axes = figure.subplots()
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#dddddd", lw=0)
    axes.axvline(0, color="#666666", lw=0.8)
    treated = _treated_methods(records)
    for place, row in enumerate(rows):
        _contrast(axes, place, row, styles[treated[row["contrast"]]] if row["kind"] == "effect" else MODERATION)
    families = [row["family"] for row in rows]
    if ended := families.count("primary") if len(set(families)) > 1 else 0:
        axes.axhline(ended - 0.5, color="#666666", lw=0.8, ls=":")
        for name, middle in (("primary", (ended - 1) / 2), ("secondary", (ended + len(rows) - 1) / 2)):
            axes.text(1.02, middle, name, transform=axes.get_yaxis_transform(), rotation=270, va="center")
    axes.set_yticks(range(len(rows)), names)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="points of test accuracy")
    said = "; ".join(f"{row['contrast']} {100 * row['estimate']:+.2f}, {row['verdict']}" for row in rows)
    over = ", and over teachers if arms have several" if table["teachers"].notna().any() else ""
    return (
        f"Effects with 95 % intervals over seeds{over}. A filled marker is a difference that is significant after "
        f"Holm, a diamond is equivalence; the grey band is the margin of {100 * MARGIN:g} points."
        f"{' The primary contrasts are above the dotted line.' if ended else ''}{more}",
        f"Forest plot of {len(rows)} contrasts in points of test accuracy. {said}.",
        figure,
    )


def _treated_methods(records: Records) -> dict[str, str]:
    """The method of the treated arm of each contrast."""
    methods = dict(zip(records.trials["arm"], records.trials["method"].map(str), strict=True))
    treated = {each["name"]: max(each["weights"], key=lambda arm: arm[1])[0] for each in records.study["contrasts"]}
    return {name: methods[arm] for name, arm in treated.items() if arm in methods}


def _contrast(axes: Axes, place: int, row: Mapping[Any, Any], look: MethodStyle) -> None:
    low, estimate, high = (100 * row[name] for name in ("low", "estimate", "high"))
    if not math.isnan(low):
        axes.plot([low, high], [place, place], color=look.colour, solid_capstyle="butt")
    inside = look.colour if row["verdict"] in ("better", "worse") else "white"
    marker = "D" if row["verdict"] == "equivalent" else look.marker
    axes.plot(estimate, place, color=look.colour, mfc=inside, zorder=3, marker=marker)


def curves(records: Records, styles: Styles) -> Made:
    """Validation accuracy over epochs: mean and standard deviation of each arm over confirmed seeds."""
    trials = accuracy.completed_trials(records)
    trials = trials.assign(stem=trials["stem"].fillna(""), method=trials["method"].map(str))
    rows = trials[["run", "trial_id", "arm", "stem", "method"]].merge(records.epochs, on=["run", "trial_id"])
    rows = rows.dropna(subset="val_accuracy")  # a line connects the validated epochs
    if rows.empty:
        return None
    stems, more = style.first_panels(rows["stem"].unique().tolist(), "stems")
    names = {stem: rows.loc[rows["stem"] == stem, "arm"].unique().tolist() for stem in stems}
    figure, panels, legends = _with_legends([[_within(name, stem) for name in names[stem][:CURVES]] for stem in stems])
    for axes, legend, stem in zip(panels, legends, stems, strict=True):
        _curves_of_stem(axes, rows[rows["stem"] == stem], stem, styles)
        legend.legend(
            *axes.get_legend_handles_labels(),
            loc="lower right" if legend is axes else "upper left",
            ncols=2 if legend is axes and len(names[stem]) > 4 else 1,
            handlelength=2.4,
            borderaxespad=0.2,
        )
    panels[-1].set_xlabel("epoch")
    more += style.left_out(sum(max(0, len(each) - CURVES) for each in names.values()), "arms")
    return (
        "Learning curves: mean and standard deviation (band) over confirmed seeds. The low accuracies of early epochs "
        f"are cut off.{more}",
        f"Learning curves of {rows['arm'].nunique()} arms: validation accuracy over {int(rows['epoch'].max())} epochs "
        f"for the stem {' and '.join(map(style.readable, stems))}.",
        figure,
    )


def _within(arm: str, stem: str) -> str:
    """The name of an arm without its stem, which the panel's title states."""
    return style.readable("/".join(part for part in arm.split("/") if part != stem) or arm)


def _with_legends(labels: list[list[str]]) -> tuple[Figure, list[Axes], list[Axes]]:
    """A figure of panels with these labels, and the axes of each legend: the panel, or axes below it for long names."""
    large = any(len(label) > SHORT for each in labels for label in each)
    if not large:
        figure, panels = style.stacked(len(labels), 2.1, sharex=True)
        return figure, panels, panels
    heights = [height for each in labels for height in (2.1, 0.13 * sum(1 + label.count("\n") for label in each))]
    figure = Figure(figsize=(style.COLUMN_INCHES, sum(heights)))
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    for panel in axes[2::2]:
        panel.sharex(axes[0])
    for legend in axes[1::2]:
        legend.axis("off")
    return figure, list(axes[::2]), list(axes[1::2])


def _curves_of_stem(axes: Axes, rows: pd.DataFrame, stem: str, styles: Styles) -> None:
    """Draw one panel."""
    methods = dict(zip(rows["arm"], rows["method"], strict=True))
    names = list(methods)
    for name in names[:CURVES]:
        spread = rows[rows["arm"] == name].groupby("epoch")["val_accuracy"].agg(["mean", "std"]).astype("float64")
        mean, std = (100 * spread[each].fillna(0.0) for each in ("mean", "std"))
        colour, line = styles[methods[name]].colour, styles[methods[name]].line
        alike = [each for each in names if methods[each] == methods[name]]
        if len(alike) > 1:  # arms of one method have different dashes
            line = (0, (1 + 2 * alike.index(name), 1))
        high = np.minimum(mean + std, 100)
        style.band(
            axes, spread.index.to_numpy(float), mean, mean - std, high, colour, ls=line, label=_within(name, stem)
        )
    lower = rows.groupby("arm")["val_accuracy"].quantile(0.25).min()
    style.stem_title(axes, stem)
    axes.set(ylim=(max(0.0, 100 * float(lower) - 2), None), ylabel="val. accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def response(records: Records, styles: Styles, factor: str) -> Made:
    """Accuracy over the levels of a numeric factor, one panel per context."""
    table = measures.response(records, factor)
    if table.empty:
        return None
    columns = list(map(str, table))[: list(table).index(factor)]
    within = table.groupby("method")[[name for name in columns if name != "method"]].nunique(dropna=False).max() > 1
    contexts = [name for name in columns if (table[name].nunique() > 1 if name == "method" else within[name])]
    grouped: list[Any] = list(table.groupby(contexts, sort=False, dropna=False)) if contexts else [((), table)]
    grouped, more = style.first_panels(grouped, "contexts")
    ticks = sorted(table[factor].unique())
    figure, panels = style.stacked(len(grouped), 1.5, 0.4, sharex=True)
    for axes, (levels, group) in zip(panels, grouped, strict=True):
        mean, low, high = (100 * group[name].to_numpy(float) for name in ("mean", "low", "high"))
        look = styles[str(group["method"].iloc[0])]
        error = [mean - low, high - mean]
        axes.errorbar(group[factor].to_numpy(float), mean, error, color=look.colour, marker=look.marker, capsize=2)
        if group["control"].nunique() > 1:  # for a recipe field, the control has these levels too
            axes.plot(group[factor].to_numpy(float), 100 * group["control"], color="#000000", ls=":", label="control")
            axes.legend(loc="best")
        elif group["control"].notna().any():
            axes.axhline(100 * float(group["control"].iloc[0]), color="#000000", ls=":", label="control")
            axes.legend(loc="best")
        if min(ticks) > 0 and (factor == "temperature" or max(ticks) > 10 * min(ticks)):
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(number, ticks)))
        named = [level if isinstance(level, str) else f"{name}={number(level)}"
                 for name, level in zip(contexts, levels, strict=True) if pd.notna(level)]  # fmt: skip
        axes.set_title(", ".join(map(style.readable, named)), loc="left")
        axes.set_ylabel("test acc. (%)")
    panels[-1].set_xlabel(factor)
    rows = table.to_dict("records")
    said = "; ".join(f"{row['stem']} {factor} {number(row[factor])}: {100 * row['mean']:.2f}" for row in rows)
    return (
        f"Test accuracy by {factor}: mean and 95 % interval over confirmed seeds; the dotted line is the control. "
        f"Levels that the screen stopped are missing, and the line skips them.{more}",
        f"Response to {factor}: {said}.",
        figure,
    )


def cost(records: Records, styles: Styles) -> Made:
    """Accuracy against the training time of a trial."""
    costs, arms = measures.costs(records), accuracy.arms(records).set_index("arm")
    costs = costs[costs["train_seconds"].notna()]
    if costs.empty:
        return None
    trials = accuracy.confirmed_trials(records).drop_duplicates("arm").set_index("arm")
    arms = arms[["mean", "low", "high"]].join(trials["method"].map(str)).join(trials["stem"].fillna(""))
    table = costs[["arm", "train_seconds"]].join(arms, on="arm")
    stems, more = style.first_panels(trials["stem"].fillna("").unique().tolist(), "stems")
    figure, panels = style.stacked(len(stems), 1.8, 0.3, ConstrainedLayoutEngine(w_pad=0.16))  # inches
    for axes, stem in zip(panels, stems, strict=True):
        of_stem = table[table["stem"] == stem]
        for row, again in zip(of_stem.to_dict("records"), of_stem["method"].duplicated(), strict=True):
            mean, low, high = (100 * row[name] for name in ("mean", "low", "high"))
            error = None if math.isnan(low) else [[mean - low], [high - mean]]
            look, label = styles[row["method"]], "_" if again else style.readable(row["method"])
            how: dict[str, Any] = {"marker": look.marker, "color": look.colour, "ls": "", "elinewidth": 0.7}
            axes.errorbar(row["train_seconds"], mean, error, label=label, **how)
        style.stem_title(axes, stem)
        axes.set(xlim=(0, None), ylabel="test accuracy (%)")
    style.legend_above(figure, 4)
    panels[-1].set_xlabel("training seconds per trial")
    rows = costs.to_dict("records")
    said = "; ".join(f"{row['arm']} {100 * row['mean']:.2f} in {row['train_seconds']:.0f} s" for row in rows)
    return (
        "Test accuracy (mean and 95 % interval) against the training time of a trial, without its teacher's "
        f"training time.{more}",
        f"Accuracy against cost: {said}.",
        figure,
    )


def tuning(records: Records, styles: Styles) -> Made:
    """Validation accuracy of the draws over each setting: the best value of an arm, and the sensitivity around it."""
    found = list(tuned.searches(records))
    settings = list(dict.fromkeys(each.name for _, _, search, _ in found for each in search.ranges))
    completed = [row for *_, draws in found for row in draws if row["status"] == Status.COMPLETED]
    if not completed:
        return None
    ended = [100 * (row["val_accuracy_best"] or 0.0) for row in completed]
    # Draws below the floor are drawn at the edge.
    floor = max(0.0, max(ended) - 4 * max(0.25, max(ended) - float(np.median(ended))))
    margin = 0.08 * (max(ended) - floor)
    methods = [str(draws[0]["method"]) for *_, draws in found]
    looks = [styles[method] for method in methods]
    for place, method in enumerate(methods):
        if methods.count(method) > 1:  # arms of one method have different colours
            looks[place] = replace(looks[place], colour=style.OTHER_COLOURS[place % len(style.OTHER_COLOURS)])
    figure, panels = style.stacked(len(settings), 1.3, 0.5)
    for axes, setting in zip(panels, settings, strict=True):
        for look, (_, study, search, draws) in zip(looks, found, strict=True):
            for over in (each.over for each in search.ranges if each.name == setting):
                _draws(axes, setting, study, draws, floor, look, style.readable(search.name))
                if isinstance(over, LogUniform):
                    _log_scale(axes)
        axes.set(ylim=(floor - margin, max(ended) + margin), xlabel=SYMBOLS.get(setting, setting))
    figure.supylabel("validation accuracy (%)", size=style.STYLE["axes.labelsize"])
    style.legend_above(figure, 3)
    rows = tuned.settings(records).dropna(subset=["tuned"]).to_dict("records")
    said = "; ".join(f"{row['arm']} {row['setting']} {row['tuned']:.3g} (default {row['default']:.3g})" for row in rows)
    return (
        "Completed draws of each arm, over each setting. Filled markers are the best draws, dotted lines the defaults. "
        "Draws with much lower accuracy are shown at the lower edge.",
        f"Validation accuracy of draws over {len(settings)} settings. Tuned: {said}.",
        figure,
    )


def _draws(
    axes: Axes, setting: str, study: Study, draws: Sequence[TrialRow], floor: float, look: MethodStyle, label: str
) -> None:
    """Draw an arm's completed draws over a setting, with the best one filled, and the setting's default."""

    def plot(rows: Sequence[Mapping[str, Any]], **how: Any) -> None:
        heights = [max(floor, 100 * row["val_accuracy_best"]) for row in rows]
        axes.plot(
            [level_in(row, setting) for row in rows], heights, color=look.colour, marker=look.marker, ls="", **how
        )

    plot([row for row in draws if row["status"] == Status.COMPLETED], mfc="white", label=label)
    assert study.tuning is not None
    if (best := adaptive_plan.best(study.tuning, draws)) is not None:
        plot([best], zorder=3)
    default = study.value(setting, str(draws[0]["method"]))
    axes.axvline(float(default or 0.0), color="#666666", lw=0.8, ls=":")


def _log_scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())

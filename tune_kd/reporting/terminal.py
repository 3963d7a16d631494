"""Tables of results on a terminal, formatted from the DataFrames of `analysis`."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tune_kd.study.tuning import number
from tune_kd.system.characters import visible

if TYPE_CHECKING:
    import pandas as pd

    from tune_kd.analysis.calibrate import Calibration, Performance, Rate
    from tune_kd.analysis.simulate import Outcome
    from tune_kd.study.spec import Screen


class Terminal(Console):
    """A console without markup. Control characters in data are escaped; only rich's own reach the terminal."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def say(self, sentence: str) -> None:
        """Print a sentence without wrapping it."""
        self.print(sentence, soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def plural(count: int, name: str) -> str:
    """`1 teacher`, `2 teachers`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration as text: `42 s`, `3.5 min`, `2.1 h`, `4.0 d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def points(accuracy: float | None) -> str:
    """An accuracy or a difference of accuracies in points (hundredths); empty for None and NaN."""
    return "" if accuracy is None or accuracy != accuracy else f"{100 * accuracy:.2f}"


def rich_table(title: str | None, *names: str, left: Collection[str], no_wrap: Collection[str] = ()) -> Table:
    """An empty table without borders. Columns are right-aligned, except those in `left`."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for name in names:
        justify: Literal["left", "right"] = "left" if name in left else "right"
        # Fold, since an ellipsis would make different names look equal.
        made.add_column(name, justify=justify, no_wrap=name in no_wrap, overflow="fold")
    return made


def effects(table: "pd.DataFrame") -> Group:
    """The contrasts in points of test accuracy, by family."""
    table = _with_runs(table, "contrast")
    parts: list[Table | Text] = []
    for family, whole in table.groupby("family", sort=False):
        title = {"primary": "Primary contrasts", "secondary": "Secondary contrasts"}.get(str(family), "Contrasts")
        if len(chosen := whole[whole["n"] > 0]):
            title = f"{title} (points of test accuracy; p by Holm over {len(whole)})"
            parts += [_contrasts(title, chosen), Text("")]
    unjudged = table[table["n"] == 0]
    for note, group in unjudged.groupby("note", sort=False):
        parts.append(Text(f"Not judged ({note}): {'; '.join(group['contrast'])}"))
    return Group(*parts)


def sentences(said: Iterable[str]) -> Table:
    """Sentences as a list."""
    shown = Table.grid(padding=(0, 1))
    for sentence in said:
        shown.add_row("-", Text(sentence))
    return shown


def variances(table: "pd.DataFrame") -> Table:
    """The spread of contrasts between teachers, between seeds, and of the rest, each with its share of the variance."""
    names = ("teachers", "seeds", "rest")
    title = "Spread in points of test accuracy (share of the variance)"
    shown = rich_table(title, "contrast", *names, left=("contrast",), no_wrap=names)
    for row in _with_runs(table, "contrast").to_dict("records"):
        found = [(points(row[f"sd_{name}"]), row[f"share_{name}"]) for name in ("teacher", "seed", "rest")]
        cells = [f"{spread} ({100 * share:.0f} %)" if share == share else spread for spread, share in found]
        shown.add_row(Text(row["contrast"]), *cells)
    return shown


def _contrasts(title: str, table: "pd.DataFrame") -> Table:
    names = ("effect", "95 % interval", "n", "p", "verdict")
    shown = rich_table(title, "contrast", *names, left=("contrast", "verdict"), no_wrap=names)
    for row in table.to_dict("records"):
        interval = f"{points(row['low'])} to {points(row['high'])}" if row["low"] == row["low"] else ""
        p = "" if row["p_holm"] != row["p_holm"] else "<0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
        effect = f"{round(100 * row['estimate'], 2) + 0.0:+.2f}"  # adding 0.0 turns -0.0 into 0.0
        shown.add_row(Text(row["contrast"]), effect, interval, str(row["n"]), p, row["verdict"])
    return shown


def _with_runs(table: "pd.DataFrame", name: str) -> "pd.DataFrame":
    """Prefix names with their run if there are several runs."""
    if "run" not in table or table["run"].nunique() < 2:
        return table
    named = table.copy()
    named[name] = table["run"] + ": " + table[name]
    return named


def arms(table: "pd.DataFrame") -> Table:
    """The confirmed test accuracy of each arm."""
    title = "Test accuracy of confirmed arms (best-validation weights, %)"
    shown = rich_table(title, "arm", "mean", "sd", "n", "planned", "note", left=("arm", "note"))
    for row in _with_runs(table, "arm").to_dict("records"):
        counts = str(row["n"]), str(row["planned"])
        shown.add_row(Text(row["arm"]), points(row["mean"]), points(row["sd"]), *counts, Text(row["note"]))
    return shown


def settings(table: "pd.DataFrame", budgets: "pd.DataFrame") -> Group:
    """The tuned value and the default of each setting, and the budgets."""
    title = "Tuned settings (share: of the variance of validation accuracy over the draws)"
    shown = rich_table(title, "arm", "setting", "default", "tuned", "range", "share", left=("arm", "setting"))
    for row in _with_runs(table, "arm").to_dict("records"):
        low, high, tuned, share = (row[name] for name in ("least", "most", "tuned", "importance"))
        found = f"{tuned:.4g}" if tuned == tuned else ""
        explained = f"{100 * share:.0f} %" if share == share else ""
        ends = f"{number(low)} to {number(high)}"
        shown.add_row(Text(row["arm"]), row["setting"], number(row["default"]), found, ends, explained)
    spent = "; ".join(
        f"{row['arm']} {row['draws']} draws, {row['stopped']} stopped, {row['failed']} failed, {row['epochs']} epochs"
        for row in _with_runs(budgets, "arm").to_dict("records")
    )
    return Group(shown, Text(f"Budgets: {spent}"))


def differences(table: "pd.DataFrame") -> Table:
    """The settings in which runs differ, one column per run."""
    shown = rich_table("Differences between the runs", left=())
    for name in table.columns:
        shown.add_column(Text(str(name)), overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(str(value)) for value in row))
    return shown


def simulation(screen: "Screen", outcomes: Mapping[str, "Outcome"], orders: int) -> Group:
    """The effect of early stopping on recorded curves: one line per stratum, then the stopped arms."""
    names = ("stratum", "arms", "seeds", "epochs saved", "mean regret", "best lost", "by cut", "by chance")
    title = f"Early stopping over {orders:,} arrival orders"
    shown = rich_table(title, *names, left=("stratum",), no_wrap=("stratum",))
    for name, each in outcomes.items():
        saved, lost = (f"{100 * share:.1f} %" for share in (each.stopping.epochs_saved, each.stopping.best_lost))
        regret, cut, chance = (f"{100 * rule.mean_regret:.3f}" for rule in (each.stopping, each.cut, each.random))
        shown.add_row(Text(name), str(each.arms), str(len(each.seeds)), saved, regret, lost, cut, chance)
    first = min(screen.grace, *(each.epochs for each in outcomes.values()))
    note = (
        "Regret: the best final validation accuracy of all arms minus that of the kept arms, in points. Two baselines "
        f"keep as many arms: a cut, which keeps the best arms at epoch {first}, and a random choice."
    )
    parts: list[RenderableType] = [shown, Text(note), Text(""), _rank_correlations(screen, outcomes)]
    for name, each in outcomes.items():
        parts += [Text(""), _stops(name, each)]
    return Group(*parts)


def _stops(name: str, outcome: "Outcome") -> Table:
    """The share of orders in which each arm of a stratum would have been stopped, by epoch."""
    epochs = sorted({epoch for when in outcome.stopped.values() for epoch in when})
    names = ("arm", "final accuracy", *(f"epoch {epoch}" for epoch in epochs), "in all", "")
    table = rich_table(f"{name}: stopped, in % of orders", *names, left=("arm", ""))
    alike = set.intersection(*(set(arm.split("/")) for arm in outcome.stopped)) if len(outcome.stopped) > 1 else set()
    for arm in sorted(outcome.stopped, key=lambda arm: -outcome.final[arm]):
        when = outcome.stopped[arm]
        shares = (f"{100 * when[epoch]:.1f}" if epoch in when else "" for epoch in epochs)
        short = "/".join(part for part in arm.split("/") if part not in alike) or arm
        never = "immune by its role" if arm in outcome.immune else ""
        table.add_row(Text(short), points(outcome.final[arm]), *shares, f"{100 * sum(when.values()):.1f}", never)
    return table


def _rank_correlations(screen: "Screen", outcomes: Mapping[str, "Outcome"]) -> Table:
    """Rank correlation between final accuracy and the accuracy at rungs and some other epochs."""
    budgets = [each.epochs for each in outcomes.values()]
    near = {round(epochs * share) for epochs in budgets for share in (0.5, 0.8, 0.9, 0.95)}
    columns = sorted({epoch for epochs in budgets for epoch in (*screen.rungs(epochs), *near) if 1 <= epoch < epochs})
    title = "Rank correlation (Spearman) between an epoch's accuracy and final accuracy, over trials"
    shown = rich_table(title, "stratum", *(f"epoch {epoch}" for epoch in columns), left=("stratum",))
    for name, each in outcomes.items():
        found = (each.rank_correlation[epoch].rho if epoch in each.rank_correlation else None for epoch in columns)
        shown.add_row(Text(name), *("" if rho is None else f"{rho:+.2f}" for rho in found))
    return shown


def calibration(practices: Mapping[str, str], found: "Calibration") -> Group:
    """False findings, coverage and power by scenario and by practice, in % of simulated studies."""
    sizes = [f"{100 * size:g}" for size in next(iter(found.before.power.values()), {})]
    heads = ("scenario", "primary", "secondary", "coverage", "worst", *sizes)
    studies = found.before.false["any"].studies
    title = f"False findings by family, coverage, and power, in % of {studies:,} studies"
    shown = rich_table(title, *heads, left=("scenario",), no_wrap=("scenario",))
    for each in found.scenarios.values():
        false = (_percent(each.false[family]) for family in ("primary", "secondary"))
        covered = each.covered(found.groups["primary"]) or ()
        coverage = (f"{100 * share:.1f}" for share in covered)
        shown.add_row(each.scenario.words, *false, *(coverage if covered else ("", "")), *_power(found, each))
    heads = ("practice, if all arms are alike", "false", "± se", "studies", *sizes)
    beside = rich_table("False findings of any family, and power, in %", *heads, left=heads[:1])
    performances = {"designed": found.scenarios["alike"], "before_0_7": found.before}
    for name, words in practices.items():
        rate, power = found.false[name], _power(found, performances[name]) if name in performances else []
        error = f"{100 * rate.standard_error:.1f}"
        beside.add_row(words, _percent(rate), error, f"{rate.studies:,}", *(power or [""] * len(sizes)))
    return Group(shown, *map(Text, _notes(found)), Text(""), beside, Text(_bias(found)))


def _power(found: "Calibration", performance: "Performance") -> list[str]:
    return [f"{100 * rate.share:.0f}" for rate in performance.power.get(found.shown or "", {}).values()]


def _percent(rate: "Rate") -> str:
    return f"{100 * rate.share:.1f}"


def _notes(found: "Calibration") -> Iterable[str]:
    yield (
        "If all arms are equally good, every finding is false; the level allows 5 % in each family. Coverage is that "
        "of the 95 % intervals of primary contrasts: the mean, and the worst."
    )
    if found.shown is not None:
        yield f"Power: the share of studies that find {found.shown}, by its true difference in points."


def _bias(found: "Calibration") -> str:
    return (
        f"Under plain ASHA, {100 * found.finished:.0f} % of trials finish, and their accuracies are on average "
        f"{found.bias:.2f} standard deviations between seeds too high."
    )

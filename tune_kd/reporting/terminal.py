"""What people see on screen: a plan, a run while it goes on, its results. Renders rows; computes nothing new."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_kd.records.eta import Row, time_left
from tune_kd.study.trial import Decision
from tune_kd.study.tuning import number
from tune_kd.system.characters import visible
from tune_kd.system.secrets import masked

if TYPE_CHECKING:
    import pandas as pd

    from tune_kd.analysis.calibrate import Calibration
    from tune_kd.analysis.simulate import Outcome
    from tune_kd.study.spec import Screen

PHASES = ("teacher", "screen", "confirm")
SHOWN = 20  # running trials that are shown one by one
LAST = 5  # comparisons of early stopping that are shown one by one
WORTH = 50.0  # times what a picture takes have to pass before the next one
PLAIN_EVERY = 30.0  # seconds between lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h`, `4.0 d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def points(accuracy: float | None, digits: int = 2) -> str:
    """An accuracy or a difference of accuracies in points (hundredths)."""
    return "" if accuracy is None or accuracy != accuracy else f"{100 * accuracy:.{digits}f}"


def _opened(log: str, flags: int) -> int:
    """A log of this user's alone. Others may write to the folder of a Ray that is joined: no link is followed, and no
    FIFO waited for."""
    return os.open(log, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


class View:
    """Shows a run while it goes on: a table that renews itself on a terminal, lines elsewhere."""

    def __init__(self, console: Console, run: str, log: Path | None = None) -> None:
        """What is said also goes to the end of the file `log`, as far as that can be written to."""
        self._console = console
        self._log = log
        self._run = run
        self._began = self._shown = time.monotonic()
        self._took = 0.0  # seconds that the last picture took
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        elapsed = time.monotonic() - self._began
        line = masked(f"{elapsed:7.1f} s  {sentence}")
        self._console.print(Text(line), soft_wrap=True)
        if self._log is not None:
            with (
                suppress(OSError),
                open(self._log, "a", encoding="utf-8", errors="backslashreplace", opener=_opened) as log,
            ):
                log.write(f"{visible(line)}\n")

    def show(self, rows: Sequence[Row], decisions: Sequence[Decision]) -> None:
        """Renew the picture; at most twice a second, and less often where many trials make it take long."""
        now = time.monotonic()
        if self._live is not None and now - self._shown >= max(0.5, WORTH * self._took):
            self._live.update(progress(self._run, rows, decisions, now - self._began), refresh=True)
            self._shown = time.monotonic()
            self._took = self._shown - now
        elif self._live is None and now - self._shown >= PLAIN_EVERY:
            counts = Counter(row["status"] for row in rows)
            ended = sum(counts[status] for status in ("completed", "stopped", "failed", "blocked"))
            left = time_left(rows)
            after = f", about {duration(left)} left" if left is not None else ""
            self.say(f"{ended} of {len(rows)} trials ended, {counts['running']} running{after}")
            self._shown = now


def progress(run: str, rows: Sequence[Row], decisions: Sequence[Decision], elapsed: float | None) -> Group:
    """The picture of a run: a line for each phase, what early stopping decided, then the trials that run."""
    phases = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("phase", "done", "running", "stopped", "failed", "waiting"):
        phases.add_column(title, justify="left" if title == "phase" else "right")
    phases.add_column("", ratio=1)
    for phase in PHASES:
        counts = Counter(row["status"] for row in rows if row["phase"] == phase)
        total = sum(counts.values())
        failed = counts["failed"] + counts["blocked"]
        ended = counts["completed"] + counts["stopped"] + failed
        phases.add_row(
            phase,
            f"{counts['completed']}/{total}",
            str(counts["running"]),
            str(counts["stopped"]),
            Text(str(failed), style="red" if failed else ""),
            str(counts["pending"]),
            ProgressBar(total=max(1, total), completed=ended, width=30),
        )
    running = [row for row in rows if row["status"] == "running"]
    trials = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("running", "epoch", "val. accuracy", "left"):
        trials.add_column(title, justify="left" if title == "running" else "right")
    for row in running[:SHOWN]:
        left = ""
        if row["epochs_run"]:
            left = duration((row["epochs_planned"] - row["epochs_run"]) * row["train_seconds"] / row["epochs_run"])
        trials.add_row(
            Text(f"{row['arm']} seed {row['seed']}"),
            f"{row['epochs_run']}/{row['epochs_planned']}",
            points(row["val_accuracy"]),
            left,
        )
    if len(running) > SHOWN:
        trials.add_row(f"and {len(running) - SHOWN} more")
    remaining = time_left(rows)
    line = Text.assemble((run, "bold"), "" if elapsed is None else f"  {duration(elapsed)}")
    if remaining:
        line.append(f", about {duration(remaining)} left")
    parts: list[RenderableType] = [line, phases]
    if decisions:
        parts += [Text(""), _comparisons(decisions)]
    if running:
        parts += [Text(""), trials]
    return Group(*parts)


def _comparisons(decisions: Sequence[Decision]) -> Group:
    """How often early stopping said what, and the last few times in words."""
    counts = Counter(decision.reason for decision in decisions)
    said = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.most_common())
    stopped = sum(decision.action == "stop" for decision in decisions)
    title = Text(f"early stopping: {len(decisions)} comparisons, {stopped} stopped ({said})", style="bold")
    return Group(title, *(Text(decision.words) for decision in decisions[-LAST:]))


def effects(table: "pd.DataFrame", teachers: int) -> Group:
    """The contrasts in points of test accuracy: effects, then how they change with the moderator."""
    table = _with_runs(table, "contrast")
    given = ", given one teacher" if teachers == 1 else ""
    parts: list[Table | Text] = []
    for kind, title in (("effect", "Effects"), ("moderation", "How effects change")):
        chosen = table[(table["kind"] == kind) & (table["n"] > 0)]
        if len(chosen):
            parts += [_contrasts(f"{title}, in points of test accuracy{given}", chosen), Text("")]
    unjudged = table[table["n"] == 0]
    for note, group in unjudged.groupby("note", sort=False):
        parts.append(Text(f"Not judged, since {note}: {'; '.join(group['contrast'])}"))
    rows = table[table["verdict"] == "inconclusive"].to_dict("records")
    needed = [f"{row['contrast']} {row['pairs_needed']:,}" for row in rows if isinstance(row["pairs_needed"], int)]
    if needed:
        parts.append(
            Text(f"Pairs that would give the test 80 % power at the difference and spread seen: {'; '.join(needed)}")
        )
    parts.append(
        Text("Paired by seed; 95 % t intervals; p adjusted by Holm over all contrasts; both allow for declared looks.")
    )
    return Group(*parts)


def _contrasts(title: str, table: "pd.DataFrame") -> Table:
    shown = _titled(title)
    for name in ("contrast", "effect", "95 % interval", "sd", "n", "p", "verdict"):
        left = name in ("contrast", "verdict")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "contrast")
    for row in table.to_dict("records"):
        interval = f"{points(row['low'])} to {points(row['high'])}" if row["low"] == row["low"] else ""
        p = f"{row['p_holm']:.3f}" if row["p_holm"] == row["p_holm"] else ""
        shown.add_row(
            Text(row["contrast"]),
            f"{round(100 * row['estimate'], 2) + 0.0:+.2f}",  # what rounds to zero has no sign
            interval,
            points(row["sd"]),
            str(row["n"]),
            p,
            row["verdict"],
        )
    return shown


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)


def _with_runs(table: "pd.DataFrame", name: str) -> "pd.DataFrame":
    """A table whose names say which run they are of, where there are several."""
    if "run" not in table or table["run"].nunique() < 2:
        return table
    named = table.copy()
    named[name] = table["run"] + ": " + table[name]
    return named


def arms(table: "pd.DataFrame") -> Table:
    """Each arm's confirmed test accuracy."""
    shown = _titled("Test accuracy of confirmed arms (best-validation weights, %)")
    for title in ("arm", "mean", "sd", "n", "planned", "note"):
        shown.add_column(title, justify="left" if title in ("arm", "note") else "right")
    for row in _with_runs(table, "arm").to_dict("records"):
        counts = str(row["n"]), str(row["planned"])
        shown.add_row(Text(row["arm"]), points(row["mean"]), points(row["sd"]), *counts, Text(row["note"]))
    return shown


def settings(table: "pd.DataFrame", budgets: "pd.DataFrame") -> Group:
    """What was found of each setting, beside its default, and with which budget."""
    shown = _titled("What was tuned (share: of the variance of validation accuracy over the draws)")
    for title in ("arm", "setting", "default", "tuned", "range", "share"):
        shown.add_column(title, justify="left" if title in ("arm", "setting") else "right")
    for row in _with_runs(table, "arm").to_dict("records"):
        low, high, tuned, share = (row[name] for name in ("least", "most", "tuned", "importance"))
        shown.add_row(
            Text(row["arm"]),
            row["setting"],
            number(row["default"]),
            f"{tuned:.4g}" if tuned == tuned else "",
            f"{number(low)} to {number(high)}",
            f"{100 * share:.0f} %" if share == share else "",
        )
    spent = "; ".join(
        f"{row['arm']} {row['draws']} draws, {row['stopped']} stopped, {row['failed']} failed, {row['epochs']} epochs"
        for row in _with_runs(budgets, "arm").to_dict("records")
    )
    return Group(shown, Text(f"Budgets: {spent}"))


def differences(table: "pd.DataFrame") -> Table:
    """In what runs differ: a column a run."""
    shown = _titled("What differs between the runs")
    for name in table.columns:
        shown.add_column(Text(str(name)), overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(str(value)) for value in row))
    return shown


def simulation(screen: "Screen", outcomes: Mapping[str, "Outcome"], orders: int) -> Group:
    """What early stopping would have done with recorded curves: a line a stratum, then who would have been stopped."""
    shown = _titled(f"Early stopping over {orders:,} arrival orders")
    shown.add_column("stratum", no_wrap=True)
    for title in ("arms", "seeds", "epochs saved", "mean regret", "best lost", "by cut", "by chance"):
        shown.add_column(title, justify="right")
    for name, each in outcomes.items():
        shown.add_row(
            Text(name),
            str(each.arms),
            str(len(each.seeds)),
            f"{100 * each.stopping.epochs_saved:.1f} %",
            f"{100 * each.stopping.mean_regret:.3f}",
            f"{100 * each.stopping.best_lost:.1f} %",
            f"{100 * each.cut.mean_regret:.3f}",
            f"{100 * each.random.mean_regret:.3f}",
        )
    first = min(screen.grace, *(each.epochs for each in outcomes.values()))
    note = (
        "Regret: the best final validation accuracy of all arms less that of the kept, in points. Of baselines that "
        f"keep as many arms: a cut at epoch {first} that keeps the best then, and a choice by chance."
    )
    parts: list[RenderableType] = [shown, Text(note), Text(""), _foretold(screen, outcomes)]
    for name, each in outcomes.items():
        parts += [Text(""), _stops(name, each)]
    return Group(*parts)


def _stops(name: str, outcome: "Outcome") -> Table:
    """Who would have been stopped in a stratum, when, and in how many of the orders."""
    table = _titled(f"{name}: stopped, in % of orders")
    epochs = sorted({epoch for when in outcome.stopped.values() for epoch in when})
    for title in ("arm", "final accuracy", *(f"epoch {epoch}" for epoch in epochs), "in all", ""):
        table.add_column(title, justify="left" if title in ("arm", "") else "right")
    alike = set.intersection(*(set(arm.split("/")) for arm in outcome.stopped)) if len(outcome.stopped) > 1 else set()
    for arm in sorted(outcome.stopped, key=lambda arm: -outcome.final[arm]):
        when = outcome.stopped[arm]
        shares = (f"{100 * when[epoch]:.1f}" if epoch in when else "" for epoch in epochs)
        short = "/".join(part for part in arm.split("/") if part not in alike) or arm
        never = "never, by its role" if arm in outcome.immune else ""
        table.add_row(Text(short), points(outcome.final[arm]), *shares, f"{100 * sum(when.values()):.1f}", never)
    return table


def _foretold(screen: "Screen", outcomes: Mapping[str, "Outcome"]) -> Table:
    """The rank correlations of rungs, and of some epochs up to the end, with the end."""
    shown = _titled("Rank correlation (Spearman) of an epoch's accuracy with the last one's, over trials")
    budgets = [each.epochs for each in outcomes.values()]
    near = {round(epochs * share) for epochs in budgets for share in (0.5, 0.8, 0.9, 0.95)}
    columns = sorted({epoch for epochs in budgets for epoch in (*screen.rungs(epochs), *near) if 1 <= epoch < epochs})
    for title in ("stratum", *(f"epoch {epoch}" for epoch in columns)):
        shown.add_column(title, justify="left" if title == "stratum" else "right")
    for name, each in outcomes.items():
        found = (each.rank_correlation[epoch].rho if epoch in each.rank_correlation else None for epoch in columns)
        shown.add_row(Text(name), *("" if rho is None else f"{rho:+.2f}" for rho in found))
    return shown


def calibration(practices: Mapping[str, str], found: "Calibration") -> Group:
    """How often each practice found something where nothing is."""
    shown = _titled("Studies of nothing with at least one false finding")
    for title in ("what is done", "studies", "share", "standard error"):
        shown.add_column(title, justify="left" if title == "what is done" else "right")
    for name, words in practices.items():
        rate = found.rates[name]
        shown.add_row(
            words, f"{rate.found} of {rate.studies}", f"{100 * rate.share:.1f} %", f"{100 * rate.standard_error:.1f} %"
        )
    return Group(
        shown,
        Text("All arms are alike in them, so whatever is found is false; the level allows 5 %."),
        Text(
            f"Of plain ASHA's trials {100 * found.finished:.0f} % finish, and their accuracies are {found.bias:.2f} "
            "standard deviations between seeds too high on average."
        ),
    )

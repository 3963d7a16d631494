"""The progress of a run on a terminal: phases, decisions of early stopping, and running trials."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_kd.records.eta import time_left
from tune_kd.records.schema import TrialRow, labels
from tune_kd.reporting.terminal import duration, plural, points, rich_table
from tune_kd.study.trial import ENDED, Decision, Phase, Status, reason_in_words
from tune_kd.system.characters import visible
from tune_kd.system.secrets import masked

SHOWN = 20  # running trials that are listed
LAST = 5  # decisions of early stopping that are listed
PAUSE_FACTOR = 50.0  # least time between refreshes, as a multiple of the last refresh's duration
PLAIN_EVERY = 30.0  # seconds between progress lines if the output is not a terminal


class ProgressDisplay:
    """Show the progress of a run: a table that refreshes on a terminal, plain lines otherwise."""

    def __init__(self, console: Console, run: str, log: Path | None = None) -> None:
        """Messages are also appended to the file `log`, if it can be written to."""
        self._console = console
        self._log = log
        self._run = run
        self._began = self._shown = time.monotonic()
        self._took = 0.0  # duration of the last refresh, in seconds
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "ProgressDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a message with the seconds since the start, and append it to the log."""
        elapsed = time.monotonic() - self._began
        line = masked(f"{elapsed:7.1f} s  {sentence}")
        self._console.print(Text(line), soft_wrap=True)
        if self._log is not None:
            with (
                suppress(OSError),
                open(self._log, "a", encoding="utf-8", errors="backslashreplace", opener=_open_log) as log,
            ):
                log.write(f"{visible(line)}\n")

    def show(self, rows: Sequence[TrialRow], decisions: Sequence[Decision]) -> None:
        """Refresh the table at most twice a second, and less often if many trials make a refresh slow."""
        now = time.monotonic()
        if self._live is not None and now - self._shown >= max(0.5, PAUSE_FACTOR * self._took):
            self._live.update(progress(self._run, rows, decisions, now - self._began), refresh=True)
            self._shown = time.monotonic()
            self._took = self._shown - now
        elif self._live is None and now - self._shown >= PLAIN_EVERY:
            counts = Counter(row["status"] for row in rows)
            ended = sum(counts[status] for status in ENDED)
            left = time_left(rows)
            after = f", about {duration(left)} left" if left is not None else ""
            self.say(f"{ended} of {len(rows)} trials ended, {counts[Status.RUNNING]} running{after}")
            self._shown = now


def _open_log(log: str, flags: int) -> int:
    """Open a log that only this user can read. Others may write to the folder of an existing Ray cluster, so do not
    follow a link or wait for a FIFO."""
    return os.open(log, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def progress(run: str, rows: Sequence[TrialRow], decisions: Sequence[Decision], elapsed: float | None) -> Group:
    """The progress of a run: one line per phase, the decisions of early stopping, then the running trials.

    `elapsed` is in seconds; None omits it.
    """
    line = Text.assemble((run, "bold"), "" if elapsed is None else f"  {duration(elapsed)}")
    if remaining := time_left(rows):
        line.append(f", about {duration(remaining)} left")
    parts: list[RenderableType] = [line, _phases(rows)]
    if decisions:
        parts += [Text(""), _decisions(decisions, live=elapsed is not None)]
    if running := [row for row in rows if row["status"] == Status.RUNNING]:
        parts += [Text(""), _running(running, labels(rows))]
    return Group(*parts)


def _phases(rows: Sequence[TrialRow]) -> Table:
    """The number of trials in each state, by phase."""
    shown = rich_table(None, "phase", "done", "running", "stopped", "failed", "waiting", left=("phase",))
    shown.add_column("", ratio=1)
    for phase in Phase:
        counts = Counter(row["status"] for row in rows if row["phase"] == phase)
        total = counts.total()
        done, running, stopped = counts[Status.COMPLETED], str(counts[Status.RUNNING]), counts[Status.STOPPED]
        failed = counts[Status.FAILED] + counts[Status.BLOCKED]
        marked = Text(str(failed), style="red" if failed else "")
        bar = ProgressBar(total=max(1, total), completed=done + stopped + failed, width=30)
        shown.add_row(phase, f"{done}/{total}", running, str(stopped), marked, str(counts[Status.PENDING]), bar)
    return shown


def _decisions(decisions: Sequence[Decision], live: bool) -> Group:
    """The number of early stopping's decisions by reason, and the last few decisions. `live` keeps each on one line."""
    counts = Counter(decision.reason for decision in decisions)
    said = ", ".join(f"{count} {reason_in_words(reason)}" for reason, count in counts.most_common())
    stopped = sum(decision.stops for decision in decisions)
    title = Text(f"early stopping: {plural(len(decisions), 'comparison')}, {stopped} stopped ({said})", style="bold")
    return Group(title, *(Text(decision.words, no_wrap=live, overflow="ellipsis") for decision in decisions[-LAST:]))


def _running(running: Sequence[TrialRow], names: Mapping[str, str]) -> Table:
    """The epoch, accuracy and remaining time of running trials."""
    shown = rich_table(None, "running", "epoch", "val. accuracy", "left", left=("running",))
    for row in running[:SHOWN]:
        left = ""
        if row["epochs_run"] and row["train_seconds"] is not None:
            left = duration((row["epochs_planned"] - row["epochs_run"]) * row["train_seconds"] / row["epochs_run"])
        trial, epoch = Text(names[row["trial_id"]]), f"{row['epochs_run']}/{row['epochs_planned']}"
        shown.add_row(trial, epoch, points(row["val_accuracy"]), left)
    if len(running) > SHOWN:
        shown.add_row(f"and {len(running) - SHOWN} more")
    return shown

"""Crash runs at named points: the places in tune_kd where a kill could do most harm.

`tune_kd.system.crash_points.POINTS` names them. With `TUNE_KD_CRASH=name:n` in its environment, a driver or worker
kills itself with SIGKILL when it passes the point for the n-th time. So does a worker that replaces it: after a few
dead workers the driver gets SIGTERM, and the run continues without the variable.
"""

import importlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from faults import study
from faults.checker import Reader, read
from faults.life import Life, Progress, place

VARIABLE = "TUNE_KD_CRASH"
ENOUGH = 2  # dead workers; a trial that loses three in a row fails
# Points that are passed only once. The study has one teacher, whose logits are computed in one go.
ONCE = ("study.published", "drain.begun", "rebuild.set_aside", "extension.recorded", "teacher.weights",
        "answers.written")  # fmt: skip


def named() -> Mapping[str, str]:
    """Return the crash points of tune_kd and their descriptions."""
    points: Mapping[str, str] = importlib.import_module("tune_kd.system.crash_points").POINTS
    return points


def crash(life: Life, point: str, n: int, reference: Path, patience: float) -> tuple[str, list[str]]:
    """Run, crash at a point, and continue without it. Returns what died, and the violations."""
    found: list[str] = []
    options: Sequence[str] = ()
    if point == "rebuild.set_aside":
        found += _end_and_truncate_ledger(life, patience)
    if point == "extension.recorded":
        found += _driver(life, {}, patience)[1]
        options = ("--extend",)
    crashing = {VARIABLE: f"{point}:{n}"}
    status, more = _driver(life, crashing, patience, options, drain=point == "drain.begun")
    found += more
    lost = _lost(life.run)
    if status == -signal.SIGKILL:
        life.killed_at = time.monotonic()
    died = "driver" if status == -signal.SIGKILL else "worker" if lost else "nothing"
    if died != "nothing" and status != 0:
        if died == "worker" and status != 143:
            found.append(f"I7: SIGTERM ended the driver with {status}, not 143: {life.last_words()}")
        if point != "rebuild.set_aside":  # there is no ledger; the next driver creates it
            coming = ("I4",) if point == "extension.recorded" else ()  # trials that the next driver will add
            found += [each for each in life.check_between() if not each.startswith(coming)]
        status, more = _driver(life, {}, patience)
        found += more
    if status != 0:
        found.append(f"I7: the run ended with {status}: {life.last_words()}")
    return died, [*found, *life.check_ended(status, reference)]


def _driver(
    life: Life, extra: Mapping[str, str], patience: float, options: Sequence[str] = (), drain: bool = False
) -> tuple[int | None, list[str]]:
    """Start a driver and wait for its end. Returns its status, None if it hung, and the violations.

    With `extra`, the driver gets SIGTERM after `ENOUGH` dead workers; with `drain`, also after the first epoch.
    """

    def leave() -> bool:
        return bool(extra) and (_lost(life.run) >= ENOUGH or (drain and bool(life.epochs[-1])))

    driver = life.start_driver(extra, options)
    with Reader(life.run) as reader:
        status = _wait(driver, Progress(life, patience), leave)
    hung = [f"I7: the driver hung: no epoch in {patience:.0f} s"] if status is None else []
    return status, [*reader.errors, *hung]


def _wait(driver: "subprocess.Popen[bytes]", progress: Progress, leave: Callable[[], bool]) -> int | None:
    """Return the driver's status; None if it hung. Send SIGTERM once `leave()` is true."""
    signalled = False
    while driver.poll() is None:
        if progress.stuck:
            driver.kill()
            driver.wait()
            return None
        if not signalled and leave():
            driver.send_signal(signal.SIGTERM)
            signalled = True
        time.sleep(0.3)
    return driver.returncode


def _lost(run: Path) -> int:
    """Return how many workers have died, by the errors of trials; 0 without a readable ledger."""
    try:
        notes = [row["error"] or "" for row in read(run).ledger.trials or ()]
    except (OSError, sqlite3.Error):
        return 0
    return sum(len(re.findall(r"attempt \d+: its worker died", note)) for note in notes)


def _end_and_truncate_ledger(life: Life, patience: float) -> list[str]:
    """Complete a run, and truncate its ledger, which the next driver must rebuild."""
    _, found = _driver(life, {}, patience)
    ledger = life.run / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2])
    return found


def rounds(
    folder: Path, times: int, seeds: int, epochs: int, only: list[str], patience: float, say: Callable[[str], None]
) -> list[str]:
    """Crash `times` times at every point. Returns all violations."""
    settings = study.settings(seeds, epochs)
    in_two_looks = (*settings, f"confirm.looks=[{seeds - 1}, {seeds}]")
    path, all_found, died = study.write(folder), list[str](), Counter[str]()
    reference = study.reference(path, folder / "whole", settings)
    for point in only or named():
        for time_ in range(1, times + 1):
            n = 1 if point in ONCE else time_
            chosen = in_two_looks if point == "extension.recorded" else settings
            with Life(folder / f"{point}-{time_}", path, chosen, checkpoint_every=0.0) as life:
                what, found = crash(life, point, n, reference, patience)
            if what == "nothing":
                found.append(f"harness: no process passed {point} {n} times")
            died[what] += 1
            say(f"{point}:{n}  died: {what}; {len(life.logs)} drivers, {len(found)} violations")
            for violation in found:
                say(f"  {violation}")
            all_found += found
            if not found:
                shutil.rmtree(life.folder, ignore_errors=True)
    say(f"{died.total()} crashes: " + ", ".join(f"{n} {what}" for what, n in died.items()))
    return all_found


def points(
    times: Annotated[int, typer.Option(help="Crash at the first, second, ... pass of each point.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option("--point", help="Only this point. Repeatable. Default: all.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for runs with findings.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(help="Confirmation seeds of the study.", min=3)] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial.")] = 4,
    patience: Annotated[float, typer.Option(help="Seconds without an epoch until a driver counts as hung.")] = 120.0,
) -> None:
    """Crash at every named point, resume, and check."""
    if unknown := set(only or ()) - set(named()):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(named())}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference must be computed on the CPU, too
    with place(keep) as folder:
        found = rounds(folder, times, seeds, epochs, list(only or ()), patience, typer.echo)
        typer.echo(f"{len(found)} violations")
        if found:
            typer.echo(f"the runs are in {folder}")
            raise typer.Exit(1)

"""Crashes at named points: every place in the product where a kill would hurt most is passed, and died in.

`tune_kd.system.crash_points.POINTS` names them. With `TUNE_KD_CRASH=name:n` in its environment the process, driver or
worker, that passes the point for the n-th time kills itself with SIGKILL. So does the worker that takes its place:
after a few the driver is asked to leave, and the run goes on without the variable.
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
ENOUGH = 2  # dead workers; a trial that loses three in a row has failed
# Passed a single time: the study has one teacher, which answers in one go.
ONCE = ("study.published", "drain.begun", "rebuild.set_aside", "extension.recorded", "teacher.weights",
        "answers.written")  # fmt: skip


def named() -> Mapping[str, str]:
    """The points that the product has, and what each is."""
    points: Mapping[str, str] = importlib.import_module("tune_kd.system.crash_points").POINTS
    return points


def crash(life: Life, point: str, n: int, reference: Path, patience: float) -> tuple[str, list[str]]:
    """Run, die at a point, go on without it. Returns what died, and the violations."""
    found: list[str] = []
    options: Sequence[str] = ()
    if point == "rebuild.set_aside":
        found += _ended_and_damaged(life, patience)
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
        if point != "rebuild.set_aside":  # there is no ledger now; the next driver makes it
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
    """Start a driver and wait for its end. Returns its status, null where it hung, and what was found.

    Where it is to crash (`extra`), SIGTERM ends it after enough dead workers; `drain` sends it after the first epoch.
    """

    def leave() -> bool:
        return bool(extra) and (_lost(life.run) >= ENOUGH or (drain and bool(life.epochs[-1])))

    driver = life.go_on(extra, options)
    with Reader(life.run) as reader:
        status = _wait(driver, Progress(life, patience), leave)
    hung = [f"I7: the driver hung: no epoch in {patience:.0f} s"] if status is None else []
    return status, [*reader.errors, *hung]


def _wait(driver: "subprocess.Popen[bytes]", progress: Progress, leave: Callable[[], bool]) -> int | None:
    """The driver's status, null where it hung. SIGTERM goes to it once it is to leave."""
    asked = False
    while driver.poll() is None:
        if progress.stuck:
            driver.kill()
            driver.wait()
            return None
        if not asked and leave():
            driver.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(0.3)
    return driver.returncode


def _lost(run: Path) -> int:
    """How many workers have died, by what the rows say of attempts. None where there is no ledger, or a cut one."""
    try:
        notes = [row["error"] or "" for row in read(run).ledger.trials or ()]
    except (OSError, sqlite3.Error):
        return 0
    return sum(len(re.findall(r"attempt \d+: its worker died", note)) for note in notes)


def _ended_and_damaged(life: Life, patience: float) -> list[str]:
    """A run that has ended, and its ledger cut: what the next driver has to rebuild."""
    _, found = _driver(life, {}, patience)
    ledger = life.run / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2])
    return found


def rounds(
    folder: Path, times: int, seeds: int, epochs: int, only: list[str], patience: float, say: Callable[[str], None]
) -> list[str]:
    """Every point so many times; returns all violations."""
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
                found.append(f"harness: nobody passed {point} {n} times")
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
    times: Annotated[int, typer.Option(help="Die at the first, second, ... passing of each point.")] = 3,
    only: Annotated[list[str] | None, typer.Option("--point", help="This point. Repeatable; all by default.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for runs with findings.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(help="Confirmation seeds of the study.", min=3)] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial.")] = 4,
    patience: Annotated[float, typer.Option(help="Seconds without an epoch after which a driver hangs.")] = 120.0,
) -> None:
    """Die at every named point, resume, and check."""
    if unknown := set(only or ()) - set(named()):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(named())}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference, too, is to be computed on the CPU
    with place(keep) as folder:
        found = rounds(folder, times, seeds, epochs, list(only or ()), patience, typer.echo)
        typer.echo(f"{len(found)} violations")
        if found:
            typer.echo(f"the runs are in {folder}")
            raise typer.Exit(1)

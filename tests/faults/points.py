"""Crashes at named points: every place in the product where a kill would hurt most is passed, and died in.

`tune_kd.faults.POINTS` names them. With `TUNE_KD_CRASH=name:n` in its environment the process, driver or worker, that
passes the point for the n-th time kills itself with SIGKILL.
"""

import importlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from faults import study
from faults.checker import MAX_ATTEMPTS, Reader, read
from faults.life import Life, Progress, place

VARIABLE = "TUNE_KD_CRASH"


def named() -> Mapping[str, str]:
    """The points that the product has, and what each is."""
    points: Mapping[str, str] = importlib.import_module("tune_kd.faults").POINTS
    return points


def crash(life: Life, point: str, n: int, reference: Path, patience: float) -> tuple[str, list[str]]:
    """Run, die at a point, go on without it. Returns what died, and the violations."""
    status, found = _driver(life, {VARIABLE: f"{point}:{n}"}, patience)
    died = "nothing"
    if status == -signal.SIGKILL:
        died = "driver"
        found += life.check_between()
        status, more = _driver(life, {}, patience)
        found += more
    elif status is not None and (lost := _lost(life.run)):
        died = "worker" if lost == 1 else f"{lost} workers"
    if died == "nothing":
        found.append(f"harness: {point} was not passed {n} times")
    if status == 1 and _retries_ran_out(life.run):  # each new worker died at the point, too: a true and bounded end
        return f"{died}, until retries ran out", [*found, *life.check_ended(1, None)]
    if status != 0:
        found.append(f"I7: the run ended with {status}: {life.last_words()}")
    return died, [*found, *life.check_ended(status, reference)]


def _driver(life: Life, extra: Mapping[str, str], patience: float) -> tuple[int | None, list[str]]:
    """Start a driver and wait for its end. Returns its status, null where it hung, and what was found."""
    driver = life.go_on(extra)
    with Reader(life.run) as reader:
        status = _wait(driver, Progress(life, patience))
    hung = [f"I7: the driver hung: no epoch in {patience:.0f} s"] if status is None else []
    return status, [*reader.errors, *hung]


def _wait(driver: "subprocess.Popen[bytes]", progress: Progress) -> int | None:
    while driver.poll() is None:
        if progress.stuck:
            driver.kill()
            driver.wait()
            return None
        time.sleep(0.1)
    return driver.returncode


def _notes(run: Path) -> list[str]:
    """What the rows say of attempts that were lost, a list entry an attempt."""
    trials = read(run).ledger.trials or []
    return [note for row in trials for note in re.findall(r"attempt \d+: its worker died", row["error"] or "")]


def _lost(run: Path) -> int:
    return len(_notes(run)) if (run / "study.json").is_file() else 0


def _retries_ran_out(run: Path) -> bool:
    """Whether every trial that failed had lost all the workers that it may lose."""
    failed = [row for row in read(run).ledger.trials or [] if row["status"] == "failed"]
    return bool(failed) and all(row["error"].count("its worker died") == MAX_ATTEMPTS for row in failed)


def rounds(
    folder: Path, times: int, settings: tuple[str, ...], only: list[str], patience: float, say: Callable[[str], None]
) -> list[str]:
    """Every point so many times; returns all violations."""
    path, all_found, died = study.write(folder), list[str](), Counter[str]()
    reference = study.reference(path, folder / "whole", settings)
    for point in only or named():
        for n in range(1, times + 1):
            with Life(folder / f"{point}-{n}".replace("/", "_"), path, settings, checkpoint_every=0.0) as life:
                what, found = crash(life, point, n, reference, patience)
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
    seeds: Annotated[int, typer.Option(help="Confirmation seeds of the study.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial.")] = 4,
    patience: Annotated[float, typer.Option(help="Seconds without an epoch after which a driver hangs.")] = 60.0,
) -> None:
    """Die at every named point, resume, and check."""
    if unknown := set(only or ()) - set(named()):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(named())}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference, too, is to be computed on the CPU
    with place(keep) as folder:
        found = rounds(folder, times, study.settings(seeds, epochs), list(only or ()), patience, typer.echo)
        typer.echo(f"{len(found)} violations")
        if found:
            typer.echo(f"the runs are in {folder}")
            raise typer.Exit(1)

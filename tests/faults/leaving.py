"""Send a run a signal to exit: to its driver, to its process group as `timeout` does, or to all of its processes as
`scancel`, systemd and Kubernetes do. Or kill a part of Ray that a driver needs."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from faults import processes, study
from faults.checker import lines, read
from faults.life import Life, place

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TARGETS = ("driver", "group", "descendants")
MOMENTS = ("importing", "starting", "connected", "training", "confirming", "ending")
PARTS = {"agent": "ray::DashboardAgent", "control store": "gcs_server", "raylet": "raylet/raylet"}  # by command line
WITHIN = 20.0  # maximum seconds from a signal to the driver's exit
START = 60.0  # maximum seconds until a moment is reached


def reached(life: Life, moment: str, epochs: int) -> bool:
    """Whether a run has reached a moment. `epochs` is the total of the run."""
    if moment == "importing":
        return (life.run / "study.json").is_file()
    if moment == "starting":  # Ray does not answer yet
        return any(PARTS["control store"] in " ".join(each.cmdline()) for each in processes.tagged(life.tag))
    if moment == "connected":
        return life.output.is_file() and b"Ray dashboard" in life.output.read_bytes()
    seen = len(lines(life.logs[-1])) if life.logs[-1].is_file() else 0
    return seen >= {"training": 2, "confirming": 0.6 * epochs, "ending": epochs}[moment]


def send(number: signal.Signals, target: str, driver: "subprocess.Popen[bytes]") -> None:
    """Send a signal as a user, `timeout` or a scheduler does."""
    if target == "group":  # `timeout` signals its command, then the group
        driver.send_signal(number)
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, number)
        return
    with suppress(psutil.Error):
        others = psutil.Process(driver.pid).children(recursive=True) if target == "descendants" else []
        driver.send_signal(number)
        for each in others:
            with suppress(psutil.Error):
                each.send_signal(number)


@dataclass(frozen=True)
class Left:
    """How a driver exited."""

    seconds: float  # from the signal to its exit
    drained: bool | None  # whether all started trials were drained; None if none had started
    found: list[str]  # violations


Case = tuple[str, Callable[[Life], Left]]
"""A name, and a function that disturbs a run."""


def leave(life: Life, number: signal.Signals, target: str, moment: str, epochs: int) -> Left:
    """Run until a moment, send a signal, and wait for the exit."""
    driver = life.start_driver()
    end = time.monotonic() + START
    while not reached(life, moment, epochs):
        if driver.poll() is not None or time.monotonic() > end:
            driver.kill()
            return Left(0.0, None, [f"harness: the moment was not reached: {life.last_words()}"])
        time.sleep(0.02)
    sent = time.monotonic()
    send(number, target, driver)
    try:
        driver.wait(3 * WITHIN)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        return Left(3 * WITHIN, None, [f"it did not exit within {3 * WITHIN:.0f} s: {life.last_words()}"])
    seconds = time.monotonic() - sent
    found = [] if seconds <= WITHIN else [f"it took {seconds:.1f} s"]
    # While Python itself exits, the command no longer handles signals, and the process dies of this one.
    if driver.returncode not in (128 + number, -number):
        found.append(f"it exited with {driver.returncode}, not {128 + number}: {life.last_words()}")
    elif driver.returncode == 128 + number and "continue with: python -m tune_kd resume" not in life.output.read_text():
        found.append(f"it did not print how to continue: {life.last_words()}")
    if not processes.gone(life.tag, 3.0):
        found.append(f"processes are left: {[each.cmdline()[:3] for each in processes.tagged(life.tag)]}")
    rows = read(life.run).ledger.trials if (life.run / "ledger.sqlite").is_file() else None
    begun = [row for row in rows or () if row["attempts"]]
    return Left(seconds, all(row["status"] != "running" for row in begun) if begun else None, found)


def kill(life: Life, part: str) -> Left:
    """Run, kill a process of Ray, and wait for the exit, which must have status 3 and report what died.

    If possible, the driver's parent is process 1, as in a container: there, Ray's core may end the driver itself.
    """
    driver = life.start_driver(within=processes.CONTAINED if processes.containable() else ())
    while not reached(life, "training", 0):
        if driver.poll() is not None:
            return Left(0.0, None, [f"harness: it exited before the kill: {life.last_words()}"])
        time.sleep(0.05)
    sent = time.monotonic()
    victims = [each for each in processes.tagged(life.tag) if any(PARTS[part] in word for word in each.cmdline()[:3])]
    for each in victims:
        each.kill()
    driver.wait(120)
    seconds, found = time.monotonic() - sent, [] if victims else [f"harness: there is no {part}"]
    if driver.returncode != 3 or "Ray died: its" not in life.output.read_text():
        found.append(f"it exited with {driver.returncode}: {life.last_words()}")
    if not processes.gone(life.tag, 3.0):
        found.append(f"processes are left: {[each.cmdline()[:3] for each in processes.tagged(life.tag)]}")
    return Left(seconds, None, found)


def rounds(folder: Path, cases: Sequence[Case], settings: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Run each case in a new run, which is then resumed and compared with an undisturbed one. Returns all findings."""
    path, all_found = study.write(folder), list[str]()
    reference = study.reference(path, folder / "whole", settings)
    drained, longest = Counter[bool | None](), 0.0
    for number, (name, case) in enumerate(cases):
        with Life(folder / str(number), path, settings) as life:
            left = case(life)
            found = list(left.found)
            if (life.run / "study.json").is_file():
                status = life.start_driver().wait(200)
                found += life.check_ended(status, reference)
                found += [] if status == 0 else [f"`resume` exited with {status}: {life.last_words()}"]
        drained[left.drained] += 1
        longest = max(longest, left.seconds)
        how = {True: "drained", False: "NOT drained", None: "nothing to drain"}[left.drained]
        say(f"{name}: {left.seconds:.1f} s, {how}, {len(found)} findings")
        for each in found:
            say(f"  {each}")
        all_found += [f"{name}: {each}" for each in found]
        if not found:
            shutil.rmtree(life.folder, ignore_errors=True)
    say(f"{len(cases)} cases, at most {longest:.1f} s; {drained[True]} drained, {drained[False]} not, "
        f"{drained[None]} with nothing to drain; {len(all_found)} findings")  # fmt: skip
    return all_found


def signalled(number: signal.Signals, target: str, moment: str, epochs: int) -> Case:
    return f"{number.name} to the {target} while {moment}", lambda life: leave(life, number, target, moment, epochs)


def leaving(
    seeds: Annotated[int, typer.Option(help="Confirmation seeds of the study.")] = 2,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial: too many to finish without Ray.")] = 8,
    times: Annotated[int, typer.Option(help="Kills of each part of Ray.")] = 3,
    keep: Annotated[Path | None, typer.Option(help="Folder for runs with findings.", show_default=False)] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    """Send each signal to driver, group and all processes at six moments, kill parts of Ray, resume, and check."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference must be computed on the CPU, too
    total = epochs * (4 * (seeds + 1) + 1)
    cases = [signalled(number, target, moment, total)
             for number in SIGNALS for target in TARGETS for moment in MOMENTS]  # fmt: skip
    for part in PARTS:
        cases += [(f"SIGKILL of the {part}, time {time_}", lambda life, part=part: kill(life, part))
                  for time_ in range(1, times + 1)]  # fmt: skip
    with place(keep) as folder:
        chosen = [case for case in cases if only in case[0]]
        found = rounds(folder, chosen, study.settings(seeds, epochs), typer.echo)
        if found:
            typer.echo(f"the runs are in {folder}")
            raise typer.Exit(1)

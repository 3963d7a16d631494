"""Kill workers, drivers and raylets of real runs at random moments, and count what is lost."""

import os
import random
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer

from faults import processes, study
from faults.checker import Reader
from faults.life import Life, Progress, place

VICTIMS = {"worker": 12, "driver": 3, "raylet": 1}  # weights of the random choice
STARTED = 10.0  # seconds after which a worker has most likely reported an epoch
DRIVERS = 30  # maximum number of drivers of a run


@dataclass
class Score:
    """Counts over all runs so far."""

    kills: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)  # how drivers ended whose raylet was killed
    runs: int = 0
    unbegun: int = 0
    acknowledged: int = 0
    again: int = 0  # epochs that a driver acknowledged twice: work lost with a dead worker
    reads: int = 0
    read_errors: int = 0
    first_epoch: list[float] = field(default_factory=list)  # seconds from `resume` on
    found: list[str] = field(default_factory=list)

    def table(self) -> str:
        rows = {
            "kills": ", ".join(f"{self.kills[victim]} {victim}s" for victim in VICTIMS),
            "drivers after their raylet's death": ", ".join(f"{n} {what}" for what, n in self.deaths.items()) or "-",
            "runs": f"{self.runs} ({self.unbegun} killed before `study.json` existed)",
            "epochs acknowledged": self.acknowledged,
            "rows lost / duplicated / changed": " / ".join(map(self._count, ("lost", "duplicated", "changed"))),
            "trials missing / phantom": " / ".join(map(self._count, ("missing", "phantom"))),
            "reads of tables": f"{self.reads}, {self.read_errors} errors",
            "epochs recomputed per killed worker": f"{self.again / max(1, self.kills['worker']):.2f}",
            "seconds from resume to the first epoch": self._seconds(),
            "orphans": self._count("I8: process"),
            "violations": len(self.found),
        }
        return "\n".join(f"{name:<40} {value}" for name, value in rows.items())

    def _count(self, word: str) -> str:
        return str(sum(word in each for each in self.found))

    def _seconds(self) -> str:
        if not self.first_epoch:
            return "-"
        return f"{statistics.median(self.first_epoch):.1f} median, {max(self.first_epoch):.1f} max"


@dataclass
class Killer:
    """Kills processes of one run at random moments."""

    life: Life
    score: Score
    chance: random.Random
    left: int  # kills still to make
    patience: float
    young: bool = False  # whether the worker that was killed last had only just started

    def accompany(self, driver: "subprocess.Popen[bytes]") -> str:
        """Kill until the driver has ended. Returns the cause: `driver`, `raylet`, `hung`, or empty for none."""
        cause, moment = "", self._first_moment()
        progress = Progress(self.life, self.patience)
        while driver.poll() is None:
            time.sleep(0.02)
            if progress.stuck:
                self._report_hung(driver, cause)
                return "hung"
            if moment is None:
                moment = self._moment_of_first_epoch()
            if moment is None or time.monotonic() < moment or not self.left or cause:
                continue
            (victim,) = self.chance.choices([*VICTIMS], [*VICTIMS.values()])
            if self._kill(victim, driver):
                if victim != "worker":
                    cause, self.life.killed_at = victim, time.monotonic()
                moment = time.monotonic() + self.chance.uniform(0, 3)
        return cause

    def _first_moment(self) -> float | None:
        """In one of four cases, return a time during the run's start; else None, for a time after the first epoch."""
        return time.monotonic() + self.chance.uniform(0, 10) if self.chance.random() < 0.25 else None

    def _moment_of_first_epoch(self) -> float | None:
        log = self.life.logs[-1]
        began = log.is_file() and log.stat().st_size > 0
        return time.monotonic() + self.chance.uniform(0, 4) if began else None

    def _kill(self, victim: str, driver: "subprocess.Popen[bytes]") -> bool:
        """Kill a victim. Returns False if there is none."""
        if victim == "driver":
            driver.kill()
        else:
            found = self._workers() if victim == "worker" else processes.raylets(self.life.tag)
            if not found:
                return False
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(found).kill()
        self.score.kills[victim] += 1
        self.left -= 1
        return True

    def _workers(self) -> list[psutil.Process]:
        """Return the workers that may be killed. Of two in a row, one must have started: a trial that loses three
        workers without an epoch in between fails, as it should."""
        found = processes.workers(self.life.tag)
        with suppress(psutil.Error):
            old = [each for each in found if time.time() - each.create_time() > STARTED]
            found = old if self.young else found
            self.young = len(old) < len(found)
        return found

    def _report_hung(self, driver: "subprocess.Popen[bytes]", cause: str) -> None:
        after = f" after its {cause} was killed" if cause else ""
        self.score.found.append(f"I7: the driver hung{after}: no epoch in {self.patience:.0f} s")
        processes.print_stack(driver)
        time.sleep(1)
        driver.kill()
        driver.wait()


def live(life: Life, score: Score, chance: random.Random, kills: int, reference: Path, patience: float) -> None:
    """Take one run from start to end, with this number of kills."""
    killer, found = Killer(life, score, chance, kills, patience), list[str]()
    before = len(score.found)
    for _ in range(DRIVERS):
        driver = life.start_driver()
        resumed = len(life.logs) > 1
        with Reader(life.run) as reader:
            cause = killer.accompany(driver)
        score.reads, score.read_errors = score.reads + reader.reads, score.read_errors + len(reader.errors)
        score.first_epoch += [s for s in [life.first_epoch_after()] if resumed and s is not None]
        found += reader.errors
        if cause == "raylet":
            score.deaths["completed" if driver.returncode == 0 else f"ended with {driver.returncode}"] += 1
        if driver.returncode == 0:
            break
        if not cause:
            found.append(f"I7: a driver that was not killed ended with {driver.returncode}: "
                         f"{life.last_words()}")  # fmt: skip
        found += life.check_between()
    else:
        found.append(f"I7: {DRIVERS} drivers did not complete the run")
    found += life.check_ended(driver.returncode, reference)
    score.runs, score.unbegun = score.runs + 1, score.unbegun + life.unbegun
    for epochs in life.epochs:
        score.acknowledged += len(epochs)
        score.again += len(epochs) - len({(line["trial_id"], line["epoch"]["epoch"]) for line in epochs})
    score.found[before:] = dict.fromkeys([*score.found[before:], *found])  # without duplicates


def rounds(
    folder: Path, number: int, seed: int, settings: tuple[str, ...], patience: float, say: Callable[[str], None]
) -> Score:
    """Start runs until `number` kills are made. Folders of runs without findings are removed."""
    chance, score = random.Random(seed), Score()
    path = study.write(folder)
    say("a reference run, without faults")
    reference = study.reference(path, folder / "whole", settings)
    while (left := number - score.kills.total()) > 0:
        before, found = score.kills.copy(), len(score.found)
        every = chance.choice((0.0, 30.0))  # a checkpoint per epoch, or none
        with Life(folder / f"run-{score.runs}", path, settings, every) as life:
            live(life, score, chance, min(left, chance.randint(6, 20)), reference, patience)
        new = score.kills - before
        say(f"run {score.runs}: killed {dict(new)}; {len(life.logs)} drivers; in all {score.kills.total()} kills, "
            f"{len(score.found)} violations")  # fmt: skip
        for violation in score.found[found:]:
            say(f"  {violation}")
        if len(score.found) == found:
            shutil.rmtree(life.folder, ignore_errors=True)
    return score


def kills(
    number: Annotated[int, typer.Option(help="Total number of kills.")] = 200,
    seed: Annotated[int, typer.Option(help="Random seed of victims and moments.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for runs with findings.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(help="Confirmation seeds of the study.")] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial.")] = 8,
    patience: Annotated[float, typer.Option(help="Seconds without an epoch until a driver counts as hung.")] = 120.0,
) -> None:
    """Kill workers, drivers and raylets of real runs at random moments, resume, and check."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference must be computed on the CPU, too
    with place(keep) as folder:
        score = rounds(folder, number, seed, study.settings(seeds, epochs), patience, typer.echo)
        typer.echo(score.table())
        if score.found:
            typer.echo(f"the runs are in {folder}")
            raise typer.Exit(1)

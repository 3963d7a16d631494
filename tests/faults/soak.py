"""Run one driver for hours with faults, and check for memory growth, lost rows, and leftovers."""

import os
import random
import signal
import subprocess
import time
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

SAMPLE_EVERY = 10.0  # seconds
WARM_UP = 300.0  # seconds: imports, caches, Ray's own buffers
DRAIN = 120.0  # maximum seconds from SIGTERM to the driver's exit


@dataclass
class Memory:
    """A driver's resident bytes over time."""

    samples: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, bytes)

    def at(self, seconds: float) -> int:
        """Return the first sample at or after `seconds`, else the last one."""
        return next((size for when, size in self.samples if when >= seconds), self.samples[-1][1])

    def table(self, warm: float) -> str:
        if not self.samples:
            return "no sample of memory"
        first, last = self.at(warm), self.samples[-1][1]
        peak = max(size for _, size in self.samples)
        return (
            f"memory of the driver: {first / 2**20:.0f} MiB after {warm:.0f} s, {last / 2**20:.0f} MiB at the end "
            f"({100 * (last - first) / first:+.1f} %), peak {peak / 2**20:.0f} MiB"
        )


@dataclass
class Soak:
    """A driver whose workers are killed and whose memory is sampled."""

    life: Life
    chance: random.Random
    fault_every: float
    patience: float
    say: Callable[[str], None]
    faults: int = 0
    memory: Memory = field(default_factory=Memory)

    def accompany(self, driver: "subprocess.Popen[bytes]", seconds: float) -> list[str]:
        """Kill a worker every `fault_every` seconds until the time is over. Returns the violations."""
        began = time.monotonic()
        sample_at, fault_at = began, began + self.fault_every
        progress = Progress(self.life, self.patience)
        while driver.poll() is None and (now := time.monotonic()) - began < seconds:
            if progress.stuck:
                processes.print_stack(driver)
                return [f"I7: the driver hung: no epoch in {self.patience:.0f} s"]
            if now >= sample_at:
                self._sample(driver, now - began)
                sample_at += SAMPLE_EVERY
            if now >= fault_at:
                fault_at += self.fault_every
                self._kill_worker()
            time.sleep(0.1)
        return [] if driver.poll() is None else ["harness: the study ended too early; use more --seeds"]

    def _sample(self, guard: "subprocess.Popen[bytes]", seconds: float) -> None:
        with suppress(psutil.Error, IndexError):  # its driver has not started, or has just ended
            self.memory.samples.append((seconds, processes.driver_of(guard).memory_info().rss))

    def _kill_worker(self) -> None:
        found = processes.workers(self.life.tag)
        if found:
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(found).kill()
                self.faults += 1
        size = self.memory.samples[-1][1] / 2**20 if self.memory.samples else 0
        self.say(f"{self.faults} faults, {len(self.life.epochs[-1])} epochs, {size:.0f} MiB")


def end(driver: "subprocess.Popen[bytes]") -> int | None:
    """Send SIGTERM. Returns the driver's exit status; None if it does not exit."""
    driver.send_signal(signal.SIGTERM)
    try:
        return driver.wait(DRAIN)
    except subprocess.TimeoutExpired:
        return None


def one_long_run(
    life: Life, seconds: float, fault_every: float, seed: int, patience: float, say: Callable[[str], None]
) -> list[str]:
    """Run a driver for `seconds` with regular faults, then send SIGTERM. Returns the violations."""
    driver = life.start_driver()
    soak = Soak(life, random.Random(seed), fault_every, patience, say)
    with Reader(life.run, every=1.0) as reader:
        found = soak.accompany(driver, seconds)
        status = end(driver)
    if status != 143:
        found.append(f"I7: SIGTERM ended the driver with {status}, not 143: {life.last_words()}")
    found += [*reader.errors, *life.check_ended(status, None)]
    epochs = life.epochs[-1]
    ended = sum(line["epoch"]["outcome"] is not None for line in epochs)
    say(f"{soak.faults} faults, {ended} trials ended, {len(epochs)} epochs, {reader.reads} reads of tables, "
        f"{len(reader.errors)} errors")  # fmt: skip
    say(soak.memory.table(min(WARM_UP, seconds / 2)))
    say(f"{sum('I8: process' in each for each in found)} orphans, {len(found)} violations")
    return found


def soak(
    minutes: Annotated[float, typer.Option(help="How long the driver runs.")] = 60.0,
    fault_every: Annotated[float, typer.Option(help="Seconds between faults.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Random seed of the victims.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="Confirmation seeds. Default: enough.", show_default=False)] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial.")] = 20,
    patience: Annotated[float, typer.Option(help="Seconds without an epoch until a driver counts as hung.")] = 90.0,
) -> None:
    """Run one driver for hours, kill a worker per minute, and check for memory growth, lost rows and leftovers."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings = study.settings(seeds or max(3, round(10 * minutes)), epochs)
    with place(keep) as folder, Life(folder / "soak", study.write(folder), settings) as life:
        found = one_long_run(life, 60 * minutes, fault_every, seed, patience, typer.echo)
        for violation in found:
            typer.echo(f"  {violation}")
        if found:
            typer.echo(f"the run is in {folder}")
            raise typer.Exit(1)

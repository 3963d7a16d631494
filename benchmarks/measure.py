"""Timing two sides in pairs: each in a process of its own that stays warm, one after the other, in changing order.

A machine that is slow for a minute is slow for both sides of a pair, so the ratio of a pair says more than two means.
"""

import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

PACKAGES = ("torch", "torchvision", "ray", "numpy", "pandas", "pyarrow")

Measure = Callable[[], float]


@dataclass(frozen=True)
class Side:
    """What one side measures. `prepare(*arguments)` runs in its process and returns the function that is timed."""

    name: str
    prepare: Callable[..., Measure]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Result:
    """One row: a figure with its spread over `n` measurements and, where there is one, the bar it is held against."""

    name: str
    figure: float  # the median
    low: float
    high: float
    n: int
    unit: str
    bar: str  # ">= 1.7", "<= 1.05", or empty
    detail: str

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its bar; null without one."""
        if not self.bar:
            return None
        sign, limit = self.bar.split()
        return self.figure >= float(limit) if sign == ">=" else self.figure <= float(limit)


def result(name: str, values: list[float], *, unit: str = "", bar: str = "", detail: str = "") -> Result:
    return Result(name, statistics.median(values), min(values), max(values), len(values), unit, bar, detail)


def pairs(name: str, above: Side, below: Side, count: int, *, unit: str, bar: str) -> Result:
    """The median over `count` pairs of `above`'s measurement divided by `below`'s, after one pair to warm up."""
    with _process(above) as first, _process(below) as second:
        values: dict[Any, list[float]] = {first: [], second: []}
        for number in range(count + 1):
            for side in (first, second) if number % 2 else (second, first):
                side.send(True)
                values[side].append(_answer(side))
    ours, theirs = values[first][1:], values[second][1:]
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    detail = f"{above.name} {statistics.median(ours):.4g}, {below.name} {statistics.median(theirs):.4g} {unit}"
    return result(name, ratios, bar=bar, detail=detail)


@contextmanager
def _process(side: Side) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(side, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(30)


def _answer(side: Connection) -> float:
    answer = side.recv()
    if isinstance(answer, BaseException):
        raise answer
    return float(answer)


def _serve(side: Side, connection: Connection) -> None:
    """Measure each time the other end asks, until it closes."""
    try:
        measure = side.prepare(*side.arguments)
        while connection.recv():
            connection.send(measure())
    except EOFError:
        return
    except Exception as error:  # told to the process that asked
        connection.send(error)


def machine() -> str:
    """The machine and the versions that a figure belongs to."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if _installed(name))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{versions}"
    )


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    except OSError:
        return platform.processor() or platform.machine()
    return ", ".join(sorted(names)) or platform.machine()

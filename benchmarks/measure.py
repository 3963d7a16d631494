"""Timing two sides in pairs, in processes that stay warm, one after the other, in changing order.

A machine that is slow for a minute is slow for both sides of a pair, so the ratio of a pair says more than two means.
Two processes can differ by some per cent for as long as they live, by where their memory lies; so sides that may share
a process do.
"""

import math
import multiprocessing
import os
import platform
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.workers import Budget, Failed, in_a_line

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
    error: str = ""  # why there is no figure

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its bar; null without one. What failed meets none."""
        if self.error:
            return False
        if not self.bar:
            return None
        sign, limit = self.bar.split()
        return self.figure >= float(limit) if sign == ">=" else self.figure <= float(limit)


def result(name: str, values: list[float], *, unit: str = "", bar: str = "", detail: str = "") -> Result:
    return Result(name, statistics.median(values), min(values), max(values), len(values), unit, bar, detail)


Row = tuple[str, Callable[[], Result]]  # a name, and what measures it
NOT_MEASURED = "not measured: the time was over"


def attempted(rows: Iterable[Row], budget: Budget | None = None) -> Iterator[Result]:
    """Measure row by row; one that fails is a row that says why, and the next one is measured. Once the budget is
    spent, the row that it ends and those that are left say so."""
    for name, measure in rows:
        if budget is not None and not budget.left:
            yield _failed(name, NOT_MEASURED)
            continue
        try:
            found = measure()
        except Exception as error:  # whatever it is, the other rows have nothing to do with it
            if isinstance(error, TimeoutError) and budget is not None and not budget.left:
                found = _failed(name, NOT_MEASURED)
            elif isinstance(error, Failed):  # it names its kind, and was printed where it was raised
                found = _failed(name, str(error))
            else:
                traceback.print_exc()
                found = _failed(name, in_a_line(error))
        yield found


def _failed(name: str, why: str) -> Result:
    return Result(name, math.nan, math.nan, math.nan, 0, "", "", "", why)


def pairs(name: str, above: Side, below: Side, count: int, *, unit: str, bar: str, together: bool = False) -> Result:
    """The median over `count` pairs of `above`'s measurement divided by `below`'s, after one pair to warm up.

    Each side has a process of its own, or both have one `together`.
    """
    sides = (above, below)
    with ExitStack() as stack:
        if together:
            process = stack.enter_context(_process(*sides))
            asked = [(process, 0), (process, 1)]
        else:
            asked = [(stack.enter_context(_process(side)), 0) for side in sides]
        values: list[list[float]] = [[], []]
        for number in range(count + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                process, place = asked[side]
                with suppress(BrokenPipeError):  # it failed before it was asked; its answer says why
                    process.send(place)
                values[side].append(_answer(process))
    ours, theirs = (each[1:] for each in values)
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    detail = f"{above.name} {statistics.median(ours):.4g}, {below.name} {statistics.median(theirs):.4g} {unit}"
    return result(name, ratios, bar=bar, detail=detail)


@contextmanager
def _process(*sides: Side) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(sides, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(30)


def _answer(process: Connection) -> float:
    answer = process.recv()
    if isinstance(answer, BaseException):
        raise answer
    return float(answer)


def _serve(sides: Sequence[Side], connection: Connection) -> None:
    """Measure the side that the other end names, until it closes."""
    try:
        measures = [side.prepare(*side.arguments) for side in sides]
        while True:
            connection.send(measures[connection.recv()]())
    except EOFError:
        return
    except Exception as error:  # told to the process that asked
        connection.send(error)


def machine(gpu: bool = False) -> str:
    """The machine and the versions that a figure belongs to, with its GPU if that is asked for and there."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if _installed(name))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {_processor()}, {os.cpu_count()} cores; {_gpu() if gpu else ''}"
        f"Python {platform.python_version()}, {versions}"
    )


def _gpu() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""


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

"""Time two sides in pairs: one after the other, in alternating order, in processes that stay warm.

If the machine is slow for a minute, both sides of a pair are slow. So the ratio within pairs is more reliable than a
ratio of two means. Two processes can differ by a few per cent for their whole lifetime because of their memory layout,
so sides share a process where possible.
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
    """One side of a pair. `prepare(*arguments)` runs in the side's process and returns a function that measures."""

    name: str
    prepare: Callable[..., Measure]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Result:
    """One row of results: a median with its range over `n` measurements and, optionally, its bar."""

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
        """Whether the figure meets its bar; None without a bar. False for a failed row."""
        if self.error:
            return False
        if not self.bar:
            return None
        sign, limit = self.bar.split()
        return self.figure >= float(limit) if sign == ">=" else self.figure <= float(limit)


def result(name: str, values: list[float], *, unit: str = "", bar: str = "", detail: str = "") -> Result:
    return Result(name, statistics.median(values), min(values), max(values), len(values), unit, bar, detail)


Row = tuple[str, Callable[[], Result]]  # a name, and the function that measures the row
NOT_MEASURED = "not measured: the time limit was reached"


def attempted(rows: Iterable[Row], budget: Budget | None = None) -> Iterator[Result]:
    """Measure row by row. A row that fails has the error in place of a figure, and the next row is measured. Once the
    budget is spent, the current row and the remaining rows are `NOT_MEASURED`."""
    for name, measure in rows:
        if budget is not None and not budget.left:
            yield _failed(name, NOT_MEASURED)
            continue
        try:
            found = measure()
        except Exception as error:  # the error of one row must not end the others
            if isinstance(error, TimeoutError) and budget is not None and not budget.left:
                found = _failed(name, NOT_MEASURED)
            elif isinstance(error, Failed):  # its message has the type; its process printed the traceback
                found = _failed(name, str(error))
            else:
                traceback.print_exc()
                found = _failed(name, in_a_line(error))
        yield found


def _failed(name: str, why: str) -> Result:
    return Result(name, math.nan, math.nan, math.nan, 0, "", "", "", why)


def pairs(name: str, above: Side, below: Side, count: int, *, unit: str, bar: str, together: bool = False) -> Result:
    """Return the median, over `count` pairs, of `above`'s measurement divided by `below`'s, after one pair of warm-up.

    Each side has its own process, or both share one if `together`.
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
                with suppress(BrokenPipeError):  # it failed earlier; `_answer` raises its error
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
    """Measure the sides that arrive as numbers through a connection, until it closes."""
    try:
        measures = [side.prepare(*side.arguments) for side in sides]
        while True:
            connection.send(measures[connection.recv()]())
    except EOFError:
        return
    except Exception as error:  # raised again in the other process
        connection.send(error)


def machine(gpu: bool = False) -> str:
    """Describe this machine: date, processor, versions and, if `gpu` and present, its GPU."""
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

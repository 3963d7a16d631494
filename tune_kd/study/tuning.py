"""What a study leaves to be tuned: ranges, and the budget that every arm gets for it."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tune_kd.study.rules import MOST_EPOCHS, MOST_TRIALS, SEED, TRIALS, at_least, length, most


def number(value: float) -> str:
    """The shortest text that is this number and no other: `4`, `0.5`, `4.0000001`."""
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True)
class Uniform:
    """Every number from `low` to `high` alike."""

    low: float
    high: float
    kind: Literal["uniform"] = "uniform"

    def __str__(self) -> str:
        return f"{number(self.low)} to {number(self.high)}"

    @property
    def problem(self) -> str | None:
        return None if -math.inf < self.low < self.high < math.inf else "low below high, both finite"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class LogUniform:
    """Every ratio alike: from 1 to 16, as many draws below 4 as above it."""

    low: float
    high: float
    kind: Literal["log_uniform"] = "log_uniform"

    def __str__(self) -> str:
        return f"{number(self.low)} to {number(self.high)} (log)"

    @property
    def problem(self) -> str | None:
        return None if 0 < self.low < self.high < math.inf else "low above 0 and below high, both finite"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Integer:
    """Every whole number from `low` to `high`, both among them."""

    low: int
    high: int
    kind: Literal["integer"] = "integer"

    def __str__(self) -> str:
        return f"whole numbers from {self.low} to {self.high}"

    @property
    def problem(self) -> str | None:
        return None if self.low < self.high else "low below high"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value == int(value)


@dataclass(frozen=True)
class Choice:
    """One of several numbers, in no order."""

    levels: tuple[float, ...]
    kind: Literal["choice"] = "choice"

    def __str__(self) -> str:
        return " or ".join(map(number, self.levels))

    @property
    def problem(self) -> str | None:
        fits = 1 < len(self.levels) == len(set(self.levels)) and all(map(math.isfinite, self.levels))
        return None if fits else "at least two levels, each finite and there once"

    def holds(self, value: float) -> bool:
        return value in self.levels


Over = Uniform | LogUniform | Integer | Choice


@dataclass(frozen=True)
class Range:
    """A setting and the values that it is drawn from. It belongs to the methods that the setting has a meaning for, or
    to those of them that are named."""

    name: str  # temperature, alpha or beta of a cell; lr or weight_decay of the recipe
    over: Over
    methods: tuple[str, ...] | None = None

    @property
    def configurations(self) -> tuple[float, ...] | None:
        """All values, where they can be counted."""
        if isinstance(self.over, Integer):
            return tuple(map(float, range(self.over.low, self.over.high + 1)))
        return self.over.levels if isinstance(self.over, Choice) else None


@dataclass(frozen=True)
class Tuning:
    """The same budget for every arm, the control among them. Draws compete inside their arm, on validation accuracy at
    the screen's seed; the best is confirmed beside the published default on fresh seeds."""

    ranges: Annotated[tuple[Range, ...], length(100)]
    budget: Annotated[int, most(MOST_TRIALS * MOST_EPOCHS)] = 40  # of each arm
    budget_unit: Literal["trials", "epochs"] = "trials"  # with epochs, those saved by early stopping are drawn again
    sampler: Literal["tpe", "random", "quasi-random"] = "tpe"
    startup: Annotated[int, at_least(1), TRIALS] = 10  # random draws before TPE models earlier ones
    parallel: Annotated[int, at_least(1), TRIALS] = 1  # concurrent draws of one arm; they know less of others
    seed: Annotated[int, SEED] = 0  # of the samplers

"""What a study tunes: ranges, and the budget of each arm."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tune_kd.study.rules import MOST_EPOCHS, MOST_TRIALS, SEED, TRIALS_LIMIT, at_least, length, most


def number(value: float) -> str:
    """The shortest text of exactly this number: `4`, `0.5`, `4.0000001`."""
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True)
class Uniform:
    """Uniform over the numbers from `low` to `high`."""

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
    """Uniform in the logarithm: from 1 to 16, half of the draws are below 4."""

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
    """Uniform over the whole numbers from `low` to `high`, inclusive."""

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
    """One of several numbers, without an order."""

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
    """A setting and the distribution of its draws, for all methods to which the setting applies or for `methods`."""

    name: str  # temperature, alpha or beta of a cell; lr or weight_decay of the recipe
    over: Over
    methods: tuple[str, ...] | None = None

    @property
    def configurations(self) -> tuple[float, ...] | None:
        """All values, or None where they cannot be counted."""
        if isinstance(self.over, Integer):
            return tuple(map(float, range(self.over.low, self.over.high + 1)))
        return self.over.levels if isinstance(self.over, Choice) else None


@dataclass(frozen=True)
class Tuning:
    """The same budget for every arm, including the control. Draws compete within their arm, by validation accuracy at
    the screen's seed. The best is confirmed on fresh seeds, beside the published default."""

    ranges: Annotated[tuple[Range, ...], length(100)]
    budget: Annotated[int, most(MOST_TRIALS * MOST_EPOCHS)] = 40  # of each arm
    budget_unit: Literal["trials", "epochs"] = "trials"  # with epochs, those saved by early stopping are drawn again
    sampler: Literal["tpe", "random", "quasi-random"] = "tpe"
    startup: Annotated[int, at_least(1), TRIALS_LIMIT] = 10  # random draws before TPE models earlier ones
    parallel: Annotated[int, at_least(1), TRIALS_LIMIT] = 1  # concurrent draws of one arm; they know less of others
    seed: Annotated[int, SEED] = 0  # of the samplers

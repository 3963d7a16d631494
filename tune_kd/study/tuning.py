"""Declaration of tuning: ranges, and the budget of each arm."""

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

    low: float  # smallest value
    high: float  # largest value
    kind: Literal["uniform"] = "uniform"  # name of the distribution in study.json

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

    low: float  # smallest value, above 0
    high: float  # largest value
    kind: Literal["log_uniform"] = "log_uniform"  # name of the distribution in study.json

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

    low: int  # smallest value
    high: int  # largest value
    kind: Literal["integer"] = "integer"  # name of the distribution in study.json

    def __str__(self) -> str:
        return f"whole numbers from {self.low} to {self.high}"

    @property
    def problem(self) -> str | None:
        return None if self.low < self.high else "low below high"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value == int(value)


@dataclass(frozen=True)
class Choice:
    """One of several numbers, treated as categories without an order."""

    levels: tuple[float, ...]  # the numbers
    kind: Literal["choice"] = "choice"  # name of the distribution in study.json

    def __str__(self) -> str:
        return " or ".join(map(number, self.levels))

    @property
    def problem(self) -> str | None:
        fits = 1 < len(self.levels) == len(set(self.levels)) and all(map(math.isfinite, self.levels))
        return None if fits else "at least two levels, all finite and different"

    def holds(self, value: float) -> bool:
        return value in self.levels


Over = Uniform | LogUniform | Integer | Choice


@dataclass(frozen=True)
class Range:
    """A setting and the distribution of its draws."""

    name: str  # a method's setting, a weight of the losses (such as alpha), lr or weight_decay
    over: Over  # Uniform, LogUniform, Integer or Choice
    methods: tuple[str, ...] | None = None  # methods for which to tune it; None: all to which it applies

    @property
    def configurations(self) -> tuple[float, ...] | None:
        """All values, or None for a continuous range."""
        if isinstance(self.over, Integer):
            return tuple(map(float, range(self.over.low, self.over.high + 1)))
        return self.over.levels if isinstance(self.over, Choice) else None


@dataclass(frozen=True)
class Tuning:
    """Tuning of every arm, including the control, with the same budget. Draws compete within their arm, by validation
    accuracy at the screen's seed. The best draw and the published default are confirmed on fresh seeds."""

    ranges: Annotated[tuple[Range, ...], length(100)]  # settings to tune
    budget: Annotated[int, most(MOST_TRIALS * MOST_EPOCHS)] = 40  # budget of each arm
    # Unit of the budget. With epochs, the epochs that early stopping saves are spent on further draws.
    budget_unit: Literal["trials", "epochs"] = "trials"
    sampler: Literal["tpe", "random", "quasi-random"] = "tpe"  # Optuna's TPE, random draws, or a Sobol sequence
    startup: Annotated[int, at_least(1), TRIALS_LIMIT] = 10  # random draws before TPE models the earlier ones
    # Concurrent draws of one arm. With more of them, a draw knows the results of fewer earlier draws.
    parallel: Annotated[int, at_least(1), TRIALS_LIMIT] = 1
    seed: Annotated[int, SEED] = 0  # seed of the samplers

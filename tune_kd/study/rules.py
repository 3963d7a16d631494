"""Rules for single fields. The dataclasses of a study declare them in their annotations.

Pydantic ignores these rules when it reads a study from JSON. Pydantic's own constraints would raise before the rules
across fields are checked, and all problems should be reported at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tune_kd.system.characters import CONTROL, visible

MOST_SEEDS = 10_000
MOST_TAUGHT_SEEDS = 1_000  # confirmation seeds with several teachers: time grows with the cube of teachers and seeds
MOST_TRIALS = 100_000
MOST_EPOCHS = 1_000_000  # per trial; patient teachers take thousands (Beyer et al. 2022)
MOST_LEVELS = 1_000  # per factor
MOST_WEIGHTS = 20_000_000  # contrasts times arms: the size of a matrix in the analysis


@dataclass(frozen=True)
class Rule:
    """The allowed values of a field, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]
    unit: str = ""  # of a length, if the rule limits one
    is_limit: bool = False  # checked before all other rules, which could take hours for larger values

    def problem(self, name: str, value: Any) -> str:
        """The message for a value that breaks the rule."""
        shown = list(value) if isinstance(value, tuple) else value
        found = f"has {len(value):,} {self.unit}" if self.unit else f"is {shown!r}"
        return f"{name} {found}; allowed: {self.allowed}"


def at_least(least: int, unit: str = "") -> Rule:
    return Rule(f"at least {least}{unit}", lambda value: value >= least)


def one_of(names: tuple[str, ...]) -> Rule:
    return Rule(", ".join(names), lambda value: value in names)


def most(limit: int) -> Rule:
    return Rule(f"at most {limit:,}", lambda value: not value > limit, is_limit=True)


def length(limit: int, unit: str = "items") -> Rule:
    """A limit for the length of a text or list. Other values pass."""
    return Rule(
        f"at most {limit:,}",
        lambda value: not isinstance(value, str | tuple) or len(value) <= limit,
        unit,
        is_limit=True,
    )


ABOVE_0 = Rule("above 0", lambda value: 0 < value < math.inf)
FROM_0 = Rule("0 or more", lambda value: 0 <= value < math.inf)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
SEED = Rule(f"from 0 to {2**31 - 1}", lambda value: 0 <= value < 2**31)
WIDTH_RANGE = Rule("above 0, at most 16", lambda value: 0 < value <= 16)
MOMENTUM = Rule("between 0 and 1, both excluded (Nesterov)", lambda value: 0 < value < 1)
DEVIATION = Rule("above 0, at most 1 (accuracy, 0.0015 is 0.15 points)", lambda value: 0 < value <= 1)
RATE = Rule("from 1e3 to 1e24 operations a second", lambda value: 1e3 <= value <= 1e24)
SIZE = Rule("at least 1, or None (null in --set) for all", lambda value: value is None or value >= 1)
MARGIN_RANGE = Rule(
    "from 0 to 1 (accuracy, 0.005 is 0.5 points)",
    lambda value: all(0 <= each <= 1 for each in (value if isinstance(value, tuple) else (value,))),
)
ENCODABLE = Rule(
    "text that can be encoded as UTF-8", lambda text: not any("\ud800" <= each <= "\udfff" for each in text)
)
LINE = Rule("text without control characters", lambda text: not CONTROL.search(text))
NAME = Rule(
    "text that is not empty, without a space at its start or end", lambda text: text != "" and text == text.strip()
)
LINES = Rule(LINE.allowed, lambda text: visible(text) == text)
LEVELS_LIMIT = length(MOST_LEVELS)
TRIALS_LIMIT = most(MOST_TRIALS)


@cache
def rules_of(kind: type, name: str) -> tuple[Rule, ...]:
    """The rules of a field of a dataclass. A `Literal`, with or without None, is one rule."""
    hint = get_type_hints(kind, include_extras=True)[name]
    literals = [each for each in (hint, *get_args(hint)) if get_origin(each) is Literal]
    if not literals:
        return getattr(hint, "__metadata__", ())
    allowed = one_of(get_args(literals[0]))
    if NoneType not in get_args(hint):
        return (allowed,)
    return (Rule(f"None (null in --set), {allowed.allowed}", lambda value: value is None or allowed.holds(value)),)


def broken(part: Any, where: str = "", limits: bool = False) -> Iterator[str]:
    """A message for each rule that a field of a dataclass breaks; with `limits`, for each limit.

    `where` is the prefix of the fields' names.
    """
    for name in (field.name for field in fields(part)):
        value = getattr(part, name)
        for rule in rules_of(part.__class__, name):
            if rule.is_limit == limits and not rule.holds(value):
                yield rule.problem(f"{where}{name}", value)

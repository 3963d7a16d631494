"""Rules for a single field. The dataclasses of a study have them in their annotations, beside type and default.

Pydantic ignores them when it reads a study from JSON. Its own constraints would raise there, before the rules across
fields are checked, and problems are to be reported all at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tune_kd.system.characters import CONTROL, visible

MOST_SEEDS = 10_000
MOST_TAUGHT_SEEDS = 1_000  # to confirm with several teachers: their variances take the cube of teachers and seeds
MOST_TRIALS = 100_000
MOST_EPOCHS = 1_000_000  # of a trial; patient teachers take thousands (Beyer et al. 2022)
MOST_LEVELS = 1_000  # of a factor
MOST_WEIGHTS = 20_000_000  # contrasts times arms, which the analysis holds as a matrix


@dataclass(frozen=True)
class Rule:
    """What a field allows, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]
    unit: str = ""  # of what is counted, where the rule is about a length
    is_limit: bool = False  # checked before all others, which could take hours beyond it

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
    """The length of a text, or of a list where the field has one."""
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
SIZE = Rule("at least 1, or null for all", lambda value: value is None or value >= 1)
MARGIN_RANGE = Rule(
    "from 0 to 1 (accuracy, 0.005 is 0.5 points)",
    lambda value: all(0 <= each <= 1 for each in (value if isinstance(value, tuple) else (value,))),
)
ENCODABLE = Rule(
    "text that can be encoded as UTF-8", lambda text: not any("\ud800" <= each <= "\udfff" for each in text)
)
LINE = Rule("text without control characters", lambda text: not CONTROL.search(text))
NAME = Rule(
    "text that neither is empty nor begins or ends with a space", lambda text: text != "" and text == text.strip()
)
LINES = Rule(LINE.allowed, lambda text: visible(text) == text)
LEVELS_LIMIT = length(MOST_LEVELS)
TRIALS_LIMIT = most(MOST_TRIALS)


@cache
def rules_of(kind: type, name: str) -> tuple[Rule, ...]:
    """The rules of a field of a dataclass. The values of a `Literal`, or None beside it, are one."""
    hint = get_type_hints(kind, include_extras=True)[name]
    literals = [each for each in (hint, *get_args(hint)) if get_origin(each) is Literal]
    if not literals:
        return getattr(hint, "__metadata__", ())
    allowed = one_of(get_args(literals[0]))
    if NoneType not in get_args(hint):
        return (allowed,)
    return (Rule(f"null, {allowed.allowed}", lambda value: value is None or allowed.holds(value)),)


def broken(part: Any, where: str = "", limits: bool = False) -> Iterator[str]:
    """A message for each rule, or limit, that a field of a dataclass breaks. `where` precedes the fields' names."""
    for name in (field.name for field in fields(part)):
        value = getattr(part, name)
        for rule in rules_of(part.__class__, name):
            if rule.is_limit == limits and not rule.holds(value):
                yield rule.problem(f"{where}{name}", value)

"""Valid levels of a factor."""

import math

from tune_kd.study.rules import one_of, rules_of
from tune_kd.study.spec import COUNTS, RECIPE_FACTORS, TEXTS, Cell, Level, Recipe, Study


def level_problem(study: Study, name: str, level: Level | None) -> str | None:
    """A message for an invalid level of a factor, or None."""
    if name == "method":
        allowed = one_of(tuple(study.known))
        return None if allowed.holds(level) else allowed.problem(name, level)
    whole, kind = name in COUNTS, (Recipe if name in RECIPE_FACTORS else Cell)
    if name not in TEXTS and (
        not isinstance(level, int if whole else int | float) or isinstance(level, bool) or not _finite(level)
    ):
        return f"{name} is {level!r}; allowed: a {'whole' if whole else 'finite'} number"
    if name in study.settings:
        return None
    return next((rule.problem(name, level) for rule in rules_of(kind, name) if not rule.holds(level)), None)


def numbers(study: Study, name: str) -> list[int | float]:
    """The valid levels of a numeric factor."""
    return [
        level
        for level in study.levels(name)
        if not isinstance(level, str) and level_problem(study, name, level) is None
    ]


def _finite(level: Level | None) -> bool:
    return not isinstance(level, float) or math.isfinite(level)

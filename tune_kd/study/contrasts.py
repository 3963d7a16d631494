"""Contrasts: the comparisons of a study in each context, and their names. Comparisons without arms are refused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tune_kd.study.arms import arm_name, level_name, levels_name
from tune_kd.study.rules import MOST_WEIGHTS
from tune_kd.study.spec import Cell, Compare, Family, Level, Study
from tune_kd.system.errors import UserError

Kind = Literal["effect", "moderation"]
Pair = tuple[Cell, Cell]  # the treated cell, and the cell with which it is compared
Pairs = Mapping[Compare, Sequence[Pair]]


@dataclass(frozen=True)
class Contrast:
    """A linear combination of the arms' means. `weights` maps arms to +1 or -1."""

    name: str
    kind: Kind
    factor: str  # the compared factor
    weights: tuple[tuple[str, float], ...]
    family: str = Family.PRIMARY


def contrasts(study: Study, cells: Sequence[Cell]) -> tuple[Contrast, ...]:
    """Every declared comparison in every context, then their changes with the moderator.

    Raises `UserError` for comparisons of arms that the study does not have, equal names and equal contrasts.
    """
    pairs = {compare: _pairs(study, cells, compare) for compare in study.contrasts}
    effects = [_effect(study, compare, pair) for compare, found in pairs.items() for pair in found]
    moderations = [each for compare, found in pairs.items() for each in _moderations(study, compare, found)]
    both = (*effects, *moderations)
    vanished = _vanished(study, cells, pairs) or ([] if moderations else _moderates_nothing(study))
    if (weights := len(both) * len(cells)) > MOST_WEIGHTS:
        raise UserError(
            f"the study has {len(both):,} contrasts over {len(cells):,} arms, which need {weights:,} weights; allowed: "
            f"at most {MOST_WEIGHTS:,}"
        )
    if problems := [*vanished, *_same_names(study, cells, both), *_repeated(both)]:
        raise UserError(*problems)
    return both


def _pairs(study: Study, cells: Sequence[Cell], compare: Compare) -> list[Pair]:
    """Pairs of cells that differ only in the compared factor. Factors of `where` and `reference` are at their fixed
    levels."""
    fixed = [(name, level) for name, level in _fixed(study, compare).items() if name != compare.factor]
    standing = [cell for cell in cells if all(cell.level(name) in (None, level) for name, level in fixed)]
    treated, against = (
        [cell for cell in standing if cell.level(compare.factor) == level]
        for level in (compare.treated, compare.against)
    )
    return [(one, other) for one in treated for other in against if _agree(study, one, other, compare.factor)]


def _fixed(study: Study, compare: Compare) -> dict[str, Level]:
    """The levels at which a comparison holds other factors. Settings that no factor varies may differ between
    methods."""
    varied = [factor.name for factor in study.factors]
    return {name: level for name, level in study.reference if name in varied} | compare.held


def _agree(study: Study, one: Cell, other: Cell, besides: str) -> bool:
    """Whether two cells have equal levels of every other factor that applies to both."""
    varied = [factor.name for factor in study.factors if factor.name != besides]
    values = ((one.level(name), other.level(name)) for name in varied)
    return all(first == second or None in (first, second) for first, second in values)


def _effect(study: Study, compare: Compare, pair: Pair) -> Contrast:
    treated, against = pair
    context = _context_name(study, _both(pair), compare, compare.factor)
    return _contrast(study, "effect", compare, context, _difference(study, compare), ((treated, 1), (against, -1)))


def _moderations(study: Study, compare: Compare, pairs: Sequence[Pair]) -> list[Contrast]:
    """Differences of differences: a contrast at one level of the moderator minus the same contrast at the first
    level."""
    by = study.moderator
    if by is None or by == compare.factor or compare.moderation is None:
        return []
    first = study.levels(by)[0]
    standing = {_both(pair): pair for pair in pairs}
    found = []
    for both, (treated, against) in standing.items():
        level, other = both.level(by), standing.get(both.at(by, first))
        if level in (None, first) or other is None:
            continue
        what = f"({_difference(study, compare)}): {level_name(by, level)} - {level_name(by, first)}"
        signs = ((treated, 1), (against, -1), (other[0], -1), (other[1], 1))
        found.append(
            _contrast(
                study, "moderation", compare, _context_name(study, both, compare, compare.factor, by), what, signs
            )
        )
    return found


def _contrast(
    study: Study, kind: Kind, compare: Compare, context: str, what: str, signs: Sequence[tuple[Cell, int]]
) -> Contrast:
    weights: Counter[str] = Counter()
    for cell, sign in signs:
        weights[arm_name(study, cell)] += sign
    return Contrast(
        name=f"{context}: {what}" if context else what,
        family=compare.family if kind == "effect" or compare.moderation is None else compare.moderation,
        kind=kind,
        factor=compare.factor,
        # An arm to which the moderator does not apply is on both sides of a moderation, and cancels out.
        weights=tuple((name, float(weight)) for name, weight in weights.items() if weight),
    )


def _both(pair: Pair) -> Cell:
    """The treated cell, plus the levels that only the other cell has."""
    treated, against = pair
    for name, level in against.levels.items():
        treated = treated if name in treated.levels else treated.at(name, level)
    return treated


def _difference(study: Study, compare: Compare) -> str:
    """The name of a difference: `logit - none`, `T=2 - T=4`, or `teacher resnet50 - resnet34` if another factor shares
    one of the levels."""
    levels = (compare.treated, compare.against)
    what = " - ".join(level_name(compare.factor, level) for level in levels)
    shared = any(set(levels) & set(each.levels) for each in study.factors if each.name != compare.factor)
    return f"{compare.factor} {what}" if shared and isinstance(compare.treated, str) else what


def _context_name(study: Study, both: Cell, compare: Compare, *compared: str) -> str:
    """The levels of the factors that are neither compared nor part of the reference."""
    skip = {*compared, *({name for name, _ in study.reference} - set(compare.held))}
    if len({*_some(study, compared[0])} & {*study.levels("method")}) == 1:
        skip.add("method")  # the factor applies only to this method
    return levels_name(study, both, tuple(name for name in study.factor_names if name not in skip))


def _some(study: Study, factor: str) -> tuple[str, ...]:
    """The methods to which a factor applies; empty if it applies to all."""
    found = study.applies(factor)
    return () if len(found) == len(study.known) else found


def _vanished(study: Study, cells: Sequence[Cell], pairs: Pairs) -> list[str]:
    """A message for each comparison that gives no contrast."""
    return [f"a contrast compares {compare.factor} {compare.treated!r} with {compare.against!r}, but "
            f"{_why_none(study, cells, compare)}; allowed: comparisons of arms that the study has"
            for compare, found in pairs.items() if not found]  # fmt: skip


def _why_none(study: Study, cells: Sequence[Cell], compare: Compare) -> str:
    """The reason why a comparison has no two arms."""
    for level in (compare.treated, compare.against):
        if not any(cell.level(compare.factor) == level for cell in cells):
            where, methods = _some(study, compare.factor), ", ".join(map(str, study.levels("method")))
            because = f": {compare.factor} applies to {', '.join(where)}, and method has {methods}" if where else ""
            return f"no arm has {compare.factor} {level!r}{because}"
    fixed = ", ".join(f"{name} {level!r}" for name, level in _fixed(study, compare).items() if name != compare.factor)
    at = f" with {fixed}, which {'where' if compare.where else 'reference'} fixes," if fixed else ""
    return f"no two arms{at} differ in {compare.factor} alone"


def _moderates_nothing(study: Study) -> list[str]:
    """A message for a moderator with which no contrast changes."""
    by = study.moderator
    if by is None:
        return []
    if by in dict(study.reference):
        why = f"reference holds every contrast at {by} {dict(study.reference)[by]!r}"
    elif all(compare.factor == by for compare in study.contrasts):
        why = "no contrast compares another factor"
    elif all(compare.moderation is None for compare in study.contrasts if compare.factor != by):
        why = "every contrast has moderation None"
    else:
        why = f"no contrast is held at two levels of {by}"
    return [f"moderator is {by!r}, but {why}; allowed: None (null in --set), or a factor of which the contrasts have "
            "at least two levels"]  # fmt: skip


def _same_names(study: Study, cells: Sequence[Cell], contrasts: Sequence[Contrast]) -> list[str]:
    """A message for each name that several arms or contrasts share."""
    names = {"arms": [arm_name(study, cell) for cell in cells], "contrasts": [each.name for each in contrasts]}
    return [
        f"{count} {kind} have the name {name!r}; allowed: levels and comparisons with different names"
        for kind, found in names.items()
        for name, count in Counter(found).items()
        if count > 1
    ]


def _repeated(contrasts: Sequence[Contrast]) -> list[str]:
    """A message for each contrast that equals an earlier one up to its sign. Both would count as tests."""
    first: dict[frozenset[tuple[str, float]], str] = {}
    problems = []
    for each in contrasts:
        turned = frozenset((arm, -weight) for arm, weight in each.weights)
        if (known := first.get(frozenset(each.weights)) or first.get(turned)) is not None:
            problems.append(f"contrasts {known!r} and {each.name!r} are the same difference of the same arms; allowed: "
                            "each difference once, so leave out a comparison or the moderator")  # fmt: skip
        first[frozenset(each.weights)] = each.name
    return problems

"""From a study to what will run: arms, contrasts, teachers and trials, in the order in which they start."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from tune_kd.study.cost import answering, flop
from tune_kd.study.spec import APPLIES, CELL_FIELDS, NUMERIC, Cell, Compare, Level, Study
from tune_kd.study.trial import Answering, Trial
from tune_kd.study.tuning import Range, number
from tune_kd.study.validate import check
from tune_kd.system.errors import UserError

T = TypeVar("T")

SYMBOLS = {"temperature": "T"}
Pairs = dict[Compare, list[tuple[Cell, Cell]]]
"""The treated and the compared-with arm of each contrast, by the comparison that is declared."""
TEACHER_FIELDS = ("teacher", "stem", "weights", "width")  # what a teacher has in common with its students


@dataclass(frozen=True)
class Arm:
    """A cell of the factors, once, however many raw cells fell together in it."""

    name: str
    cell: Cell
    merged: int  # raw cells that this arm stands for
    role: Literal["control", "reference", "compared"]

    @property
    def immune(self) -> bool:
        """Whether early stopping has to leave this arm alone, since contrasts refer to it."""
        return self.role != "compared"


@dataclass(frozen=True)
class Contrast:
    """A linear combination of arms' means, paired by seed: `weights` maps arm to +1 or -1."""

    name: str
    kind: Literal["effect", "moderation"]
    factor: str  # the factor that is compared
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Search:
    """An arm that is tuned. Its draws have its name; what comes of them is confirmed as two arms, `tuned` and
    `default`."""

    name: str
    ranges: tuple[Range, ...]

    @property
    def tuned(self) -> str:
        return f"{self.name}/tuned"

    @property
    def default(self) -> str:
        return f"{self.name}/default"


@dataclass(frozen=True)
class Plan:
    """All that a study will do. Trials stand in the order in which they start once they are ready.

    Of a study that is tuned, the trials are those that are known before anything is drawn (see
    `tune_kd.records.adaptive_plan`).
    """

    study: Study
    raw_cells: int
    arms: tuple[Arm, ...]
    contrasts: tuple[Contrast, ...]
    trials: tuple[Trial, ...]
    answering: dict[str, Answering]  # by teacher, for those with logit students
    searches: tuple[Search, ...] = ()  # of a study that is tuned

    @property
    def teachers(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.role == "teacher")


def plan(study: Study, data_digest: str | None = None, look: int = 0) -> Plan:
    """Expand a checked study, up to one of the looks that it declares (from 0).

    Without the data's digest the plan is a preview, and its ids are not the run's. Raises `UserError`, also for what
    only the expansion shows: a comparison that is none, and two things of one name.
    """
    raw, contrasts = _compared(study)
    merged = Counter(raw)
    cells = list(merged)
    referred = {
        arm
        for contrast in contrasts
        for arm, weight in contrast.weights
        if contrast.kind == "effect" and (weight < 0 or contrast.factor == "method")
    }
    arms = tuple(
        Arm(
            name=_arm_name(study, cell),
            cell=cell,
            merged=merged[cell],
            role=_role(study, cell, referred),
        )
        for cell in cells
    )
    searches: tuple[Search, ...] = ()
    screened = arms
    if study.tuning is not None:
        searches = tuple(Search(arm.name, study.ranges(arm.cell.method)) for arm in arms)
        contrasts = _of_tuned(searches, contrasts)
        roles = ["control" if arm.role == "control" else "reference" for arm in arms]
        arms = tuple(
            replace(arm, name=name, role=role)  # type: ignore[arg-type]
            for arm, role, search in zip(arms, roles, searches, strict=True)
            for name in (search.default, search.tuned)
        )
        screened = arms[::2]
    trials = _trials(study, screened, data_digest, study.confirm.seeds_at(look))
    answering = _answering(trials)
    if searches:  # a screen is of what is drawn
        trials = tuple(trial for trial in trials if trial.phase != "screen")
    return Plan(study, len(raw), arms, contrasts, _longest_path_first(trials), answering, searches)


def checked(study: Study) -> Study:
    """The study itself, whose trials are not made for it. Raises `UserError` as `plan` does."""
    _compared(study)
    return study


def _compared(study: Study) -> tuple[list[Cell], tuple[Contrast, ...]]:
    """Every combination of levels that the study has, those that come to the same included, and what is compared."""
    check(study)
    crossed = (_cell(study, levels) for levels in itertools.product(*(factor.levels for factor in study.factors)))
    raw = [cell for cell in crossed if _departures(study, cell) <= 1]
    cells = list(dict.fromkeys(raw))
    pairs = {compare: _pairs(study, cells, compare) for compare in study.contrasts}
    contrasts = _contrasts(study, pairs)
    problems = [*_vanished(study, cells, pairs, contrasts), *_namesakes(study, cells, contrasts), *_repeated(contrasts)]
    if problems:
        raise UserError(*problems)
    return raw, contrasts


def _cell(study: Study, levels: tuple[Level, ...]) -> Cell:
    """One raw cell, with null for what does not apply to its method, so that equal cells are equal."""
    chosen: dict[str, Any] = {}
    for factor, level in zip(study.factors, levels, strict=True):
        chosen[factor.name] = float(level) if factor.name in NUMERIC else level
    cell = replace(study.cell, **chosen)
    inert: dict[str, Any] = dict.fromkeys(name for name, where in APPLIES.items() if cell.method not in where)
    return replace(cell, **inert)


def _departures(study: Study, cell: Cell) -> int:
    """In how many of the swept factors a cell departs from the reference."""
    return sum(getattr(cell, name) not in (None, level) for name, level in study.reference if name in study.swept)


def _of_tuned(searches: tuple[Search, ...], contrasts: tuple[Contrast, ...]) -> tuple[Contrast, ...]:
    """What is declared is held of the tuned arms, and each of them against its default."""
    gains = [
        Contrast(f"{each.name}: tuned - default", "effect", "tuning", ((each.tuned, 1.0), (each.default, -1.0)))
        for each in searches
    ]
    tuned = {each.name: each.tuned for each in searches}
    return *(
        replace(each, name=f"{each.name}, tuned", weights=tuple((tuned[arm], sign) for arm, sign in each.weights))
        for each in contrasts
    ), *gains


def _role(study: Study, cell: Cell, referred: set[str]) -> Literal["control", "reference", "compared"]:
    """Controls; the arms that others are compared with or that stand for their method; the rest."""
    if cell.method == study.control:
        return "control"
    return "reference" if _arm_name(study, cell) in referred else "compared"


def level_name(factor: str, level: Level) -> str:
    """How a level is written in the name of an arm: `cifar`, `T=4`."""
    return level if isinstance(level, str) else f"{SYMBOLS.get(factor, factor)}={number(level)}"


def _arm_name(study: Study, cell: Cell, among: tuple[str, ...] = CELL_FIELDS) -> str:
    """The levels that apply, in the study's order: `cifar/logit/T=4`."""
    varied = [factor.name for factor in study.factors if factor.name in among]
    parts = [level_name(name, getattr(cell, name)) for name in varied if getattr(cell, name) is not None]
    return "/".join(parts) or cell.method


def _contrasts(study: Study, pairs: Pairs) -> tuple[Contrast, ...]:
    """Each declared comparison in each context, then how it changes with the moderator."""
    effects: list[Contrast] = []
    moderations: list[Contrast] = []
    for compare, found in pairs.items():
        what = _difference(study, compare)
        for treated, against in found:
            context = _context_name(study, _both(treated, against), compare.factor)
            effects.append(
                Contrast(
                    name=f"{context}: {what}" if context else what,
                    kind="effect",
                    factor=compare.factor,
                    weights=((_arm_name(study, treated), 1.0), (_arm_name(study, against), -1.0)),
                )
            )
        moderations += _moderations(study, compare.factor, what, found)
    return (*effects, *moderations)


def _difference(study: Study, compare: Compare) -> str:
    """What is compared: `logit - none`, `T=2 - T=4`, or `teacher resnet50 - resnet34` where students have such a level,
    too."""
    levels = (compare.treated, compare.against)
    what = " - ".join(level_name(compare.factor, level) for level in levels)
    shared = any(set(levels) & set(each.levels) for each in study.factors if each.name != compare.factor)
    return f"{compare.factor} {what}" if shared and isinstance(compare.treated, str) else what


def _both(treated: Cell, against: Cell) -> Cell:
    """Where a contrast stands: the levels of the treated arm, and those that only the other one has."""
    inert = {field.name: getattr(against, field.name) for field in fields(Cell) if getattr(treated, field.name) is None}
    return replace(treated, **inert)


def _moderations(study: Study, factor: str, what: str, pairs: list[tuple[Cell, Cell]]) -> list[Contrast]:
    """Differences of differences: a contrast at one level of the moderator less the same at the first level."""
    by = study.moderator
    if by is None or by == factor:
        return []
    first = study.levels(by)[0]
    at_first: dict[str, Any] = {by: first}
    standing = {_both(*pair): pair for pair in pairs}
    found = []
    for both, (treated, against) in standing.items():
        level, other = getattr(both, by), standing.get(replace(both, **at_first))
        if level in (None, first) or other is None:
            continue
        weights: Counter[str] = Counter()
        for cell, sign in ((treated, 1), (against, -1), (other[0], -1), (other[1], 1)):
            weights[_arm_name(study, cell)] += sign
        context = _context_name(study, both, factor, by)
        change = f"({what}): {level_name(by, level)} - {level_name(by, first)}"
        found.append(
            Contrast(
                name=f"{context}: {change}" if context else change,
                kind="moderation",
                factor=factor,
                # An arm that stands on both sides, since the moderator does not apply to it, cancels out.
                weights=tuple((name, float(weight)) for name, weight in weights.items() if weight),
            )
        )
    return found


def _vanished(study: Study, cells: list[Cell], pairs: Pairs, contrasts: tuple[Contrast, ...]) -> list[str]:
    """A sentence for each comparison, and for the moderator, of which the expansion leaves nothing."""
    problems = []
    for compare, found in pairs.items():
        if not found:
            problems.append(f"a contrast compares {compare.factor} {compare.treated!r} with {compare.against!r}, and "
                            f"{_why_none(study, cells, compare)}; allowed: comparisons of arms that the study "
                            "has")  # fmt: skip
    by = study.moderator
    if by is None or problems or any(contrast.kind == "moderation" for contrast in contrasts):
        return problems
    others = [compare for compare in study.contrasts if compare.factor != by]
    if by in dict(study.reference):
        why = f"reference holds every contrast at {by} {dict(study.reference)[by]!r}"
    elif not others:
        why = "no contrast compares another factor"
    else:
        why = f"no contrast is held at two levels of {by}"
    return [f"moderator is {by!r}, and {why}; allowed: null, or a factor that the contrasts have at two levels or more"]


def _why_none(study: Study, cells: list[Cell], compare: Compare) -> str:
    """Why no two arms can be compared in this way."""
    for level in (compare.treated, compare.against):
        if not any(getattr(cell, compare.factor) == level for cell in cells):
            where = APPLIES.get(compare.factor, ())
            methods = ", ".join(map(str, study.levels("method")))
            because = f": {compare.factor} applies to {', '.join(where)}, and method has {methods}" if where else ""
            return f"no arm has {compare.factor} {level!r}{because}"
    fixed = ", ".join(f"{name} {level!r}" for name, level in study.reference if name != compare.factor)
    at = f" with {fixed}, at which reference holds it," if fixed else ""
    return f"no two arms{at} differ in {compare.factor} alone"


def _namesakes(study: Study, cells: list[Cell], contrasts: tuple[Contrast, ...]) -> list[str]:
    """A sentence for each name that two arms or two contrasts would have."""
    names = {"arms": [_arm_name(study, cell) for cell in cells], "contrasts": [each.name for each in contrasts]}
    return [
        f"{count} {kind} have the name {name!r}; allowed: levels and comparisons whose names differ"
        for kind, found in names.items()
        for name, count in Counter(found).items()
        if count > 1
    ]


def _repeated(contrasts: tuple[Contrast, ...]) -> list[str]:
    """A sentence for each contrast that is another one, or the other way round: both would count as tests."""
    first: dict[frozenset[tuple[str, float]], str] = {}
    problems = []
    for each in contrasts:
        turned = frozenset((arm, -weight) for arm, weight in each.weights)
        if (known := first.get(frozenset(each.weights)) or first.get(turned)) is not None:
            problems.append(f"contrasts {known!r} and {each.name!r} are one difference of the same arms; allowed: each "
                            "difference once, so leave out a comparison or the moderator")  # fmt: skip
        first[frozenset(each.weights)] = each.name
    return problems


def _pairs(study: Study, cells: list[Cell], compare: Compare) -> list[tuple[Cell, Cell]]:
    """Treated and compared-with cells that differ in the one factor and stand at the reference elsewhere."""
    fixed = {name: level for name, level in study.reference if name != compare.factor}
    found: list[tuple[Cell, Cell]] = []
    for treated in cells:
        if getattr(treated, compare.factor) != compare.treated:
            continue
        if any(getattr(treated, name) not in (None, level) for name, level in fixed.items()):
            continue
        candidates = (cell for cell in cells if getattr(cell, compare.factor) == compare.against)
        found += [(treated, other) for other in candidates if _comparable(treated, other, compare, fixed)]
    return found


def _comparable(treated: Cell, against: Cell, compare: Compare, fixed: dict[str, Level]) -> bool:
    """Whether two cells agree wherever both have a level, and stand at the reference where one has none."""
    for field in fields(Cell):
        if field.name == compare.factor:
            continue
        one, other = getattr(treated, field.name), getattr(against, field.name)
        if one is not None and other is not None and one != other:
            return False
        if other is not None and field.name in fixed and other != fixed[field.name]:
            return False
    return True


def _context_name(study: Study, both: Cell, *compared: str) -> str:
    """Where a contrast holds: the levels of its arms outside of what is compared and of the reference."""
    skip = {*compared, *(name for name, _ in study.reference)}
    if len(set(APPLIES.get(compared[0], ())) & set(study.levels("method"))) == 1:
        skip.add("method")  # which the factor names
    return _arm_name_or_nothing(study, both, tuple(name for name in CELL_FIELDS if name not in skip))


def _arm_name_or_nothing(study: Study, cell: Cell, among: tuple[str, ...]) -> str:
    return _arm_name(study, cell, among) if any(factor.name in among for factor in study.factors) else ""


def arrival_order(arms: Sequence[T], seed: int) -> list[T]:
    """The order in which arms start: random, since the first to arrive at a rung are never stopped, and grids arrive
    sorted by their levels."""
    return random.Random(f"order {seed}").sample(arms, len(arms))


def _trials(study: Study, arms: tuple[Arm, ...], data_digest: str | None, seeds: tuple[int, ...]) -> tuple[Trial, ...]:
    data, screen = study.data, study.screen
    teachers: dict[str, Trial] = {}

    def teacher_of(cell: Cell, replicate: int) -> str | None:
        """The id of the teacher of a student; with several teacher seeds, replicates take turns."""
        if cell.teacher is None:
            return None
        kept = {name: getattr(cell, name) for name in TEACHER_FIELDS}
        name = _arm_name_or_nothing(study, cell, TEACHER_FIELDS)
        trial = Trial(
            arm=f"{name}/teacher" if name else "teacher",
            phase="teacher",
            cell=Cell(student=study.cell.student, **kept, method="none", temperature=None, alpha=None, beta=None),
            recipe=study.teacher_recipe,
            seed=study.teacher_seeds[replicate % len(study.teacher_seeds)],
            data=data,
            data_digest=data_digest,
            scale=study.scale,
        )
        return teachers.setdefault(trial.trial_id, trial).trial_id

    def student(arm: Arm, phase: Literal["screen", "confirm"], seed: int, replicate: int) -> Trial:
        teacher_id = teacher_of(arm.cell, replicate)
        return Trial(arm.name, phase, arm.cell, study.recipe, seed, data, data_digest, study.scale, teacher_id)

    order = arrival_order(arms, screen.order_seed)
    students = [student(arm, "screen", screen.seed, 0) for arm in order]
    for replicate, seed in enumerate(seeds):
        students += [student(arm, "confirm", seed, replicate) for arm in order]
    return (*teachers.values(), *students)


def _longest_path_first(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Trials in the order in which what has to follow them is longest, so that no long chain is left for the end.

    After a teacher come its students, after a screen the confirmation of its arm. Equal ones keep their order, which
    is random among arms that compete with each other.
    """
    confirmed = {trial.arm: flop(trial) for trial in trials if trial.phase == "confirm"}
    paths = {
        trial.trial_id: flop(trial) + (confirmed.get(trial.arm, 0.0) if trial.phase == "screen" else 0.0)
        for trial in trials
        if trial.role == "student"
    }
    for teacher in (trial for trial in trials if trial.role == "teacher"):
        students = (paths[trial.trial_id] for trial in trials if trial.teacher_id == teacher.trial_id)
        paths[teacher.trial_id] = flop(teacher) + max(students)
    return tuple(sorted(trials, key=lambda trial: -paths[trial.trial_id]))


def _answering(trials: tuple[Trial, ...]) -> dict[str, Answering]:
    students: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.cell.method == "logit" and trial.teacher_id is not None:
            students.setdefault(trial.teacher_id, []).append(trial)
    return {teacher_id: answering(each) for teacher_id, each in students.items()}

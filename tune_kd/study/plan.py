"""The plan of a study: arms, contrasts, teachers and trials, in the order in which they start."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tune_kd.study.arms import Arm, arm_name, levels_name, raw_cells
from tune_kd.study.contrasts import Contrast, contrasts
from tune_kd.study.cost import answering, flop
from tune_kd.study.spec import Cell, Family, Study
from tune_kd.study.trial import Answering, ArmRole, Phase, Role, Trial
from tune_kd.study.tuning import Range
from tune_kd.study.validate import check

T = TypeVar("T")

TEACHER_FIELDS = ("teacher", "stem", "weights", "width")  # settings that are equal for a teacher and its students


@dataclass(frozen=True)
class Search:
    """An arm that is tuned. Its draws have its name. Two arms are confirmed: `tuned` and `default`."""

    name: str  # of the arm
    ranges: tuple[Range, ...]  # that apply to it

    @property
    def tuned(self) -> str:
        return f"{self.name}/tuned"

    @property
    def default(self) -> str:
        return f"{self.name}/default"


@dataclass(frozen=True)
class Plan:
    """The arms, contrasts and trials of a study.

    For a study with tuning, these are the trials that are known before the first draw (see
    `tune_kd.records.adaptive_plan`).
    """

    study: Study  # the study itself
    raw_cells: int  # number of combinations of levels, before equal ones are merged into arms
    arms: tuple[Arm, ...]  # the distinct arms; with tuning, the default and the tuned arm of each
    contrasts: tuple[Contrast, ...]  # linear combinations of the arms' means
    trials: tuple[Trial, ...]  # in the order in which they start once they are ready
    answering: dict[str, Answering]  # views whose logits are computed, by teacher id; only if students need logits
    searches: tuple[Search, ...] = ()  # the arms that are tuned

    @property
    def teachers(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.role == Role.TEACHER)


def plan(study: Study, data_digest: str | None = None, look: int = 0) -> Plan:
    """Check a study and expand it into arms, contrasts and trials, with the confirmation seeds up to `look` (from 0).

    Without `data_digest` the plan is a preview: its trial ids differ from those of a run. Raises `UserError` with all
    problems, including comparisons of arms that the study does not have, and equal names.
    """
    raw, declared = _expanded(study)
    arms = screened = _arms(study, raw, declared)
    searches: tuple[Search, ...] = ()
    if study.tuning is not None:
        searches = tuple(Search(arm.name, study.ranges(arm.cell.method)) for arm in arms)
        declared = _of_tuned(searches, declared)
        arms = tuple(each for arm, search in zip(arms, searches, strict=True) for each in _confirmed(arm, search))
        screened = arms[::2]
    trials = _trials(study, screened, data_digest, study.confirm.seeds_at(look))
    answered = _answering(trials)
    if searches:  # the screen consists only of draws
        trials = tuple(trial for trial in trials if trial.phase != Phase.SCREEN)
    return Plan(study, len(raw), arms, declared, _longest_path_first(trials), answered, searches)


def checked(study: Study) -> Study:
    """The study itself. Raises `UserError` as `plan` does, but creates no trials."""
    _expanded(study)
    return study


def _expanded(study: Study) -> tuple[list[Cell], tuple[Contrast, ...]]:
    """Check a study, and return its raw cells and contrasts."""
    raw = raw_cells(check(study))
    return raw, contrasts(study, list(dict.fromkeys(raw)))


def _arms(study: Study, raw: list[Cell], declared: tuple[Contrast, ...]) -> tuple[Arm, ...]:
    references = {
        arm
        for contrast in declared
        for arm, weight in contrast.weights
        if contrast.kind == "effect" and (weight < 0 or contrast.factor == "method")
    }

    def role(cell: Cell) -> ArmRole:
        if cell.method == study.control:
            return ArmRole.CONTROL
        return ArmRole.REFERENCE if arm_name(study, cell) in references else ArmRole.COMPARED

    return tuple(Arm(arm_name(study, cell), cell, merged, role(cell)) for cell, merged in Counter(raw).items())


def _of_tuned(searches: tuple[Search, ...], declared: tuple[Contrast, ...]) -> tuple[Contrast, ...]:
    """The declared contrasts of the tuned arms, then each tuned arm against its default."""
    tuned = {each.name: each.tuned for each in searches}
    return (
        *(
            replace(each, name=f"{each.name}, tuned", weights=tuple((tuned[arm], sign) for arm, sign in each.weights))
            for each in declared
        ),
        *(
            Contrast(
                f"{each.name}: tuned - default",
                "effect",
                "tuning",
                ((each.tuned, 1.0), (each.default, -1.0)),
                Family.SECONDARY,
            )
            for each in searches
        ),
    )


def _confirmed(arm: Arm, search: Search) -> tuple[Arm, Arm]:
    """The arms that are confirmed for a tuned arm: its default, then the tuned one."""
    role = ArmRole.CONTROL if arm.role == ArmRole.CONTROL else ArmRole.REFERENCE
    return replace(arm, name=search.default, role=role), replace(arm, name=search.tuned, role=role)


def arrival_order(arms: Sequence[T], seed: int) -> list[T]:
    """A random order in which arms start. Early stopping favours the first arms at a rung, so the order of a grid would
    favour low levels."""
    return random.Random(f"order {seed}").sample(arms, len(arms))


def _trials(study: Study, arms: tuple[Arm, ...], data_digest: str | None, seeds: tuple[int, ...]) -> tuple[Trial, ...]:
    teachers: dict[str, Trial] = {}
    own = {method.name: method for method in study.methods}

    def student(arm: Arm, phase: Phase, seed: int, teacher_seed: int) -> Trial:
        varied: dict[str, Any] = dict(arm.cell.recipe)
        recipe, brought = replace(study.recipe, **varied), own.get(arm.cell.method)
        trial = Trial(arm.name, phase, arm.cell, recipe, seed, study.data, data_digest, study.scale, brought=brought)
        if arm.cell.teacher is None:
            return trial
        teacher = _teacher(study, arm.cell, data_digest, teacher_seed)
        teacher = teachers.setdefault(teacher.trial_id, teacher)
        several = len(study.teacher_seeds) > 1
        return replace(trial, teacher_id=teacher.trial_id, teacher_seed=teacher_seed if several else None)

    order = arrival_order(arms, study.screen.order_seed)
    students = [student(arm, Phase.SCREEN, study.screen.seed, study.teacher_seeds[0]) for arm in order]
    for replicate, seed in enumerate(seeds):
        for number, teacher_seed in enumerate(study.teachers_of(replicate)):  # one trial per seed without a teacher
            taught = (arm for arm in order if number == 0 or arm.cell.teacher is not None)
            students += [student(arm, Phase.CONFIRM, seed, teacher_seed) for arm in taught]
    return (*teachers.values(), *students)


def _teacher(study: Study, cell: Cell, data_digest: str | None, seed: int) -> Trial:
    """The teacher of the students with a cell."""
    kept = {name: getattr(cell, name) for name in TEACHER_FIELDS}
    name = levels_name(study, cell, TEACHER_FIELDS)
    return Trial(
        arm=f"{name}/teacher" if name else "teacher",
        phase=Phase.TEACHER,
        cell=Cell(student=study.cell.student, **kept, alpha=None),
        recipe=study.teacher_recipe,
        seed=seed,
        data=study.data,
        data_digest=data_digest,
        scale=study.scale,
    )


def _longest_path_first(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Sort trials: teachers first, since their students wait for them, then by the cost of the longest chain that a
    trial starts, so that no long chain starts last.

    In a chain, a teacher is followed by its students, and a trial of the screen by the confirmation of its arm. Trials
    of equal cost keep their order, which is random among arms that compete with each other.
    """
    confirmed = {trial.arm: flop(trial) for trial in trials if trial.phase == Phase.CONFIRM}
    paths = {
        trial.trial_id: flop(trial) + (confirmed.get(trial.arm, 0.0) if trial.phase == Phase.SCREEN else 0.0)
        for trial in trials
        if trial.role == Role.STUDENT
    }
    for teacher in (trial for trial in trials if trial.role == Role.TEACHER):
        students = (paths[trial.trial_id] for trial in trials if trial.teacher_id == teacher.trial_id)
        paths[teacher.trial_id] = flop(teacher) + max(students)
    return tuple(sorted(trials, key=lambda trial: (trial.role != Role.TEACHER, -paths[trial.trial_id])))


def _answering(trials: tuple[Trial, ...]) -> dict[str, Answering]:
    students: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.method.uses_cached_logits and trial.teacher_id is not None:
            students.setdefault(trial.teacher_id, []).append(trial)
    return {teacher_id: answering(each) for teacher_id, each in students.items()}

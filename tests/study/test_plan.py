"""The plan of a study: its arms, contrasts and trials."""

import itertools
import json
import random
from collections import Counter
from dataclasses import asdict, replace

import pytest
from hypothesis import given, strategies as st

from conftest import tiny
from search_spaces.ablation import SCALES
from tune_kd.study.plan import plan
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import Trial, digest
from tune_kd.system.errors import UserError

ARMS = [
    f"{stem}/{method}"
    for stem in ("imagenet", "cifar")
    for method in ("none", *(f"logit/T={level}" for level in (1, 2, 4, 8, 16)), "feature")
]


def test_the_30_raw_cells_of_the_ablation_merge_into_14_arms() -> None:
    planned = plan(SCALES["paper"]())
    assert planned.raw_cells == 30
    assert [arm.name for arm in planned.arms] == ARMS
    assert [arm.merged for arm in planned.arms] == [5, 1, 1, 1, 1, 1, 5] * 2


def test_each_stem_has_one_teacher_and_each_arm_has_one_screen_and_all_confirm_trials() -> None:
    planned = plan(SCALES["paper"]())
    assert sorted(trial.arm for trial in planned.teachers) == ["cifar/teacher", "imagenet/teacher"]
    for arm in ARMS:
        trials = [(trial.phase, trial.seed) for trial in planned.trials if trial.arm == arm]
        assert trials == [("screen", 0), *(("confirm", seed) for seed in (1, 2, 3, 4, 5))]
    assert len({trial.trial_id for trial in planned.trials}) == len(planned.trials) == 2 + 14 * 6


def test_every_student_with_a_method_has_the_teacher_of_its_stem_and_controls_have_none() -> None:
    planned = plan(SCALES["laptop"]())
    teachers = {trial.trial_id: trial for trial in planned.teachers}
    for trial in planned.trials:
        if trial.role == "student" and trial.cell.method != "none":
            assert teachers[trial.teacher_id or ""].cell.stem == trial.cell.stem
        else:
            assert trial.teacher_id is None


def test_controls_and_reference_arms_of_contrasts_get_their_roles() -> None:
    roles = {arm.name: arm.role for arm in plan(SCALES["paper"]()).arms}
    assert {name for name, role in roles.items() if role == "control"} == {"imagenet/none", "cifar/none"}
    assert {name for name, role in roles.items() if role == "reference"} == {
        f"{stem}/{method}" for stem in ("imagenet", "cifar") for method in ("logit/T=4", "feature")
    }


def test_contrasts_cover_every_comparison_in_every_stem_and_its_moderation_by_stem() -> None:
    contrasts = {contrast.name: dict(contrast.weights) for contrast in plan(SCALES["paper"]()).contrasts}
    assert len(contrasts) == 1 + 7 * 2 + 7
    assert contrasts["none: cifar - imagenet"] == {"cifar/none": 1, "imagenet/none": -1}
    assert contrasts["cifar: logit - none"] == {"cifar/logit/T=4": 1, "cifar/none": -1}
    assert contrasts["imagenet: T=16 - T=4"] == {"imagenet/logit/T=16": 1, "imagenet/logit/T=4": -1}
    assert contrasts["(logit - feature): cifar - imagenet"] == {
        "cifar/logit/T=4": 1,
        "cifar/feature": -1,
        "imagenet/logit/T=4": -1,
        "imagenet/feature": 1,
    }


def test_the_ablation_declares_six_primary_contrasts() -> None:
    declared = plan(SCALES["paper"]()).contrasts
    assert [each.name for each in declared if each.family == "primary"] == [
        "none: cifar - imagenet",
        "imagenet: logit - none",
        "cifar: logit - none",
        "imagenet: feature - none",
        "cifar: feature - none",
        "(logit - none): cifar - imagenet",
    ]


def test_a_comparison_can_be_fixed_at_a_level_and_excluded_from_moderation() -> None:
    held = Compare("method", "logit", "none", where={"stem": "cifar", "temperature": 2.0}, moderation=None)
    declared = plan(replace(SCALES["paper"](), contrasts=(held,), moderator=None)).contrasts
    assert [(each.name, dict(each.weights)) for each in declared] == [
        ("cifar/T=2: logit - none", {"cifar/logit/T=2": 1, "cifar/none": -1})
    ]
    everywhere = replace(
        SCALES["paper"](), contrasts=(Compare("method", "logit", "none", moderation=None), TEMPERATURE)
    )
    assert [each.name for each in plan(everywhere).contrasts if each.kind == "moderation"] == [
        "(T=1 - T=4): cifar - imagenet"
    ]


TEMPERATURE = Compare("temperature", 1.0, 4.0)
BETA = Factor("beta", (0.0, 1.0))
PAIR = Factor("method", ("none", "logit"))
THREE = Factor("temperature", (1.0, 2.0, 4.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"factors": (PAIR, BETA), "contrasts": (Compare("beta", 1.0, 0.0),), "moderator": None},
            "a contrast compares beta 1.0 with 0.0, but no arm has beta 1.0: beta applies to feature, and method has "
            "none, logit;",
        ),
        (
            {
                "factors": (Factor("method", ("logit", "feature")), BETA),
                "control": "logit",
                "reference": (("method", "logit"),),
                "contrasts": (Compare("beta", 1.0, 0.0),),
                "moderator": None,
            },
            "a contrast compares beta 1.0 with 0.0, but no two arms with method 'logit', which reference fixes, "
            "differ in beta alone;",
        ),
        (
            {"moderator": "temperature"},
            "moderator is 'temperature', but reference holds every contrast at temperature 4.0; allowed: None ",
        ),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet"),)},
            "moderator is 'stem', but no contrast compares another factor;",
        ),
        (
            {"moderator": "method", "contrasts": (Compare("temperature", 2.0, 4.0),)},
            "moderator is 'method', but no contrast is held at two levels of method;",
        ),
        ({"contrasts": ()}, "moderator is 'stem', but no contrast compares another factor;"),
        (
            {
                "factors": (Factor("method", ("none", "feature")), BETA),
                "reference": (),
                "contrasts": (Compare("method", "feature", "none"), Compare("beta", 1.0, 0.0)),
                "moderator": "beta",
            },
            "contrasts 'beta=1 - beta=0' and '(feature - none): beta=1 - beta=0' are the same difference of the same ",
        ),
        (
            {
                "factors": (Factor("method", ("none", "logit", "feature")), BETA),
                "reference": (),
                "contrasts": (Compare("method", "feature", "none"), Compare("method", "logit", "feature")),
                "moderator": "beta",
            },
            "contrasts '(feature - none): beta=1 - beta=0' and '(logit - feature): beta=1 - beta=0' are the same ",
        ),
    ],
)
def test_unusable_contrasts_and_moderators_are_rejected_with_the_reason(
    study: Study, change: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        plan(replace(study, **change))  # type: ignore[arg-type]
    assert [problem for problem in refused.value.problems if problem.startswith(words)], refused.value.problems


def test_the_name_of_a_contrast_includes_a_level_that_only_one_arm_has(one_stem: Study) -> None:
    declared = replace(one_stem, factors=(PAIR, THREE), reference=(), contrasts=(Compare("method", "none", "logit"),))
    assert [(each.name, dict(each.weights)) for each in plan(replace(declared, moderator=None)).contrasts] == [
        (f"T={level}: none - logit", {"none": 1, f"logit/T={level}": -1}) for level in (1, 2, 4)
    ]


def test_a_moderation_names_its_stem_and_drops_the_control_that_cancels(study: Study) -> None:
    compared = replace(study, factors=(*study.factors[:2], THREE), reference=(), moderator="temperature",
                       contrasts=(Compare("method", "logit", "none"),))  # fmt: skip
    found = {each.name: dict(each.weights) for each in plan(compared).contrasts if each.kind == "moderation"}
    assert found == {
        f"{stem}: (logit - none): T={level} - T=1": {f"{stem}/logit/T={level}": 1, f"{stem}/logit/T=1": -1}
        for stem in ("imagenet", "cifar")
        for level in (2, 4)
    }


def test_reversing_a_moderated_comparison_only_flips_the_signs(study: Study) -> None:
    """The comparison in the other direction has the opposite signs and equally many differences of differences."""
    two = replace(study, factors=(*study.factors[:2], THREE), reference=(), moderator="temperature")
    one, other = (
        {each.name: dict(each.weights) for each in plan(replace(two, contrasts=(compare,))).contrasts}
        for compare in (Compare("method", "logit", "none"), Compare("method", "none", "logit"))
    )
    turned = {name.replace("none - logit", "logit - none"): weights for name, weights in other.items()}
    assert turned == {name: {arm: -sign for arm, sign in weights.items()} for name, weights in one.items()}
    assert len(one) == 2 * 3 + 2 * 2


def test_contrasts_name_the_factor_when_two_factors_have_the_same_levels(one_stem: Study) -> None:
    networks = tuple(Factor(name, ("resnet18", "resnet34")) for name in ("student", "teacher"))
    compared = tuple(Compare(each.name, "resnet34", "resnet18") for each in networks)
    declared = replace(one_stem, factors=networks, cell=Cell(method="logit"), control="logit", contrasts=compared)
    assert [each.name for each in plan(replace(declared, moderator=None)).contrasts] == [
        "resnet18: student resnet34 - resnet18",
        "resnet34: student resnet34 - resnet18",
        "resnet18: teacher resnet34 - resnet18",
        "resnet34: teacher resnet34 - resnet18",
    ]


def test_contrasts_name_the_factor_when_another_factor_has_one_of_its_levels(study: Study) -> None:
    shared = replace(
        study, factors=(*study.factors, Factor("weights", ("none", "imagenet"))), cell=Cell(), moderator=None
    )
    compared = replace(shared, contrasts=(Compare("stem", "cifar", "imagenet"), Compare("weights", "imagenet", "none")))
    whats = {each.name.rpartition(": ")[2] for each in plan(compared).contrasts}
    assert whats == {"stem cifar - imagenet", "weights imagenet - none"}


def test_levels_that_agree_to_six_digits_have_distinct_names(study: Study) -> None:
    close = Factor("temperature", (4.0, 4.0000001))
    compared = (Compare("temperature", 4.0000001, 4.0),)
    planned = plan(replace(study, factors=(*study.factors[:2], close), contrasts=compared))
    assert [arm.name for arm in planned.arms if "logit" in arm.name] == [
        f"{stem}/logit/T={level}" for stem in ("imagenet", "cifar") for level in ("4", "4.0000001")
    ]
    assert planned.contrasts[0].name == "imagenet: T=4.0000001 - T=4"


def test_two_arms_with_the_same_name_are_rejected(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this test, because names have fewer digits than levels."""
    monkeypatch.setattr("tune_kd.study.arms.number", lambda value: f"{value:g}")
    close = Factor("temperature", (4.0, 4.0000001))
    with pytest.raises(UserError, match="2 arms have the name 'cifar/logit/T=4'; allowed: "):
        plan(replace(study, factors=(*study.factors[:2], close), contrasts=study.contrasts[:2]))


def test_alpha_is_in_the_name_of_the_arms_to_which_it_applies(study: Study) -> None:
    varied = replace(study, factors=(*study.factors, Factor("alpha", (0.3, 0.7))))
    names = [arm.name for arm in plan(varied).arms]
    assert "cifar/logit/T=4/alpha=0.3" in names
    assert "cifar/feature/alpha=0.7" in names
    assert "cifar/none" in names


def layout(study: Study) -> dict[str, list[tuple[int, int | None]]]:
    """The seed and the teacher's seed of each confirmed trial, by arm."""
    planned = plan(study)
    seeds = {trial.trial_id: trial.seed for trial in planned.teachers}
    assert len(planned.teachers) == len(study.teacher_seeds)
    found: dict[str, list[tuple[int, int | None]]] = {}
    for trial in planned.trials:
        if trial.role == "student":
            taught_by = None if trial.teacher_id is None else seeds[trial.teacher_id]
            assert trial.teacher_seed == taught_by
            if trial.phase == "confirm":
                found.setdefault(trial.arm, []).append((trial.seed, taught_by))
            else:
                assert taught_by in (None, study.teacher_seeds[0])
    return found


def test_students_are_crossed_with_all_teachers_and_controls_have_one_trial_per_seed(one_stem: Study) -> None:
    study = replace(one_stem, teacher_seeds=(7, 8), confirm=Confirm(seeds=(1, 2, 3)))
    crossed = set(itertools.product((1, 2, 3), (7, 8)))
    for arm, cells in layout(study).items():
        assert set(cells) == ({(1, None), (2, None), (3, None)} if arm == "cifar/none" else crossed)
        assert len(cells) == len(set(cells))
    names = {trial.label for trial in plan(study).trials if trial.phase == "confirm"}
    assert {"cifar/none seed 1", "cifar/feature seed 1, teacher seed 7", "cifar/feature seed 1, teacher seed 8"} < names


@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_a_layout_with_fewer_teachers_per_seed_is_balanced_at_every_look(
    teachers: int, per_seed: int, rounds: int, looks: bool
) -> None:
    counts = (teachers, teachers * (rounds + 1)) if looks else None
    confirm = Confirm(tuple(range(1, teachers * rounds + 1)), counts, teachers_per_seed=min(per_seed, teachers))
    study = replace(tiny(), teacher_seeds=tuple(range(100, 100 + teachers)), confirm=confirm)
    for look in range(len(counts or (0,))):
        met = [(seed, each) for number, seed in enumerate(confirm.seeds_at(look)) for each in study.teachers_of(number)]
        assert set(Counter(seed for seed, _ in met).values()) == {min(per_seed, teachers)}
        assert len(set(Counter(each for _, each in met).values())) == 1
        assert len(Counter(each for _, each in met)) == teachers
        assert len(met) == len(set(met))


def test_a_larger_layout_includes_all_trials_of_a_smaller_one(one_stem: Study) -> None:
    """So a study with one teacher, or with teachers that take turns, keeps its trials when it is crossed."""
    base = replace(one_stem, teacher_seeds=(7, 8), confirm=Confirm(seeds=(1, 2)))
    alone, turns, crossed = (
        {trial.trial_id for trial in plan(each).trials}
        for each in (
            replace(base, teacher_seeds=(7,)),
            replace(base, confirm=replace(base.confirm, teachers_per_seed=1)),
            base,
        )
    )
    assert alone < crossed
    assert turns < crossed


def test_teachers_alternate_when_each_seed_has_one_teacher(one_stem: Study) -> None:
    study = replace(one_stem, teacher_seeds=(7, 8), confirm=Confirm(seeds=(1, 2, 3, 4), teachers_per_seed=1))
    assert layout(study)["cifar/feature"] == [(1, 7), (2, 8), (3, 7), (4, 8)]


def test_the_longest_remaining_path_starts_first(study: Study) -> None:
    """A teacher before its students, the expensive stem before the cheap one, a teacher in the step before cached
    logits."""
    names = [(trial.arm, trial.phase, trial.seed) for trial in plan(study).trials]
    at = {name: place for place, name in enumerate(names)}
    assert names[:2] == [(f"{stem}/teacher", "teacher", 1000) for stem in ("cifar", "imagenet")]  # before any control
    for stem in ("cifar", "imagenet"):
        students = [place for (arm, phase, _), place in at.items() if arm.startswith(stem) and phase != "teacher"]
        assert at[f"{stem}/teacher", "teacher", 1000] < min(students)
        assert at[f"{stem}/feature", "screen", 0] < at[f"{stem}/logit/T=2", "screen", 0]
        assert at[f"{stem}/logit/T=2", "screen", 0] < at[f"{stem}/logit/T=2", "confirm", 1]
        assert at[f"{stem}/feature", "confirm", 2] < at[f"{stem}/logit/T=2", "confirm", 1]
    assert at["cifar/none", "confirm", 1] < at["imagenet/none", "confirm", 1]


def test_competing_arms_start_in_random_order(study: Study) -> None:
    factors = (*study.factors[:2], Factor("temperature", (1.0, 2.0, 4.0, 8.0, 16.0)))
    orders = set()
    for seed in range(20):
        planned = plan(replace(study, factors=factors, screen=replace(study.screen, order_seed=seed)))
        orders.add(tuple(t.arm for t in planned.trials if t.phase == "screen" and t.arm.startswith("cifar/logit")))
    assert len(orders) > 10
    assert {order[0] for order in orders} > {"cifar/logit/T=4", "cifar/logit/T=1"}  # also for the reference


def test_the_random_order_of_arms_is_reproducible_from_the_order_seed(study: Study) -> None:
    def order(seed: int) -> list[str]:
        planned = plan(replace(study, screen=replace(study.screen, order_seed=seed)))
        return [trial.arm for trial in planned.trials if trial.phase == "screen"]

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1
    assert sorted(order(0)) == sorted(order(1))


FIXED = Trial(
    arm="cifar/logit/T=4",
    phase="confirm",
    cell=Cell(method="logit", temperature=4.0, alpha=0.5, beta=None),
    recipe=Recipe(),
    seed=1,
    data=Data("cifar10"),
    data_digest="0" * 64,
    scale="paper",
    teacher_id="0123456789abcdef",
)


def test_trial_ids_are_pinned() -> None:
    """Ids name teachers on disk: if they change unnoticed, every teacher is trained again."""
    assert FIXED.trial_id == "d286effcc9b30143"
    teacher = replace(FIXED, phase="teacher", cell=Cell(), teacher_id=None)
    assert teacher.trial_id == "1057c94b9ee0e23b"
    assert FIXED.recipe_id == "bdf837a127445e54"
    assert replace(FIXED, recipe=Recipe(validate_every=5)).recipe_id != FIXED.recipe_id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"recipe": Recipe(epochs=99)},
        {"recipe": Recipe(clip=2.0)},
        {"recipe": Recipe(precision="bfloat16")},
        {"recipe": Recipe(precision="tf32")},
        {"recipe": Recipe(compile=True)},
        {"recipe": Recipe(validate_every=2)},
        {"data_digest": "1" * 64},
        {"teacher_id": "f" * 16},
        *({"cell": replace(FIXED.cell, **{name: value})} for name, value in
          [("stem", "imagenet"), ("temperature", 2.0), ("alpha", 0.3), ("width", 0.5), ("student", "resnet34")]),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_result_changes_the_id(change: dict[str, object]) -> None:
    assert replace(FIXED, **change).trial_id != FIXED.trial_id  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"arm": "other"}, {"phase": "screen"}, {"scale": "x"}, {"data": Data("d", 1)}])
def test_a_field_that_does_not_change_the_result_does_not_change_the_id(change: dict[str, object]) -> None:
    assert replace(FIXED, **change).trial_id == FIXED.trial_id  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.text(), st.integers() | st.text() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
    ),
    st.randoms(),
)
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object], chance: random.Random) -> None:
    items = list(value.items())
    chance.shuffle(items)
    assert digest(dict(items)) == digest(value)


levels = st.fixed_dictionaries(
    {
        "stem": st.lists(st.sampled_from(["imagenet", "cifar"]), min_size=1, unique=True),
        "method": st.lists(st.sampled_from(["logit", "feature"]), unique=True).map(lambda some: ["none", *some]),
        "temperature": st.lists(st.sampled_from([1.0, 2.0, 4.0, 8.0]), min_size=1, unique=True),
        "alpha": st.lists(st.sampled_from([0.3, 0.5, 0.7]), min_size=1, unique=True),
    }
)


@given(levels, st.randoms(), st.data())
def test_a_plan_contains_all_declared_contrasts_with_unique_names_or_is_rejected(
    drawn: dict[str, list[str | float]], chance: random.Random, data: st.DataObject
) -> None:
    factors = [Factor(name, tuple(some)) for name, some in drawn.items()]
    chance.shuffle(factors)
    pairs = [Compare(each.name, *two) for each in factors for two in itertools.permutations(each.levels, 2)]
    contrasts = data.draw(st.lists(st.sampled_from(pairs), max_size=4)) if pairs else []
    fixed = data.draw(st.lists(st.sampled_from(["temperature", "alpha", "stem"]), unique=True))
    study = Study(
        "drawn",
        "?",
        tuple(factors),
        tuple(contrasts),
        moderator=data.draw(st.none() | st.sampled_from([each.name for each in factors])),
        reference=tuple((name, drawn[name][0]) for name in fixed),
        swept=tuple(data.draw(st.lists(st.sampled_from(fixed), unique=True))) if fixed else (),
        screen=Screen(grace=1),
    )
    try:
        planned = plan(study)
    except UserError as refused:
        assert refused.problems and (study.contrasts or study.moderator)
        return
    for compare in contrasts:
        theirs = [dict(each.weights) for each in planned.contrasts if each.factor == compare.factor]
        cells = {arm.name: arm.cell for arm in planned.arms}
        assert any(
            {getattr(cells[arm], compare.factor): sign for arm, sign in weights.items()}
            == {compare.treated: 1, compare.against: -1}
            for weights in theirs
        )
    assert len({each.name for each in planned.contrasts}) == len(planned.contrasts)
    assert len({arm.name for arm in planned.arms}) == len(planned.arms)
    assert study.moderator is None or "moderation" in {each.kind for each in planned.contrasts}


@given(levels, st.randoms())
def test_expansion_accounts_for_every_raw_cell_and_creates_no_duplicate_arm(
    drawn: dict[str, list[str | float]], chance: random.Random
) -> None:
    factors = [Factor(name, tuple(some)) for name, some in drawn.items()]
    chance.shuffle(factors)
    temperature = drawn["temperature"][0]
    contrasts = [Compare("method", method, "none") for method in drawn["method"] if method != "none"]
    planned = plan(
        Study(
            "drawn",
            "?",
            tuple(factors),
            tuple(contrasts),
            reference=(("temperature", temperature), ("alpha", drawn["alpha"][0])),
            screen=Screen(grace=1),
        )
    )
    assert sum(arm.merged for arm in planned.arms) == planned.raw_cells
    assert len({arm.name for arm in planned.arms}) == len(planned.arms)
    assert len(planned.contrasts) == len(contrasts) * len(drawn["stem"])
    for arm in planned.arms:
        for name in ("teacher", "alpha", "temperature", "beta"):
            assert (arm.cell.level(name) is None) == (arm.cell.method not in planned.study.applies(name))
    assert json.dumps([asdict(contrast) for contrast in planned.contrasts])

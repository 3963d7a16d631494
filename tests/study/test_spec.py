"""Validation of a study, and its messages."""

from dataclasses import replace

import pytest

from search_spaces.ablation import SCALES
from tune_kd.study.discover import find, from_json, resolve, to_json
from tune_kd.study.plan import plan
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import digest
from tune_kd.study.tuning import Tuning
from tune_kd.study.validate import check
from tune_kd.system.errors import UserError


def problems(study: Study) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check(study)
    return caught.value.problems


@pytest.mark.parametrize("scale", SCALES)
def test_each_scale_of_the_ablation_is_valid(scale: str) -> None:
    assert check(SCALES[scale]()).scale == scale


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factors": (Factor("stem", ("resnet",)),)}, ("stem", "'resnet'", "imagenet, cifar")),
        ({"factors": (Factor("depth", (1,)),)}, ("'depth'", "temperature")),
        ({"factors": (Factor("method", ()),)}, ("'method'", "no arm is left")),
        ({"factors": (Factor("alpha", (0.5, 0.5)),)}, ("'alpha'", "each level once")),
        ({"factors": (Factor("alpha", (1.5,)),)}, ("alpha is 1.5", "from 0 to 1")),
        ({"factors": (Factor("temperature", (0.0,)),)}, ("temperature is 0.0", "above 0")),
        ({"factors": (Factor("temperature", (float("nan"),)),)}, ("temperature is nan", "finite")),
        ({"factors": (Factor("temperature", ("hot",)),)}, ("temperature is 'hot'", "number")),
        ({"factors": (Factor("stem", ("cifar",)), Factor("stem", ("imagenet",)))}, ("'stem'", "more than once")),
        ({"control": "no"}, ("control is 'no'", "none, logit, feature")),
        ({"control": None}, ("control is None", "no contrasts")),
        ({"contrasts": (Compare("method", "logit", "dkd"),)}, ("'dkd'", "none, logit, feature")),
        ({"contrasts": (Compare("alpha", 0.3, 0.5),)}, ("'alpha'", "stem, method, temperature")),
        ({"contrasts": (Compare("method", "none", "none"),)}, ("'none'", "itself")),
        ({"contrasts": (Compare("stem", "cifar", "imagenet"),) * 2}, ("stem 'cifar' with 'imagenet' more than once",)),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet", family="main"),)},
            ("contrasts[0].family is 'main'", "primary, secondary"),
        ),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet", moderation="no"),)},
            ("contrasts[0].moderation is 'no'", "primary, secondary"),
        ),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet", where={"depth": 1}),)},
            ("where of a contrast of stem names 'depth'", "method"),
        ),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet", where={"stem": "cifar"}),)},
            ("where of a contrast of stem names 'stem'",),
        ),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet", where={"method": "dkd"}),)},
            ("where of a contrast holds method at 'dkd'", "none, logit, feature"),
        ),
        ({"strata": ("depth",)}, ("strata names 'depth'", "stem")),
        (
            {"contrasts": (Compare("temperature", 2.0, 4.0), Compare("temperature", 4, 2))},
            ("4 with 2", "in one direction"),
        ),
        ({"reference": (("temperature", 2.0), ("temperature", 4.0))}, ("'temperature' more than once",)),
        ({"reference": (("temperature", 3.0),)}, ("temperature is 3.0", "2.0, 4.0")),
        ({"moderator": "width"}, ("'width'", "stem, method, temperature")),
        ({"recipe": Recipe(epochs=0)}, ("recipe.epochs is 0", "at least 1")),
        ({"recipe": Recipe(validate_every=0)}, ("recipe.validate_every is 0", "at least 1")),
        ({"teacher_recipe": Recipe(validate_every=-1)}, ("teacher_recipe.validate_every is -1", "at least 1")),
        (
            {"recipe": Recipe(epochs=9, validate_every=4), "screen": Screen(grace=2, reduction=2)},
            (
                "screen.grace is 2 (rungs: 2, 4, 8) while recipe.validate_every is 4",
                "a multiple of validate_every, or 9,",
            ),
        ),
        ({"recipe": Recipe(lr=-1.0)}, ("recipe.lr is -1.0", "above 0")),
        ({"teacher_recipe": Recipe(lr_min=1.0)}, ("teacher_recipe.lr_min is 1.0", "0 to lr")),
        ({"confirm": Confirm(seeds=(0, 1))}, ("screen.seed is 0", "confirm.seeds [0, 1]")),
        ({"confirm": Confirm(seeds=())}, ("confirm.seeds is empty",)),
        ({"confirm": Confirm(seeds=(1, 1))}, ("confirm.seeds is [1, 1]", "each seed once")),
        ({"confirm": Confirm(seeds=(-1,))}, ("confirm.seeds has -1",)),
        ({"teacher_seeds": ()}, ("teacher_seeds is empty",)),
        ({"confirm": Confirm((1, 2), teachers_per_seed=0)}, ("confirm.teachers_per_seed is 0", "at least 1, or None")),
        (
            {"teacher_seeds": (7, 8), "confirm": Confirm(tuple(range(1, 1002)))},
            ("confirm.seeds has 1,001 seeds with 2 teacher_seeds", "at most 1,000 seeds, or one teacher seed"),
        ),
        (
            {"confirm": Confirm((1, 2), teachers_per_seed=2)},
            ("confirm.teachers_per_seed is 2 with 1 teacher_seeds", "for all of them, or at most 1"),
        ),
        (
            {"teacher_seeds": (7, 8), "confirm": Confirm((1, 2), (2, 3), teachers_per_seed=1)},
            ("confirm.teachers_per_seed is 1 with 2 teacher_seeds and 2, 3 seeds", "a multiple of 2"),
        ),
        ({"screen": Screen(grace=3)}, ("screen.grace is 3", "recipe.epochs = 2", "1 to 2")),
        ({"screen": Screen(grace=0)}, ("screen.grace is 0",)),
        ({"screen": Screen(grace=1, reduction=1)}, ("screen.reduction is 1", "at least 2")),
        ({"screen": Screen(grace=1, margin=-0.1)}, ("screen.margin is -0.1",)),
        (
            {"screen": Screen(grace=1, reduction=2, margin=(0.1, 0.2))},
            ("screen.margin is [0.1, 0.2]", "each rung (1: 1)"),
        ),
        ({"screen": Screen(grace=1, margin=(2.0,))}, ("screen.margin is [2.0]", "from 0 to 1")),
        ({"screen": Screen(grace=1, strata=())}, ("screen.strata is empty", "for one stratum")),
        ({"confirm": Confirm(looks=())}, ("confirm.looks is []", "increasing numbers of seeds")),
        ({"confirm": Confirm(looks=(5, 5))}, ("confirm.looks is [5, 5]",)),
        ({"confirm": Confirm(looks=(1, 5))}, ("confirm.looks is [1, 5]", "the first at least 2")),
        ({"confirm": Confirm(seeds=(1, 2, 3), looks=(2,))}, ("confirm.looks is [2] with 3 confirm.seeds",)),
        ({"confirm": Confirm(looks=(5, 10)), "screen": Screen(seed=9, grace=1)}, ("screen.seed is 9", "9, 10]")),
        ({"screen": Screen(grace=1, min_peers=0)}, ("screen.min_peers is 0",)),
        ({"screen": Screen(grace=1, strata=("depth",))}, ("'depth'",)),
        ({"screen": Screen(grace=1, strata=None)}, ("screen.strata is None", "no contrasts")),
        ({"data": Data("mnist")}, ("data.name is 'mnist'", "digits, cifar10, cifar100")),
        ({"data": Data("digits", train=0)}, ("data.train is 0",)),
        ({"cell": Cell(weights="imagenet", width=0.5)}, ("weights is 'imagenet'", "width is not 1")),
        ({"cell": Cell(teacher=None)}, ("teacher is None", "'logit'")),
        ({"cell": Cell(student="vgg")}, ("cell.student is 'vgg'", "resnet18")),
        ({"data": Data("digits", test=float("nan"))}, ("data.test is nan", "at least 1, or None")),  # type: ignore[arg-type]
        ({"screen": Screen(seed=-1, grace=1)}, ("screen.seed is -1", f"from 0 to {2**31 - 1}")),
        ({"deviation": 0.0}, ("deviation is 0.0",)),
        ({"rate": 1.0}, ("rate is 1.0", "from 1e3 to 1e24")),
        ({"cell": Cell(width=17.0)}, ("cell.width is 17.0", "above 0, at most 16")),
        ({"question": "Does it \ud83d?"}, (r"question is 'Does it \ud83d?'", "encoded as UTF-8")),
        ({"name": "\udce9"}, (r"name is '\udce9'", "encoded as UTF-8")),
        ({"name": "two\nlines"}, (r"name is 'two\nlines'", "without control characters")),
        ({"scale": "\u202ebrief"}, (r"scale is '\u202ebrief'", "without control characters")),
        ({"question": "Does it\n\x1b[2J?"}, (r"question is 'Does it\n\x1b[2J?'", "without control characters")),
    ],
)
def test_an_invalid_study_is_rejected_with_field_value_and_allowed_values(
    study: Study, change: dict[str, object], words: tuple[str, ...]
) -> None:
    found = problems(replace(study, **change))  # type: ignore[arg-type]
    assert any(all(word in problem for word in words) for problem in found), found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "x" * 201, "control": "no"}, "name has 201 characters; allowed: at most 200"),
        (
            {"contrasts": (Compare("stem", "cifar", "imagenet"),) * 1001},
            "contrasts has 1,001 items; allowed: at most 1,000",
        ),
        ({"factors": (Factor("alpha", (0.5,) * 1001),)}, "factor 'alpha' has 1,001 items; allowed: at most 1,000"),
        ({"recipe": Recipe(epochs=1_000_001)}, "recipe.epochs is 1000001; allowed: at most 1,000,000"),
        ({"recipe": Recipe(validate_every=1_000_001)}, "recipe.validate_every is 1000001; allowed: at most 1,000,000"),
        ({"tuning": Tuning((), startup=100_001)}, "tuning.startup is 100001; allowed: at most 100,000"),
        ({"tuning": Tuning((), budget=100_001)}, "tuning.budget is 100001; allowed: at most 100,000"),
        (
            {"confirm": Confirm(seeds=tuple(range(9000)))},
            "factors have 12 combinations of levels, which with 9000 seeds",
        ),
        (
            {"confirm": Confirm(seeds=tuple(range(900))), "teacher_seeds": tuple(range(10))},
            "factors have 12 combinations of levels, which with 900 seeds and 10 teachers each need up to",
        ),
    ],
)
def test_absurd_sizes_are_rejected_before_any_other_check(study: Study, change: dict[str, object], words: str) -> None:
    found = problems(replace(study, **change))  # type: ignore[arg-type]
    assert found[0].startswith(words) and not any(each.startswith("control") for each in found)


@pytest.mark.parametrize(
    ("epochs", "every", "grace"),
    [(9, 2, 2), (9, 3, 3), (9, 4, 8), (9, 5, 9), (9, 100, 9)],  # with a grace of 9 epochs there is no rung
)
def test_a_screen_with_validated_rungs_or_without_rungs_is_accepted(
    study: Study, epochs: int, every: int, grace: int
) -> None:
    recipe = replace(study.recipe, epochs=epochs, validate_every=every)
    assert check(replace(study, recipe=recipe, screen=replace(study.screen, grace=grace)))


def test_the_validation_interval_of_a_teacher_is_independent_of_the_rungs(study: Study) -> None:
    assert check(replace(study, teacher_recipe=replace(study.teacher_recipe, epochs=9, validate_every=5)))


def test_the_validation_interval_can_be_set_for_students_and_teachers() -> None:
    path, settings = find("ablation"), ("recipe.validate_every=2", "screen.grace=2", "teacher_recipe.validate_every=5")
    found = resolve(path, "laptop", settings=settings)
    assert (found.recipe.validate_every, found.teacher_recipe.validate_every) == (2, 5)
    assert from_json(to_json(found)) == found
    with pytest.raises(UserError, match=r"--set recipe.validate_every is 2.5; allowed: a whole number$"):
        resolve(path, "laptop", settings=("recipe.validate_every=2.5",))


def test_the_digest_of_a_study_that_validates_every_epoch_is_pinned(study: Study) -> None:
    assert digest(to_json(study)) == "38b6ad46493b7393d7fee310f326258ed648af3808342e9aded7153cd15e5734"
    assert from_json(to_json(study)) == study


def test_a_question_can_have_several_lines(study: Study) -> None:
    assert check(replace(study, question="Does it work?\n\tAnd when?"))


def test_all_problems_of_a_study_are_reported_at_once(study: Study) -> None:
    bad = replace(study, control="no", recipe=Recipe(epochs=0), confirm=Confirm(seeds=(0,)), data=Data("x"))
    found = problems(bad)
    for field in ("control", "recipe.epochs", "screen.seed", "data"):
        assert any(problem.startswith(field) for problem in found)


def test_the_laptop_scale_limits_cifar10_and_digits_are_used_whole() -> None:
    path = find("ablation")
    assert resolve(path, "laptop", "cifar10").data.train == 4000
    assert resolve(path, "laptop").data == Data("digits")
    assert resolve(path, "paper", "digits").data == Data("digits")


def test_seeds_of_later_looks_continue_from_the_last_listed_seed() -> None:
    confirm = Confirm(seeds=(3, 7), looks=(2, 3, 5))
    assert confirm.all_seeds == (3, 7, 8, 9, 10)
    assert [confirm.seeds_at(look) for look in range(3)] == [(3, 7), (3, 7, 8), (3, 7, 8, 9, 10)]
    assert Confirm(seeds=(3, 7)).seeds_at(0) == (3, 7)


def test_contrasts_with_too_many_weights_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_kd.study.contrasts.MOST_WEIGHTS", 100)
    with pytest.raises(UserError, match="has 22 contrasts over 14 arms, which need 308 weights; allowed: at most 100"):
        plan(SCALES["paper"]())

"""Settings of methods, weights of the losses and fields of the recipe as factors."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from conftest import tiny
from tune_kd.records.schema import TRIALS
from tune_kd.study import methods
from tune_kd.study.discover import from_json, resolve
from tune_kd.study.methods import COLUMNS, Method, built_in
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import CELL_FIELDS, RECIPE_FACTORS, Cell, Compare, Factor, Level, Recipe, Screen, Study
from tune_kd.study.trial import Trial
from tune_kd.study.tuning import LogUniform, Range, Tuning, Uniform
from tune_kd.study.validate import check
from tune_kd.system.errors import UserError

MINE = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"temperature": 3.0, "sharpness": 2.0})


def study(**changes: Any) -> Study:
    """A study of three methods with their own settings, without contrasts."""
    few = replace(
        tiny(),
        factors=(Factor("method", ("none", "logit", "mine", "dkd")),),
        contrasts=(Compare("method", "mine", "none"),),
        moderator=None,
        reference=(),
        methods=(MINE,),
        screen=Screen(grace=1, reduction=2, min_peers=1, strata=("method",)),
    )
    return replace(few, **changes)


def varying(name: str, *levels: Level, **changes: Any) -> Study:
    """`study` with another factor."""
    return study(factors=(*study().factors, Factor(name, levels)), **changes)


def cells(planned: Plan) -> dict[str, Cell]:
    return {arm.name: arm.cell for arm in planned.arms}


def problems(bad: Study) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check(bad)
    return caught.value.problems


def at_seed(planned: Plan, arm: str) -> Trial:
    return next(trial for trial in planned.trials if trial.arm == arm and trial.seed == 1)


def test_a_setting_has_the_default_of_its_method_and_is_absent_for_other_methods() -> None:
    found = cells(plan(study()))
    assert found["mine"].level("temperature") == 3.0 and found["logit"].level("temperature") == 4.0
    assert dict(found["mine"].settings) == {"sharpness": 2.0}
    assert dict(found["dkd"].settings) == {"target_weight": 1.0, "nontarget_weight": 8.0, "warmup": 20.0}
    assert found["none"].settings == found["logit"].settings == () and found["none"].temperature is None


def test_the_study_sets_a_setting_for_all_methods_that_declare_it() -> None:
    found = cells(plan(study(cell=Cell(width=0.0625, temperature=5, settings={"warmup": 0}))))  # type: ignore[arg-type]
    assert [found[name].temperature for name in ("logit", "mine", "dkd")] == [5.0, 5.0, 5.0]
    assert dict(found["dkd"].settings)["warmup"] == 0.0 and found["mine"].level("warmup") is None


def test_a_setting_as_a_factor_merges_the_arms_to_which_it_does_not_apply() -> None:
    planned = plan(varying("sharpness", 1, 2))
    assert {arm.name: arm.merged for arm in planned.arms} == {
        "none": 2, "logit": 2, "mine/sharpness=1": 1, "mine/sharpness=2": 1, "dkd": 2,
    }  # fmt: skip
    assert cells(planned)["mine/sharpness=1"].settings == (("sharpness", 1.0),)


def test_methods_with_different_defaults_can_be_compared() -> None:
    compared = plan(study(contrasts=(Compare("method", "mine", "logit"),), reference=(("temperature", 4.0),)))
    assert [each.name for each in compared.contrasts] == ["mine - logit"]


def test_a_setting_can_be_contrasted_and_swept_and_used_as_moderator_and_stratum() -> None:
    both = (Factor("sharpness", (1.0, 2.0)), Factor("stem", ("imagenet", "cifar")))
    held = {"reference": (("sharpness", 1.0), ("stem", "cifar")), "swept": ("sharpness", "stem")}
    factors = (*study().factors, *both)
    swept = plan(study(factors=factors, contrasts=(Compare("sharpness", 2.0, 1.0),), **held))
    assert [each.name for each in swept.contrasts] == ["sharpness=2 - sharpness=1"]
    assert [arm.name for arm in swept.arms if arm.cell.method == "mine"] == [
        "mine/sharpness=1/imagenet", "mine/sharpness=1/cifar", "mine/sharpness=2/cifar",
    ]  # fmt: skip
    moderated = plan(study(factors=factors, moderator="sharpness", strata=("sharpness",)))
    assert [each.name for each in moderated.contrasts] == [
        "sharpness=1/imagenet: mine - none", "sharpness=1/cifar: mine - none",
        "sharpness=2/imagenet: mine - none", "sharpness=2/cifar: mine - none",
        "imagenet: (mine - none): sharpness=2 - sharpness=1", "cifar: (mine - none): sharpness=2 - sharpness=1",
    ]  # fmt: skip
    where = Compare("stem", "cifar", "imagenet", where={"sharpness": 2.0})
    assert [each.name for each in plan(study(factors=factors, contrasts=(where,))).contrasts] == [
        "none: cifar - imagenet", "logit: cifar - imagenet",
        "mine/sharpness=2: cifar - imagenet", "dkd: cifar - imagenet",
    ]  # fmt: skip


def test_a_setting_is_tuned_for_the_methods_that_declare_it() -> None:
    ranges = (Range("sharpness", Uniform(1.0, 5.0)), Range("lr", LogUniform(0.01, 0.1)))
    planned = plan(study(tuning=Tuning(ranges, budget=12)))
    assert {each.name: [one.name for one in each.ranges] for each in planned.searches} == {
        "none": ["lr"], "logit": ["lr"], "mine": ["sharpness", "lr"], "dkd": ["lr"],
    }  # fmt: skip
    assert (
        "tuning.ranges has sharpness: its default 2.0 lies outside"
        in problems(study(tuning=Tuning((Range("sharpness", Uniform(3.0, 5.0)), ranges[1]), budget=12)))[0]
    )


@pytest.mark.parametrize(("given", "whole"), [
    ({"kd_weight": 2.0}, (1.0, 2.0)), ({"ce_weight": 0.0}, (0.0, 1.0)),
    ({"ce_weight": 0.5, "kd_weight": 3}, (0.5, 3.0)),
])  # fmt: skip
def test_loss_weights_replace_alpha_and_an_omitted_weight_is_1(
    given: dict[str, float], whole: tuple[float, float]
) -> None:
    found = cells(plan(study(cell=Cell(width=0.0625, **given))))
    for name in ("logit", "mine", "dkd"):
        assert (found[name].alpha, found[name].ce_weight, found[name].kd_weight) == (None, *whole)
    assert (found["none"].alpha, found["none"].ce_weight, found["none"].kd_weight) == (None, None, None)


def test_a_loss_weight_can_be_a_factor_and_alpha_is_rejected_beside_it() -> None:
    planned = plan(varying("kd_weight", 1.0, 2.0, contrasts=(Compare("kd_weight", 2.0, 1.0),)))
    assert [each.name for each in planned.contrasts] == [
        f"{name}: kd_weight=2 - kd_weight=1" for name in ("logit", "mine", "dkd")
    ]
    weighted = Cell(width=0.0625, kd_weight=2.0)
    assert problems(varying("alpha", 0.1, 0.9, cell=weighted)) == (
        "alpha is a factor while kd_weight is set; allowed: alpha, or ce_weight and kd_weight",
    )
    tuned = Tuning((Range("alpha", Uniform(0.1, 0.9)), Range("lr", LogUniform(0.01, 0.1))), budget=12)
    assert problems(study(cell=weighted, tuning=tuned))[0].startswith(
        "tuning.ranges has alpha for every method, but no such method of the study uses it"
    )


@pytest.mark.parametrize(("name", "levels"), [
    ("lr", (0.05, 0.1)), ("batch_size", (16, 32)), ("weight_decay", (0, 1e-4)), ("epochs", (2, 4)),
    ("momentum", (0.5, 0.9)), ("precision", ("float32", "bfloat16")), ("clip", (1, 2)), ("lr_min", (0, 1e-3)),
])  # fmt: skip
def test_a_recipe_factor_sets_the_students_recipe_and_gives_the_same_id_as_that_recipe(
    name: str, levels: tuple[Level, ...]
) -> None:
    strata = Screen(grace=1, reduction=2, min_peers=1, strata=("method", "epochs"))
    planned = plan(varying(name, *levels, screen=strata))
    alike: dict[str, str] = {}
    for level in levels:
        one = plan(study(recipe=replace(study().recipe, **{name: level}), screen=strata))
        declared = from_json(asdict(one.study))
        alike |= {trial.trial_id: f"{trial.arm} {level}" for trial in plan(declared).trials}
    assert {trial.trial_id for trial in planned.trials} == alike.keys()
    for trial in planned.trials:
        if trial.role == "teacher":
            assert trial.recipe == study().teacher_recipe
        else:
            assert trial.recipe == replace(study().recipe, **{name: trial.cell.level(name)})
    assert len({trial.recipe for trial in planned.trials if trial.role == "student"}) == len(levels)


def test_a_recipe_field_can_be_contrasted_and_used_as_moderator_and_reference() -> None:
    lr = plan(varying("lr", 0.05, 0.1, contrasts=(Compare("lr", 0.1, 0.05, where={"method": "mine"}),)))
    assert [each.name for each in lr.contrasts] == ["mine: lr=0.1 - lr=0.05"]
    by = plan(varying("batch_size", 16, 32, moderator="batch_size"))
    assert [each.name for each in by.contrasts][-1] == "(mine - none): batch_size=32 - batch_size=16"
    held = plan(varying("lr", 0.05, 0.1, reference=(("lr", 0.05),)))
    assert [each.weights for each in held.contrasts] == [(("mine/lr=0.05", 1.0), ("none/lr=0.05", -1.0))]


def test_a_setting_changes_only_the_ids_of_trials_that_have_it() -> None:
    before, after = (
        {
            trial.label: trial.trial_id
            for trial in plan(study(cell=Cell(width=0.0625, settings={"sharpness": level}))).trials
        }
        for level in (2.0, 3.0)
    )
    assert {label for label in before if before[label] != after[label]} == {
        label for label in before if label.startswith("mine")
    }
    assert before == {trial.label: trial.trial_id for trial in plan(study()).trials}  # also at its default


def test_loss_weights_are_part_of_the_id_of_arms_that_use_them() -> None:
    plain, weighted = plan(study()), plan(study(cell=Cell(width=0.0625, kd_weight=0.5, ce_weight=0.5)))
    assert at_seed(plain, "logit").trial_id != at_seed(weighted, "logit").trial_id
    assert at_seed(plain, "none").trial_id == at_seed(weighted, "none").trial_id


def test_a_new_version_of_a_method_changes_only_the_ids_of_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {trial.label: trial.trial_id for trial in plan(study()).trials}
    corrected = built_in() | {"dkd": replace(built_in()["dkd"], version=2)}
    for module in ("tune_kd.study.spec", "tune_kd.study.trial"):
        monkeypatch.setattr(f"{module}.built_in", lambda: corrected)
    after = {trial.label: trial.trial_id for trial in plan(study()).trials}
    assert {label for label in before if before[label] != after[label]} == {
        label for label in before if label.startswith("dkd")
    }


def test_a_study_with_methods_and_settings_round_trips_through_json() -> None:
    whole = check(varying("lr", 0.05, 0.1, cell=Cell(width=0.0625, kd_weight=2.0, settings={"sharpness": 1.5})))
    again = from_json(asdict(whole))
    assert again == whole and from_json(asdict(again)) == again
    ids = [[trial.trial_id for trial in plan(each).trials] for each in (whole, again)]
    assert ids[0] == ids[1]


FILE = """
from dataclasses import replace
from test_factors import MINE, varying
from tune_kd import Factor, Method

def study():
    other = Method("other", "tune_kd.training.methods.logit:Logit", settings={"temperature": 3.0, "margin": 2.0})
    varied = varying("lr", 0.05, 0.1, methods=(MINE, other))
    return replace(varied, factors=(*varied.factors, Factor("margin", (1.0, 3.0))))
"""


def test_settings_and_levels_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)

    def at(*settings: str) -> Study:
        return resolve(tmp_path / "mine.py", "test", settings=settings)

    several = at("cell.settings.sharpness=3", "cell.settings.warmup=0", "factors.lr=[0.1]")
    assert dict(several.cell.settings) == {"sharpness": 3.0, "warmup": 0.0} and several.levels("lr") == (0.1,)
    assert at('cell.settings={"sharpness": 3}').cell.settings == (("sharpness", 3.0),)
    for setting, words in (
        ("factors.sharpness=[1, 2]", "--set names 'factors.sharpness'; allowed here: factors.method, factors.lr"),
        ("factors.lr=[0.1, -1]", "factor lr is -1"),
        ("cell.settings.nce_k=3", "cell.settings names 'nce_k'; allowed: settings of methods"),
        ("cell.settings.sharpness=high", "--set cell.settings.sharpness is 'high'; allowed: a number"),
        ("cell.settings.sharpness=true", "--set cell.settings.sharpness is true; allowed: a number"),
        ("cell.settings=3", "--set cell.settings is 3; allowed: "),
        ("recipe.lr=0.5", "--set recipe.lr is 0.5, but lr is a factor; allowed: --set factors.lr=[...]"),
        ('recipe={"lr": 0.5}', "--set recipe.lr is 0.5, but lr is a factor"),
        ("cell.method=dkd", "--set cell.method is 'dkd', but method is a factor"),
        ("cell.settings.margin=9", "--set cell.settings.margin is 9, but margin is a factor"),
        ('cell.settings={"margin": 9}', "--set cell.settings.margin is 9, but margin is a factor"),
        ("recipe.lr=0.05", "--set recipe.lr is 0.05, but lr is a factor"),  # even the value that it already has
    ):
        with pytest.raises(UserError) as caught:
            at(setting)
        assert [words in problem for problem in caught.value.problems] == [True], caught.value.problems
    with pytest.raises(UserError) as caught:
        at("recipe.lr=1", "recipe.momentun=1")
    assert len(caught.value.problems) == 2


@given(
    st.dictionaries(st.sampled_from(["sharpness", "warmup", "target_weight"]), st.floats(-9, 9), min_size=1), st.data()
)
def test_an_id_does_not_depend_on_the_order_of_settings(values: dict[str, float], data: st.DataObject) -> None:
    turned = dict(data.draw(st.permutations(list(values.items()))))
    one, other = (
        [trial.trial_id for trial in plan(study(cell=Cell(width=0.0625, settings=each))).trials]
        for each in (values, turned)
    )
    assert one == other


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (varying("warmth", 1.0), ("factors names 'warmth'", "warmup, sharpness, epochs", "lr, lr_min")),
        (varying("sharpness", "x"), ("factor sharpness is 'x'", "a finite number")),
        (varying("sharpness", float("inf")), ("factor sharpness is inf", "a finite number")),
        (varying("sharpness", True), ("factor sharpness is True", "a finite number")),
        (varying("lr", 0.1, -0.1), ("factor lr is -0.1", "above 0")),
        (varying("lr", 0.1, 1e-5), ("lr_min is 0.0001 while lr is 1e-05", "lr_min from 0 to the smallest lr")),
        (varying("lr_min", 0.0, 0.2), ("lr_min is 0.2 while lr is 0.05",)),
        (varying("batch_size", 16.5), ("factor batch_size is 16.5", "a whole number")),
        (varying("batch_size", 1), ("factor batch_size is 1", "at least 2")),
        (varying("epochs", 2, 0), ("factor epochs is 0", "at least 1")),
        (varying("epochs", 2, 4), ("epochs is a factor while screen.strata lacks it",)),
        (varying("precision", "float8"), ("factor precision is 'float8'", "float32, tf32, bfloat16")),
        (varying("kd_weight", -1.0), ("factor kd_weight is -1.0", "0 or more")),
        (varying("nce_k", 4.0), ("factors names 'nce_k'",)),
        (study(cell=Cell(settings={"nce_k": 1.0})), ("cell.settings names 'nce_k'", "warmup, sharpness)")),
        (study(cell=Cell(settings={"temperature": 1.0})), ("cell.settings names 'temperature'", "not fields of cell")),
        (study(cell=Cell(settings={"lr": 1.0})), ("cell.settings names 'lr'",)),
        (study(cell=Cell(settings={"warmup": float("nan")})), ("cell.warmup is nan", "a finite number")),
        (study(cell=Cell(recipe=(("lr", 0.1),))), ("cell.recipe is set", "recipe for all arms")),
        (study(reference=(("sharpness", 1.0), ("x", 1.0))), ("reference names 'x'", "sharpness")),
        (study(swept=("sharpness",)), ("swept names 'sharpness'", "factors that have a reference (there are none)")),
        (study(strata=("x",)), ("strata names 'x'", "sharpness")),
        (
            study(contrasts=(Compare("method", "mine", "none", where={"sharpness": 1.0}),)),
            ("where of a contrast holds sharpness at 1.0", "no level of sharpness"),
        ),
        (study(methods=(MINE, MINE)), ("methods has 'mine' more than once",)),
        (study(methods=(MINE, replace(MINE, name="dkd"))), ("methods[1].name is 'dkd', the name of a built-in",)),
        (study(methods=(replace(MINE, loss=None),)), ("methods[0].loss is None", "FILE.py:CLASS")),
        (study(methods=(replace(MINE, version=0),)), ("methods[0].version is 0", "at least 1")),
        (
            study(methods=(replace(MINE, settings={"a b": 1.0}),)),
            ("methods[0].settings has 'a b'", "a Python identifier"),
        ),
        (study(methods=(replace(MINE, settings={"lambda": 1.0}),)), ("methods[0].settings has 'lambda'",)),
        (
            study(methods=(replace(MINE, settings={"seed": 1.0}),)),
            ("methods[0].settings has 'seed'", "not the name of another column or factor"),
        ),
        (study(methods=(replace(MINE, settings={"lr": 1.0}),)), ("methods[0].settings has 'lr'",)),
        (study(methods=(replace(MINE, settings={"w": float("nan")}),)), ("methods[0].settings has w nan",)),
    ],
)
def test_an_invalid_setting_or_recipe_field_is_reported_once(bad: Study, words: tuple[str, ...]) -> None:
    (found,) = (problem for problem in problems(bad) if all(word in problem for word in words))
    assert found.count("allowed: ") == 1


def test_all_invalid_settings_are_reported_at_once() -> None:
    bad = varying(
        "lr", -1.0, 0.5, "x", methods=(replace(MINE, settings={"seed": 1.0}),), cell=Cell(settings={"nce_k": 1.0})
    )
    found = problems(bad)
    for words in (
        "factor lr is -1.0",
        "factor lr is 'x'",
        "methods[0].settings has 'seed'",
        "cell.settings names 'nce_k'",
    ):
        assert sum(each.startswith(words) for each in found) == 1


def test_no_built_in_setting_has_the_name_of_a_trial_column() -> None:
    own = {*CELL_FIELDS, *RECIPE_FACTORS}
    of_responses = {"n", "mean", "sd", "low", "high", "control"}
    assert {*TRIALS.columns, *of_responses} <= COLUMNS | own and not COLUMNS & own
    for method in methods.built_in().values():
        assert not COLUMNS & set(method.defaults)


def test_a_budget_in_epochs_is_counted_in_trials_of_the_longest_arm() -> None:
    tuned = Tuning((Range("lr", LogUniform(0.01, 0.1)),), budget=40, budget_unit="epochs")
    longer = Screen(grace=1, reduction=2, min_peers=1, strata=("method", "epochs"))
    (found,) = problems(varying("epochs", 2, 8, screen=longer, tuning=tuned))
    assert "at least 11 trials (of 8 epochs a trial)" in found
    assert plan(varying("epochs", 2, 3, screen=longer, tuning=tuned)).searches


def test_rungs_are_checked_for_the_longest_arm_even_if_the_recipe_is_shorter() -> None:
    margins = Screen(grace=2, reduction=2, margin=(0.1, 0.1), strata=("method", "epochs"))
    assert check(varying("epochs", 2, 8, screen=margins, recipe=Recipe(epochs=1)))
    (found,) = problems(varying("epochs", 2, 8, screen=replace(margins, margin=(0.1,))))
    assert "one for each rung (2: 2, 4)" in found
    (found,) = problems(varying("epochs", 2, 8, screen=replace(margins, grace=9, margin=0.1)))
    assert found == "screen.grace is 9, longer than the budget of at most 8 epochs; allowed: 1 to 8"


def test_rungs_of_the_longest_arm_must_be_validated_epochs() -> None:
    screen = Screen(grace=3, reduction=2, strata=("method", "epochs"))
    recipe = Recipe(epochs=1, validate_every=2)
    (found,) = problems(varying("epochs", 2, 8, screen=screen, recipe=recipe))
    assert found.startswith("screen.grace is 3 (rungs: 3, 6) while recipe.validate_every is 2; allowed: a grace that")
    assert check(varying("epochs", 2, 8, screen=replace(screen, grace=4), recipe=recipe))

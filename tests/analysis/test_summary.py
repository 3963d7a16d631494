"""The summary answers a study's question in sentences that match its verdicts."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest

from search_spaces import ablation
from tune_kd.analysis import accuracy, contrasts, summary
from tune_kd.records.reader import Records
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, first_row
from tune_kd.records.tables import frame
from tune_kd.study.plan import plan
from tune_kd.study.spec import Cell, Compare, Confirm, Study

STEM = {"imagenet": 0.87, "cifar": 0.95}


def made(study: Study, gain: Callable[[Cell], float], run: str = "r") -> Records:
    """The records of a run with known true accuracies and a spread of 0.1 points between seeds."""
    drawn = np.random.default_rng(5)
    planned = plan(study, "0" * 64)
    rows = []
    for trial in planned.trials:
        value = STEM[trial.cell.stem] + gain(trial.cell) + 0.001 * drawn.standard_normal()
        rows.append(
            first_row(run, trial)
            | {"status": "completed", "epochs_run": trial.recipe.epochs, "test_accuracy_best": min(value, 1.0)}
        )
    record = {
        "study": asdict(study),
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
    }
    return Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {run: record})


def helps_under_one_stem(cell: Cell) -> float:
    """Logit gains a point with the CIFAR stem, half a point at T=16, and nothing with the other stem."""
    if cell.method != "logit" or cell.stem != "cifar":
        return 0.0
    return 0.005 if cell.temperature == 16 else 0.01


def test_each_question_of_the_ablation_has_its_sentence() -> None:
    said = summary.summary(made(ablation.study(), helps_under_one_stem)).sentences
    assert 3 <= len(said) <= 6
    logit, feature, change, stem, others = said
    assert stem.startswith("Stem cifar vs. stem imagenet: better by 7.9")
    assert " without distillation (95 % interval +7." in stem and stem.endswith("5 seeds).")
    assert logit.startswith("logit (T=4) vs. no distillation: inconclusive with stem imagenet (-0.0")
    assert " points ruled out; better by 0.9" in logit and "points with stem cifar (95 %" in logit
    assert feature.count("inconclusive with stem") == feature.count(", gains above 0.") == 2
    assert change.startswith("The effect of logit (T=4) vs. no distillation is higher by 1.0")
    assert " points with stem cifar than with stem imagenet (95 % interval +0." in change
    assert "F test of any effect of temperature: p = 0." in others and "p < 0.001 with stem cifar." in others
    assert others.startswith("4 of the 16 secondary contrasts are significant: ")
    assert "cifar: T=16 - T=4 (worse by 0.4" in others and "; 1 more. F test of any" in others


def test_without_true_effects_the_summary_states_what_is_ruled_out() -> None:
    said = " ".join(summary.summary(made(ablation.study(), lambda cell: 0.0)).sentences)
    assert (
        "Whether the effect of logit (T=4) vs. no distillation differs between stem imagenet and stem cifar is "
        "inconclusive (+0." in said
    )
    assert "None of the 16 secondary contrasts is significant." in said
    assert "logit (T=4) vs. no distillation: inconclusive" in said and "distillation: better" not in said


def test_a_study_with_one_seed_has_a_single_sentence() -> None:
    alone = replace(ablation.study(), confirm=Confirm(seeds=(1,)))
    assert summary.summary(made(alone, helps_under_one_stem)) == summary.Summary(
        ["One confirmation seed gives no estimate of spread, so no difference is judged."], [], []
    )


def test_verdicts_over_many_contexts_are_counted() -> None:
    study = ablation.study()
    pairs = replace(study.factors[0], name="student", levels=("resnet18", "resnet34"))
    many = replace(study, factors=(*study.factors[:2], pairs), contrasts=study.contrasts[1:2], moderator=None)
    (said,) = summary.summary(made(many, helps_under_one_stem)).sentences
    assert "over all 4 contexts, better in 2 and worse in 1" in said


def test_a_loss_in_a_context_that_is_not_shown_is_counted() -> None:
    study = ablation.study()
    pairs = replace(study.factors[0], name="student", levels=("resnet18", "resnet34"))
    many = replace(study, factors=(*study.factors[:2], pairs), contrasts=study.contrasts[1:2], moderator=None)
    (said,) = summary.summary(
        made(many, lambda cell: -0.01 * (cell.method == "logit" and cell.stem == "cifar"))
    ).sentences
    assert "over all 4 contexts, better in 0 and worse in 3" in said


def test_an_effect_that_is_a_larger_loss_is_called_lower_and_not_smaller() -> None:
    said = summary.summary(made(ablation.study(), lambda cell: -helps_under_one_stem(cell))).sentences
    assert "worse by 1.0" in said[0]
    assert said[2].startswith("The effect of logit (T=4) vs. no distillation is lower by 0.9")
    assert not any("smaller" in each for each in said)


def test_an_equivalent_effect_is_stated_with_its_margin() -> None:
    said = summary.summary(made(ablation.study(), lambda cell: 0.0), margin=0.02).sentences
    assert "no distillation is the same within 2 points with stem cifar and with stem imagenet (" in said[2]


def test_an_inconclusive_moderation_is_worded_as_rise_or_fall_and_not_gain_or_loss() -> None:
    records = made(ablation.study(), lambda cell: 0.0)
    assert ", increases above 0." in summary.summary(records).sentences[2]
    table = contrasts.contrasts(records).set_index("kind")
    assert table.loc["moderation", "rules_out"].str.match("increases above .* and .*decreases").all()
    assert table.loc["effect", "rules_out"].str.contains("increase|decrease").sum() == 0


def test_a_factor_without_a_spread_is_reported_as_not_tested() -> None:
    records = made(ablation.study(), lambda cell: 0.0)
    records.trials.loc[records.trials["stem"] == "cifar", "test_accuracy_best"] = 0.95
    others = summary.summary(records).sentences[-1]
    assert others.endswith(" with stem imagenet; not tested with stem cifar.")


def test_a_single_secondary_contrast_is_worded_in_the_singular() -> None:
    study = ablation.study()
    few = replace(study, factors=(*study.factors[1:],), contrasts=study.contrasts[3:4], moderator=None,
                  cell=replace(study.cell, stem="cifar"))  # fmt: skip
    (said,) = summary.summary(made(few, lambda cell: 0.0)).sentences
    assert said == "The secondary contrast is not significant."


def test_several_runs_are_named_and_tables_without_a_study_have_no_summary() -> None:
    one, other = (made(ablation.study(), helps_under_one_stem, run) for run in ("a", "b"))
    both = Records(*(_stacked(one, other, name) for name in ("trials", "epochs", "decisions")),
                   {**one.studies, **other.studies})  # fmt: skip
    assert [each[:3] for each in summary.summary(both).sentences] == ["a: "] * 5 + ["b: "] * 5
    assert summary.summary(replace(one, studies={})) == summary.Summary([], [], [])


def _stacked(one: Records, other: Records, name: str) -> object:
    import pandas as pd

    return pd.concat([getattr(one, name), getattr(other, name)], ignore_index=True)


def test_the_summary_states_that_verdicts_hold_for_this_test_set_and_one_teacher() -> None:
    records = made(ablation.study(), helps_under_one_stem)
    assert summary.summary(records).holds_for == [
        "These verdicts hold for this test set, which all arms and seeds share, and for one teacher of each kind."
    ]
    assert "interval may therefore exclude 0 although p is 0.05 or more" in summary.summary(records).method[0]
    assert (
        "unless the spread differs widely between arms or their accuracies are strongly correlated"
        in summary.summary(records).method[2]
    )


def test_the_factor_test_of_a_context_matches_the_f_test_of_statsmodels() -> None:
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    records = made(ablation.study(), helps_under_one_stem)
    table = contrasts.factors(records)
    found = table[(table["factor"] == "temperature") & (table["context"] == "cifar")].to_dict("records")[0]
    trials = accuracy.completed_trials(records)
    cifar = trials[trials["stem"] == "cifar"].assign(
        arm=lambda each: each["arm"].astype(object),
        seed=lambda each: each["seed"].astype(object),
        y=lambda each: each["test_accuracy_best"].astype(float),
    )
    pooled = cifar.assign(arm=cifar["arm"].where(cifar["method"] != "logit", "logit"))
    full, restricted = (ols("y ~ C(arm) + C(seed)", each).fit() for each in (cifar, pooled))
    expected = anova_lm(restricted, full).iloc[1]
    assert (found["df"], found["df_error"]) == (4, 24)
    assert found["F"] == pytest.approx(expected["F"])
    assert found["p"] == pytest.approx(expected["Pr(>F)"])


def test_intervals_of_accuracies_stay_within_0_and_1() -> None:
    table = accuracy.arms(made(ablation.study(), lambda cell: 0.0495 if cell.stem == "cifar" else 0.0))
    assert table["high"].max() == 1.0
    assert table["low"].min() >= 0.0


def test_the_teacher_table_has_a_row_for_the_effect_of_the_stem() -> None:
    one = contrasts.teachers_compared(made(ablation.study(), lambda cell: 0.0)).set_index("teacher")
    assert one.loc["imagenet/teacher", "n"] == 1
    effect = one.loc["stem cifar - imagenet"]
    expected = one.loc["cifar/teacher", "mean"] - one.loc["imagenet/teacher", "mean"]
    assert effect["estimate"] == pytest.approx(expected)
    assert effect[["low", "high", "p"]].isna().all()
    three = replace(ablation.study(), teacher_seeds=(1000, 1001, 1002))
    effect = (
        contrasts.teachers_compared(made(three, lambda cell: 0.0)).set_index("teacher").loc["stem cifar - imagenet"]
    )
    assert effect["n"] == 3
    assert 0.07 < effect["low"] < effect["estimate"] < effect["high"] < 0.09


def test_a_single_large_family_names_its_findings_and_counts_the_rest() -> None:
    records = made(ablation.study(), helps_under_one_stem)
    for contrast in records.study["contrasts"]:
        del contrast["family"]
    said = summary.summary(records).sentences
    assert len(said) <= 6
    assert any(each.startswith("Stem cifar vs. stem imagenet: better by 7.9") for each in said)
    assert said[-1] == "3 of the 15 other contrasts are significant."
    for contrast in records.study["contrasts"]:
        contrast["family"] = "primary"
    assert " other primary contrasts are" in summary.summary(replace(records)).sentences[-1]
    nothing = made(ablation.study(), lambda cell: 0.0 if cell.stem == "cifar" else 0.08)
    for contrast in nothing.study["contrasts"]:
        del contrast["family"]
    assert "None of the 22 contrasts is significant." in summary.summary(nothing, margin=1e-6).sentences


def test_findings_that_are_not_named_are_counted() -> None:
    records = made(ablation.study(), lambda cell: 0.0 if cell.method == "none" else 0.01 * (cell.temperature or 8.0))
    for contrast in records.study["contrasts"]:
        del contrast["family"]
    said = summary.summary(records).sentences
    found = contrasts.contrasts(records)["verdict"].isin(["better", "worse"]).sum()
    named = sum(len(re.findall("(?:better|worse|higher|lower) by", each)) for each in said[:-1])
    assert len(said) == 5 and found > named
    assert said[-1].startswith(f"{found - named} of the ") and said[-1].endswith(" other contrasts are significant.")


def test_equivalent_contrasts_count_as_no_difference() -> None:
    alike = made(ablation.study(), lambda cell: 0.0)
    rows = contrasts.contrasts(alike, margin=0.02)
    assert set(rows.loc[rows["family"] == "secondary", "verdict"]) == {"equivalent"}
    said = summary.summary(alike, margin=0.02).sentences
    assert said[-1].startswith("None of the 16 secondary contrasts is significant.")


def test_a_level_shared_by_two_factors_is_named_by_the_compared_factor() -> None:
    study = ablation.study()
    networks = ("resnet18", "resnet34")
    both = replace(
        study,
        factors=(
            study.factors[1],
            *(replace(study.factors[0], name=name, levels=networks) for name in ("student", "teacher")),
        ),
        contrasts=(Compare("teacher", "resnet34", "resnet18", where={"method": "feature"}),),
        moderator=None,
        reference=(),
    )
    (said,) = summary.summary(made(both, lambda cell: 0.0)).sentences
    assert said.startswith("Teacher resnet34 vs. resnet18: inconclusive with feature, ")
    assert "student" not in said


def test_only_rules_families_and_looks_that_occur_are_explained() -> None:
    study = ablation.study()
    whole = " ".join(summary.summary(made(study, lambda cell: 0.0)).method)
    assert "block model" in whole and "across strata" in whole and "secondary contrasts" in whole
    assert "looks" not in whole and "random effect" not in whole
    few = replace(study, contrasts=study.contrasts[1:2], moderator=None)
    (how, rate) = summary.summary(made(few, lambda cell: 0.0)).method
    assert "block model" in how and "across strata" not in how and "secondary" not in how + rate
    looks = replace(study, confirm=replace(study.confirm, looks=(3, 5)))
    assert "Both account for the declared looks." in summary.summary(made(looks, lambda cell: 0.0)).method[0]


def test_an_inconclusive_contrast_whose_interval_excludes_zero_has_its_adjusted_p() -> None:
    records = made(ablation.study(), lambda cell: 0.0016 * (cell.method == "logit"))
    rows = contrasts.contrasts(records).set_index("contrast")
    names = ["imagenet: logit - none", "cifar: logit - none"]
    (name,) = [each for each in names if rows.loc[each, "low"] > 0 and rows.loc[each, "verdict"] == "inconclusive"]
    logit = summary.summary(records).sentences[0]
    assert f", not significant after adjustment (p = {rows.loc[name, 'p_holm']:.3f})" in logit
    assert "ruled out" in logit  # of the other stem, whose interval contains 0

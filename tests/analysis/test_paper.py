"""The table of a paper: the arms that have a cell, its row and column, and the verdict that makes it bold."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from test_contrasts import made, noisy

from tune_kd.analysis import accuracy
from tune_kd.analysis.paper import COLUMNS, paper
from tune_kd.records.reader import Records
from tune_kd.study.spec import Cell, Compare, Confirm, Factor, Study
from tune_kd.study.tuning import LogUniform, Range, Tuning


def cells(records: Records, *row: str) -> dict[tuple[Any, ...], dict[Any, Any]]:
    """The cells of a table by row and column."""
    return {(*(each[name] for name in row), each["column"]): each for each in paper(records).to_dict("records")}


def test_a_cell_has_the_mean_deviation_and_seed_count_of_its_arm(study: Study) -> None:
    records = made(study, noisy(0.01))
    lost = (records.trials["arm"] == "cifar/feature") & (records.trials["seed"] == 4)
    records.trials.loc[lost, "status"] = "failed"
    found, arms = cells(records, "stem"), accuracy.arms(records).set_index("arm")
    assert list(found) == [
        (stem, column) for stem in ("imagenet", "cifar") for column in ("none", "logit T=2", "logit T=4", "feature")
    ]
    for each in found.values():
        assert (each["mean"], each["sd"], each["n"]) == tuple(arms.loc[each["arm"], ["mean", "sd", "n"]])
    assert found["cifar", "feature"]["n"] == 4


def pairs(*contrasts: Compare) -> Study:
    """Three pairs of student and teacher, as in the second published study, with one temperature."""
    return Study(
        name="pairs",
        question="Which teacher?",
        factors=(
            Factor("teacher", ("resnet50", "resnet34")),
            Factor("student", ("resnet18", "resnet34")),
            Factor("method", ("none", "logit", "feature")),
        ),
        contrasts=contrasts or (Compare("method", "logit", "none"),),
        confirm=Confirm(seeds=(1, 2)),
    )


def test_a_control_has_a_cell_in_the_row_of_each_teacher() -> None:
    found = cells(made(pairs(), noisy(0.01)), "teacher", "student")
    teachers, students = ("resnet50", "resnet34"), ("resnet18", "resnet34")
    assert set(found) == {(*row, method) for row in [(one, other) for one in teachers for other in students]
                          for method in ("none", "logit", "feature")}  # fmt: skip
    for student in students:
        assert {found[teacher, student, "none"]["arm"] for teacher in teachers} == {f"{student}/none"}


def test_a_context_with_only_a_control_has_a_row_without_a_teacher() -> None:
    records = made(pairs(), noisy(0.01))
    records = replace(
        records,
        trials=records.trials[
            ~(records.trials["student"].eq("resnet34") & records.trials["method"].ne("none")).fillna(False)
        ],
    )
    rows = paper(records)
    (alone,) = rows[rows["student"] == "resnet34"].to_dict("records")
    assert (alone["column"], alone["arm"]) == ("none", "resnet34/none")
    assert pd.isna(alone["teacher"]) and pd.isna(alone["teacher_accuracy"]) and pd.isna(alone["teacher_n"])


def test_levels_off_the_reference_have_a_column_only_if_a_contrast_compares_them(study: Study) -> None:
    factors = (*study.factors, Factor("alpha", (0.3, 0.5)))
    several = replace(
        study,
        factors=factors,
        reference=(("temperature", 4.0), ("alpha", 0.5)),
        contrasts=(Compare("method", "logit", "none"), Compare("alpha", 0.3, 0.5, where={"method": "logit"})),
    )
    columns = paper(made(several, noisy(0.01)))["column"].unique().tolist()
    assert columns == ["none", "logit T=4 alpha=0.3", "logit T=4 alpha=0.5", "feature alpha=0.5"]


def test_a_verdict_comes_only_from_a_primary_contrast_with_the_rows_control(study: Study) -> None:
    declared = (
        Compare("stem", "cifar", "imagenet", where={"method": "none"}),
        Compare("method", "logit", "none"),
        Compare("method", "feature", "none", family="secondary"),
        Compare("method", "feature", "logit"),
        Compare("temperature", 2.0, 4.0),
    )
    found = cells(made(replace(study, contrasts=declared), noisy(0.02)), "stem")
    verdicts = {key: each["verdict"] for key, each in found.items() if not pd.isna(each["verdict"])}
    assert verdicts == {(stem, "logit T=4"): "better" for stem in ("imagenet", "cifar")}


def test_contrasts_of_an_earlier_version_without_families_give_verdicts(study: Study) -> None:
    records = made(study, noisy(0.02))
    for contrast in records.study["contrasts"]:
        del contrast["family"], contrast["factor"]
    assert cells(records, "stem")["cifar", "logit T=4"]["verdict"] == "better"


def test_a_teachers_accuracy_is_the_mean_over_its_seeds(study: Study) -> None:
    records = made(replace(study, teacher_seeds=(1000, 1001)), noisy(0.01))
    teachers = (records.trials["role"] == "teacher") & (records.trials["stem"] == "cifar")
    records.trials.loc[teachers, "test_accuracy_best"] = [0.95, 0.97]
    found = cells(records, "stem")
    assert found["cifar", "none"]["teacher_n"] == 2
    assert found["cifar", "none"]["teacher_accuracy"] == pytest.approx(0.96)
    assert found["cifar", "none"]["teacher_accuracy_sd"] == pytest.approx(0.02 / 2**0.5)
    assert found["imagenet", "none"]["teacher_accuracy"] == 0.95


def test_tuned_and_default_arms_have_separate_columns(study: Study) -> None:
    tuning = Tuning((Range("lr", LogUniform(0.01, 0.5)),), budget=2, startup=1)
    tuned = replace(
        study, factors=(study.factors[1],), contrasts=(Compare("method", "logit", "none"),), moderator=None,
        tuning=tuning, cell=Cell(width=0.0625),
    )  # fmt: skip
    records = made(tuned, noisy(0.02))
    known = records.trials[records.trials["phase"] == "confirm"]
    chosen = known.assign(arm=known["arm"].str.replace("default", "tuned"), trial_id=known["trial_id"] + "t")
    records = replace(records, trials=pd.concat([records.trials, chosen], ignore_index=True))
    columns = {f"{method} {which}" for method in ("none", "logit", "feature") for which in ("default", "tuned")}
    found = cells(records)
    assert {column for (column,) in found} == columns
    assert [column for (column,), each in found.items() if each["verdict"] == "better"] == ["logit tuned"]


def test_columns_are_named_by_known_settings_if_the_method_is_missing(study: Study) -> None:
    records = made(study, noisy(0.01))
    records.trials["method"] = None
    assert "T=2" in set(paper(records)["column"])


@pytest.mark.parametrize("what", ["no study", "one arm", "nothing completed"])
def test_the_table_is_empty_if_nothing_can_be_compared(study: Study, what: str) -> None:
    records = made(study, noisy(0.01))
    if what == "no study":
        records = replace(records, studies={})
    elif what == "one arm":
        records = replace(records, trials=records.trials[records.trials["arm"] == "cifar/none"])
    else:
        records.trials["status"] = "pending"
    assert paper(records).empty
    assert list(paper(records).columns) == COLUMNS.split()

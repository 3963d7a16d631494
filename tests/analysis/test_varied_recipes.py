"""Arms that differ in a declared recipe field are compared. The note of a contrast names any other difference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_summary import made

from conftest import tiny
from tune_kd.analysis import calibrate, contrasts, measures, simulate, summary
from tune_kd.records.reader import Records
from tune_kd.records.schema import EPOCHS
from tune_kd.records.tables import frame
from tune_kd.reporting import figures
from tune_kd.reporting.report import report
from tune_kd.study.methods import Method
from tune_kd.study.spec import Cell, Compare, Confirm, Factor, Level, Study
from tune_kd.system.errors import UserError


def varying(name: str, *levels: Level, **changes: Any) -> Study:
    few = replace(
        tiny(),
        factors=(Factor("method", ("none", "logit")), Factor(name, levels)),
        contrasts=(Compare("method", "logit", "none"), Compare(name, levels[1], levels[0], where={"method": "none"})),
        moderator=None,
        reference=(),
        screen=replace(tiny().screen, strata=("method", "epochs")),
        confirm=Confirm(seeds=(1, 2, 3, 4, 5)),
    )
    return replace(few, **changes)


def gaining(cell: Cell) -> float:
    """Logit gains a point, and the second level of the other factor half a point."""
    second = (0.1, 32, 4, 1e-3, "bfloat16", 0.95)
    return 0.01 * (cell.method == "logit") - 0.1 + 0.005 * any(level in second for _, level in cell.recipe)


LEVELS: list[tuple[str, tuple[Level, Level]]] = [
    ("lr", (0.05, 0.1)), ("batch_size", (16, 32)), ("epochs", (2, 4)), ("weight_decay", (5e-4, 1e-3)),
    ("precision", ("float32", "bfloat16")), ("momentum", (0.9, 0.95)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "levels"), LEVELS)
def test_a_recipe_field_is_judged_alone_and_as_a_moderator(name: str, levels: tuple[Level, Level]) -> None:
    table = contrasts.contrasts(made(varying(name, *levels), gaining)).set_index("contrast")
    assert set(table["note"]) == {""} and set(table["verdict"]) == {"better"}
    (of_recipe,) = (contrast for contrast in table.index if contrast.startswith("none: "))
    assert table.loc[of_recipe, "estimate"] == pytest.approx(0.005, abs=0.002)
    both = contrasts.contrasts(made(varying(name, *levels, moderator=name), gaining))
    assert set(both["note"]) == {""} and both["kind"].tolist().count("moderation") == 1


def altered(records: Records, arm: str, column: str, value: object) -> Records:
    """The records, with another value in the trials of one arm."""
    trials = records.trials.copy()
    trials.loc[trials["arm"] == arm, column] = value
    return replace(records, trials=trials)


@pytest.mark.parametrize(("column", "value", "words"), [
    ("recipe_id", "x", "recipe_id is "), ("lr", 0.4, "lr is 0.05 and 0.4"), ("epochs_planned", 1, "epochs_planned is "),
    ("dataset", "cifar10", "dataset is digits and cifar10"), ("data_digest", "1", "data_digest is "),
])  # fmt: skip
def test_arms_with_an_undeclared_difference_are_not_judged_and_the_note_names_the_field(
    column: str, value: object, words: str
) -> None:
    records = altered(made(varying("lr", 0.05, 0.1), gaining), "logit/lr=0.05", column, value)
    table = contrasts.contrasts(records).set_index("contrast")
    assert table.loc["lr=0.05: logit - none", "verdict"] == "not judged"
    assert words in table.loc["lr=0.05: logit - none", "note"]
    assert table.loc["lr=0.1: logit - none", "verdict"] == "better"


def test_an_effect_needs_equal_levels_of_the_moderator() -> None:
    study = varying("epochs", 2, 4, moderator="epochs", contrasts=(Compare("method", "logit", "none"),))
    records = altered(made(study, gaining), "logit/epochs=2", "epochs_planned", 1)
    table = contrasts.contrasts(records).set_index("contrast")
    assert "epochs_planned is " in table.loc["epochs=2: logit - none", "note"]


def test_recipe_fields_can_be_compared_without_a_declared_contrast() -> None:
    for name, (first, second) in LEVELS:
        records = made(varying(name, first, second), gaining)
        table = contrasts.compare(records, name, second, first)
        assert table["context"].tolist() == ["none", "logit"]
        assert table["estimate"].tolist() == pytest.approx([0.005, 0.005], abs=0.002)
        assert len(contrasts.compare(records, "method", "logit", "none")) == 2
    with pytest.raises(UserError, match="factor is 'clip'; allowed: a column of the trials"):
        contrasts.compare(records, "clip", 1.0, 2.0)


def test_methods_with_different_default_settings_are_compared() -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"temperature": 3.0, "weight": 7.0})
    other = replace(mine, name="other", settings={"temperature": 2.0, "weight": 9.0})
    study = varying("lr", 0.05, 0.1, methods=(mine, other), contrasts=(Compare("method", "mine", "other"),))
    study = replace(study, factors=(Factor("method", ("none", "mine", "other")), study.factors[1]))
    records = made(study, gaining)
    assert contrasts.contrasts(records)["note"].tolist() == ["", ""]
    assert contrasts.compare(records, "method", "mine", "other")["context"].tolist() == ["0.05", "0.1"]


def test_a_method_setting_is_a_float_column_that_is_null_where_it_does_not_apply() -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"weight": 7})
    study = varying("weight", 1, 2, methods=(mine,), contrasts=(Compare("weight", 2, 1),))
    study = replace(study, factors=(Factor("method", ("none", "mine")), study.factors[1]))
    records = made(study, lambda cell: 0.01 * (cell.level("weight") == 2) - 0.1)
    students = records.trials[records.trials["role"] == "student"].drop_duplicates("arm").set_index("arm")
    assert records.trials["weight"].dtype == "float64"
    assert students["weight"].dropna().to_dict() == {"mine/weight=1": 1.0, "mine/weight=2": 2.0}
    (row,) = contrasts.contrasts(records).to_dict("records")
    assert (row["contrast"], row["verdict"]) == ("weight=2 - weight=1", "better")
    assert contrasts.compare(records, "weight", 2.0, 1.0)["estimate"].tolist() == pytest.approx([0.01], abs=0.002)


def test_a_stratum_without_a_column_in_the_trials_does_not_split_the_arms() -> None:
    study = varying("lr", 0.05, 0.1, strata=("stem", "momentum", "kd_weight"))
    assert set(contrasts.contrasts(made(study, gaining))["rule"]) == {"block model"}


def test_the_summary_names_recipe_levels() -> None:
    said = " ".join(summary.summary(made(varying("lr", 0.05, 0.1), gaining)).sentences)
    assert "lr=0.1 vs. lr=0.05: better by 0.5" in said and "with lr=0.05" in said


def test_a_response_to_a_recipe_field_has_the_control_of_each_level() -> None:
    for name, (first, second) in LEVELS:
        if isinstance(first, str):
            continue
        study = varying(name, first, second)
        study = replace(study, factors=(*study.factors, Factor("temperature", (2.0, 4.0))), reference=())
        records = made(study, gaining)
        assert measures.responses(records) == ["temperature", "alpha", name]
        table = measures.response(records, name)
        assert table["n"].tolist() == [5] * 6 and table["method"].tolist() == ["none"] * 2 + ["logit"] * 4
        assert table[name].tolist() == [first, second] * 3
        assert table["control"].isna().tolist() == [True] * 2 + [False] * 4  # the control's own rows have no control
        assert table["control"].tolist()[2:] == pytest.approx(table["mean"].tolist()[:2] * 2)
        by_temperature = measures.response(records, "temperature")
        assert by_temperature["n"].tolist() == [5] * 4 and by_temperature["control"].nunique() == 2


def test_a_response_does_not_mix_arms_that_differ_in_another_setting() -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"weight": 7.0, "power": 1.0})
    factors = (Factor("method", ("none", "mine")), Factor("weight", (1.0, 2.0)), Factor("power", (1.0, 2.0, 3.0)))
    study = varying("lr", 0.05, 0.1, methods=(mine,), contrasts=())
    study = replace(study, factors=(*factors, study.factors[1]))
    records = made(study, gaining)
    assert measures.responses(records) == ["temperature", "alpha", "weight", "power", "lr"]
    for name, count in (("weight", 2), ("power", 3), ("lr", 2)):
        table = measures.response(records, name)
        assert set(table["n"]) == {5} and len(table) == 12 + 2 * (name == "lr")
        assert not table.duplicated(["method", "weight", "power", "lr"]).any()
        assert table[name].nunique() == count


def test_an_arm_with_an_undeclared_recipe_difference_is_left_out_of_the_response() -> None:
    records = altered(made(varying("lr", 0.05, 0.1), gaining), "logit/lr=0.1", "recipe_id", "x")
    assert measures.response(records, "lr")["method"].tolist() == ["none", "none"]


def test_gaps_and_the_target_accuracy_use_the_control_that_the_study_declares() -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit")
    study = varying("lr", 0.05, 0.1, methods=(mine,), control="logit", contrasts=(Compare("method", "mine", "logit"),))
    study = replace(study, factors=(Factor("method", ("none", "logit", "mine")), study.factors[1]))
    records = made(study, gaining)
    gaps = measures.gaps(records)
    assert gaps["arm"].tolist() == ["mine/lr=0.05", "mine/lr=0.1"]
    assert gaps["gain"].tolist() == pytest.approx([-0.01, -0.01], abs=0.002)
    trials = records.trials.assign(val_accuracy_best=[0.9 if "logit" in arm else 0.5 for arm in records.trials["arm"]])
    assert measures.target_accuracy(replace(records, trials=trials)) == pytest.approx(0.99 * 0.9)
    without = Records(records.trials, records.epochs, records.decisions, {})
    assert set(measures.gaps(without)["arm"]) == {"logit/lr=0.05", "logit/lr=0.1", "mine/lr=0.05", "mine/lr=0.1"}


def test_a_report_has_a_table_and_a_figure_for_each_varied_number(tmp_path: Path) -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"weight": 7.0})
    factors = (
        Factor("method", ("none", "mine")),
        Factor("weight", (1.0, 20.0)),
        Factor("precision", ("float32", "tf32")),
    )
    study = varying("epochs", 2, 4, methods=(mine,), contrasts=())
    reference = (("epochs", 2), ("momentum", 0.9), ("weight", 1.0), ("temperature", 4.0))
    report(reportable(replace(study, factors=(*factors, study.factors[1]), reference=reference)), tmp_path)
    for kind, folder in (("csv", "tables"), ("svg", "figures")):
        found = {path.stem for path in (tmp_path / folder).glob(f"response_*.{kind}")}
        assert found == {"response_weight", "response_epochs"}
    assert "Accuracy by weight" in (tmp_path / "report.md").read_text()
    paper = pd.read_csv(tmp_path / "tables" / "paper.csv")  # at the reference
    assert paper["column"].tolist() == [
        "none float32 epochs=2", "none tf32 epochs=2", "mine weight=1 float32 epochs=2", "mine weight=1 tf32 epochs=2",
    ]  # fmt: skip
    report(reportable(varying("lr", 0.05, 0.1)), tmp_path)  # for another study: no rows are left
    assert {path.stem for path in tmp_path.glob("*/response_*")} == {"response_lr"}


def test_recipe_strata_work_in_figures_simulations_and_calibration() -> None:
    study = varying("epochs", 2, 4, strata=("epochs", "method"))
    records = made(study, gaining)
    key, rows = {"run": "r", "attempt": 1}, records.trials.to_dict("records")
    curves = [key | {"trial_id": row["trial_id"], "epoch": epoch, "val_accuracy": 0.5 + epoch * row["seed"] / 100}
              for row in rows for epoch in range(1, row["epochs_planned"] + 1)]  # fmt: skip
    records = replace(records, epochs=frame(EPOCHS, [dict.fromkeys(EPOCHS.columns) | row for row in curves]))
    (picture,) = (each for each in figures.draw(records) if each.name == "rank_correlation")
    assert "in 4 strata" in picture.alternative
    found = simulate.curves(records, study, study.screen.strata)
    assert sorted(found.strata) == ["logit/2", "logit/4", "none/2", "none/4"]
    with pytest.raises(UserError, match=r"columns of the curves .*method.*epochs, lr"):
        simulate.curves(records, study, ("momentum",))
    assert calibrate.calibrate(study, 10).scenarios


def reportable(study: Study) -> Records:
    """The records of a run, with the entry on data in `study.json`."""
    records = made(study, gaining)
    records.studies["r"]["data"] = {"name": "digits", "digest": "0" * 64}
    return records

"""Reading tables: a table matches the schema, or the error says what is wrong with it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import tune_kd
from conftest import tiny
from tune_kd.records.reader import check, load, rows as rows_of
from tune_kd.records.schema import DECISIONS, EPOCHS, PANDAS, SCHEMAS, TRIALS, Schema, as_further
from tune_kd.records.tables import arrow, frame, to_parquet
from tune_kd.system.characters import CONTROL
from tune_kd.system.errors import UserError


def trial(number: int, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(TRIALS.columns) | {
        "run": "r", "trial_id": f"t{number}", "arm": "cifar/none", "phase": "confirm", "role": "student",
        "seed": number, "status": "completed",
        "epochs_run": 2, "epochs_planned": 2, "test_accuracy_best": 0.5 + number / 100,
    }  # fmt: skip
    return row | values


def epoch(number: int, of: int, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(EPOCHS.columns) | {"run": "r", "trial_id": f"t{of}", "epoch": number, "val_accuracy": 0.5}
    return row | values


def write(folder: Path, run: str = "r", **tables: pd.DataFrame) -> Path:
    """A run's folder with two trials of two epochs by default; `tables` replaces some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "trials": frame(TRIALS, [trial(number, run=run) for number in (1, 2)]),
        "epochs": frame(EPOCHS, [epoch(number, of, run=run) for of in (1, 2) for number in (1, 2)]),
        "decisions": frame(DECISIONS, []),
    }
    for name, table in (made | tables).items():
        table.to_parquet(folder / f"{name}.parquet")
    record = {"run": run, "study": asdict(tiny()), "contrasts": [], "data": {"name": "digits"}}
    (folder / "study.json").write_text(json.dumps(record | {"arms": [{"name": "cifar/none", "role": "control"}]}))
    return folder


def test_a_run_is_read_with_its_types_by_path_and_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "runs" / "r")
    for records in (tune_kd.load(folder), load("r", out=tmp_path / "runs"), load(folder / "trials.parquet")):
        assert records.runs == ["r"]
        for schema in SCHEMAS:
            table = getattr(records, schema.name)
            assert list(table.columns) == list(schema.in_parquet)
            assert [str(each) for each in table.dtypes] == [PANDAS[kind] for kind in schema.in_parquet.values()]
    assert records.study["run"] == "r"


def test_trials_written_to_parquet_round_trip_through_load(tmp_path: Path) -> None:
    folder = write(tmp_path / "r")
    rows = [
        trial(1, temperature=4.0, alpha=0.5, val_accuracy=0.25),
        trial(2, peak_memory_bytes=2**40, further=as_further({"weight": 1000.0, "precision": "tf32"})),
    ]
    more = {"weight": float, "precision": str}
    (folder / "trials.parquet").write_bytes(to_parquet(arrow(TRIALS, rows, more)))
    found = load(folder).trials
    pd.testing.assert_frame_equal(found, frame(TRIALS, rows), check_like=True)
    assert found["weight"].tolist()[1:] == [1000.0] and found["weight"].isna().tolist() == [True, False]
    assert rows_of(TRIALS, found) == rows


def test_several_runs_are_concatenated_and_can_be_selected_by_name(tmp_path: Path) -> None:
    records = load(write(tmp_path / "a", "a"), write(tmp_path / "b", "b"))
    assert records.runs == ["a", "b"]
    assert len(records.trials) == 4
    assert set(records.studies) == {"a", "b"}
    assert records.of("b").trials["run"].tolist() == ["b", "b"]
    assert records.of("b").study["run"] == "b"
    with pytest.raises(ValueError, match=r"select one with `of\(run\)`"):
        _ = records.study


def test_columns_that_an_earlier_version_did_not_write_are_null(tmp_path: Path) -> None:
    epochs = frame(EPOCHS, [epoch(1, 1)]).drop(columns=list(EPOCHS.optional))
    read = load(write(tmp_path / "r", epochs=epochs)).epochs
    assert read["views_answered"].dtype == "Int64"
    assert read["answer_seconds"].dtype == "float64"
    assert read[list(EPOCHS.optional)].isna().all(axis=None)


def changed(column: str, values: list[Any]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.assign(**{column: values})


BROKEN: list[tuple[str, str, Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    ("no columns", "trials", lambda table: table.drop(columns=["seed", "ece"]), "lacks the columns seed, ece; has"),
    ("text for a number", "trials", changed("seed", ["1", "2"]), r"seed is str.*, such as '1'; expected int64"),
    ("a number for text", "trials", changed("arm", [1.5, 2.5]), r"arm is float64, such as 1\.5; expected text"),
    ("half a seed", "trials", changed("seed", [1.0, 2.5]), r"1 of 2 rows .* got 2\.5 in row 1; expected whole numbers"),
    ("infinite", "epochs", changed("val_loss", [1, 2, np.inf, 1]), r"1 of 4 rows .* got inf in row 2; expected finite"),
    ("no arm", "trials", changed("arm", ["a", None]), r"arm: 1 of 2 rows break a rule.*expected a value in every row"),
    ("done", "trials", changed("status", ["done", "completed"]), r"got 'done' in row 0; expected one of pending, run"),
    ("percent", "trials", changed("test_accuracy_best", [95.0, 0.9]), r"got 95\.0 in row 0; expected a fraction"),
    ("stopped, yet accurate", "trials", changed("status", ["stopped", "completed"]),
     r"test_accuracy_best: 1 of 2 rows .* expected null unless status is completed"),
    ("completed, yet short", "trials", changed("epochs_run", [2, 1]), "got 1 in row 1; expected completed only if"),
    ("nobody", "trials", lambda table: table.head(0), "has no rows; expected one row per trial"),
    ("a huge seed", "trials", changed("seed", [1.0, 2.0**63]), "1 of 2 rows .* expected whole numbers"),
    ("twice", "trials", changed("trial_id", ["t1", "t1"]), r"run, trial_id: 1 of 2 rows .* got \('r', 't1'\) in row 1"),
    ("a gap", "epochs", changed("epoch", [1, 2, 1, 3]), r"epoch: 1 of 2 trials .*; t2 has 2 from 1 to 3"),
    ("a command", "trials", changed("arm", ["a\x1b[2J", "b"]),
     r"arm: 1 of 2 rows break a rule; got 'a\\x1b\[2J' in row 0; expected text without control characters"),
    ("a name in two lines", "epochs", changed("trial_id", ["t1", "t1", "a\nb", "a\nb"]), r"got 'a\\nb' in row 2, "),
    ("a stranger", "epochs", changed("trial_id", ["t1", "t1", "x", "x"]), r"1 of 2 rows .*'x'\)"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "change", "says"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_rows_that_break_the_schema_are_rejected_with_their_count_and_examples(
    tmp_path: Path, table: str, change: Callable[[pd.DataFrame], pd.DataFrame], says: str
) -> None:
    folder = write(tmp_path / "r")
    whole = pd.read_parquet(folder / f"{table}.parquet")
    change(whole).to_parquet(folder / f"{table}.parquet")
    with pytest.raises(UserError, match=says) as caught:
        load(folder)
    assert str(folder / f"{table}.parquet") in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "r")
    trials = pd.read_parquet(folder / "trials.parquet")
    trials.assign(status="done", phase="later").to_parquet(folder / "trials.parquet")
    (folder / "decisions.parquet").unlink()
    with pytest.raises(UserError) as caught:
        load(folder, tmp_path / "nowhere", folder)
    problems = caught.value.problems
    assert len(problems) == 2  # each problem once
    assert "decisions.parquet is missing; `tune_kd resume" in problems[0]
    assert "nowhere'; allowed: a run's folder" in problems[1]
    write(folder)
    trials.assign(status="done", phase="later").to_parquet(folder / "trials.parquet")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [*("phase", "status", "test_accuracy_best")]


def test_a_run_given_twice_is_rejected(tmp_path: Path) -> None:
    folder = write(tmp_path / "r")
    with pytest.raises(UserError, match="RUN 'r' is given more than once"):
        load(folder, folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_table_is_rejected_with_a_remedy(tmp_path: Path, cut: int) -> None:
    folder = write(tmp_path / "r")
    path = folder / "epochs.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"epochs\.parquet cannot be read .*rewrites the tables from the ledger"):
        load(folder)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEMAS), st.data())
def test_a_table_of_valid_rows_passes_the_check_unchanged(schema: Schema, data: st.DataObject) -> None:
    def value(name: str, kind: type) -> st.SearchStrategy[Any]:
        if name in schema.levels:
            fits = st.sampled_from(schema.levels[name])
        elif name in schema.fractions:
            fits = st.floats(0, 1)
        else:
            text = st.text(max_size=3) if name in schema.free else st.text(max_size=3).map(lambda s: CONTROL.sub("", s))
            fits = {str: text, int: st.integers(-9, 9), float: st.floats(-9, 9)}[kind]
        never = name in (*schema.key, *schema.needed)
        return fits if never else st.none() | fits

    row = st.fixed_dictionaries({name: value(name, kind) for name, kind in schema.in_parquet.items()})
    rows = data.draw(st.lists(row, max_size=4, unique_by=lambda row: tuple(row[name] for name in schema.key)))
    for each in rows:
        for name in schema.only_completed:
            each[name] = each[name] if each["status"] == "completed" else None
        if schema is TRIALS:
            each["epochs_planned"] = each["epochs_run"]
    table = frame(schema, rows)
    checked, problems = check(schema, table)
    assert problems == []
    pd.testing.assert_frame_equal(checked, table)


def lacking(record: dict[str, Any]) -> None:
    del record["contrasts"], record["study"]["scale"]


def fewer_contrasts(record: dict[str, Any]) -> None:
    record["contrasts_sha256"] = "0" * 64


def another_study(record: dict[str, Any]) -> None:
    record["study_sha256"] = "0" * 64


def another_run(record: dict[str, Any]) -> None:
    record["run"] = "x"


def another_arm(record: dict[str, Any]) -> None:
    record["arms"][0]["name"] = "a"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (another_run, "study.json: run: 2 of 2 rows break a rule; got 'r' in row 0, 'r' in row 1; expected 'x'"),
        (
            another_arm,
            "arm: 2 of 2 rows break a rule; got 'cifar/none' in row 0, 'cifar/none' in row 1; expected one of",
        ),
        (lacking, "study.json lacks contrasts, study.scale; restore the file"),
        (fewer_contrasts, "its hash does not match the contrasts, so the file was changed after the run began"),
        (another_study, "its hash does not match the study"),
    ],
)
def test_a_changed_or_incomplete_study_record_is_rejected(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = write(tmp_path / "r") / "study.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        load(path.parent)
    assert says in str(caught.value)


def test_control_characters_in_a_study_record_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "r") / "study.json"
    record = json.loads(path.read_text())
    record["versions"] = {"tor\x07ch": "2.0\x9b"}
    record["git_commit"] = "a\n\x1b[31mred\u202e?"
    path.write_text(json.dumps(record))
    study = load(path.parent).study
    assert study["git_commit"] == "a\n\u241b[31mred\ufffd?"
    assert study["versions"] == {"tor\u2407ch": "2.0\ufffd"}
    assert study["study"]["deviation"] == tiny().deviation


def test_the_pandas_index_of_a_table_is_dropped(tmp_path: Path) -> None:
    """Concatenate two halves: pandas keeps an index with duplicate numbers."""
    trials = frame(TRIALS, [trial(1), trial(2)])
    halves = pd.concat([trials.head(1), trials.tail(1).reset_index(drop=True)])
    assert load(write(tmp_path / "r", trials=halves)).trials.index.tolist() == [0, 1]


def test_a_run_name_that_points_to_another_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study.json: run is '\.\./\.\./x', which is not a valid value"):
        load(write(tmp_path / "r", "../../x"))
    (tmp_path / "r" / "study.json").unlink()
    with pytest.raises(UserError, match=r"RUN holds a run named '\.\./\.\./x'; allowed: letters"):
        load(tmp_path / "r")


def test_a_derived_table_is_computed_once_per_records_and_returned_as_a_copy(finished: Path) -> None:
    records, made = load(finished), list[int]()

    def make() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"x": [1, 2]})

    first = records.kept("table", make)
    first.loc[0, "x"] = 9
    assert records.kept("table", make)["x"].tolist() == [1, 2] and made == [1]
    other = replace(records, trials=records.trials.head(1))
    assert other.kept("table", make)["x"].tolist() == [1, 2] and made == [1, 1]
    (run,) = records.runs
    assert records.of(run) is records

"""Further settings of trials are JSON in the ledger and columns in Parquet. Invalid ones are refused in both."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from test_ledger import CONTRACT

from bench import Bench
from conftest import tiny
from tune_kd.records import ledger as ledgers, rebuild
from tune_kd.records.ledger import Ledger
from tune_kd.records.reader import check, rows as rows_of
from tune_kd.records.run_folder import Run, create
from tune_kd.records.schema import TRIALS, as_further
from tune_kd.records.sqlite_file import creating
from tune_kd.records.tables import frame
from tune_kd.study.methods import Method
from tune_kd.study.spec import Factor
from tune_kd.study.trial import FURTHER
from tune_kd.system.errors import CorruptFile


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def pending(trial_id: str, **values: Any) -> dict[str, Any]:
    """A row that readers accept."""
    least = {"run": "r", "arm": "a", "phase": "confirm", "role": "student", "seed": 1, "status": "pending"}
    return {"trial_id": trial_id, **least, **values}


COUNTER = count()
FURTHER_ROWS = [
    pending("a"),
    pending("b", further=as_further({"weight": 2, "precision": "tf32"})),
    pending("c", further=as_further({"weight": 0.5, "momentum": 0.0})),
]


def test_each_further_setting_is_a_column_that_is_null_where_it_does_not_apply(ledger: Ledger, tmp_path: Path) -> None:
    for row in FURTHER_ROWS:
        ledger.put(TRIALS, row)
    ledger.write_tables(tmp_path)
    table = pd.read_parquet(tmp_path / "trials.parquet")
    assert list(table)[: len(TRIALS.in_parquet)] == list(TRIALS.in_parquet) and FURTHER not in table
    assert [str(table[name].dtype) for name in ("weight", "momentum", "precision")] == ["float64", "float64", "string"]
    assert table["weight"].isna().tolist() == [True, False, False] and table["weight"].tolist()[1:] == [2.0, 0.5]
    assert table["precision"].tolist() == [pd.NA, "tf32", pd.NA]
    pd.testing.assert_frame_equal(table, frame(TRIALS, ledger.rows(TRIALS))[list(table)])


def test_a_further_setting_of_two_types_is_rejected_as_corrupt(ledger: Ledger) -> None:
    ledger.put(TRIALS, pending("a", further=as_further({"weight": 2.0})))
    ledger.put(TRIALS, pending("b", further=as_further({"weight": "heavy"})))
    with pytest.raises(CorruptFile, match="further settings that no run writes"):
        ledger.table(TRIALS)


def test_more_than_1000_further_settings_are_rejected(ledger: Ledger) -> None:
    for number in range(2):
        ledger.put(TRIALS, pending(f"{number}", further=as_further({f"s{number}_{each}": 1.0 for each in range(501)})))
    with pytest.raises(CorruptFile, match="further settings that no run writes"):
        ledger.table(TRIALS)
    more = pd.DataFrame({f"s{each}": [1.0] for each in range(1002)})
    wide = pd.concat([frame(TRIALS, [pending("a")]), more], axis=1)
    _, problems = check(TRIALS, wide)
    assert "expected names of settings, 1000 at most" in problems[0]


@given(st.lists(st.dictionaries(
    st.sampled_from(["weight", "momentum", "nce_k"]), st.floats(allow_nan=False, allow_infinity=False), max_size=3,
), max_size=4))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_with_further_settings_round_trip_through_the_table(tmp_path: Path, every: list[dict[str, float]]) -> None:
    with closing(Ledger(tmp_path / f"{next(COUNTER)}.sqlite")) as ledger:
        for number, known in enumerate(every):
            ledger.put(TRIALS, pending(f"t{number}", further=as_further(known)))
        written, table = ledger.rows(TRIALS), ledger.table(TRIALS)
    checked, problems = check(TRIALS, table.to_pandas())
    assert problems == [] and rows_of(TRIALS, checked) == written


def test_a_ledger_of_an_earlier_version_is_used_without_the_further_column(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as made:
        for statement in creating(earlier=True):
            made.execute(statement)
    before = path.read_bytes()
    for number in range(2):  # reopened as a ledger of the earlier version
        with closing(Ledger(path)) as earlier:
            earlier.put(TRIALS, pending(f"t{number}"))
            earlier.write_tables(tmp_path)
            assert [row["further"] for row in earlier.rows(TRIALS)] == [None] * (number + 1)
            earlier.check()
    assert path.read_bytes() != before
    with closing(sqlite3.connect(path)) as found:
        _, *names, crc = [column for _, column, *_ in found.execute("PRAGMA table_info(trials)")]
    assert (names, crc) == ([*CONTRACT["trials"].split(), "teacher_digest", "weights_digest", "host", "started"], "crc")
    assert list(pd.read_parquet(tmp_path / "trials.parquet")) == list(TRIALS.in_parquet)


@pytest.mark.parametrize("text", [
    "{", "[]", "1", "null", '"x"', "[" * 10_000, '{"a": 1}', '{"a": null}', '{"a": true}', '{"a": [1.0]}', '{"a": {}}',
    '{"a": NaN}', '{"a": Infinity}', '{"a b": 1.0}', '{"": 1.0}', '{"a-b": 1.0}', '{"a": "\\u001b[2J"}',
    '{"\\u001b": 1.0}', '{"seed": 1.0}', '{"further": 1.0}', '{"a": 1.0, "a": 2.0}',
], ids=lambda text: text[:20])  # fmt: skip
def test_invalid_further_settings_are_rejected_on_write_and_on_read(ledger: Ledger, text: str) -> None:
    with pytest.raises(ValueError, match=r"trials\.further is .*; allowed: null, or JSON of names with levels"):
        ledger.put(TRIALS, pending("t", further=text))
    row = {**ledger_row(ledger), FURTHER: text}
    other = sqlite3.connect(ledger.path)
    del row["number"]
    crc = ledgers._crc({name: row[name] for name in TRIALS.columns})
    other.execute(f"UPDATE trials SET {FURTHER} = ?, crc = ?", [text, crc])
    other.commit()
    for read in (lambda: ledger.rows(TRIALS), lambda: ledger.table(TRIALS)):
        with pytest.raises(CorruptFile, match=r"has an invalid row: trials|further settings that no run writes"):
            read()


def ledger_row(ledger: Ledger) -> dict[str, Any]:
    """Put a pending trial, and return its cells as SQLite stores them."""
    ledger.put(TRIALS, pending("u"))
    with closing(sqlite3.connect(ledger.path)) as found:
        found.row_factory = sqlite3.Row
        return dict(found.execute("SELECT * FROM trials").fetchone())


def test_a_ledger_with_further_settings_is_rebuilt_from_its_tables(tmp_path: Path) -> None:
    mine = Method("mine", "tune_kd.training.methods.logit:Logit", settings={"weight": 7.0})
    factors = (
        Factor("method", ("none", "mine")),
        Factor("weight", (1.0, 2.0)),
        Factor("precision", ("float32", "tf32")),
    )
    study = replace(tiny(), factors=factors, methods=(mine,), contrasts=(), moderator=None)
    run = Run("r", tmp_path, study, "0" * 64, None, {})
    create(run)
    bench = Bench(run.study, tmp_path)
    bench.run()
    bench.driver.write_tables()
    before = {row["trial_id"]: row for row in bench.ledger.rows(TRIALS)}
    assert {row["further"] for row in before.values()} == {
        None, *(as_further({"precision": each}) for each in ("float32", "tf32")),
        *(as_further({"weight": weight, "precision": each}) for weight in (1, 2) for each in ("float32", "tf32")),
    }  # fmt: skip
    bench.ledger.close()
    bench.ledger.path.write_bytes(b"")
    with closing(rebuild.opened(run, lambda _: None)) as again:
        assert {row["trial_id"]: row for row in again.rows(TRIALS)} == before

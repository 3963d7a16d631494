"""The ledger and the tables: rows round-trip, and alterations are detected."""

import hashlib
import math
import os
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tune_kd.records import ledger as ledgers, tables
from tune_kd.records.ledger import Ledger, damage, reading
from tune_kd.records.reader import check
from tune_kd.records.schema import DECISIONS, EPOCHS, SCHEMAS, TRIALS, Schema, as_further
from tune_kd.records.tables import arrow, frame, to_parquet
from tune_kd.study.trial import FURTHER
from tune_kd.system.characters import CONTROL
from tune_kd.system.errors import CorruptFile

# The contract: other programs rely on these names and this order.
CONTRACT = {
    "trials": """run trial_id arm phase role student teacher teacher_id stem weights width method temperature alpha
        beta lr weight_decay seed recipe_id dataset data_digest scale device threads status stop_reason epochs_planned
        epochs_run best_epoch val_accuracy val_accuracy_best test_accuracy test_accuracy_best agreement kl_t1 kl_t4
        ece params train_seconds wall_seconds gpu_fraction peak_memory_bytes attempts error""",
    "epochs": """run trial_id epoch attempt val_accuracy val_loss train_loss train_accuracy loss_ce loss_kd lr
        grad_norm seconds images_per_second""",
    "decisions": "run trial_id arm phase stratum epoch rung metric cutoff rank peers action reason",
}
COUNTS = {
    "seed", "threads", "epochs_planned", "epochs_run", "best_epoch", "params", "peak_memory_bytes", "attempts",
    "epoch", "attempt", "rung", "rank", "peers", "views_answered",
}  # fmt: skip
TEXTS = {
    "run", "trial_id", "arm", "phase", "role", "student", "teacher", "teacher_id", "stem", "weights", "method",
    "recipe_id", "dataset", "data_digest", "scale", "device", "status", "stop_reason", "error", "stratum", "action",
    "reason", "teacher_digest", "weights_digest", "host", "fast_paths",
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def epoch(number: int, **values: Any) -> dict[str, Any]:
    return {"run": "r", "trial_id": "t", "epoch": number, "attempt": 1, "val_accuracy": 0.5, **values}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_tables_begin_with_the_columns_and_types_of_the_contract(schema: Schema[Any]) -> None:
    names = CONTRACT[schema.name].split()
    assert list(schema.columns)[: len(names)] == names
    read = pq.read_schema(pa.BufferReader(to_parquet(arrow(schema, []))))
    for field in read:
        kind = pa.int64() if field.name in COUNTS else pa.string() if field.name in TEXTS else pa.float64()
        assert (field.type, field.nullable) == (kind, True), field.name


def pending(trial_id: str, **values: Any) -> dict[str, Any]:
    """A row that readers accept."""
    least = {"run": "r", "arm": "a", "phase": "confirm", "role": "student", "seed": 1, "status": "pending"}
    return {"trial_id": trial_id, **least, **values}


def cells(kind: type) -> st.SearchStrategy[Any]:
    some = {
        str: st.text(st.characters(exclude_categories=["Cs"])),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }
    return st.none() | some[kind]


@given(st.lists(st.fixed_dictionaries({name: cells(kind) for name, kind in DECISIONS.columns.items()}), max_size=5))
def test_parquet_rows_round_trip(rows: list[dict[str, Any]]) -> None:
    table = pq.read_table(pa.BufferReader(to_parquet(arrow(DECISIONS, rows))))
    assert table.to_pylist() == rows


def named(text: str | None) -> str | None:
    """Text that is allowed as a name."""
    return None if text is None else CONTROL.sub("", text)


@given(row=st.fixed_dictionaries(
    {name: cells(kind).map(named) if name in TRIALS.names else cells(kind) for name, kind in TRIALS.columns.items()}
    | {"further": st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9) | st.just("x")).map(as_further)}
))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ledger_rows_round_trip(ledger: Ledger, row: dict[str, Any]) -> None:
    row |= pending("t", stop_reason=None, **dict.fromkeys((*TRIALS.fractions, *TRIALS.only_completed), 0.5))
    row["status"], row["epochs_planned"] = "completed", None
    ledger.put(TRIALS, row)
    assert ledger.rows(TRIALS) == [row]


def near_the_rules(schema: Schema[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that break rules of a schema, or only just keep them."""
    some: dict[str, st.SearchStrategy[Any]] = {}
    for name, kind in schema.columns.items():
        if name in schema.levels:
            some[name] = st.sampled_from([*schema.levels[name], "else"])
        else:
            some[name] = {str: st.just("x"), int: st.integers(0, 3), float: st.sampled_from([-0.1, 0.0, 0.5, 1.0])}[
                kind
            ]
        if name == FURTHER:
            some[name] = st.just(as_further({"weight": 2.0}))
        if name not in ("run", "trial_id"):
            some[name] |= st.none()
    return st.fixed_dictionaries(some)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
@given(data=st.data())
def test_writers_reject_a_row_if_and_only_if_readers_do(schema: Schema[Any], data: st.DataObject) -> None:
    row = data.draw(near_the_rules(schema))
    if data.draw(st.booleans()):  # otherwise hardly any row is valid
        good = {"status": "completed", "epochs_planned": row.get("epochs_run"), "phase": "screen", "role": "student"}
        good |= {"action": "stop", "stop_reason": None, **dict.fromkeys(schema.fractions, 1.0)}
        good |= {name: row[name] or {str: "x", int: 1, float: 1.0}[schema.columns[name]] for name in
                 (*schema.key, *schema.needed) if name not in good}  # fmt: skip
        row |= {name: value for name, value in good.items() if name in row}
        row |= data.draw(st.fixed_dictionaries({}, optional={"epochs_planned": st.just(2)})) if "status" in row else {}
    texts = [name for name, kind in schema.columns.items() if kind is str]
    if name := data.draw(st.none() | st.sampled_from(texts)):
        row[name] = (lambda text: as_further({"weight": text}) if name == FURTHER else text)(
            data.draw(st.sampled_from(["two\nlines", "\x1b[2J", "\x9b2J", "\u202etxt"]))
        )
    _, problems = check(schema, frame(schema, [row]))
    assert (schema.broken(row) is None) == (problems == []), (schema.broken(row), problems)


def test_control_characters_are_allowed_in_errors_but_not_in_names(ledger: Ledger) -> None:
    ledger.put(TRIALS, pending("t", error="\x1b[31mTraceback\x1b[0m\n  line 1"))
    with pytest.raises(ValueError, match=r"trials\.device is 'GPU\\x1b\[2J'; allowed: text without control characters"):
        ledger.put(TRIALS, pending("u", device="GPU\x1b[2J"))
    assert [row["trial_id"] for row in ledger.rows(TRIALS)] == ["t"]


def test_a_row_that_readers_would_reject_is_not_written(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match=r"trials\.status is completed after 1 of 7 epochs; allowed: after all 7"):
        ledger.put(TRIALS, pending("t", status="completed", epochs_run=1, epochs_planned=7))
    assert ledger.rows(TRIALS) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_none(value: float) -> None:
    assert EPOCHS.clean(epoch(1, loss_kd=value))["loss_kd"] is None


def test_pandas_reads_counts_as_integers_although_some_are_null(ledger: Ledger, tmp_path: Path) -> None:
    ledger.put(TRIALS, pending("a", best_epoch=3, test_accuracy=None, stop_reason="asha"))
    ledger.put(TRIALS, pending("b"))
    ledger.write_tables(tmp_path)
    trials = pd.read_parquet(tmp_path / "trials.parquet")
    assert trials["best_epoch"].tolist() == [3, pd.NA]
    assert trials["best_epoch"].dtype == "Int64"
    assert trials["test_accuracy"].dtype == "float64"
    assert trials["stop_reason"].isna().tolist() == [False, True]


def test_a_recomputed_epoch_is_compared_with_its_record(ledger: Ledger) -> None:
    assert ledger.add_epoch(epoch(1, seconds=1.0)) == "new"
    assert ledger.add_epoch(epoch(1, seconds=9.0, attempt=2)) == "same"  # times may differ
    assert ledger.add_epoch(epoch(1, seconds=1.0, val_accuracy=0.6)) == "different"
    assert [row["val_accuracy"] for row in ledger.rows(EPOCHS)] == [0.5]


def test_a_ledger_that_fails_to_open_releases_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the caller keeps the error, and with it the frame that holds the connection."""

    class Gone(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement.startswith(("CREATE", "ROLLBACK")):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(statement, *values)

    real = sqlite3.connect
    with monkeypatch.context() as broken:
        broken.setattr(sqlite3, "connect", lambda *arguments, **options: real(*arguments, **options, factory=Gone))
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error") as kept:
            Ledger(tmp_path / "ledger.sqlite")
    Ledger(tmp_path / "ledger.sqlite").close()
    assert kept.traceback


def test_a_failed_transaction_is_rolled_back(ledger: Ledger) -> None:
    def fail() -> None:
        with ledger.transaction():
            ledger.add_epoch(epoch(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ledger.rows(EPOCHS) == []


def test_a_row_is_visible_to_other_connections_as_soon_as_it_is_committed(ledger: Ledger) -> None:
    with ledger.transaction():
        ledger.add_epoch(epoch(1))
        assert Ledger(ledger.path, read_only=True).rows(EPOCHS) == []
    assert len(Ledger(ledger.path, read_only=True).rows(EPOCHS)) == 1


def test_an_altered_row_is_detected(ledger: Ledger) -> None:
    ledger.add_epoch(epoch(1))
    other = sqlite3.connect(ledger.path)
    other.execute("UPDATE epochs SET val_accuracy = 0.9")
    other.commit()
    with pytest.raises(CorruptFile, match=r"trial_id='t', epoch=1"):
        ledger.rows(EPOCHS)


@pytest.mark.parametrize("name", ["a?b#c%20d", os.fsdecode(b"no text \xff")])
def test_a_ledger_with_unusual_characters_in_its_path_is_readable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    ledger = Ledger(tmp_path / name / "ledger.sqlite")
    ledger.put(TRIALS, pending("t", error=f"{name} is not there"))
    for path in (ledger.path, Path(f"/{ledger.path}")):  # two slashes, as in $ROOT/results if ROOT is /
        with reading(path) as one:
            one.check()
            (row,) = one.rows(TRIALS)
    assert row["error"] == f"{name} is not there".replace("\udcff", "\\udcff")
    ledger.write_tables(tmp_path)
    assert pd.read_parquet(tmp_path / "trials.parquet")["error"].tolist() == [row["error"]]


@pytest.mark.long
@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_a_ledger_that_passes_its_check_can_be_written_to(ledger: Ledger, tmp_path: Path, mask: int) -> None:
    """Change any byte of SQLite's header, or of the rest, which mostly holds the definitions of the tables."""
    ledger.put(TRIALS, pending("t"))
    ledger.close()  # no data stays in the log
    content = ledger.path.read_bytes()
    passed = set()
    for place in [*range(100), *range(100, len(content), 53)]:
        other = tmp_path / f"{place}" / ledger.path.name
        other.parent.mkdir()
        other.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        try:
            with reading(other) as one:
                one.check()
        except Exception as error:
            assert damage(error)
            continue
        passed.add(place)
        written = Ledger(other)
        for number in range(1, 4):
            assert written.add_epoch(epoch(number)) == "new"
        written.put(TRIALS, pending("t", epochs_run=3))
        decided = {"arm": "a", "phase": "screen", "action": "stop", "reason": "behind"}
        written.put(DECISIONS, {"run": "r", "trial_id": "t", "epoch": 1, **decided})
        assert [row["trial_id"] for row in written.rows(TRIALS)] == ["t"]
        assert len(written.rows(EPOCHS)) == 3 and written.rows(DECISIONS)
        written.check()
        written.close()
    assert {18, 19}.isdisjoint(passed)


def test_page_checksums_detect_a_flipped_bit_in_a_table(ledger: Ledger, tmp_path: Path) -> None:
    for number in range(1, 200):
        ledger.add_epoch(epoch(number, val_loss=number / 7))
    ledger.write_tables(tmp_path)
    path = tmp_path / "epochs.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, page_checksum_verification=True)


def test_tables_are_replaced_and_leave_no_temporary_files(ledger: Ledger, tmp_path: Path) -> None:
    for number in (1, 2):
        ledger.add_epoch(epoch(number))
        ledger.write_tables(tmp_path)
        assert len(pd.read_parquet(tmp_path / "epochs.parquet")) == number
    assert {path.name for path in tmp_path.glob("*epochs*")} == {"epochs.parquet"}


@pytest.mark.parametrize("place", ["tables.announced", "tables.published"])
def test_tables_match_a_recorded_digest_wherever_their_writer_dies(
    place: str, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passed(name: str) -> None:
        if name == place:
            raise KeyboardInterrupt

    ledger.write_tables(tmp_path)
    ledger.add_epoch(epoch(1))
    monkeypatch.setattr(ledgers, "point", passed)
    for _ in range(2):  # another writer is killed at the same point
        with pytest.raises(KeyboardInterrupt):
            ledger.write_tables(tmp_path)
        known = ledgers.digests(tmp_path)
        assert known is not None
        for path in tmp_path.glob("*.parquet"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in known[path.name]


def test_a_table_does_not_depend_on_how_many_rows_are_read_at_a_time(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 8):
        ledger.add_epoch(epoch(number))
    whole = arrow(EPOCHS, ledger.rows(EPOCHS))
    for part in (1, 3, 7, 100):
        monkeypatch.setattr(tables, "PART", part)
        assert ledger.table(EPOCHS).equals(whole, check_metadata=True)
    pd.testing.assert_frame_equal(whole.to_pandas(), frame(EPOCHS, ledger.rows(EPOCHS)))

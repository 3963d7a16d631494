"""Tables of other tools: those of the published study, and small ones."""

import io
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import fastparquet
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from conftest import SHARED
from tune_kd.analysis import accuracy, contrasts
from tune_kd.cli import main
from tune_kd.records import parquet
from tune_kd.records.importer import Adapter, parse_phases
from tune_kd.records.reader import Records, load
from tune_kd.system.errors import UserError

PUBLISHED = SHARED / "data" / "published"
PHASES = {"select": "screen", "stem_ablation": "confirm", "teachers": "teacher"}
needs_published = pytest.mark.skipif(
    not PUBLISHED.with_name("published_trials.parquet").is_file(), reason="the published tables are not here"
)


@pytest.fixture(scope="module")
def published() -> Records:
    return load(PUBLISHED, adapt=Adapter(phases=PHASES))


@needs_published
def test_the_published_tables_are_read_through_an_adapter(published: Records) -> None:
    assert published.runs == ["published"]
    assert (len(published.trials), len(published.epochs)) == (71, 8200)
    assert published.trials["phase"].value_counts().to_dict() == {"screen": 48, "confirm": 14, "teacher": 9}
    assert published.decisions.empty
    assert published.studies == {}


@needs_published
@pytest.mark.parametrize(
    ("arm", "printed"),
    [
        ("resnet18/cifar/none", "94.86 ± 0.14"),
        ("resnet18/imagenet/none", "87.71 ± 0.22"),
        ("resnet34/imagenet/none", "88.28 ± 0.06"),
    ],
)
def test_the_published_stem_ablation_is_reproduced_to_the_printed_digits(
    published: Records, arm: str, printed: str
) -> None:
    row = accuracy.arms(published).set_index("arm").loc[arm]
    assert row["n"] == 3
    assert f"{100 * row['mean']:.2f} ± {100 * row['sd']:.2f}" == printed


@needs_published
def test_the_published_stem_effect_is_about_seven_points_and_its_interval_excludes_zero(published: Records) -> None:
    table = contrasts.compare(published, "stem", "cifar", "imagenet").set_index("context")
    row = table.loc["resnet18/100"] if "resnet18/100" in table.index else table.loc["resnet18"]
    assert (row["how"], row["n"]) == ("paired", 3)
    assert row["estimate"] == pytest.approx(0.9486 - 0.8771, abs=1e-4)
    assert 0.06 < row["low"] < row["estimate"] < row["high"] < 0.085
    assert row["p"] < 0.001


@needs_published
def test_the_published_selection_grid_is_exploratory_and_yields_no_contrasts(published: Records) -> None:
    explored = accuracy.exploratory(published)
    assert len(explored) == 48
    assert set(explored["what"]) == {"screen"}
    assert set(explored["tried"]) == {48}
    assert contrasts.contrasts(published).empty
    assert not set(accuracy.arms(published)["arm"]) & set(explored["arm"])


@needs_published
def test_a_report_on_published_tables_gives_no_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [part for theirs, ours in PHASES.items() for part in ("--phase", f"{theirs}={ours}")]
    monkeypatch.setattr("sys.argv", ["tune_kd", "report", str(PUBLISHED), "--to", str(tmp_path / "r"), *phases])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "These tables have no study with declared contrasts: all their results are exploratory." in said
    page = (tmp_path / "r" / "report.html").read_text()
    assert "there are no verdicts" in page
    assert "resnet18/imagenet/none" in page


def small(folder: Path) -> Path:
    """Tables with only the required columns."""
    pd.DataFrame({"id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.6]}).to_parquet(
        folder / "their_trials.parquet"
    )
    pd.DataFrame({"id": ["a", "a", "b"], "epoch": [1, 2, 1], "acc": [0.1, 0.2, 0.3]}).to_parquet(
        folder / "their_epochs.parquet"
    )
    return folder / "their"


def test_columns_are_renamed_and_missing_ones_get_defaults(tmp_path: Path) -> None:
    records = load(small(tmp_path), adapt=Adapter(columns={"id": "trial_id", "acc": "val_accuracy"}))
    assert records.trials["run"].tolist() == ["their", "their"]
    assert records.trials[["phase", "role", "status", "arm"]].drop_duplicates().to_numpy().tolist() == [
        ["confirm", "student", "completed", "all"]
    ]
    assert accuracy.arms(records).loc[0, "mean"] == pytest.approx(0.55)
    assert records.epochs["val_accuracy"].tolist() == [0.1, 0.2, 0.3]


def test_tables_without_required_columns_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"their_trials\.parquet: lacks the columns trial_id; has id, seed"):
        load(small(tmp_path))


def test_a_trial_with_fewer_epochs_than_planned_counts_as_stopped_and_enters_no_mean(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.9]})
    trials.assign(epochs_run=[7, 100], epochs_planned=100).to_parquet(tmp_path / "t_trials.parquet")
    records = load(tmp_path / "t")
    assert records.trials["status"].tolist() == ["stopped", "completed"]
    assert accuracy.confirmed(records)["all"].tolist() == [0.9]


def test_trials_on_different_data_belong_to_different_arms(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.9]})
    trials.assign(dataset=["x", "y"], epochs_run=[10, 20], lr=0.1).to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["arm"].tolist() == ["x", "y"]


def test_a_setting_that_varies_within_a_method_becomes_part_of_the_arms_name(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b", "c"], "seed": [1, 2, 3], "method": ["none", "none", "logit"]})
    trials.assign(lr=[0.1, 0.2, 0.1], epochs_run=[9, 9, 10]).to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["arm"].tolist() == ["none/lr=0.1", "none/lr=0.2", "logit/lr=0.1"]


def test_renaming_a_column_to_an_existing_name_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trials has more than one column seed"):
        load(small(tmp_path), adapt=Adapter(columns={"id": "seed"}))


def test_a_method_is_compared_with_a_control_that_has_no_temperature(tmp_path: Path) -> None:
    rows = [{"trial_id": f"{method}{seed}", "seed": seed, "method": method, "test_accuracy_best": accuracy + seed / 100,
             "temperature": 4.0 if method == "logit" else None}
            for method, accuracy in (("none", 0.5), ("logit", 0.6)) for seed in (1, 2, 3)]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "t_trials.parquet")
    (found,) = contrasts.compare(load(tmp_path / "t"), "method", "logit", "none").to_dict("records")
    assert (found["how"], found["n"], found["estimate"]) == ("paired", 3, pytest.approx(0.1))
    with pytest.raises(UserError, match=r"method has no level 'logits'; allowed: none, logit"):
        contrasts.compare(load(tmp_path / "t"), "method", "logits", "none")
    with pytest.raises(UserError, match="factor is 'methods'"):
        contrasts.compare(load(tmp_path / "t"), "methods", "logit", "none")


def test_phase_options_map_their_names_to_ours_and_invalid_ones_are_reported() -> None:
    assert parse_phases(["select=screen", "x=confirm"]) == {"select": "screen", "x": "confirm"}
    with pytest.raises(UserError) as caught:
        parse_phases(["select", "x=later"])
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "--phase is 'select'",
        "--phase is 'x=later'",
    ]


BIG = 2**53  # float64 rounds it and its successor to the same number
TRIALS: dict[str, list[Any]] = {
    "trial_id": ["a", "b", "c", "d"],
    "seed": [BIG, BIG + 1, BIG, BIG + 1],
    "phase": ["final", "final", "final", None],
    "method": ["none", "none", "logit", "logit"],
    "teacher": [None, None, "resnet50", "resnet50"],
    "temperature": [None, None, 4.0, 4.0],
    "test_accuracy_best": [0.5, 0.625, 0.75, 0.875],
    "best_epoch": [1, None, 2, 2],
    "params": [BIG + 1, None, BIG + 1, BIG + 1],
}
EPOCHS: dict[str, list[Any]] = {"trial_id": ["a", "b"], "epoch": [1, 1], "val_accuracy": [0.25, 0.5]}
WHOLE = ("seed", "best_epoch", "params", "epoch")
TEXT = ("trial_id", "phase", "method", "teacher")
Columns = dict[str, list[Any]]
Writer = Callable[[Columns, Path], object]
WRITERS: dict[str, Writer] = {}


def frame(columns: Columns) -> pd.DataFrame:
    """Integers with nulls as `Int64`; by default pandas makes them float64."""
    return pd.DataFrame({name: pd.Series(values, dtype="Int64" if name in WHOLE and None in values else None)
                         for name, values in columns.items()})  # fmt: skip


def writer(name: str) -> Callable[[Writer], Writer]:
    def add(write: Writer) -> Writer:
        WRITERS[name] = write
        return write

    return add


def of_pandas(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    WRITERS[f"pandas, {name}"] = lambda columns, path: change(frame(columns)).to_parquet(path)


def changed(types: dict[str, Any]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.astype({name: kind for name, kind in types.items() if name in table})


of_pandas("as it is", lambda table: table)
of_pandas("indexed", lambda table: table.set_index(list(table)[1], drop=False))
of_pandas("with a named index", lambda table: table.set_index(list(table)[1]))
of_pandas("with two named indexes", lambda table: table.set_index(list(table)[:2]))
of_pandas("with an index that has no name", lambda table: table.set_axis([7, 3, 5, 4][: len(table)]))
of_pandas("with its own types", pd.DataFrame.convert_dtypes)
of_pandas("categorical", changed(dict.fromkeys((*TEXT, "seed", "temperature"), "category")))
of_pandas("narrow", changed({"epoch": "int8", "val_accuracy": "float16", "test_accuracy_best": "float32",
                             "temperature": "float16", "best_epoch": "UInt8"}))  # fmt: skip
of_pandas("object", changed(dict.fromkeys(TEXT, object)))
of_pandas("pyarrow's types", lambda table: table.convert_dtypes(dtype_backend="pyarrow"))


@writer("fastparquet")
def _(columns: Columns, path: Path) -> None:
    fastparquet.write(str(path), changed(dict.fromkeys(TEXT, object))(frame(columns)))


@writer("fastparquet, bytes and an index")
def _(columns: Columns, path: Path) -> None:
    encoded = {name: [value if value is None else value.encode() for value in values] if name in TEXT else values
               for name, values in columns.items()}  # fmt: skip
    table = changed(dict.fromkeys(TEXT, object))(frame(encoded))
    table.index = [7, 3, 5, 4][: len(table)]
    fastparquet.write(str(path), table, object_encoding={name: "bytes" for name in TEXT if name in columns})


@writer("fastparquet, categorical")
def _(columns: Columns, path: Path) -> None:
    fastparquet.write(str(path), changed(dict.fromkeys(TEXT, "category"))(frame(columns)))


@writer("polars")
def _(columns: Columns, path: Path) -> None:
    pl.DataFrame(columns).write_parquet(path)


@writer("polars, categorical, narrow and decimal")
def _(columns: Columns, path: Path) -> None:
    kinds = {"phase": pl.Categorical, "method": pl.Enum(["none", "logit"]), "temperature": pl.Decimal(10, 2)}
    kinds |= {"best_epoch": pl.Int16, "epoch": pl.UInt64, "test_accuracy_best": pl.Float32, "params": pl.Decimal(38, 0)}
    pl.DataFrame(columns).cast({name: kind for name, kind in kinds.items() if name in columns}).write_parquet(path)


@writer("DuckDB")
def _(columns: Columns, path: Path) -> None:
    duckdb.from_arrow(pl.DataFrame(columns).to_arrow()).write_parquet(str(path))


@writer("DuckDB, enum and decimal")
def _(columns: Columns, path: Path) -> None:
    kinds = {"seed": "decimal(38, 0)", "temperature": "decimal(9, 4)", "test_accuracy_best": "decimal(18, 6)"}
    kinds |= {"method": "enum('none', 'logit')", "params": "ubigint", "val_accuracy": "real", "epoch": "utinyint"}
    named = ", ".join(f"{name}::{kinds[name]} as {name}" if name in kinds else name for name in columns)
    duckdb.from_arrow(pl.DataFrame(columns).to_arrow()).project(named).write_parquet(str(path))


@writer("PyArrow, dictionaries, bytes and views")
def _(columns: Columns, path: Path) -> None:
    kinds = {"trial_id": pa.large_binary(), "method": pa.string_view(), "teacher": pa.binary_view()}
    kinds |= {"val_accuracy": pa.float16()}
    arrays = {name: pa.array(values) for name, values in columns.items()}
    arrays |= {name: array.cast(kinds[name]) for name, array in arrays.items() if name in kinds}
    encoded = {name: array.dictionary_encode() for name, array in arrays.items() if name in ("phase", "params", "seed")}
    pq.write_table(pa.table(arrays | encoded), path)


def written(write: Writer, folder: Path) -> Records:
    for name, columns in (("trials", TRIALS), ("epochs", EPOCHS)):
        write(columns, folder / f"t_{name}.parquet")
    return load(folder / "t", adapt=Adapter(phases={"final": "confirm"}, rest="screen"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_reads_the_same_from_every_parquet_writer(name: str, tmp_path: Path) -> None:
    """Compare with the original values, not only with the tables of the other writers."""
    records = written(WRITERS[name], tmp_path)
    plain = written(lambda columns, path: pq.write_table(pa.table(columns), path), tmp_path)
    pd.testing.assert_frame_equal(records.trials, plain.trials, check_exact=True)
    pd.testing.assert_frame_equal(records.epochs, plain.epochs, check_exact=True)
    assert records.trials["seed"].tolist() == [BIG, BIG + 1, BIG, BIG + 1]
    assert records.trials["params"].tolist() == [BIG + 1, pd.NA, BIG + 1, BIG + 1]
    assert records.trials["phase"].tolist() == ["confirm", "confirm", "confirm", "screen"]
    assert records.trials["arm"].tolist() == ["none", "none", "resnet50/logit/T=4", "resnet50/logit/T=4"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_has_the_same_columns_and_plain_types_from_every_parquet_writer(name: str, tmp_path: Path) -> None:
    WRITERS[name](TRIALS, tmp_path / "file")
    table = parquet.table((tmp_path / "file").read_bytes())
    assert set(table) - set(TRIALS) <= ({"index"} if name.startswith("fastparquet") else set())  # a named index
    assert table.index.tolist() == [0, 1, 2, 3]
    for column, values in TRIALS.items():
        assert table[column].astype(object).where(table[column].notna(), None).tolist() == values
        kinds = ["string"] if column in TEXT else ["Int64"] if column in WHOLE else ["float64", "Int64"]  # decimals
        assert str(table[column].dtype) in kinds


def test_fixed_size_binary_is_read_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"trial_id": pa.array([b"ab", b"cd"], pa.binary(2))}), tmp_path / "file")
    assert parquet.table((tmp_path / "file").read_bytes())["trial_id"].tolist() == ["ab", "cd"]


def test_seeds_beyond_the_precision_of_float64_are_paired_correctly(tmp_path: Path) -> None:
    whole = {**TRIALS, "phase": ["final"] * 4}
    for order in ([0, 1, 2, 3], [0, 1, 3, 2]):
        pl.DataFrame(whole)[order].write_parquet(tmp_path / "t_trials.parquet")
        records = load(tmp_path / "t", adapt=Adapter(phases={"final": "confirm"}))
        (found,) = contrasts.compare(records, "method", "logit", "none").to_dict("records")
        assert (found["how"], found["n"], found["estimate"]) == ("paired", 2, 0.25)


def test_a_named_range_index_is_a_column_unless_the_table_has_one_of_that_name(tmp_path: Path) -> None:
    """pandas writes such an index only into its metadata, not as a column."""
    table = pd.DataFrame({"trial_id": ["a", "b"]}, index=pd.RangeIndex(3, 9, 3, name="seed"))
    table.to_parquet(tmp_path / "t_trials.parquet")
    assert pq.read_schema(tmp_path / "t_trials.parquet").names == ["trial_id"]
    assert load(tmp_path / "t").trials["seed"].tolist() == [3, 6]
    table.assign(seed=[1, 2]).to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["seed"].tolist() == [1, 2]


def noted(notes: bytes, path: Path) -> None:
    table = pa.table({"trial_id": ["a"], "seed": [1]})
    pq.write_table(table.replace_schema_metadata({b"pandas": notes}), path)


@pytest.mark.parametrize(
    "notes",
    [
        b"{", b"5", b'"x"', b'{"index_columns": 5}', b'{"index_columns": [{}]}', b'{"index_columns": [{"name": "x"}]}',
        b'{"index_columns": [{"name": "x", "start": 1e999, "step": 1}]}',
        b'{"index_columns": [{"name": "x", "start": 99999999999999999999999999, "step": 1}]}',
        b'{"index_columns": [{"name": "x", "start": "a", "step": []}]}',
    ],
)  # fmt: skip
def test_damaged_pandas_metadata_is_ignored_or_reported(notes: bytes, tmp_path: Path) -> None:
    noted(notes, tmp_path / "t_trials.parquet")
    try:
        assert load(tmp_path / "t").trials["seed"].tolist() == [1]
    except UserError as mistake:
        assert "t_trials.parquet cannot be read" in str(mistake)


def test_duplicate_column_names_are_reported(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["trial_id", "seed", "seed"])
    pq.write_table(twice, tmp_path / "t_trials.parquet")
    with pytest.raises(UserError, match="trials has more than one column seed"):
        load(tmp_path / "t")


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        (pa.array([1, 2**64 - 1], pa.uint64()), "seed: 1 of 2 rows break a rule; got 18446744073709551615 in row 1"),
        (pa.array([None, 2**64 - 1], pa.uint64()), "got 18446744073709551615 in row 1; expected whole numbers"),
        (pa.array([1, Decimal("2.5")]), "seed: 1 of 2 rows break a rule; got 2.5 in row 1; expected whole numbers"),
        (pa.array([b"1", b"2"]), "seed is string, such as '1'; expected int64"),
        (pa.array([True, None]), "seed is boolean, such as True; expected int64"),
    ],
)
def test_seeds_that_are_not_64_bit_integers_are_rejected(seeds: pa.Array, says: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"trial_id": ["a", "b"], "seed": seeds}), tmp_path / "t_trials.parquet")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "t")
    assert says in str(caught.value)


def test_bytes_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"trial_id": [b"a", b"\xff"], "seed": [1, 2]}), tmp_path / "t_trials.parquet")
    with pytest.raises(UserError, match=r"trial_id is object, such as b'a'; expected text"):
        load(tmp_path / "t")


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), BIG + 1])
def test_large_64_bit_integers_are_read_exactly(seed: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"trial_id": ["a"], "seed": [seed]}), tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["seed"].tolist() == [seed]


@pytest.mark.parametrize("text", ["0.1", "0.123456789012345678", "0.3333333333333333333"])
def test_a_decimal_is_read_as_the_nearest_float(text: str, tmp_path: Path) -> None:
    table = pa.table({"trial_id": ["a"], "seed": [1], "test_accuracy_best": [Decimal(text)]})
    pq.write_table(table, tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["test_accuracy_best"].tolist() == [float(text)]


def test_a_null_phase_is_reported_with_its_row(tmp_path: Path) -> None:
    table = pd.DataFrame({"trial_id": ["a", "b"], "seed": [1, 2], "phase": pd.array(["confirm", None], "string")})
    table.to_parquet(tmp_path / "t_trials.parquet")
    with pytest.raises(UserError, match=r"phase: 1 of 2 rows break a rule; .* in row 1; expected a value in every row"):
        load(tmp_path / "t")


def test_a_report_accepts_a_categorical_phase_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = frame(TRIALS).head(3).astype({"phase": "category"}).set_index("seed", drop=False)
    table.to_parquet(tmp_path / "t_trials.parquet")
    command = ["tune_kd", "report", str(tmp_path / "t"), "--to", str(tmp_path / "r"), "--phase", "final=confirm"]
    monkeypatch.setattr("sys.argv", [*command, "--format", "md"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "logit/T=4" in (tmp_path / "r" / "report.md").read_text()


# Tables that would fill the memory.


def refused(path: Path) -> str:
    """The error of `load` for a table, raised without much memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return str(caught.value)


def repeated(value: object, kind: Any, times: int) -> Any:
    """An array that repeats one value many times; each takes a byte."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([value], kind))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (repeated("a", pa.string(), 2**21 + 1), "it has 2,097,153 rows; at most 2,097,152 are read"),
        (repeated("a" * 2**20, pa.string(), 10**5), "it has 104,857,600,000 bytes of values; at most 1,073,741,824"),
        (repeated(b"a" * 2**20, pa.large_binary(), 10**5), "it has 104,857,600,000 bytes of values; at most"),
    ],
    ids=["rows", "text", "bytes"],
)
@pytest.mark.parametrize("hint", [True, False])
def test_a_small_file_that_expands_to_too_many_values_is_rejected(
    values: Any, says: str, hint: bool, tmp_path: Path
) -> None:
    path = tmp_path / "t_trials.parquet"
    pq.write_table(pa.table({"trial_id": values}), path, compression="zstd", store_schema=hint)
    assert path.stat().st_size < 2**21
    assert says in refused(tmp_path / "t")


@pytest.mark.parametrize("bound", ["ROWS", "COLUMNS", "VALUES", "BYTES", "PAGES", "FOOTER_BYTES", "INDICES"])
def test_each_exceeded_bound_is_reported(bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"trial_id": ["a", "b"]}, index=pd.RangeIndex(3, 9, 3, name="seed"))
    table.to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["seed"].tolist() == [3, 6]
    monkeypatch.setattr(parquet, f"MOST_{bound}", 0)
    what = {"FOOTER_BYTES": "bytes of metadata"}.get(bound, bound.lower())
    assert re.search(rf"it has \d[\d,]* {what}; at most 0 are read", refused(tmp_path / "t"))


def test_fixed_size_binary_beyond_the_bound_is_rejected_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = repeated(b"a" * 2**10, pa.binary(2**10), 1000)
    pq.write_table(pa.table({"trial_id": values}), tmp_path / "t_trials.parquet", store_schema=False)
    monkeypatch.setattr(parquet, "MOST_BYTES", 10**6)
    monkeypatch.setattr(parquet, "_value_bytes", pytest.fail)
    assert "it has 1,024,000 bytes of values" in refused(tmp_path / "t")


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_that_decompress_to_more_than_declared_are_rejected(
    codec: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t_trials.parquet"
    pq.write_table(pa.table({"trial_id": ["a" * 2**20]}), path, compression=codec, use_dictionary=False,
                   write_statistics=False, data_page_version=version)  # fmt: skip
    declared = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    data = path.read_bytes()
    before, after = varint(2 * declared), varint(2 * 100)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:-8].replace(before, after)
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100
    monkeypatch.setattr(parquet, "MOST_BYTES", 2**20)
    assert "it has 1,048,58" in refused(tmp_path / "t") and "bytes; at most 1,048,576" in refused(tmp_path / "t")


def varint(number: int) -> bytes:
    digits = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([each | 128 for each in digits[:-1]] + digits[-1:])


@pytest.mark.parametrize("notes", [b"[" * 200_000, b'{"index_columns": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_deeply_nested_pandas_metadata_is_reported(notes: bytes, tmp_path: Path) -> None:
    noted(notes, tmp_path / "t_trials.parquet")
    assert "pandas' metadata on its index is damaged" in refused(tmp_path / "t")


def test_nested_columns_are_left_out(tmp_path: Path) -> None:
    nested = pa.ListArray.from_arrays(pa.array([0, 10**7], pa.int32()), pa.nulls(10**7, pa.int64()))
    table = pa.table({"trial_id": ["a"], "tags": nested, "seed": [1], "more": [{"a": 1}]})
    pq.write_table(table, tmp_path / "t_trials.parquet")
    assert list(parquet.table((tmp_path / "t_trials.parquet").read_bytes())) == ["trial_id", "seed"]
    assert load(tmp_path / "t").trials["seed"].tolist() == [1]


@settings(max_examples=200, deadline=None)
@given(choose=st.data())
def test_a_damaged_file_is_read_or_raises_an_expected_error(whole: bytes, choose: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(choose.draw(st.integers(1, 3))):
        damaged[choose.draw(st.integers(0, len(damaged) - 1))] = choose.draw(st.integers(0, 255))
    with suppress(ValueError, OSError, TypeError, NotImplementedError):
        parquet.table(bytes(damaged))


@pytest.fixture(scope="module")
def whole() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"trial_id": ["a", "b", "a"], "seed": [1, 2, None], "x": [0.5, 1.5, 2.5]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "thrift", [b"\x19" * 1000, b"\x1c" * 1000, b"\x19\xf7" + b"\xff" * 8 + b"\x01", b"\x19\xf1" + b"\xff" * 8 + b"\x01",
               b"\x18\xff\xff\xff\xff\x0f", b"\x1b\x00", b"\x15" + b"\xff" * 20, b"\x15"],
)  # fmt: skip
def test_malformed_parquet_metadata_raises_lookup_error(thrift: bytes) -> None:
    with pytest.raises(LookupError):
        parquet._struct(thrift, 0)

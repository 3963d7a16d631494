"""Convert rows to DataFrames, Arrow tables and the bytes of Parquet files."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tune_kd.records.schema import PANDAS, Schema
from tune_kd.study.trial import Row, further

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

PART = 2000  # rows per conversion
# Columns of results that hold text, and columns that hold counts. All others hold measures.
TEXTS = (
    "run arm role note what contrast kind verdict words context how against setting value host stratum phase method "
    "status student teacher stem weights family rule factor rules_out measure column precision"
)
COUNTS = (
    "draws completed failed epochs best_draw n planned tried trials stopped n_treated n_control pairs_needed epoch "
    "slot seed rung contrasts df_error teachers teacher_n"
)
KINDS = dict.fromkeys(TEXTS.split(), str) | dict.fromkeys(COUNTS.split(), int)


def frame(schema: Schema[Any], rows: Sequence[Row]) -> "pd.DataFrame":
    """Return rows as a DataFrame with the schema's types: `string`, `Int64` and `float64`."""
    import pandas as pd

    whole = [{**row, **further(row)} for row in rows]
    columns = schema.in_parquet | {name: type(each) for row in rows for name, each in further(row).items()}
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in whole], dtype=PANDAS[kind]) for name, kind in columns.items()}
    )


def typed(rows: Sequence[Row], names: str) -> "pd.DataFrame":
    """Return rows as a DataFrame with these columns (separated by spaces), typed even if it is empty or all null."""
    import pandas as pd

    return as_typed(pd.DataFrame(rows, columns=names.split()), names)


def as_typed(table: "pd.DataFrame", names: str) -> "pd.DataFrame":
    """Return these columns (separated by spaces) of a table, with the types in `KINDS`."""
    table = table[names.split()]
    return table.astype({name: PANDAS[KINDS.get(name, float)] for name in table.columns})


def arrow(schema: Schema[Any], rows: Sequence[Row], more: Mapping[str, type] = MappingProxyType({})) -> "pa.Table":
    """Return rows as an Arrow table, which pandas reads with the types of `frame`.

    `more` gives the names and types of further settings; each becomes a column.
    """
    import pyarrow as pa

    columns = schema.in_parquet | dict(more)
    whole = [{**row, **further(row)} for row in rows] if more else list(rows)
    return pa.Table.from_pylist(whole, schema=_arrow_schema(tuple(columns.items())))


@cache
def _arrow_schema(columns: tuple[tuple[str, type], ...]) -> "pa.Schema":
    import pandas as pd
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    types = pa.schema([pa.field(column, kinds[kind]) for column, kind in columns])
    empty = pd.DataFrame({column: pd.Series([], dtype=PANDAS[kind]) for column, kind in columns})
    return pa.Table.from_pandas(empty, schema=types, preserve_index=False).schema


def to_parquet(table: "pa.Table", before: bytes = b"") -> bytes:
    """Return a table as the bytes of a Parquet file with page checksums, to replace the file `before`.

    The pages of `before` stay at their offsets, although the new footer does not refer to them. pyarrow (and so
    pandas), polars and DuckDB open a file twice, so they may apply the old footer to the new file. The new pages come
    before the old ones if they fit, otherwise after them. A file is at most about three times as large as its table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tune_kd.records.parquet import extent

    start, end = extent(before)
    kept = before[start:end]
    for behind in (False, True):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
            if not behind:
                writer.write_table(table)
            room = start - sink.tell()
            if kept and room >= 0:
                sink.write(bytes(room) + kept)
            if behind:
                writer.write_table(table)
        if room >= 0 or not kept:
            break
    return bytes(sink.getvalue())

"""Parquet bytes of a table: whole row groups, whose pages are those of the table before where nothing changed."""

from functools import cache
from typing import TYPE_CHECKING

from tune_kd.records.schema import PANDAS, SCHEMAS, Row, Schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


PART = 2000  # rows that are made into a table at a time


def frame(schema: Schema, rows: list[Row]) -> "pd.DataFrame":
    """Rows as a DataFrame with the schema's types: `string`, `Int64` and `float64`."""
    import pandas as pd

    columns = schema.columns.items()
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=PANDAS[kind]) for name, kind in columns})


def arrow(schema: Schema, rows: list[Row]) -> "pa.Table":
    """Rows as a table of Arrow's, which pandas reads with the types of `frame`."""
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=_arrow_schema(schema.name))


@cache
def _arrow_schema(name: str) -> "pa.Schema":
    import pyarrow as pa

    schema = next(schema for schema in SCHEMAS if schema.name == name)
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    types = pa.schema([pa.field(column, kinds[kind]) for column, kind in schema.columns.items()])
    return pa.Table.from_pandas(frame(schema, []), schema=types, preserve_index=False).schema


def to_parquet(table: "pa.Table", before: bytes | None = None) -> bytes:
    """A table as the bytes of a Parquet file with page checksums.

    The pages of the file that this one replaces, `before`, stay where they were, though no footer tells of them any
    more. For pyarrow, and so pandas, opens a file that it is given by name twice, and where it is replaced in between
    reads its pages by the footer of the one before. The new pages lie in front of those where there is room, else
    behind them: a file is at most about three times as large as its table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    start, kept = (0, b"") if before is None else _pages(before)
    for behind in (False, True):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
            if behind:
                sink.write(bytes(start - sink.tell()) + kept)
            writer.write_table(table)
            if kept and not behind:
                if sink.tell() > start:
                    continue
                sink.write(bytes(start - sink.tell()) + kept)
        break
    return bytes(sink.getvalue())


def _pages(data: bytes) -> tuple[int, bytes]:
    """Where the pages begin that the footer of a Parquet file tells of, and the bytes from there to their end. There
    are none in what is no such file, which nobody reads."""
    from tune_kd.records.parquet import spans

    try:
        found = spans(data)
    except ValueError:
        return 0, b""
    start = min((start for start, _ in found), default=0)
    return start, data[start : max((end for _, end in found), default=0)]

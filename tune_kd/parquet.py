"""Parquet files of pandas, PyArrow, polars, DuckDB and fastparquet as DataFrames of the same few types."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

UNNAMED = re.compile(r"__index_level_\d+__")  # a column in which pandas keeps an index without a name of its own
PLAIN = {
    pa.string(): pd.StringDtype(),
    pa.large_string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)

Column = Any  # a pyarrow.ChunkedArray


def table(data: bytes) -> pd.DataFrame:
    """A file's table. Text is `string`, whole numbers are `Int64`, other numbers `float64`, truth values `boolean`, and
    what is none of these is as pandas has it. What pandas says of its own types is not asked for, but for an index with
    a name, which is a column here; one without is not in the table.

    Raises `ValueError`, `OSError`, `TypeError` or `NotImplementedError` where it cannot be read.
    """
    found = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    named = [(name, column) for name, column in zip(found.column_names, found.columns, strict=True)
             if not UNNAMED.fullmatch(name)]  # fmt: skip
    there = {name for name, _ in named}
    named += [(name, column) for name, column in _ranges(found) if name not in there]
    plain = pa.Table.from_arrays([_plain(column) for _, column in named], names=[name for name, _ in named])
    frame: pd.DataFrame = plain.to_pandas(types_mapper=PLAIN.get)
    return frame


def _ranges(found: Any) -> Iterator[tuple[str, Column]]:
    """Indices with a name whose numbers follow one another: pandas writes such a one into its notes alone."""
    try:
        for index in (found.schema.pandas_metadata or {}).get("index_columns", []):
            if isinstance(index, dict) and index["name"] is not None:
                numbers = index["start"] + index["step"] * np.arange(found.num_rows)
                yield str(index["name"]), pa.chunked_array([pa.array(numbers)])
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"pandas' notes on its index are damaged: {error!r}") from error


def _plain(column: Column) -> Column:
    """The column as the first plain type that takes all of its values as they are; else as it is."""
    for cast in _casts(column.type):
        try:
            return cast(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return column


def _casts(kind: Any) -> Iterator[Callable[[Column], Column]]:
    is_a = pa.types
    if is_a.is_dictionary(kind):  # a categorical, an enum
        decoded = kind.value_type
        yield lambda column: _plain(pa.chunked_array([each.dictionary_decode() for each in column.chunks], decoded))
    elif is_a.is_integer(kind):  # never through float64, in which numbers from 2**53 on become others
        yield lambda column: column.cast(pa.int64())
    elif is_a.is_floating(kind):
        yield lambda column: column.cast(pa.float64())
    elif is_a.is_decimal(kind):
        yield lambda column: column.cast(pa.int64())
        yield lambda column: column.cast(pa.string()).cast(pa.float64())  # the nearest there is
    elif is_a.is_string_view(kind) or any(is_bytes(kind) for is_bytes in BYTES):
        yield lambda column: column.cast(pa.large_string())

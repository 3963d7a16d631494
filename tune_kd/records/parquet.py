"""Parquet files of pandas, PyArrow, polars, DuckDB and fastparquet as DataFrames of the same few types."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
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

# The epochs of 10,000 trials with 100 each are a million rows of 16 columns, and 150 MB.
MOST_ROWS = 2**21
MOST_COLUMNS = 1000
MOST_VALUES = 2**25  # of all columns
MOST_BYTES = 2**30  # of all pages unpacked, and of all values
MOST_PAGES = 2**17  # that million rows has 300
MOST_FOOTER_BYTES = 2**23  # of metadata: 150 for each column of each group of rows
MOST_DEPTH = 16  # of what is in one another there
MOST_PARTS = 2**14  # row groups, or columns with what they are nested in
MOST_INDICES = 16  # of pandas

Column = Any  # a pyarrow.ChunkedArray


def table(data: bytes) -> pd.DataFrame:
    """A file's table. Text is `string`, whole numbers are `Int64`, other numbers `float64`, truth values `boolean`, and
    what is none of these is as pandas has it; columns of lists and other nested values are left out. What pandas says
    of its own types is not asked for, but for an index with a name, which is a column here; one without is not in the
    table.

    Raises `ValueError`, `OSError`, `TypeError` or `NotImplementedError` where it cannot be read, and where it would
    fill the memory.
    """
    footer = int.from_bytes(data[-8:-4], "little")
    _bound("bytes of metadata", footer, MOST_FOOTER_BYTES)
    source = pa.BufferReader(data)
    limits = {"thrift_string_size_limit": MOST_FOOTER_BYTES, "thrift_container_size_limit": MOST_PARTS}
    about = pq.ParquetFile(source, **limits)
    flat = [field.name for field in about.schema_arrow if not pa.types.is_nested(field.type)]
    texts = _bounded(data, footer, about.schema)
    # Text comes as numbers of different texts: a million times one text of a megabyte is then a megabyte.
    found = pq.ParquetFile(source, metadata=about.metadata, page_checksum_verification=True, read_dictionary=texts,
                           **limits).read(columns=flat if len(flat) < len(about.schema_arrow) else None)  # fmt: skip
    try:
        _bound("bytes of values", sum(map(_value_bytes, found.columns)), MOST_BYTES)
    except IndexError as error:  # pyarrow's own, for which there is no such text
        raise ValueError(f"its dictionaries are damaged: {error}") from error
    named = [(name, column) for name, column in zip(found.column_names, found.columns, strict=True)
             if not UNNAMED.fullmatch(name)]  # fmt: skip
    there = {name for name, _ in named}
    named += [(name, column) for name, column in _ranges(found) if name not in there]
    plain = pa.Table.from_arrays([_plain(column) for _, column in named], names=[name for name, _ in named])
    frame: pd.DataFrame = plain.to_pandas(types_mapper=PLAIN.get)
    return frame


def _bound(what: str, number: int, most: int) -> None:
    if not 0 <= number <= most:
        raise ValueError(f"it has {number:,} {what}; at most {most:,} are read")


def _bounded(data: bytes, footer: int, schema: Any) -> list[str]:
    """The columns of text. Raises `ValueError` where the metadata, or pages that say other than they, tell of more
    than is read.

    The metadata are read here, since some that are damaged end the process where pyarrow is asked for them, and it
    tells nothing of pages. Ids of fields: parquet.thrift, in Apache Parquet's format.
    """
    columns = [schema.column(number) for number in range(len(schema))]
    _bound("columns", len(columns), MOST_COLUMNS)
    try:
        groups, chunks = _chunks(data, footer)
        rows = sum(group[3] for group in groups)
        _bound("rows", rows, MOST_ROWS)
        chunks = [chunk for chunk in chunks if chunk[5] > 0]  # of others nothing is read, and they may lie nowhere
        _bound("values", sum(chunk[5] for chunk in chunks), MOST_VALUES)
        wide = sum(column.length for column in columns if column.physical_type == "FIXED_LEN_BYTE_ARRAY")
        _bound("bytes of values", wide * rows, MOST_BYTES)
        _bound("bytes", sum(chunk[6] for chunk in chunks), MOST_BYTES)
        unpacked = 0
        for number, size in enumerate((size for chunk in chunks for size in _pages(data, chunk)), start=1):
            unpacked += size
            _bound("bytes", unpacked, MOST_BYTES)
            _bound("pages", number, MOST_PAGES)
    except (LookupError, TypeError) as error:
        raise ValueError("its metadata or pages are damaged") from error
    return [
        column.path for column in columns if column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level
    ]


def spans(data: bytes) -> list[tuple[int, int]]:
    """Where the pages of each column of each group of rows begin and end. Raises `ValueError` where the metadata that
    say so are damaged."""
    try:
        return [_span(data, chunk) for chunk in _chunks(data, int.from_bytes(data[-8:-4], "little"))[1]]
    except (LookupError, TypeError) as error:
        raise ValueError("its metadata are damaged") from error


def _chunks(data: bytes, footer: int) -> tuple[list[dict[int, Any]], list[dict[int, Any]]]:
    """The metadata of groups of rows, and those of all their columns."""
    groups = _struct(data, len(data) - 8 - footer)[0].get(4, [])
    return groups, [chunk[3] for group in groups for chunk in group[1]]


def _span(data: bytes, chunk: dict[int, Any]) -> tuple[int, int]:
    """Where the pages of a column begin and end."""
    # One without rows has an empty dictionary and no page of data, of which it says that it is at 0.
    start = min(at for at in (chunk.get(9, 0), chunk.get(11, 0)) if at) if chunk.get(9) or chunk.get(11) else 0
    end = start + chunk[7]
    if not 0 <= start <= end <= len(data):
        raise IndexError
    return start, end


def _pages(data: bytes, chunk: dict[int, Any]) -> Iterator[int]:
    """The bytes that each page of a column unpacks to, by the header before it."""
    at, end = _span(data, chunk)
    while at < end:
        header, at = _struct(data, at)
        if min(header[2], header[3]) < 0:
            raise IndexError
        yield header[2]
        at += header[3]


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Whole numbers, structs and lists of structs in a struct of Thrift's compact protocol by the ids of their fields,
    and where it ends. Raises LookupError where there is none.

    Format: thrift-compact-protocol.md, in Apache Thrift.
    """
    found: dict[int, Any] = {}
    field = 0
    if depth > MOST_DEPTH:
        raise IndexError
    while head := data[at]:
        at, kind = at + 1, head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        if kind not in (1, 2):  # true and false, which in a field have no bytes of their own
            value, at = _value(data, at, kind, depth)
            if value is not None and field < 16:  # what is asked for
                found[field] = value
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):  # whole numbers of 16, 32 and 64 bits
        return _number(data, at)
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind in (9, 10):  # a list, a set
        count, kind, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        if depth > MOST_DEPTH:
            raise IndexError
        several = []
        for _ in range(count):
            value, at = _value(data, at, kind, depth + 1)
            if kind == 12:
                several.append(value)
        return several, at
    if kind == 8:  # bytes
        length, at = _varint(data, at)
    elif kind in (1, 2, 3, 7):  # truth values and bytes in a list; a number of 64 bits
        length = 8 if kind == 7 else 1
    else:
        raise IndexError
    if at + length > len(data):
        raise IndexError
    return None, at + length


def _number(data: bytes, at: int) -> tuple[int, int]:
    coded, at = _varint(data, at)
    return (coded >> 1) ^ -(coded & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise IndexError


def _value_bytes(column: Column) -> int:
    """The bytes of a column's values, each text as often as it is there."""
    if not (pa.types.is_dictionary(column.type) and _is_text(column.type.value_type)):
        return int(column.nbytes)
    lengths = (pc.sum(pc.take(pc.binary_length(each.dictionary), each.indices)).as_py() for each in column.chunks)
    return sum(length or 0 for length in lengths)


def _is_text(kind: Any) -> bool:
    is_a = pa.types
    return bool(
        is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_binary(kind) or is_a.is_large_binary(kind)
    )


def _ranges(found: Any) -> Iterator[tuple[str, Column]]:
    """Indices with a name whose numbers follow one another: pandas writes such a one into its notes alone."""
    try:
        indices = (found.schema.pandas_metadata or {}).get("index_columns", [])
        _bound("indices", len(indices), MOST_INDICES)
        for index in indices:
            if isinstance(index, dict) and index["name"] is not None:
                numbers = index["start"] + index["step"] * np.arange(found.num_rows)
                yield str(index["name"]), pa.chunked_array([pa.array(numbers)])
    except (AttributeError, KeyError, OverflowError, TypeError, RecursionError) as error:
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

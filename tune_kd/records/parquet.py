"""Read Parquet files of pandas, PyArrow, polars, DuckDB and fastparquet into DataFrames with the same few types."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

UNNAMED = re.compile(r"__index_level_\d+__")  # column that pandas writes for an index without a name
PLAIN = {
    pa.string(): pd.StringDtype(),
    pa.large_string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
BYTES = (pa.binary(), pa.large_binary())
TEXT = (pa.string(), pa.large_string(), *BYTES)
VIEWS = (pa.string_view(), pa.binary_view())
NO_CAST = (pa.ArrowInvalid, pa.ArrowNotImplementedError)

# 10,000 trials with 100 epochs each give an epochs table of a million rows, 16 columns and 150 MB.
MOST_ROWS = 2**21
MOST_COLUMNS = 1000
MOST_VALUES = 2**25  # of all columns
MOST_BYTES = 2**30  # of all uncompressed pages, and of all values
MOST_PAGES = 2**17  # the table above has 300
MOST_FOOTER_BYTES = 2**23  # of metadata, which takes 150 bytes for each column of each row group
MOST_DEPTH = 16  # of nested metadata
MOST_PARTS = 2**14  # row groups, or columns with their parents
MOST_INDICES = 16  # pandas index columns

Column = Any  # a pyarrow.ChunkedArray


def table(data: bytes) -> pd.DataFrame:
    """Return the table in a file's bytes.

    Text becomes `string`, integers `Int64`, other numbers `float64`, and booleans `boolean`; other types are read as
    pandas reads them. Nested columns are dropped. pandas' own type metadata is ignored. An index with a name becomes a
    column; an index without a name is dropped.

    Raises `ValueError`, `OSError`, `TypeError` or `NotImplementedError` if the file cannot be read or would fill the
    memory.
    """
    _bound("bytes of metadata", _footer_bytes(data), MOST_FOOTER_BYTES)
    source = pa.BufferReader(data)
    limits = {"thrift_string_size_limit": MOST_FOOTER_BYTES, "thrift_container_size_limit": MOST_PARTS}
    about = pq.ParquetFile(source, **limits)
    flat = [field.name for field in about.schema_arrow if not pa.types.is_nested(field.type)]
    texts = _check_bounds(data, about.schema)
    # Text is read as dictionaries, so a million copies of one text of a megabyte take a megabyte.
    found = pq.ParquetFile(source, metadata=about.metadata, page_checksum_verification=True, read_dictionary=texts,
                           **limits).read(columns=flat if len(flat) < len(about.schema_arrow) else None)  # fmt: skip
    try:
        _bound("bytes of values", sum(map(_value_bytes, found.columns)), MOST_BYTES)
    except IndexError as error:  # from pyarrow: an index that is not in the dictionary
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


def _check_bounds(data: bytes, schema: Any) -> list[str]:
    """Return the text columns. Raises `ValueError` if the metadata or the page headers exceed a bound.

    The metadata is decoded here, since pyarrow aborts the process for some damaged metadata and does not expose page
    headers. Field ids: parquet.thrift, in Apache Parquet's format.
    """
    columns = [schema.column(number) for number in range(len(schema))]
    _bound("columns", len(columns), MOST_COLUMNS)
    try:
        groups, chunks = _chunks(data)
        rows = sum(group[3] for group in groups)
        _bound("rows", rows, MOST_ROWS)
        chunks = [chunk for chunk in chunks if chunk[5] > 0]  # empty chunks are not read and may have any offset
        _bound("values", sum(chunk[5] for chunk in chunks), MOST_VALUES)
        wide = sum(column.length for column in columns if column.physical_type == "FIXED_LEN_BYTE_ARRAY")
        _bound("bytes of values", wide * rows, MOST_BYTES)
        _bound("bytes", sum(chunk[6] for chunk in chunks), MOST_BYTES)
        unpacked = 0
        for number, size in enumerate((size for chunk in chunks for size in _page_sizes(data, chunk)), start=1):
            unpacked += size
            _bound("bytes", unpacked, MOST_BYTES)
            _bound("pages", number, MOST_PAGES)
    except (LookupError, TypeError) as error:
        raise ValueError("its metadata or pages are damaged") from error
    return [
        column.path for column in columns if column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level
    ]


def extent(data: bytes) -> tuple[int, int]:
    """Return the start and end of a file's pages; (0, 0) if it has none or its metadata is damaged."""
    try:
        starts, ends = zip(*(_span(data, chunk) for chunk in _chunks(data)[1]), strict=True)
        return min(starts), max(ends)
    except (LookupError, TypeError, ValueError):
        return 0, 0


def _footer_bytes(data: bytes) -> int:
    return int.from_bytes(data[-8:-4], "little")


def _chunks(data: bytes) -> tuple[list[dict[int, Any]], list[dict[int, Any]]]:
    """Return the metadata of all row groups, and of all columns in them."""
    groups = _struct(data, len(data) - 8 - _footer_bytes(data))[0].get(4, [])
    return groups, [chunk[3] for group in groups for chunk in group[1]]


def _span(data: bytes, chunk: dict[int, Any]) -> tuple[int, int]:
    """Return the start and end of a column's pages."""
    # A column without rows has an empty dictionary, and its data offset is 0.
    start = min((at for at in (chunk.get(9), chunk.get(11)) if at), default=0)
    end = start + chunk[7]
    if not 0 <= start <= end <= len(data):
        raise IndexError
    return start, end


def _page_sizes(data: bytes, chunk: dict[int, Any]) -> Iterator[int]:
    """Yield the uncompressed size of each page of a column, from the page's header."""
    at, end = _span(data, chunk)
    while at < end:
        header, at = _struct(data, at)
        if min(header[2], header[3]) < 0:
            raise IndexError
        yield header[2]
        at += header[3]


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Decode a struct of Thrift's compact protocol. Return its integers, structs and lists of structs by field id, and
    the offset of its end. Raises LookupError if it is damaged.

    Format: thrift-compact-protocol.md, in Apache Thrift.
    """
    found: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at, kind = at + 1, head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        if kind not in (1, 2):  # true and false take no bytes in a field
            value, at = _value(data, at, kind, depth)
            if value is not None and field < 16:  # larger ids are never read here
                found[field] = value
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Decode a value; None for kinds that are not used here."""
    if depth > MOST_DEPTH:
        raise IndexError
    if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
        return _number(data, at)
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind in (9, 10):  # a list, a set
        count, kind, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        several = []
        for _ in range(count):
            value, at = _value(data, at, kind, depth + 1)
            if kind == 12:
                several.append(value)
        return several, at
    if kind == 8:  # bytes
        length, at = _varint(data, at)
    elif kind in (1, 2, 3, 7):  # booleans and bytes in a list; a 64-bit float
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
    """Return the bytes of a column's values, counting every occurrence of a text."""
    if not (pa.types.is_dictionary(column.type) and column.type.value_type in TEXT):
        return int(column.nbytes)
    lengths = (pc.sum(pc.take(pc.binary_length(each.dictionary), each.indices)).as_py() for each in column.chunks)
    return sum(length or 0 for length in lengths)


def _ranges(found: Any) -> Iterator[tuple[str, Column]]:
    """Yield the named range indices, which pandas stores only in its metadata."""
    try:
        indices = (found.schema.pandas_metadata or {}).get("index_columns", [])
        _bound("indices", len(indices), MOST_INDICES)
        for index in indices:
            if isinstance(index, dict) and index["name"] is not None:
                numbers = index["start"] + index["step"] * np.arange(found.num_rows)
                yield str(index["name"]), pa.chunked_array([pa.array(numbers)])
    except (AttributeError, KeyError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"pandas' metadata on its index is damaged: {error!r}") from error


def _plain(column: Column) -> Column:
    """Return the column in a plain type that can hold all of its values; unchanged if there is no such type."""
    is_a, kind = pa.types, column.type
    with suppress(*NO_CAST):
        if is_a.is_dictionary(kind):  # a categorical or an enum
            return _plain(pa.chunked_array([each.dictionary_decode() for each in column.chunks], kind.value_type))
        if is_a.is_integer(kind):  # not through float64, which rounds numbers from 2**53 on
            return column.cast(pa.int64())
        if is_a.is_floating(kind):
            return column.cast(pa.float64())
        if is_a.is_decimal(kind):
            with suppress(*NO_CAST):
                return column.cast(pa.int64())
            return column.cast(pa.string()).cast(pa.float64())  # the nearest float
        if kind in (*BYTES, *VIEWS) or is_a.is_fixed_size_binary(kind):
            return column.cast(pa.large_string())
    return column

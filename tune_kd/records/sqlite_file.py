"""The layout of a ledger's file, and checks before SQLite opens it: journal, header and path length."""

import os
from pathlib import Path
from typing import Any

from tune_kd.records.schema import MOST_LEDGER_BYTES, SCHEMAS, Schema
from tune_kd.study.trial import FURTHER
from tune_kd.system.errors import CorruptFile
from tune_kd.system.files import opened

SQLITE_BYTES = 504  # limit of the path: SQLite's 512, less the suffix of its journal
VERSIONS = b"\x02\x02"  # format versions of a file with a write-ahead log
SUPER = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # last bytes of a journal that names another file (fileformat.html)
_SQL = {str: "TEXT", int: "INTEGER", float: "REAL"}


def versions(path: Path) -> bytes:
    """Return the format versions for writing and reading: bytes 18 and 19 (https://sqlite.org/fileformat.html)."""
    with opened(path, MOST_LEDGER_BYTES) as file:
        return file.read(20)[18:]


def check_journal(path: Path) -> None:
    """Raise `CorruptFile` for a SQLite journal that names another file, which SQLite would remove.

    Only a transaction over several databases writes such a journal, and no run does.
    """
    if os.path.isfile(path):
        with opened(path, MOST_LEDGER_BYTES) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(SUPER)))
            if file.read() == SUPER:
                raise CorruptFile(f"{path} names another file; no run writes such a journal; remove it")


def too_long(path: Path) -> str | None:
    """Return a sentence if a path, also with its links resolved, is too long for SQLite. Return None otherwise."""
    length = max(len(os.fsencode(each)) for each in (path.absolute(), os.path.realpath(path)))
    if length <= SQLITE_BYTES:
        return None
    return f"the path of its ledger has {length} bytes, and SQLite opens paths of at most {SQLITE_BYTES}"


SINCE_0_7 = ("fast_paths", FURTHER)  # columns of trials


def columns(schema: Schema[Any], earlier: bool) -> list[str]:
    """The columns of a table in a ledger. `earlier` selects those of versions before 0.7."""
    return [name for name in schema.columns if not (earlier and name in SINCE_0_7)]


def creating(earlier: bool) -> list[str]:
    """The statements that create the tables."""
    return [
        f"CREATE TABLE IF NOT EXISTS {schema.name} (number INTEGER PRIMARY KEY AUTOINCREMENT, "
        + "".join(f'"{name}" {_SQL[schema.columns[name]]}, ' for name in columns(schema, earlier))
        + f"crc INTEGER NOT NULL, UNIQUE ({', '.join(schema.key)}))"
        for schema in SCHEMAS
    ] + ["CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)"]

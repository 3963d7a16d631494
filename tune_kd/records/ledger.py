"""The records of a run: a ledger while it runs, Parquet tables for everyone else (`tables.py` reads them).

The schemas below are the one place that says which columns there are, of which type, and which rows are one.
The ledger (SQLite, written by the driver alone) is the truth; tables are made from it and can be made again.
"""

import hashlib
import json
import math
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tune_kd.records.schema import (
    COMMITS,
    DIGESTS,
    EPOCHS,
    MOST_LEDGER_BYTES,
    MOST_TABLE_BYTES,
    SCHEMAS,
    TIMING,
    Row,
    Schema,
    broken,
    clean,
    mistyped,
)
from tune_kd.records.sqlite_file import VERSIONS, versions
from tune_kd.records.tables import PART, arrow, to_parquet
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile
from tune_kd.system.files import MOST_RECORD_BYTES, check_regular, patiently, publish, read, sealed, unsealed, write_at
from tune_kd.system.overhead import spending

if TYPE_CHECKING:
    import pyarrow as pa

ASIDE = ("", "-wal", "-shm", "-journal")  # ends of the names of SQLite's files


Write = tuple[str, list[Any]]  # an SQL statement and its values
_SQL = {str: "TEXT", int: "INTEGER", float: "REAL"}


FAILURES = (CorruptFile, OSError, sqlite3.Error)
"""What the machine can do to records: damage, a full disk, a lock that is not given."""


def _crc(row: Row) -> int:
    return zlib.crc32(json.dumps(list(row.values())).encode())


ROW_BYTES = 32  # of a row at least, with its index
SLACK = 2**24  # bytes by which a ledger may be larger than it was a moment ago
MARGIN = 2**20  # bytes by which a table may be larger than four times what it holds
STEPS = 100_000  # of SQLite's machine, after which it is asked whether it goes on for ever
MOST_CELL_BYTES = 2**24
TABLES_APART = 0.5  # seconds at least between two makings of the tables


class Ledger:
    """One SQLite file a run. A row counts once the transaction that holds it is committed.

    Each row carries a check sum, and a file beside the ledger how many transactions were committed, so that neither
    an altered row nor a lost end of the write-ahead log goes unseen.
    """

    def __init__(self, path: Path, *, read_only: bool = False, after: int = 0) -> None:
        """`after`: how many transactions were committed to the ledger that this one takes the place of."""
        self.path = path
        self._tables_at = -math.inf  # when this made the tables, by the monotonic clock
        self._writes: list[Write] | None = None  # of the transaction that is open
        for end in ASIDE:  # whoever reads writes into one of them, too
            writes = not read_only or end == "-shm"
            check_regular(path.with_name(f"{path.name}{end}"), MOST_LEDGER_BYTES, writes=writes)
        journal = path.with_name(f"{path.name}-journal")
        if os.path.isfile(journal):  # with a write-ahead log there is none, and SQLite removes the files that one names
            raise CorruptFile(f"{journal} is there, which no run leaves")
        if read_only:
            # SQLite writes beside a ledger in order to read it. Whoever may not do so reads it as it stands, which is
            # right while no driver has its write-ahead log there.
            log = path.with_name(f"{path.name}-wal")
            still = "" if log.exists() or os.access(path.parent, os.W_OK) else "&immutable=1"
            uri = f"{path.absolute().as_uri()}?mode=ro{still}"
            self._connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        else:
            self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_CELL_BYTES)
        self._steps = self._room() // STEPS
        self._connection.set_progress_handler(self._went_on, STEPS)
        try:
            if read_only:
                self._connection.execute("BEGIN")  # all that is read is of one moment
                self._check_made()
                return
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._in_one([(statement, []) for statement in _CREATE])
            self._check_made()
            self._commits = max(after, self.held())
        except BaseException:
            self._connection.close()  # with what it holds locked
            raise

    def _check_made(self) -> None:
        """Raise `CorruptFile` where the file holds anything but our tables. A view, a trigger or an index is a program:
        one of somebody else's could go on for ever, or write what nobody asked for."""
        made = {statement.replace(" IF NOT EXISTS", "") for statement in _CREATE}
        own = {("table", "CREATE TABLE sqlite_sequence(name,seq)"), *(("table", sql) for sql in made)}
        found = {(kind, sql) for kind, sql in self._read("SELECT type, sql FROM sqlite_master", [])}
        if found - {("index", None)} != own:
            raise CorruptFile(f"{self.path} is damaged: its tables are not those that were made")

    def close(self) -> None:
        self._connection.close()

    def count_again(self) -> None:
        """Make the file again that says how many transactions were committed. Raises OSError."""
        publish(self.path.with_name(COMMITS), counted(self._commits))

    def held(self) -> int:
        """How many transactions the ledger says it holds. Raises `CorruptFile` where that was altered."""
        held = self.fact("commits")
        count = 0 if held is None else count_of(held.encode())
        if count is None:
            raise CorruptFile(f"{self.path}: its count of transactions was altered since it was written")
        return count

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything that is put inside is on disk together, or not at all. It cannot be read before the end.

        Raises `sqlite3.Error` where a disk refuses it several times.
        """
        assert self._writes is None, "a transaction is open"
        writes: list[Write] = []
        self._writes = writes
        try:
            yield
        finally:
            self._writes = None
        if writes:
            with spending("ledger"):
                patiently(lambda: self._commit(writes), (sqlite3.OperationalError,))
                write_at(self.path.with_name(COMMITS), 0, counted(self._commits))

    def _commit(self, writes: list[Write]) -> None:
        self._steps = self._room() // STEPS
        self._in_one([*writes, (_SET_FACT, ["commits", counted(self._commits + 1).decode()])])
        self._commits += 1
        point("ledger.committed")

    def _in_one(self, writes: list[Write]) -> None:
        """All of these statements, or none."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            point("ledger.begun")
            for statement, values in writes:
                self._connection.execute(statement, values)
            point("ledger.written")
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _write(self, statement: str, values: list[Any]) -> None:
        if self._writes is not None:
            self._writes.append((statement, values))
            return
        with self.transaction():
            self._write(statement, values)

    def put(self, schema: Schema, row: Mapping[str, Any]) -> None:
        """Write a row, in the place of the one with its key. Raises `ValueError` for one that no reader would take."""
        cleaned = clean(schema, row)
        if (problem := broken(schema, cleaned)) is not None:
            raise ValueError(f"{problem} (a row of trial {cleaned['trial_id']})")
        names = [*cleaned, "crc"]
        updates = ", ".join(f'"{name}" = excluded."{name}"' for name in names)
        self._write(
            f"INSERT INTO {schema.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
            f"ON CONFLICT ({', '.join(schema.key)}) DO UPDATE SET {updates}",
            [*cleaned.values(), _crc(cleaned)],
        )

    def add_epoch(self, row: Mapping[str, Any]) -> Literal["new", "same", "different"]:
        """Write an epoch that is not there yet; else say whether the one that is there agrees with it."""
        cleaned = clean(EPOCHS, row)
        where = " AND ".join(f"{name} = ?" for name in EPOCHS.key)
        known = self._select(EPOCHS, f"WHERE {where}", [cleaned[name] for name in EPOCHS.key])
        if not known:
            self.put(EPOCHS, cleaned)
            return "new"
        agrees = all(known[0][name] == value for name, value in cleaned.items() if name not in TIMING)
        return "same" if agrees else "different"

    def rows(self, schema: Schema) -> list[Row]:
        """All rows in the order in which they were first written. Raises `CorruptFile` where one was altered."""
        return self._select(schema, "ORDER BY number", [])

    def table(self, schema: Schema) -> "pa.Table":
        """All rows, made into a table a part at a time: as Python's objects they take ten times as much memory."""
        import pyarrow as pa

        parts = [arrow(schema, [])]
        while rows := self._select(schema, "ORDER BY number LIMIT ? OFFSET ?", [PART, PART * (len(parts) - 1)]):
            parts.append(arrow(schema, rows))
        return pa.concat_tables(parts)

    def _select(self, schema: Schema, which: str, values: list[Any]) -> list[Row]:
        names = ", ".join(f'"{name}"' for name in schema.columns)
        rows = []
        for *cells, crc in self._read(f"SELECT {names}, crc FROM {schema.name} {which}", values):
            row = dict(zip(schema.columns, cells, strict=True))
            if any(isinstance(cell, bytes) for cell in cells) or _crc(row) != crc:
                key = ", ".join(f"{name}={row[name]!r}" for name in schema.key)
                raise CorruptFile(f"{self.path}: the row {key} of {schema.name} was altered since it was written")
            if (problem := mistyped(schema, row) or broken(schema, row)) is not None:
                raise CorruptFile(f"{self.path}: {problem}, which no run writes")
            rows.append(row)
        return rows

    def fact(self, name: str) -> str | None:
        found = self._read("SELECT value FROM facts WHERE name = ?", [name])
        return str(found[0][0]) if found else None

    def _read(self, statement: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """What a statement finds, where need be at a later try. Raises `CorruptFile` where to ask again would not
        help."""

        def ask() -> list[tuple[Any, ...]]:
            self._steps = self._room() // STEPS
            try:
                return self._bounded(self._connection.execute(statement, values))
            except (sqlite3.Error, UnicodeError) as error:  # SQLite's own words on a damage may be no text any more
                if isinstance(error, UnicodeError) or damage(error):
                    raise CorruptFile(f"{self.path} is damaged ({error})") from error
                raise

        return patiently(ask, (sqlite3.OperationalError,))

    def _room(self) -> int:
        """More than the bytes of all rows, and than the steps in which SQLite reads them. Pages can be made to lead to
        one another, and would be read for ever."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return SLACK + sum(8 * file.stat().st_size for file in files if file.exists())

    def _went_on(self) -> bool:
        """Whether SQLite is to be interrupted, which asks after so many steps."""
        self._steps -= 1
        return self._steps < 0

    def _bounded(self, cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
        """What a cursor gives. Raises `CorruptFile` where that is more than the files have room for."""
        room = self._room()
        rows = []
        for row in cursor:
            room -= ROW_BYTES + sum(len(cell) for cell in row if isinstance(cell, str | bytes))
            if room < 0:
                raise CorruptFile(f"{self.path} is damaged: it has more rows than room for them")
            rows.append(row)
        return rows

    def check(self) -> None:
        """Read everything. Raises `CorruptFile`, or what `damage` makes of an error, where not all is as it was
        written."""
        at_least = commits(self.path.parent)  # before the ledger, which may grow meanwhile
        if versions(self.path) != VERSIONS:
            raise CorruptFile(f"{self.path} is damaged (its header); SQLite would read it, and not write to it")
        found = [text for (text,) in self._read("PRAGMA integrity_check(3)", [])]
        if found != ["ok"]:
            raise CorruptFile(f"{self.path} is damaged ({'; '.join(found)})")
        trials, _, epochs = (self.rows(schema) for schema in SCHEMAS)
        theirs: dict[str, list[int]] = {}
        for row in epochs:
            theirs.setdefault(row["trial_id"], []).append(row["epoch"])
        for row in trials:
            has, says = theirs.pop(row["trial_id"], []), row["epochs_run"]
            if len(has) != (says or 0) or sorted(has) != list(range(1, len(has) + 1)):  # what it says may be any number
                what = f"{row['arm']} seed {row['seed']} says {says} epochs and has {len(has)}"
                raise CorruptFile(f"{self.path} is damaged: {what}")
        if theirs:
            raise CorruptFile(f"{self.path} is damaged: it holds epochs of {next(iter(theirs))}, and no such trial")
        held = self.held()
        if at_least is not None and held < at_least:
            raise CorruptFile(f"{self.path} holds {held} transactions, and {at_least} were committed: its end was lost")

    def write_tables(self, folder: Path) -> None:
        """Make the three Parquet tables, each complete or as it was before.

        Not at once after this did so before: a table keeps the pages of one that it replaces (see `to_parquet`), and a
        reader on a busy machine must not sleep through two.
        """
        with spending("ledger"):
            time.sleep(max(0.0, self._tables_at + TABLES_APART - time.monotonic()))
            self._write_tables(folder)
            self._tables_at = time.monotonic()

    def _write_tables(self, folder: Path) -> None:
        known = digests(folder) or {}
        for schema in SCHEMAS:
            path = folder / f"{schema.name}.parquet"
            before = _before(path)
            here = None if before is None else hashlib.sha256(before).hexdigest()
            kept = [each for each in known.get(path.name, []) if each == here]  # what stays there after a kill
            table = self.table(schema)
            fits = kept and before is not None and len(before) <= MARGIN + 4 * table.nbytes
            data = to_parquet(table, before if fits else None)
            known[path.name] = [hashlib.sha256(data).hexdigest(), *kept[:1]]
            publish(folder / DIGESTS, sealed(known))
            point("tables.announced")
            publish(path, data)
            point("tables.published")


def _before(path: Path) -> bytes | None:
    """The table that another one is to replace; null where none is there."""
    try:
        return read(path, MOST_TABLE_BYTES) if path.is_file() else None
    except UnexpectedFile:  # nobody reads that
        return None


_CREATE = [
    f"CREATE TABLE IF NOT EXISTS {schema.name} (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    + "".join(f'"{name}" {_SQL[kind]}, ' for name, kind in schema.columns.items())
    + f"crc INTEGER NOT NULL, UNIQUE ({', '.join(schema.key)}))"
    for schema in SCHEMAS
] + ["CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)"]
_SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"


def snapshot(path: Path, to: Path) -> int:
    """Copy a ledger as it is at this moment, also while its driver writes; returns how many transactions it holds."""
    check_regular(path, MOST_LEDGER_BYTES)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    with reading(to) as copy:
        return copy.held()


@contextmanager
def reading(path: Path) -> Iterator[Ledger]:
    """A ledger to look into, also while its driver writes."""
    ledger = Ledger(path, read_only=True)
    try:
        yield ledger
    finally:
        ledger.close()


def damage(error: Exception) -> bool:
    """Whether an error says that a record is damaged, and not that the disk is full, slow or locked."""
    if not isinstance(error, sqlite3.Error):
        return isinstance(error, CorruptFile)
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: text that is no text
    wrong = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_INTERRUPT)
    return code & 0xFF in wrong


def commits(folder: Path) -> int | None:
    """How many transactions the ledger in a folder holds at least; null where nothing whole says so."""
    path = folder / COMMITS
    try:
        return count_of(read(path, MOST_RECORD_BYTES)) if path.is_file() else None
    except UnexpectedFile:
        return None


def count_of(text: bytes) -> int | None:
    """The inverse of `counted`; null where the text was altered."""
    count, _, crc = text.rstrip(b"\n").partition(b" ")
    whole = count.isdigit() and len(count) <= 18 and crc == b"%08x" % zlib.crc32(count)
    return int(count) if whole else None


def counted(count: int) -> bytes:
    """A count with its check sum. Of one length, so that it is written over in one piece."""
    text = b"%012d" % count
    return b"%b %08x\n" % (text, zlib.crc32(text))


def digests(folder: Path) -> dict[str, list[str]] | None:
    """The SHA-256 that each table of a run may have, by file name. Null where no whole record says so."""
    path = folder / DIGESTS
    try:
        found = unsealed(read(path, MOST_RECORD_BYTES), path) if path.is_file() else None
    except CorruptFile:
        return None
    whole = found is not None and all(isinstance(each, list) for each in found.values())
    return found if whole else None

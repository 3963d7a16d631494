"""The ledger of a run: one SQLite file that only the driver writes.

It is the source of truth. The Parquet tables (`reader.py` loads them) are written from it and can be rewritten.
"""

import hashlib
import json
import math
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tune_kd.records.schema import (
    COMMITS,
    DIGESTS,
    EPOCHS,
    MOST_LEDGER_BYTES,
    MOST_TABLE_BYTES,
    SCHEMAS,
    R,
    Schema,
    further_kinds,
)
from tune_kd.records.sqlite_file import VERSIONS, columns, creating, versions
from tune_kd.records.tables import PART, arrow, to_parquet
from tune_kd.study.trial import FURTHER, Row
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile
from tune_kd.system.files import MOST_RECORD_BYTES, check_regular, patiently, publish, read, sealed, unsealed, write_at
from tune_kd.system.overhead import spending

if TYPE_CHECKING:
    import pyarrow as pa

ASIDE = ("", "-wal", "-shm", "-journal")  # suffixes of SQLite's files
FAILURES = (CorruptFile, OSError, sqlite3.Error)  # failures of the machine: damage, a full disk, a taken lock

Write = tuple[str, list[Any]]  # an SQL statement and its values

ROW_BYTES = 32  # least size of a row with its index
SLACK = 2**24  # bytes that a ledger may grow between two checks of its size
MARGIN = 2**20  # bytes that a table's file may have beyond four times its content
STEPS = 100_000  # steps of SQLite's virtual machine between two checks for an endless statement
MOST_CELL_BYTES = 2**24
TABLES_APART = 0.5  # least seconds between two writes of the tables


def _crc(row: Row) -> int:
    return zlib.crc32(json.dumps(list(row.values())).encode())


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if not read_only:
        return sqlite3.connect(path, isolation_level=None)
    # To read a ledger, SQLite creates files in its folder. Without write permission, read the file alone. That is
    # correct while no driver has a write-ahead log there.
    log = path.with_name(f"{path.name}-wal")
    still = "" if log.exists() or os.access(path.parent, os.W_OK) else "&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{still}", uri=True, isolation_level=None)


class Ledger:
    """A run's SQLite file. A row counts once its transaction is committed.

    Each row has a checksum, which detects altered rows. A file in the same folder counts the committed transactions,
    which detects a truncated write-ahead log.
    """

    def __init__(self, path: Path, *, read_only: bool = False, after: int = 0) -> None:
        """Open or create a ledger. `after` is the number of transactions in the ledger that this one replaces.

        Raises `CorruptFile`, OSError or `sqlite3.Error`.
        """
        self.path = path
        self._tables_at = -math.inf  # monotonic time of the last write of the tables
        self._writes: list[Write] | None = None  # of the open transaction
        for end in ASIDE:
            writes = not read_only or end == "-shm"  # readers also write this file
            check_regular(path.with_name(f"{path.name}{end}"), MOST_LEDGER_BYTES, writes=writes)
        journal = path.with_name(f"{path.name}-journal")
        if os.path.isfile(journal):  # runs use a write-ahead log, and SQLite removes the files that a journal names
            raise CorruptFile(f"{journal} exists, but no run leaves such a file")
        self._connection = _connect(path, read_only=read_only)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_CELL_BYTES)
        self._steps = self._room() // STEPS
        self._connection.set_progress_handler(self._went_on, STEPS)
        try:
            if read_only:
                self._connection.execute("BEGIN")  # one snapshot for all reads
                self._check_made()
                return
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._in_one([(statement, []) for statement in creating(False)])
            self._check_made()
            self._commits = max(after, self.held())
        except BaseException:
            self._connection.close()  # releases its locks
            raise

    def _check_made(self) -> None:
        """Raise `CorruptFile` if the file contains anything but our tables.

        Views, triggers and indices can execute code. A foreign one could run forever or write to the file.
        """
        found = {(kind, sql) for kind, sql in self._read("SELECT type, sql FROM sqlite_master", [])}
        for earlier in (False, True):
            made = {statement.replace(" IF NOT EXISTS", "") for statement in creating(earlier)}
            own = {("table", "CREATE TABLE sqlite_sequence(name,seq)"), *(("table", sql) for sql in made)}
            if found - {("index", None)} == own:
                self._earlier = earlier
                return
        raise CorruptFile(f"{self.path} is damaged: its tables are not those that a run creates")

    def _names(self, schema: Schema[Any]) -> list[str]:
        """The columns of a table in this ledger."""
        return columns(schema, self._earlier)

    def close(self) -> None:
        self._connection.close()

    def count_again(self) -> None:
        """Rewrite the file that counts the committed transactions. Raises OSError."""
        publish(self.path.with_name(COMMITS), counted(self._commits))

    def held(self) -> int:
        """Return how many transactions the ledger holds. Raises `CorruptFile` if that number was altered."""
        held = self.fact("commits")
        count = 0 if held is None else count_of(held.encode())
        if count is None:
            raise CorruptFile(f"{self.path}: its count of transactions was changed after it was written")
        return count

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all rows that are put inside the block, or none. They can be read only after the block ends.

        Raises `sqlite3.Error` if the disk fails repeatedly.
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
        """Execute all of these statements or none."""
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

    def put(self, schema: Schema[Any], row: Row) -> None:
        """Insert a row, or replace the row with the same key. Raises `ValueError` if the row breaks a rule."""
        if self._writes is None:
            with self.transaction():
                self.put(schema, row)
            return
        cleaned = schema.clean(row)
        if (problem := schema.broken(cleaned)) is not None:
            raise ValueError(f"{problem} (a row of trial {cleaned['trial_id']})")
        cleaned = {name: cleaned[name] for name in self._names(schema)}
        names = [*cleaned, "crc"]
        updates = ", ".join(f'"{name}" = excluded."{name}"' for name in names)
        statement = (
            f"INSERT INTO {schema.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
            f"ON CONFLICT ({', '.join(schema.key)}) DO UPDATE SET {updates}"
        )
        self._writes.append((statement, [*cleaned.values(), _crc(cleaned)]))

    def add_epoch(self, row: Row) -> Literal["new", "same", "different"]:
        """Insert an epoch. If it exists already, return whether the two agree in all columns but the timing."""
        cleaned = EPOCHS.clean(row)
        where = " AND ".join(f"{name} = ?" for name in EPOCHS.key)
        known = self._select(EPOCHS, f"WHERE {where}", [cleaned[name] for name in EPOCHS.key])
        if not known:
            self.put(EPOCHS, cleaned)
            return "new"
        agrees = all(known[0][name] == value for name, value in cleaned.items() if name not in EPOCHS.timing)
        return "same" if agrees else "different"

    def rows(self, schema: Schema[R]) -> list[R]:
        """Return all rows in insertion order. Raises `CorruptFile` if a row was altered."""
        return self._select(schema, "ORDER BY number", [])

    def table(self, schema: Schema[Any]) -> "pa.Table":
        """Return all rows as a table. It is built in parts, since Python objects take ten times the memory."""
        import pyarrow as pa

        more = self._further() if FURTHER in schema.columns else {}
        parts: list[pa.Table] = []
        while rows := self._select(schema, "ORDER BY number LIMIT ? OFFSET ?", [PART, PART * len(parts)]):
            parts.append(arrow(schema, rows, more))
        return pa.concat_tables(parts or [arrow(schema, [], more)])

    def _further(self) -> dict[str, type]:
        """The further settings of the trials, with their types, in column order."""
        if self._earlier:
            return {}
        which = f"SELECT DISTINCT {FURTHER} FROM {SCHEMAS[0].name} WHERE {FURTHER} IS NOT NULL"
        kinds = further_kinds([text for (text,) in self._read(which, [])])
        if kinds is None:
            raise CorruptFile(f"{self.path} is damaged: its trials have further settings that no run writes")
        return kinds

    def _select(self, schema: Schema[R], which: str, values: list[Any]) -> list[R]:
        present, rows = self._names(schema), []
        names = ", ".join(f'"{name}"' for name in present)
        for *cells, crc in self._read(f"SELECT {names}, crc FROM {schema.name} {which}", values):
            row = dict(zip(present, cells, strict=True))
            if any(isinstance(cell, bytes) for cell in cells) or _crc(row) != crc:
                key = ", ".join(f"{name}={row[name]!r}" for name in schema.key)
                raise CorruptFile(f"{self.path}: the row {key} of {schema.name} was changed after it was written")
            row = {name: row.get(name) for name in schema.columns}
            if (problem := schema.mistyped(row) or schema.broken(row)) is not None:
                raise CorruptFile(f"{self.path} has an invalid row: {problem}")
            rows.append(row)
        return cast(list[R], rows)

    def fact(self, name: str) -> str | None:
        found = self._read("SELECT value FROM facts WHERE name = ?", [name])
        return str(found[0][0]) if found else None

    def _read(self, statement: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """Return the result of a query. Retries it if the disk fails. Raises `CorruptFile` for damage."""

        def ask() -> list[tuple[Any, ...]]:
            self._steps = self._room() // STEPS
            try:
                return self._bounded(self._connection.execute(statement, values))
            except (sqlite3.Error, UnicodeError) as error:  # UnicodeError: SQLite's message may quote damaged bytes
                if isinstance(error, UnicodeError) or damage(error):
                    raise CorruptFile(f"{self.path} is damaged ({error})") from error
                raise

        return patiently(ask, (sqlite3.OperationalError,))

    def _room(self) -> int:
        """Return an upper bound on the bytes of all rows, and on the steps to read them.

        Forged pages can refer to each other in a cycle, which SQLite would follow forever.
        """
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return SLACK + sum(8 * file.stat().st_size for file in files if file.exists())

    def _went_on(self) -> bool:
        """Return whether to interrupt SQLite, which calls this function every `STEPS` steps."""
        self._steps -= 1
        return self._steps < 0

    def _bounded(self, cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
        """Return the rows of a cursor. Raises `CorruptFile` if they exceed the size of the files."""
        room = self._room()
        rows = []
        for row in cursor:
            room -= ROW_BYTES + sum(len(cell) for cell in row if isinstance(cell, str | bytes))
            if room < 0:
                raise CorruptFile(f"{self.path} is damaged: its rows exceed the size of its files")
            rows.append(row)
        return rows

    def check(self) -> None:
        """Read everything. Raises `CorruptFile`, or an error that `damage` recognises, if anything was altered."""
        at_least = commits(self.path.parent)  # read before the ledger, which may grow meanwhile
        if versions(self.path) != VERSIONS:
            raise CorruptFile(f"{self.path} is damaged (its header); SQLite could read it but not write to it")
        found = [text for (text,) in self._read("PRAGMA integrity_check(3)", [])]
        if found != ["ok"]:
            raise CorruptFile(f"{self.path} is damaged ({'; '.join(found)})")
        trials, _, epochs = (self.rows(schema) for schema in SCHEMAS)
        theirs: dict[str, list[int]] = {}
        for row in epochs:
            theirs.setdefault(row["trial_id"], []).append(row["epoch"])
        for row in trials:
            has, says = theirs.pop(row["trial_id"], []), row["epochs_run"]
            if len(has) != (says or 0) or sorted(has) != list(range(1, len(has) + 1)):  # `says` may be any number
                what = f"{row['arm']} seed {row['seed']} says {says} epochs and has {len(has)}"
                raise CorruptFile(f"{self.path} is damaged: {what}")
        if theirs:
            raise CorruptFile(f"{self.path} is damaged: it holds epochs of {next(iter(theirs))}, but not that trial")
        held = self.held()
        if at_least is not None and held < at_least:
            raise CorruptFile(f"{self.path} holds {held} of {at_least} committed transactions: its end is lost")

    def write_tables(self, folder: Path) -> None:
        """Write the three Parquet tables, each atomically.

        Waits until `TABLES_APART` has passed since the last write. A table keeps only the pages of its previous version
        (see `to_parquet`), so a table must not be replaced twice while a reader on a busy machine opens it.
        """
        with spending("ledger"):
            time.sleep(max(0.0, self._tables_at + TABLES_APART - time.monotonic()))
            known = digests(folder) or {}
            for schema in SCHEMAS:
                self._write_table(schema, folder, known)
            self._tables_at = time.monotonic()

    def _write_table(self, schema: Schema[Any], folder: Path, known: dict[str, list[str]]) -> None:
        path = folder / f"{schema.name}.parquet"
        table, before = self.table(schema), _contents(path, MOST_TABLE_BYTES)
        # The old digest stays valid until the new table is in place; a kill may prevent that.
        kept = [each for each in known.get(path.name, []) if before and each == hashlib.sha256(before).hexdigest()][:1]
        fits = kept and len(before) <= MARGIN + 4 * table.nbytes
        data = to_parquet(table, before if fits else b"")
        known[path.name] = [hashlib.sha256(data).hexdigest(), *kept]
        publish(folder / DIGESTS, sealed(known))
        point("tables.announced")
        publish(path, data)
        point("tables.published")


def _contents(path: Path, most: int) -> bytes:
    """Return a file's bytes; empty if it is missing, larger than `most`, or not a regular file."""
    try:
        return read(path, most) if path.is_file() else b""
    except UnexpectedFile:
        return b""


_SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"


def snapshot(path: Path, to: Path) -> int:
    """Copy a ledger, even while its driver writes. Returns the number of transactions in the copy."""
    check_regular(path, MOST_LEDGER_BYTES)
    with closing(_connect(path, read_only=True)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    with reading(to) as copy:
        return copy.held()


def reading(path: Path) -> closing[Ledger]:
    """Open a ledger for reading, even while its driver writes."""
    return closing(Ledger(path, read_only=True))


def damage(error: Exception) -> bool:
    """Return whether an error means a damaged record rather than a full, slow or locked disk."""
    if not isinstance(error, sqlite3.Error):
        return isinstance(error, CorruptFile)
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # no code: text that cannot be decoded
    wrong = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_INTERRUPT)
    return code & 0xFF in wrong


def commits(folder: Path) -> int | None:
    """Return the least number of transactions in a folder's ledger; None if its count is missing or damaged."""
    return count_of(_contents(folder / COMMITS, MOST_RECORD_BYTES))


def count_of(text: bytes) -> int | None:
    """Invert `counted`; None if the text was altered."""
    count, _, crc = text.rstrip(b"\n").partition(b" ")
    whole = count.isdigit() and len(count) <= 18 and crc == b"%08x" % zlib.crc32(count)
    return int(count) if whole else None


def counted(count: int) -> bytes:
    """Return a count with its checksum. The length is constant, so the file can be overwritten in place."""
    text = b"%012d" % count
    return b"%b %08x\n" % (text, zlib.crc32(text))


def digests(folder: Path) -> dict[str, list[str]] | None:
    """Return the valid SHA-256 digests of each table of a run, by file name; None if the record is damaged."""
    path = folder / DIGESTS
    try:
        found = unsealed(_contents(path, MOST_RECORD_BYTES), path)
    except CorruptFile:
        return None
    return found if all(isinstance(each, list) for each in found.values()) else None

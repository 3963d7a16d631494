"""Alter files of a results folder as a stranger could: in one place, with matching digests.

Every digest is stored beside the data that it protects, so anybody who alters a file can also update its digest. Only
`Chance` determines a mutation: the same seed and folder give the same mutation.
"""

import base64
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load as tensors_of, save as bytes_of

from tune_kd.records.ledger import counted
from tune_kd.records.schema import COMMITS, DIGESTS, LEDGER, SCHEMAS
from tune_kd.records.sync import HOLDER, STUDY
from tune_kd.study.discover import from_json
from tune_kd.study.plan import plan

AUDIT, MARK = "audit.json", ".mirror.json"
ALONE = "theirs"  # prefix of tables that no run wrote
TWICE = "@@twice@@"  # suffix of a key that is written twice
PLANNED_WITHIN = 2  # maximum seconds to plan an altered study here

Chance = random.Random
Tree = Any  # a value in JSON


@dataclass(frozen=True)
class Raw:
    """Text that is written into JSON verbatim, and the text of the value that is read back, if it differs."""

    written: str
    read: str | None = None


@dataclass(frozen=True)
class Stranger:
    """A copy of a results folder to alter, and the folders around it."""

    root: Path  # contains everything below
    port: int  # on loopback; a connection to it is a violation

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def run(self) -> Path:
        return self.results / "r"

    @property
    def canary(self) -> Path:
        """A folder outside of the results, which must not change."""
        return self.root / "canary"

    @property
    def evil(self) -> Path:
        """A study file inside the results."""
        return self.run / "evil.py"

    @property
    def store(self) -> str:
        return f"s3://bucket/x?endpoint_override=127.0.0.1:{self.port}&scheme=http"


@dataclass(frozen=True)
class Mutation:
    """What was altered, and whether all of its digests match."""

    what: str
    fits: bool


def short(value: Any) -> str:
    value = value.written if isinstance(value, Raw) else value
    text = repr(value) if not isinstance(value, list | dict) or len(value) < 50 else f"{len(value)} values"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"


def bad_values(stranger: Stranger) -> list[Any]:
    """Return unexpected values that JSON can have."""
    long = "x" * 1_000_000
    deep = Raw("[" * 200_000 + "]" * 200_000)
    deep_object = Raw('{"a": ' * 50_000 + "1" + "}" * 50_000)
    numbers = [-1, 0, 1, 2, 10**9, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
    floats = [0.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf, Raw("1e999", "Infinity")]
    floats += [Raw("9" * 5000)]  # more digits than Python parses
    paths = ["../../x", "..", ".", "/dev/zero", "/etc/passwd", "/", "~/x", "a/b\x00c", "/proc/self/mem"]
    paths += [str(stranger.evil), str(stranger.canary / "evil.py"), str(stranger.canary / "new")]
    places = [stranger.store, f"http://127.0.0.1:{stranger.port}/x", f"file://{stranger.canary}/x", "gs://x/y"]
    texts = ["", "x", long, "\x1b]0;x\x07\x1b[2J\r\n", "\ud800", "\u202e", "'; DROP TABLE trials; --", "%s%n{0}"]
    texts += ["[bold]x", "=1+1", "<script>alert(1)</script>", "cifar10", "cifar", "completed", "confirm", "mlflow"]
    many = [[0] * 100_000, list(range(2000)), {str(each): each for each in range(100_000)}, [], {}, [[]], [None]]
    many += [["mlflow"], ["tensorboard"], ["wandb"]]
    return [None, True, False, *numbers, *floats, *paths, *places, *texts, *many, deep, deep_object]


# JSON


def text_of(value: Tree, *, as_read: bool = False, **options: Any) -> str:
    """Return JSON with `Raw` values verbatim. If `as_read`, return it as parsed: of two equal keys, the second."""
    raws: list[Raw] = []

    def plain(each: Tree) -> Tree:
        if isinstance(each, Raw):
            raws.append(each)
            return f"@@raw {len(raws) - 1}@@"
        if isinstance(each, dict):
            return {key: plain(held) for key, held in each.items()}
        return [plain(held) for held in each] if isinstance(each, list | tuple) else each

    text = json.dumps(plain(value), **options)
    for number, raw in enumerate(raws):
        there = raw.read if as_read and raw.read is not None else raw.written
        text = text.replace(f'"@@raw {number}@@"', there)
    return re.sub(f'"([^"]*){TWICE}"', r'"\1"' if as_read else r'"\1": "twice", "\1"', text)


def digest(value: Tree) -> str:
    """Like `tune_kd.study.trial.digest`."""
    return hashlib.sha256(text_of(value, as_read=True, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(record: Tree) -> bytes:
    """Like `tune_kd.system.files.sealed`."""
    seal = hashlib.sha256(text_of(record, as_read=True, sort_keys=True).encode()).hexdigest()
    if isinstance(record, dict):
        return text_of({**record, "sha256": seal}, indent=1).encode()
    return text_of(record).encode()


def unsealed(path: Path) -> Tree:
    record = json.loads(path.read_bytes())
    record.pop("sha256", None)
    return record


def alter(tree: Tree, chance: Chance, bad: Sequence[Any], into: Sequence[str] = ()) -> tuple[Tree, str]:
    """Return a copy with one change, and its description. Six of ten changes are below one of the keys `into`."""
    tree = copy.deepcopy(tree)
    held, keys = tree, list[Any]()
    if into and chance.random() < 0.6 and (there := [each for each in into if tree.get(each)]):
        keys.append(chance.choice(there))
        held = tree[keys[0]]
    while isinstance(held, dict | list) and held and (not keys or chance.random() < 0.85):
        keys.append(chance.choice(list(held)) if isinstance(held, dict) else chance.randrange(len(held)))
        held = held[keys[-1]]
    if not keys:
        new = chance.choice(bad)
        return new, f"the whole is {short(new)}"
    above = tree
    for key in keys[:-1]:
        above = above[key]
    key, named = keys[-1], ".".join(map(str, keys))
    how = chance.random()
    if how < 0.72:
        above[key] = chance.choice(bad)
        return tree, f"{named} is {short(above[key])}"
    if how < 0.80:
        del above[key]
        return tree, f"{named} is gone"
    if how < 0.86 and isinstance(above, dict):
        above[f"{key}{TWICE}"] = above.pop(key)
        return tree, f"{named} is there twice"
    if how < 0.92 and isinstance(above, dict):
        new = chance.choice([each for each in bad if type(each) is str])
        above[new] = above.pop(key)
        return tree, f"{named} is renamed to {short(new)}"
    if isinstance(above, list):
        above[key : key + 1] = [above[key]] * chance.choice((2, 100))
        return tree, f"{named} is repeated"
    others = [each for each in above if each != key]
    if others:
        other = chance.choice(others)
        above[key], above[other] = above[other], above[key]
        return tree, f"{named} and {other} are swapped"
    above["more"] = chance.choice(bad)
    return tree, f"{named} has a new neighbour, {short(above['more'])}"


def alter_more(tree: Tree, chance: Chance, bad: Sequence[Any], into: Sequence[str] = ()) -> tuple[Tree, str]:
    """Like `alter`, with one to three changes."""
    changes = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree, what = alter(tree, chance, bad, into if isinstance(tree, dict) else ())
        changes.append(what)
        if not isinstance(tree, dict | list):
            break
    return tree, "; ".join(changes)


def study(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter `study.json`, and update its digests and its list of trials."""
    path = stranger.run / STUDY
    before = unsealed(path)
    if chance.random() < 0.1:
        return Mutation(flipped(path, chance), False)
    fields = ("study", "study", "study", "settings", "source", "data", "contrasts", "arms", "look", "extended")
    start = copy.deepcopy(before)
    if start["source"] is None and chance.random() < 0.2:
        start["source"] = {"file": str(stranger.evil), "scale": "test", "data": None, "settings": []}
    if chance.random() < 0.15:
        arms = [{"name": arm["name"], "role": arm["role"]} for arm in before["arms"]]
        start["extended"] = {"study": before["study"], "study_sha256": before["study_sha256"], "arms": arms,
                             "searches": [], "at": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    record, what = alter_more(start, chance, bad_values(stranger), fields)
    if isinstance(record, dict):
        sums = [(record, "study", "study_sha256"), (record, "contrasts", "contrasts_sha256")]
        sums += [(record["extended"], "study", "study_sha256")] if isinstance(record.get("extended"), dict) else []
        for holder, name, seal in sums:
            if name in holder and holder.get(seal) in (before["study_sha256"], before["contrasts_sha256"]):
                holder[seal] = digest(holder[name])
        if record.get("trials") == before["trials"]:
            record["trials"] = _planned(record) or record["trials"]
    path.write_bytes(sealed(record))
    if chance.random() < 0.25:  # as before the first trial of a run
        for each in (COMMITS, DIGESTS, *(f"{LEDGER}{end}" for end in ("", "-wal", "-shm"))):
            (stranger.run / each).unlink(missing_ok=True)
        for schema in SCHEMAS:
            (stranger.run / f"{schema.name}.parquet").unlink(missing_ok=True)
        what += "; no trial has run yet"
    return Mutation(what, True)


def _planned(record: Tree) -> list[str] | None:
    """Return the ids of a study's trials; None if planning fails or takes too long."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PLANNED_WITHIN)
    try:
        declared = json.loads(text_of((record["extended"] or record)["study"]))
        planned = plan(from_json(declared), record["data"]["digest"], record["look"])
        return [trial.trial_id for trial in planned.trials]
    except Exception:
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain(name: str) -> Callable[[Stranger, Chance], Mutation]:
    """Return a mutation of a JSON file that has no digest."""

    def mutation(stranger: Stranger, chance: Chance) -> Mutation:
        path = stranger.run / name
        if chance.random() < 0.2:
            return Mutation(flipped(path, chance), True)
        tree, what = alter_more(json.loads(path.read_bytes()), chance, bad_values(stranger))
        path.write_text(text_of(tree))
        return Mutation(what, True)

    return mutation


def digests(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter `tables.json`."""
    path = stranger.run / DIGESTS
    tree, what = alter_more(unsealed(path), chance, bad_values(stranger))
    path.write_bytes(sealed(tree))
    return Mutation(what, True)


def mark(stranger: Stranger, chance: Chance) -> Mutation:
    """Add a mark that makes a folder the mirror of a store."""
    folders = [stranger.results, stranger.run, stranger.results / "teachers", stranger.run / "checkpoints"]
    folder = chance.choice(folders)
    folder.mkdir(exist_ok=True)
    tree: Tree = {"url": stranger.store}
    if chance.random() < 0.6:
        tree, what = alter_more(tree, chance, bad_values(stranger))
    else:
        what = f"is {stranger.store}"
    (folder / MARK).write_text(text_of(tree))
    return Mutation(f"in {folder.name}: {what}", True)


# Bytes


def damaged(data: bytes, chance: Chance) -> tuple[bytes, str]:
    """Return bytes with some of them changed, cut off, inserted or repeated, or other bytes; and a description."""
    how, size = chance.random(), len(data)
    place = chance.randrange(size) if size else 0
    if how < 0.55 and size:
        changed = bytearray(data)
        places = sorted(chance.randrange(size) for _ in range(chance.choice((1, 1, 2, 8, 64))))
        for each in places:
            changed[each] ^= chance.randrange(1, 256)
        return bytes(changed), f"{len(places)} bytes changed, the first at {places[0]}"
    if how < 0.70:
        return data[:place], f"cut to {place} bytes"
    if how < 0.82:
        more = chance.randbytes(chance.choice((1, 4, 1000)))
        return data[:place] + more + data[place:], f"{len(more)} bytes inserted at {place}"
    if how < 0.88 and size >= 8:  # intact counts and lengths are small
        at = min(place, size - 4)
        extreme = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
        return data[:at] + extreme + data[at + 4 :], f"{extreme.hex()} at {at}"
    if how < 0.92:
        return b"", "empty"
    if how < 0.96:
        return data + data, "twice"
    return chance.randbytes(2000), "noise"


def flipped(path: Path, chance: Chance) -> str:
    data, what = damaged(path.read_bytes(), chance)
    path.write_bytes(data)
    return what


# SQLite


def ledger(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter cells, facts or the schema of the ledger. The transaction count and the rows' checksums match."""
    path = stranger.run / LEDGER
    how = chance.random()
    if how < 0.15:
        end = chance.choice([each for each in ("", "-wal", "-shm") if Path(f"{path}{each}").exists()])
        return Mutation(f"{LEDGER}{end}: {flipped(Path(f'{path}{end}'), chance)}", False)
    with closing(sqlite3.connect(path, isolation_level=None)) as base:
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        what = (_cells if how < 0.60 else _schema)(base, stranger, chance)
    fits = True
    if chance.random() < 0.1:  # damage beside matching checksums
        what, fits = f"{what}; and {flipped(path, chance)}", False
    return Mutation(what, fits)


def _cells(base: sqlite3.Connection, stranger: Stranger, chance: Chance) -> str:
    changes = []
    for _ in range(chance.choice((1, 1, 2))):
        schema = chance.choice(SCHEMAS)
        names = list(schema.columns)
        rows = [number for (number,) in base.execute(f"SELECT number FROM {schema.name}")]
        if not rows:
            continue
        number, name = chance.choice(rows), chance.choice(names)
        bad = [each for each in bad_values(stranger) if each is None or isinstance(each, int | float | str)]
        bad = [each for each in bad if not isinstance(each, int) or abs(each) < 2**63]
        bad += [b"\xff\x00", math.inf, *(each for each in (schema.levels.get(name) or ()))]
        value = chance.choice(bad)
        with suppress(UnicodeEncodeError, sqlite3.IntegrityError, OverflowError):
            which = "1" if chance.random() < 0.1 else f"number = {number}"
            base.execute(f'UPDATE {schema.name} SET "{name}" = ? WHERE {which}', [value])
            changes.append(f"{schema.name}.{name} of row {number} is {short(value)}")
    if chance.random() < 0.1:
        count = chance.choice((0, 1, 10**11, 10**12 - 1))
        base.execute("INSERT OR REPLACE INTO facts VALUES ('commits', ?)", [counted(count).decode()])
        (stranger.run / COMMITS).write_bytes(counted(count))
        changes.append(f"{count} transactions")
    _update_checksums(base)
    return "; ".join(changes) or "nothing"


def _update_checksums(base: sqlite3.Connection) -> None:
    """Update the checksum of every row."""
    for schema in SCHEMAS:
        names = ", ".join(f'"{name}"' for name in schema.columns)
        for number, *cells in base.execute(f"SELECT number, {names} FROM {schema.name}").fetchall():
            with suppress(TypeError):
                base.execute(f"UPDATE {schema.name} SET crc = ? WHERE number = ?",
                             [zlib.crc32(json.dumps(cells).encode()), number])  # fmt: skip


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
ENDS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000)"


def _schema(base: sqlite3.Connection, stranger: Stranger, chance: Chance) -> str:
    """Replace a table, or add something beside it."""
    schema = chance.choice(SCHEMAS)
    table, names = schema.name, ", ".join(f'"{name}"' for name in schema.columns)
    numbers = ", ".join("x" for _ in schema.columns)
    options: list[list[str]] = [
        [f"ALTER TABLE {table} RENAME TO was",
         f"CREATE VIEW {table} AS {ENDLESS} SELECT x AS number, {names}, crc FROM was, c"],
        [f"ALTER TABLE {table} RENAME TO was", f"CREATE VIEW {table} AS SELECT * FROM was"],
        ["ALTER TABLE facts RENAME TO was",
         f"CREATE VIEW facts AS {ENDLESS} SELECT 'commits' AS name, x AS value FROM c WHERE x < 0"],
        ["ALTER TABLE facts RENAME TO was", "CREATE VIEW facts AS SELECT name, value FROM was"],
        [f"CREATE VIEW more AS {ENDLESS} SELECT x FROM c"],
        [f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END"],
        [f"CREATE TRIGGER t BEFORE UPDATE ON {table} BEGIN SELECT ({ENDLESS} SELECT count(*) FROM c); END"],
        [f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT ({ENDLESS} SELECT count(*) FROM c); END"],
        ["CREATE TRIGGER t AFTER INSERT ON facts BEGIN SELECT RAISE(ABORT, 'no'); END"],
        [f"CREATE TRIGGER t AFTER UPDATE ON facts BEGIN SELECT ({ENDLESS} SELECT count(*) FROM c); END"],
        ["CREATE TRIGGER t BEFORE INSERT ON facts BEGIN SELECT load_extension('/tmp/evil.so'); END"],
        ["CREATE TABLE more (x)", f"INSERT INTO more {ENDS} SELECT x FROM c"],
        ["CREATE TABLE more (x CHECK (x < 3), y AS (x + 1))"],
        [f"CREATE INDEX i ON {table} (abs(number) + 1)"],
        [f"DROP TABLE {table}"],
        ["DROP TABLE facts"],
        [f"DROP TABLE {table}", f"CREATE TABLE {table} (number INTEGER PRIMARY KEY, {names}, crc)",
         f"INSERT INTO {table} {ENDS} SELECT x, {numbers}, 0 FROM c"],
        [f"ALTER TABLE {table} RENAME COLUMN {next(iter(schema.columns))} TO other"],
        [f"ALTER TABLE {table} ADD COLUMN more"],
        [f"DELETE FROM {table}"],
        ["DELETE FROM facts"],
        ["UPDATE facts SET value = zeroblob(100000000)"],
        ["UPDATE facts SET value = 'x'"],
        ["UPDATE sqlite_sequence SET seq = 9223372036854775807"],
        ["UPDATE sqlite_sequence SET seq = 'x'"],
        ["PRAGMA journal_mode = DELETE"],
        ["PRAGMA journal_mode = DELETE", "PRAGMA page_size = 65536", "VACUUM"],
        ["PRAGMA user_version = -1", "PRAGMA application_id = 1"],
        ["CREATE VIRTUAL TABLE more USING fts5(x)"],
        ["CREATE VIRTUAL TABLE more USING rtree(a, b, c)"],
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_master SET rootpage = 1 WHERE name = 'epochs'"],
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_master SET rootpage = "
         "(SELECT rootpage FROM sqlite_master WHERE name = 'trials') WHERE name = 'epochs'"],
        ["PRAGMA writable_schema = ON", f"UPDATE sqlite_master SET sql = 'nonsense' WHERE name = '{table}'"],
        [f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT ({ENDLESS} SELECT count(*) FROM c); END",
         "PRAGMA writable_schema = ON",  # under a name like SQLite's own
         "UPDATE sqlite_master SET name = 'sqlite_t', sql = replace(sql, 'TRIGGER t', 'TRIGGER sqlite_t') "
         "WHERE name = 't'"],
        [f"ALTER TABLE {table} RENAME TO sqliteless",  # the old table gets a name like SQLite's own
         f"CREATE VIEW {table} AS {ENDLESS} SELECT x AS number, {names}, crc FROM sqliteless, c"],
    ]  # fmt: skip
    statements = chance.choice(options)
    try:
        for statement in statements:
            base.execute(statement)
    except sqlite3.Error as error:
        return f"{'; '.join(statements)[:200]} (until {error})"
    return "; ".join(statements)[:300]


def commits(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter `ledger.commits`."""
    path = stranger.run / COMMITS
    if chance.random() < 0.3:
        return Mutation(flipped(path, chance), False)
    texts = [b"0", b"1", b"9" * 12, b"9" * 5000, b"-1", "²".encode(), "٣".encode(), b"1_0", b" 1", b""]
    count = chance.choice(texts)
    path.write_bytes(b"%b %08x\n" % (count, zlib.crc32(count)))
    return Mutation(f"{short(count)} transactions", True)


# Parquet


def parquet(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a table of a run, and its digest."""
    schema = chance.choice((SCHEMAS[0], *SCHEMAS))
    path = stranger.run / f"{schema.name}.parquet"
    what = f"{path.name}: {_table(path, stranger, chance)}"
    fits = chance.random() < 0.95
    if fits:
        known = unsealed(path.with_name(DIGESTS))
        known[path.name] = [hashlib.sha256(path.read_bytes()).hexdigest()]
        path.with_name(DIGESTS).write_bytes(sealed(known))
    return Mutation(what, fits)


def theirs(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a table that no run wrote, and that has no digest."""
    schema = chance.choice((SCHEMAS[0], *SCHEMAS))
    path = stranger.results / f"{ALONE}_{schema.name}.parquet"
    return Mutation(f"{path.name}: {_table(path, stranger, chance)}", True)


def _table(path: Path, stranger: Stranger, chance: Chance) -> str:
    if chance.random() < 0.3:
        return flipped(path, chance)
    table = pq.read_table(path)
    name, rows = chance.choice(table.column_names), table.num_rows
    place, kind = table.column_names.index(name), table.schema.field(name).type
    options: dict[str, Any] = {}
    how = chance.random()
    if how < 0.35:  # cells of the same type
        cells, value = table[name].to_pylist(), _of_type(kind, stranger, chance)
        where = range(rows) if not rows or chance.random() < 0.2 else [chance.randrange(rows)]
        for each in where:
            cells[each] = value
        table = table.set_column(place, table.schema.field(name), pa.array(cells, kind, from_pandas=False))
        what = f"{name} is {short(value)} in {len(where)} rows"
    elif how < 0.60:
        column = chance.choice(_columns(rows))
        table = table.set_column(place, name, column)
        what = f"{name} is {column.type}"
    elif how < 0.70:
        what, table = chance.choice([
            (f"{name} is gone", table.drop_columns([name])),
            (f"{name} is there twice", table.append_column(name, table[name])),
            (f"{name} is renamed", table.rename_columns(
                [chance.choice(("", "\x1b[2J", "\x00", "x" * 100_000)) if each == name else each
                 for each in table.column_names])),
            ("no columns", table.select([])),
            ("no rows", table.slice(0, 0)),
            ("a column of lists", table.append_column("more", pa.array([[[1]]] * rows))),
        ])  # fmt: skip
    elif how < 0.80:  # large tables in small files
        what, table, options = chance.choice(_bombs(table, place))()
    elif how < 0.92:
        what, table = _metadata(table, stranger, chance)
    else:
        options = chance.choice([
            {"compression": chance.choice(("gzip", "brotli", "zstd", "lz4", "none")), "data_page_version": "2.0"},
            {"use_dictionary": False, "version": "1.0", "row_group_size": 1},
            {"use_dictionary": False, "column_encoding": "PLAIN"},
            {"data_page_size": 1, "write_page_index": True},
            {"store_schema": False},
        ])  # fmt: skip
        what = f"written with {options}"
    before = path.read_bytes()
    try:
        pq.write_table(table, path, **{"write_page_checksum": True, **options})
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        path.write_bytes(before)  # pyarrow has removed it
        return f"{what}, which could not be written ({type(error).__name__}); {flipped(path, chance)}"
    return what


def _of_type(kind: Any, stranger: Stranger, chance: Chance) -> Any:
    if pa.types.is_integer(kind):
        return chance.choice([None, -1, 0, 1, 10**9, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)])
    if pa.types.is_floating(kind):
        return chance.choice([None, -1.0, -0.0, 2.0, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf])
    texts = [each for each in bad_values(stranger) if type(each) is str and each != "\ud800"]
    return chance.choice([None, *texts, "stopped", "failed", "blocked", "teacher", "screen", "x/y", "a\nb|c&d"])


def _columns(rows: int) -> list[Any]:
    """Return columns of types that our tables do not have."""
    two = rows // 2
    return [
        pa.nulls(rows),
        pa.array([True] * rows),
        pa.array([[1, 2]] * rows),
        pa.array([{"a": 1}] * rows),
        pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        pa.array([b"\xff\xfe"] * rows),
        pa.array([b"ab"] * rows, pa.binary(2)),
        pa.array(["x"] * rows).dictionary_encode(),
        pa.array(["x"] * rows, pa.large_string()),
        pa.array(["x"] * rows, pa.string_view()),
        pa.array([10**30] * rows, pa.decimal256(76, 3)),
        pa.array([0] * rows, pa.timestamp("ns", "Europe/Berlin")),
        pa.array([2**62] * rows, pa.timestamp("s")),
        pa.array([-(2**62)] * rows, pa.duration("us")),
        pa.array([0] * rows, pa.date32()),
        pa.array([2**64 - 1] * rows, pa.uint64()),
        pa.array([1.0] * rows, pa.float16()),
        pa.array([1.5] * two + [None] * (rows - two)),
        pa.array(["1"] * rows),
        pa.array(["x" * 1_000_000] * rows),
    ]


def _bombs(table: Any, place: int) -> list[Callable[[], tuple[str, Any, dict[str, Any]]]]:
    name, few = table.column_names[place], {"compression": "zstd", "compression_level": 1}

    def rows() -> tuple[str, Any, dict[str, Any]]:
        more = {column: pa.nulls(3_000_000, table.schema.field(column).type) for column in table.column_names}
        return "3,000,000 rows of nulls", pa.table(more), few

    def repeated() -> tuple[str, Any, dict[str, Any]]:
        return "each row 2,000 times", pa.concat_tables([table] * 2000), few

    def text() -> tuple[str, Any, dict[str, Any]]:
        same = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["x" * 100_000]))
        wide = {column: pa.nulls(200_000, table.schema.field(column).type) for column in table.column_names}
        return f"{name} has 100,000 letters in 200,000 rows", pa.table({**wide, name: same}), few

    def columns() -> tuple[str, Any, dict[str, Any]]:
        more = table
        for number in range(3000):
            more = more.append_column(f"more{number}", pa.nulls(table.num_rows, pa.int64()))
        return "3,000 more columns", more, {}

    def nested() -> tuple[str, Any, dict[str, Any]]:
        value: Any = 1
        for _ in range(90):
            value = [value]
        return "a column of depth 90", table.append_column("more", pa.array([value] * table.num_rows)), {}

    return [rows, repeated, text, columns, nested]


def _metadata(table: Any, stranger: Stranger, chance: Chance) -> tuple[str, Any]:
    """Alter the metadata that pandas and Arrow write beside the columns."""
    known = dict(table.schema.metadata or {})
    if chance.random() < 0.3:
        arrow = base64.b64encode(damaged(table.schema.serialize().to_pybytes(), chance)[0])
        return "Arrow's schema is altered", table.replace_schema_metadata({**known, b"ARROW:schema": arrow})
    if chance.random() < 0.2:
        field = table.schema.field(0)
        kinds = ("arrow.py_extension_type", "arrow.json", "arrow.fixed_shape_tensor", "pandas.period")
        named = {"ARROW:extension:name": chance.choice(kinds), "ARROW:extension:metadata": "cos\nsystem\n(S'true'\ntR."}
        schema = table.schema.set(0, field.with_metadata(named))
        return f"{field.name} is an extension, {named['ARROW:extension:name']}", table.cast(schema)
    tree = json.loads(known.get(b"pandas", b'{"index_columns": [], "columns": []}'))
    if chance.random() < 0.5:
        tree, what = alter_more(tree, chance, bad_values(stranger))
    else:
        named = chance.choice(table.column_names)
        index = [named], ["__index_level_0__"], [{"kind": "range", "name": None, "start": 0, "stop": 2**62, "step": 1}]
        tree["index_columns"] = chance.choice((*index, [named, named], [["a"]], {"a": 1}))
        what = f"index_columns is {short(tree['index_columns'])}"
    return f"pandas' metadata: {what}", table.replace_schema_metadata({**known, b"pandas": text_of(tree).encode()})


# safetensors


def checkpoint(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a checkpoint of an unfinished trial, and the digest in its name."""
    paths = sorted(stranger.run.glob("checkpoints/*/*.safetensors"))
    path = paths[-1] if chance.random() < 0.8 else chance.choice(paths)
    data, what = _state(path.read_bytes(), stranger, chance)
    fits = chance.random() < 0.95
    epoch = path.name.partition("-")[0]
    if chance.random() < 0.15:
        epoch = chance.choice(("999999", "000000", "9" * 150, "0x1", "1e9", "5\x1b[2J", "5 "))
        what += f"; of epoch {epoch!r}"
    path.unlink()
    name = f"{epoch}-{hashlib.sha256(data).hexdigest()}.safetensors" if fits else path.name
    path.with_name(name).write_bytes(data)
    return Mutation(what, fits)


def weights(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a teacher's weights, and the digest in its card."""
    card = _card(stranger)
    path = card.with_name("weights.safetensors")
    data, what = _state(path.read_bytes(), stranger, chance)
    path.write_bytes(data)
    fits = chance.random() < 0.95
    if fits:
        card.write_bytes(sealed({**unsealed(card), "weights_sha256": hashlib.sha256(data).hexdigest()}))
    if chance.random() < 0.7:  # so that students need the weights
        shutil.rmtree(card.parent / "answers")
        what += "; no answers"
    return Mutation(what, fits)


def card(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a teacher's card."""
    path = _card(stranger)
    tree, what = alter_more(unsealed(path), chance, bad_values(stranger), ("trial", "epochs"))
    path.write_bytes(sealed(tree))
    return Mutation(what, True)


def _card(stranger: Stranger) -> Path:
    return min(stranger.results.glob("teachers/*/card.json"))


def _state(data: bytes, stranger: Stranger, chance: Chance) -> tuple[bytes, str]:
    """Alter the tensors or notes of a safetensors file."""
    how = chance.random()
    if how < 0.15:
        return damaged(data, chance)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if how < 0.30:
        notes, what = alter_more(json.loads(header["__metadata__"]["notes"]), chance, bad_values(stranger))
        header["__metadata__"]["notes"] = text_of(notes)
        what = f"notes: {what}"
    elif how < 0.60:
        header, what = alter_more(header, chance, bad_values(stranger), list(header))
    elif how < 0.70:
        long = chance.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", long) + data[8:], f"a header of {long} bytes"
    else:
        return _tensors(data, header, chance)
    text = text_of(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body, what


def _tensors(data: bytes, header: Tree, chance: Chance) -> tuple[bytes, str]:
    import torch

    tensors = dict(tensors_of(data))
    name = chance.choice(sorted(tensors))
    old = tensors[name]
    new = [
        torch.full_like(old, math.nan) if old.is_floating_point() else torch.full_like(old, -1),
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros((1, *old.shape), dtype=old.dtype),
        old.double() if old.is_floating_point() else old.float(),
        torch.ones_like(old, dtype=torch.bool),
        torch.ones_like(old, dtype=torch.float16),
        torch.full_like(old, 10**9) if old.dtype not in (torch.uint8, torch.bool) else torch.zeros_like(old),
        torch.zeros(3, 4, 5, 6, 7, 8, dtype=torch.int8),
        None,
    ]
    tensors[name] = chance.choice(new)  # type: ignore[assignment]
    what = f"{name} is gone"
    if tensors[name] is None:
        del tensors[name]
    else:
        what = f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}"
    return bytes_of(tensors, metadata=header.get("__metadata__")), what


def answers(stranger: Stranger, chance: Chance) -> Mutation:
    """Alter a teacher's cached logits, and their digests."""
    table = chance.choice(sorted(stranger.results.glob("teachers/*/answers/*/*")))
    logits, sums = table / "logits.f32", table / "digests.sha256"
    if chance.random() < 0.4:
        file = chance.choice((logits, sums))
        return Mutation(f"{file.name}: {flipped(file, chance)}", False)
    if chance.random() < 0.3:
        size = chance.choice((0, 1, 2**20, 2**36, 2**40))
        file = chance.choice((logits, sums))
        with file.open("r+b") as opened:
            opened.truncate(size)
        return Mutation(f"{file.name} has {size} bytes", False)
    value = chance.choice((math.nan, math.inf, -math.inf, 1e38, 0.0))
    data = logits.read_bytes()
    data = struct.pack("<f", value) * (len(data) // 4)
    logits.write_bytes(data)
    chunk = 4096 * 10 * 4
    parts = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    sums.write_bytes(b"".join(hashlib.sha256(part).digest() for part in parts))
    return Mutation(f"all answers are {value}", True)


# Other things in place of a file


NEW = (
    *(".lock", ".probe", ".drain", "checkpoints/drain", f"{LEDGER}-journal", f"{LEDGER}-wal", f"{LEDGER}-shm"),
    *("mlflow.db", "optuna.sqlite", "tensorboard", "report/figures", "report/report.html", "r2", ".study.json.1"),
)
HOW = ("link", "link", "link", "dangling", "hard link", "fifo", "folder", "socket", "loop", "device")


def replaced(stranger: Stranger, chance: Chance) -> Mutation:
    """Put a link to the outside, a FIFO, a socket or a folder in place of an existing or expected file or folder."""
    there = sorted(each for each in stranger.results.rglob("*") if each.name != "evil.py")
    top = [each for each in there if each.parent == stranger.run]
    path = chance.choice(chance.choice((top, there)))
    if chance.random() < 0.3:
        path = stranger.run / chance.choice(NEW)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    what = chance.choice(HOW)
    named = path.relative_to(stranger.results)
    outside = stranger.canary / f"of-{path.name}"
    if path.exists():
        path.rename(outside)
    elif what in ("link", "hard link"):
        outside.write_bytes(b"canary")
    if what == "link":
        path.symlink_to(outside)
    elif what == "dangling":
        outside.rename(outside.with_name("aside")) if outside.exists() else None
        path.symlink_to(stranger.canary / "new")
    elif what == "hard link" and outside.is_file():
        path.hardlink_to(outside)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket may have at most 108 bytes
        with suppress(OSError), socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "device":
        path.symlink_to(chance.choice(("/dev/zero", "/dev/full", "/dev/tty", "/proc/self/fd/0", "/proc/self/mem")))
    else:
        path.mkdir()
        (path / "more").write_text("x")
    return Mutation(f"{named} is a {what}", True)


def named(stranger: Stranger, chance: Chance) -> Mutation:
    """Add a second run with an invalid name."""
    name = chance.choice(("\x1b[2J", "a\nb", "-h", "--out", "..x", "~", "x" * 200, "%s", "[bold]", "'", "\udcff"))
    other = stranger.results / name
    shutil.copytree(stranger.run, other, ignore=lambda _, names: [each for each in names if each == "report"])
    return Mutation(f"a run named {name!r}", True)


KINDS: dict[str, tuple[float, Callable[[Stranger, Chance], Mutation]]] = {
    "study.json": (22, study),
    "ledger.sqlite": (16, ledger),
    "ledger.commits": (1, commits),
    "tables": (14, parquet),
    "tables.json": (3, digests),
    "tables of others": (8, theirs),
    "checkpoint": (9, checkpoint),
    "teacher's weights": (5, weights),
    "teacher's card": (5, card),
    "answers": (2, answers),
    "audit.json": (3, plain(AUDIT)),
    "holder.json": (2, plain(HOLDER)),
    "mirror's mark": (1.5, mark),
    "links and others": (7.5, replaced),
    "names": (1, named),
}
"""Kinds of mutations, with their shares in per cent."""


def mutate(stranger: Stranger, chance: Chance, kind: str) -> Mutation:
    """Alter a folder in one place."""
    return KINDS[kind][1](stranger, chance)


def chosen(chance: Chance) -> str:
    """Choose a kind of mutation."""
    return chance.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]

"""Send a run's records to an object store, and fetch them on another machine.

SQLite needs the ledger on the driver's own disk. Each time the driver writes the tables, it sends them and then a
snapshot of the ledger. A lost disk costs at most the results since the last tables; these run again from checkpoints.
The store is never ahead of the driver's disk.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from tune_kd.records.ledger import commits, count_of, counted, snapshot
from tune_kd.records.schema import COMMITS, DIGESTS, LEDGER, MOST_LEDGER_BYTES, MOST_TABLE_BYTES, SCHEMAS
from tune_kd.system.errors import CorruptFile
from tune_kd.system.files import MOST_RECORD_BYTES, parsed, publish, read, unsealed
from tune_kd.system.object_store import READS, Mirror

STUDY = "study.json"  # in a run's folder
HOLDER = "holder.json"  # in the same folder: the process that drives the run
TABLES = (DIGESTS, *(f"{schema.name}.parquet" for schema in SCHEMAS))  # digests come before their tables


class Sender:
    """Sends the records of a run to its store, in a separate thread."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._mirror = Mirror.of(folder)
        self._say = say
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tune_kd-send")
        self._sending: Future[None] | None = None

    def offer(self) -> None:
        """Start to send the new tables and a snapshot of the ledger, unless an earlier send is still running."""
        if self._mirror.url is None or (self._sending is not None and not self._sending.done()):
            return
        if self._sending is not None and (error := self._sending.exception()) is not None:
            self._say(f"warning: {error}; the new tables are sent in a retry")
        self._sending = self._pool.submit(self._send, self._tables())

    def finish(self) -> None:
        """Send the final records and wait. Raises OSError if the store fails."""
        self._pool.shutdown()
        if self._mirror.url is None:
            return
        try:
            self._send(self._tables())
        except OSError as error:
            here = f"all records are in {self._folder}; `tune_kd resume` of that folder sends them"
            raise OSError(f"{self._mirror.place(self._folder)} does not take the records ({error}); {here}") from error

    def _tables(self) -> list[tuple[str, bytes]]:
        """Read all tables at once, so that they match each other in the store."""
        return [(name, read(self._folder / name, MOST_TABLE_BYTES)) for name in (STUDY, *TABLES)]

    def _send(self, tables: list[tuple[str, bytes]]) -> None:
        for name, data in tables:
            self._mirror.send(self._folder / name, data)
        with tempfile.TemporaryDirectory() as aside:
            held = snapshot(self._folder / LEDGER, copy := Path(aside, LEDGER))
            self._mirror.send(self._folder / LEDGER, read(copy, MOST_LEDGER_BYTES))
        self._mirror.send(self._folder / COMMITS, counted(held))
        if (self._folder / HOLDER).is_file():
            self._mirror.send(self._folder / HOLDER, stamped(read(self._folder / HOLDER, MOST_RECORD_BYTES)))


def stamped(holder: bytes) -> bytes:
    """Add the current time to a run's holder record, since a store releases no lock when a process ends."""
    return json.dumps({**parsed(holder), "seen": time.time()}).encode()


def send(folder: Path, *names: str) -> None:
    """Send files and folders inside a run's folder, if they exist. Raises OSError."""
    mirror = Mirror.of(folder)
    if mirror.url is not None:
        for path in (folder / name for name in names):
            for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if each.is_file() and not each.is_symlink():
                    mirror.send(each)


def pull(folder: Path) -> None:
    """Fetch a run from its store, if it is missing here or has newer records there. Raises OSError."""
    mirror = Mirror.of(folder)
    if mirror.url is None:
        return
    there = mirror.read(folder / COMMITS, MOST_RECORD_BYTES)
    ahead = there is not None and (count_of(there) or 0) > (commits(folder) or 0)
    if (folder / STUDY).is_file() and not ahead:
        return
    if (study := mirror.read(folder / STUDY, MOST_RECORD_BYTES)) is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".pulling"):
        files = _of_one_age(mirror, folder) if there is not None else {}
        for end in ("-wal", "-shm") if files else ():  # files of the older ledger
            (folder / f"{LEDGER}{end}").unlink(missing_ok=True)
        for name, data in {STUDY: study, **files}.items():
            publish(folder / name, data)
        if there is not None:
            publish(folder / COMMITS, there)


def _of_one_age(mirror: Mirror, folder: Path) -> dict[str, bytes]:
    """Read tables and ledger until they match their digests, since a driver may be sending them."""
    bounds = {**dict.fromkeys(TABLES, MOST_TABLE_BYTES), LEDGER: MOST_LEDGER_BYTES}
    for _ in range(READS):
        found = {name: mirror.read(folder / name, most) for name, most in bounds.items()}
        whole = {name: data for name, data in found.items() if data is not None}
        try:
            known = unsealed(whole[DIGESTS], folder / DIGESTS)
        except (KeyError, CorruptFile):
            known = {}
        fit = [hashlib.sha256(whole.get(name, b"")).hexdigest() in known.get(name, []) for name in TABLES[1:]]
        if all(fit) or len(whole) < len(found):
            break
    return whole  # readers report a mismatch


def runs(out: Path) -> list[str]:
    """Return the names of the runs under `out` in the store. Raises OSError."""
    return Mirror.of(out).names(out)

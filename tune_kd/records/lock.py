"""Who drives a run now: a lock that dies with its process, and a file that says who and where."""

import fcntl
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from tune_kd.records.sync import HOLDER, stamped
from tune_kd.system import signals
from tune_kd.system.errors import UserError
from tune_kd.system.files import MOST_RECORD_BYTES, opened, parsed, publish, read
from tune_kd.system.object_store import Mirror

UNSEEN = 150.0  # seconds after which a driver elsewhere, which sends every 30, is taken for dead
WAIT_SECONDS = 2.0  # seconds for which another driver may hold a run before this one gives up


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: str
    dashboard: str | None


@contextmanager
def held(folder: Path) -> Iterator[Callable[[str | None], None]]:
    """Keep other drivers out while this one runs. The system frees the lock with its process.

    Yields a function that writes down where Ray's dashboard is, for whoever looks at the run.
    """
    lock = FileLock(folder / ".lock", timeout=WAIT_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        who = holder(folder) or {}
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid', '?')} on {who.get('host', '?')} holds since "
            f"{who.get('since', '?')}; wait for it or stop it (`tune_kd status {folder.name}` shows it)"
        ) from None
    except OSError as error:
        raise UserError(f"RUN is {folder}, which cannot be written to ({error.strerror}); make it writable") from error
    mirror = Mirror.of(folder)
    try:
        _check_unheld(mirror, folder)
        for aside in folder.glob(".*.[0-9]*"):  # of writers that were killed: nobody else writes here now
            aside.unlink(missing_ok=True)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        ours = _Holder(signals.process_id(), platform.node(), since, None)

        def tell(dashboard: str | None) -> None:
            data = json.dumps(asdict(replace(ours, dashboard=dashboard))).encode()
            publish(folder / HOLDER, data)
            mirror.send(folder / HOLDER, stamped(data))

        tell(None)
        yield tell
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):  # else it is seen to be old
            mirror.forget(folder / HOLDER)
        lock.release()


def _check_unheld(mirror: Mirror, folder: Path) -> None:
    """Raise `UserError` where a driver on another machine has this run in a store. It says so again with each sending;
    a store has no lock that dies with its holder."""
    there = mirror.read(folder / HOLDER, MOST_RECORD_BYTES)
    try:
        who = {} if there is None else parsed(there)
        age = time.time() - float(who.get("seen", 0))
    except (ValueError, AttributeError, TypeError):
        return
    if who.get("host", platform.node()) != platform.node() and age < UNSEEN:
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid')} on {who['host']} holds since {who.get('since')}, "
            f"seen {age:.0f} s ago; wait for it or stop it; one not seen for {UNSEEN:.0f} s is taken for dead"
        )


def holder(folder: Path) -> dict[str, Any] | None:
    """Who runs a run now: `pid`, `host`, `since`, and the `dashboard` of its Ray, once that is there. Null where nobody
    does, also after a kill."""
    with suppress(OSError, ValueError):  # there is none, it is being written, or just went
        found = asdict(TypeAdapter(_Holder).validate_python(parsed(read(folder / HOLDER, MOST_RECORD_BYTES))))
        # To be read only: whoever looks may have no right to write.
        with opened(folder / ".lock", MOST_RECORD_BYTES) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return found
    return None

"""One driver per run: a lock that is released when its process ends, and a file that names the process and its host."""

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

from tune_kd.records.sync import HOLDER, stamped
from tune_kd.system import signals
from tune_kd.system.adapters import adapter
from tune_kd.system.errors import UserError
from tune_kd.system.files import MOST_RECORD_BYTES, opened, parsed, publish, read
from tune_kd.system.object_store import Mirror

UNSEEN = 150.0  # seconds without a heartbeat after which a driver on another host counts as dead; it sends one every 30
WAIT_SECONDS = 2.0  # timeout for the lock


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: str
    dashboard: str | None


@contextmanager
def held(folder: Path) -> Iterator[Callable[[str | None], None]]:
    """Hold a run's lock. The operating system releases it when the process ends. Raises `UserError` if it is taken.

    Yields a function that records the URL of Ray's dashboard.
    """
    lock = FileLock(folder / ".lock", timeout=WAIT_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        who = holder(folder) or {}
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid', '?')} on {who.get('host', '?')} has held since "
            f"{who.get('since', '?')}; wait for it or stop it (`tune_kd status {folder.name}` shows it)"
        ) from None
    except OSError as error:
        raise UserError(f"RUN is {folder}, which cannot be written to ({error.strerror}); make it writable") from error
    mirror = Mirror.of(folder)
    try:
        _check_unheld(mirror, folder)
        for aside in folder.glob(".*.[0-9]*"):  # temporary files of killed writers; nobody else writes here now
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
        with suppress(OSError):  # a claim that stays in the store expires
            mirror.forget(folder / HOLDER)
        lock.release()


def _check_unheld(mirror: Mirror, folder: Path) -> None:
    """Raise `UserError` if a driver on another machine holds this run in a store.

    A store has no lock that ends with its holder, so a driver renews its claim whenever it sends.
    """
    there = mirror.read(folder / HOLDER, MOST_RECORD_BYTES)
    try:
        who = {} if there is None else parsed(there)
        age = time.time() - float(who.get("seen", 0))
    except (ValueError, AttributeError, TypeError):
        return
    if who.get("host", platform.node()) != platform.node() and age < UNSEEN:
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid')} on {who['host']} has held since {who.get('since')}, "
            f"seen {age:.0f} s ago; wait for it or stop it; a process not seen for {UNSEEN:.0f} s counts as dead"
        )


def holder(folder: Path) -> dict[str, Any] | None:
    """Return the process that drives a run: `pid`, `host`, `since`, and Ray's `dashboard` once it is known.

    Returns None if no process drives the run, even if its driver was killed.
    """
    with suppress(OSError, ValueError):  # missing, partly written, or just removed
        found = asdict(adapter(_Holder).validate_python(parsed(read(folder / HOLDER, MOST_RECORD_BYTES))))
        # Open for reading: the caller may lack write permission.
        with opened(folder / ".lock", MOST_RECORD_BYTES) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return found
    return None

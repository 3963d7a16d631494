"""Everything that is written to a results folder outside the ledger: whole, or as it was before, whatever happens.

A disk that fails once, as those of networks do, is asked again, a bounded number of times.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tune_kd.faults import point

T = TypeVar("T")
NAME_BYTES = 255  # of a file or a folder, on all disks of Linux
PAUSES = (0.2, 1.0)  # seconds before what failed is tried again; after that many times it has failed


class Damaged(RuntimeError):
    """A file does not carry the bytes that were written."""


def patiently(do: Callable[[], T], hiccups: tuple[type[Exception], ...] = (OSError,)) -> T:
    """What `do` returns, where need be at a later try. Raises its last error; a missing file is no hiccup."""
    for pause in PAUSES:
        try:
            return do()
        except FileNotFoundError:
            raise
        except hiccups:
            time.sleep(pause)
    return do()


def publish(path: Path, data: bytes) -> None:
    """Write aside, sync, rename, sync the folder. Raises OSError; the old file is then untouched."""
    patiently(lambda: _publish(path, data))


def _publish(path: Path, data: bytes) -> None:
    # A leading dot: readers of a whole folder pass over what a killed writer left.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0, data)
        point("publish.written")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes into a file, which is made where there is none, and sync it. Raises OSError."""
    patiently(lambda: _write(path, os.O_WRONLY | os.O_CREAT, offset, data))


def _write(path: Path, flags: int, offset: int, data: bytes) -> None:
    file = os.open(path, flags, 0o644)
    try:
        rest = memoryview(data)
        while rest:  # one call may write a part only
            written = os.pwrite(file, rest, offset)
            rest, offset = rest[written:], offset + written
        os.fsync(file)
    finally:
        os.close(file)


def obstacle(folder: Path) -> Path | None:
    """What keeps files from being written into a folder, which may still have to be made; null where nothing does.

    Raises OSError for a name that is too long, before the folders above it are made.
    """
    if any(len(os.fsencode(name)) > NAME_BYTES for name in folder.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(folder))
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def sync(folder: Path) -> None:
    """Have the names in a folder on disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> bytes:
    """A file's bytes. Raises OSError."""
    return patiently(path.read_bytes)


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record as JSON that carries its own digest."""
    return json.dumps({**record, "sha256": _seal(record)}, indent=1).encode()


def unsealed(data: bytes, name: Path) -> dict[str, Any]:
    """The record in JSON bytes, without its digest, which those of the first layout lack. Raises `Damaged`."""
    try:
        record = json.loads(data)
        seal = record.pop("sha256", None)
        lost = seal is None and record.get("layout", 1) > 1  # the name of the digest was what changed
    except (ValueError, AttributeError, TypeError) as error:
        raise Damaged(f"{name} cannot be read ({error})") from error
    if lost or seal not in (None, _seal(record)):
        raise Damaged(f"{name} was altered since it was written: its digest does not fit")
    return dict(record)


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

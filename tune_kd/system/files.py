"""Atomic writes to a results folder (except the ledger), and safe reads of files that may come from others.

Only regular files up to an expected size are opened. Nothing is written through a link, or to a file with several hard
links: either may lead to a file outside the results. Failed operations are retried a bounded number of times, since
network file systems fail occasionally.
"""

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, TypeVar

from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile

T = TypeVar("T")
MOST_RECORD_BYTES = 2**26  # limit for JSON; the `study.json` of 10,000 trials has less than 1 MB
MOST_DEPTH = 32  # limit for nesting in JSON; our records have 10 levels, and Python's own functions fail at hundreds
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NAME_BYTES = 255  # limit for the name of a file or folder on Linux file systems
PAUSES = (0.2, 1.0)  # seconds before each retry


def patiently(do: Callable[[], T], hiccups: tuple[type[Exception], ...] = (OSError,)) -> T:
    """Return the result of `do`, with a retry if it raises one of `hiccups`. Raises the last error. A missing file and
    an `UnexpectedFile` are not retried."""
    for pause in PAUSES:
        try:
            return do()
        except (FileNotFoundError, UnexpectedFile):
            raise
        except hiccups:
            time.sleep(pause)
    return do()


def publish(path: Path, data: bytes) -> None:
    """Write a file atomically: write a temporary file, sync it, rename it, sync the folder. Raises OSError, and leaves
    the old file unchanged."""
    patiently(lambda: _publish(path, data))


def _publish(path: Path, data: bytes) -> None:
    # A killed writer leaves this file behind. The leading dot hides it from readers of the whole folder.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)  # left by a killed process with the same id
        _write(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0, data)
        point("publish.written")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes at an offset of a file, and sync it. Create the file if it is missing. Raises OSError."""
    patiently(lambda: _write(path, os.O_WRONLY | os.O_CREAT, offset, data))


def _write(path: Path, flags: int, offset: int, data: bytes) -> None:
    file = _open(path, flags)
    try:
        rest = memoryview(data)
        while rest:  # pwrite may write only a part
            written = os.pwrite(file, rest, offset)
            rest, offset = rest[written:], offset + written
        os.fsync(file)
    finally:
        os.close(file)


def obstacle(folder: Path) -> Path | None:
    """Return the path that prevents writing into a folder, or None. The folder need not exist yet.

    Raises OSError for a name that is too long, before its parent folders are created.
    """
    check_names(folder)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def check_names(path: Path) -> None:
    """Raise OSError if a name in a path is too long. `Path.exists` would only return False."""
    if any(len(os.fsencode(name)) > NAME_BYTES for name in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))


def sync(folder: Path) -> None:
    """Sync the directory entries of a folder. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def opened(path: Path, most: int) -> BufferedReader:
    """Open a regular file of at most `most` bytes for reading. Raises OSError; `UnexpectedFile` if the path is
    anything else: reading a FIFO would block, and a device has no end."""
    return os.fdopen(_open(path, os.O_RDONLY, most), "rb")


def appended(path: Path) -> BufferedWriter:
    """Open a regular file for appending. Create it if it is missing. Raises OSError."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def _open(path: Path, flags: int, most: int | None = None) -> int:
    writes = flags & os.O_WRONLY
    try:
        # O_NONBLOCK and O_NOCTTY have no effect on a regular file.
        file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | (os.O_NOFOLLOW if writes else 0), 0o644)
    except OSError as error:
        # In this order: a socket or a FIFO without a reader; a folder opened for writing; a link opened for writing.
        if error.errno in (errno.ENXIO, errno.EISDIR, errno.ELOOP) and os.path.lexists(path):
            raise _unexpected(path, os.lstat(path), most) from error
        raise
    try:
        _check(path, os.fstat(file), most, writes=bool(writes))
    except UnexpectedFile:
        os.close(file)
        raise
    return file


def _check(path: Path, found: os.stat_result, most: int | None, *, writes: bool) -> None:
    too_large = most is not None and found.st_size > most
    if not stat.S_ISREG(found.st_mode) or too_large or (writes and found.st_nlink > 1):
        raise _unexpected(path, found, most)


def check_regular(path: Path, most: int, *, writes: bool = False, through_links: bool = False) -> None:
    """Raise `UnexpectedFile` if a path exists and is not a regular file of at most `most` bytes.

    Call it before a library opens the path. It does not open the file itself: closing a SQLite file would release this
    process's locks on it.
    """
    try:
        found = os.stat(path) if through_links else os.lstat(path)
    except FileNotFoundError:
        return
    _check(path, found, most, writes=writes)


def links(folder: Path) -> Iterator[Path]:
    """Yield all symbolic links in a folder, recursively. If the folder itself is a link, yield only that."""
    if folder.is_symlink():
        yield folder
        return
    for here, folders, files in os.walk(folder):
        yield from (path for path in (Path(here, name) for name in (*folders, *files)) if path.is_symlink())


def _unexpected(path: Path, found: os.stat_result, most: int | None) -> UnexpectedFile:
    kind = KINDS.get(stat.S_IFMT(found.st_mode))
    at_most = "" if most is None else f" of at most {most:,} bytes"
    what = f"has {found.st_size:,} bytes" if kind is None else f"is {kind}"
    if kind is None and found.st_nlink > 1 and (most is None or found.st_size <= most):
        what = f"has {found.st_nlink} hard links"
        at_most = f"{at_most} with a single link"
    return UnexpectedFile(errno.EINVAL, f"{what}; expected a regular file{at_most}", str(path))


def sha256(path: Path, most: int) -> str:
    """Return the hexadecimal SHA-256 of a file of at most `most` bytes. Raises OSError as `read` does."""

    def digest() -> str:
        with opened(path, most) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(digest)


def read(path: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises OSError as `opened` does."""
    return patiently(lambda: _read(path, most))


def _read(path: Path, most: int) -> bytes:
    with opened(path, most) as file:
        parts = [file.read(said := os.fstat(file.fileno()).st_size)]
        while part := file.read(2**16):  # the file grows, or reports a size that is too small, like files in /proc
            parts.append(part)
            if sum(map(len, parts)) > min(most, said + MOST_RECORD_BYTES):
                raise _unexpected(path, os.fstat(file.fileno()), most)
        return b"".join(parts)


def sealed(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON that includes its own SHA-256."""
    return json.dumps({**record, "sha256": _seal(record)}, indent=1).encode()


def parsed(data: bytes | str) -> Any:
    """Parse untrusted JSON. Raises `ValueError` if it is invalid or nested too deeply."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level if isinstance(each, dict | list)
                 for inner in (each.values() if isinstance(each, dict) else each)]  # fmt: skip
        if not level:
            return value
    raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def unsealed(data: bytes, name: Path) -> dict[str, Any]:
    """Parse a sealed record and return it without its digest. Records of layout 1 have none. Raises `CorruptFile`."""
    try:
        record = parsed(data)
        seal = record.pop("sha256", None)
        lost = seal is None and record.get("layout", 1) > 1  # the digest's key itself was altered
    except (ValueError, AttributeError, TypeError) as error:
        raise CorruptFile(f"{name} cannot be read ({error})") from error
    if lost or seal not in (None, _seal(record)):
        raise CorruptFile(f"{name} was changed after it was written: its digest does not match")
    return dict(record)


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

"""Everything that is written to a results folder outside the ledger: whole, or as it was before, whatever happens.

What comes from others is opened here, too: regular files alone, of a size that is expected of their kind. Nothing is
written through a link, or into a file that has a second name elsewhere: who made them may mean another file.
A disk that fails once, as those of networks do, is asked again, a bounded number of times.
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
MOST_RECORD_BYTES = 2**26  # of JSON: the `study.json` of 10,000 trials has less than 1 MB
MOST_DEPTH = 32  # of objects and lists in one another: ours have ten, and Python's own functions fail at hundreds
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NAME_BYTES = 255  # of a file or a folder, on all disks of Linux
PAUSES = (0.2, 1.0)  # seconds before what failed is tried again; after that many times it has failed


def patiently(do: Callable[[], T], hiccups: tuple[type[Exception], ...] = (OSError,)) -> T:
    """What `do` returns, where need be at a later try. Raises its last error; a missing file is no hiccup, nor is
    something else in its place."""
    for pause in PAUSES:
        try:
            return do()
        except (FileNotFoundError, UnexpectedFile):
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
        aside.unlink(missing_ok=True)  # of a process of that number that was killed
        _write(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0, data)
        point("publish.written")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes into a file, which is made where there is none, and sync it. Raises OSError."""
    patiently(lambda: _write(path, os.O_WRONLY | os.O_CREAT, offset, data))


def _write(path: Path, flags: int, offset: int, data: bytes) -> None:
    file = _open(path, flags)
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
    check_names(folder)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def check_names(path: Path) -> None:
    """Raise OSError for a path that no disk takes: what asks whether it is there would only say no."""
    if any(len(os.fsencode(name)) > NAME_BYTES for name in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))


def sync(folder: Path) -> None:
    """Have the names in a folder on disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def opened(path: Path, most: int) -> BufferedReader:
    """A regular file of at most so many bytes, open to be read. Raises OSError, which for anything else there is
    `UnexpectedFile`: a FIFO would be waited for, and a device has no end."""
    return os.fdopen(_open(path, os.O_RDONLY, most), "rb")


def appended(path: Path) -> BufferedWriter:
    """A regular file, made where there is none, open to be written to at its end. Raises OSError."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def _open(path: Path, flags: int, most: int | None = None) -> int:
    writes = flags & os.O_WRONLY
    try:
        # The first two flags change nothing for a regular file.
        file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | (os.O_NOFOLLOW if writes else 0), 0o644)
    except OSError as error:
        # A socket, a FIFO that nobody reads; a folder, to be written to; a link, to be written through.
        if error.errno in (errno.ENXIO, errno.EISDIR, errno.ELOOP) and os.path.lexists(path):
            raise _unexpected(path, os.lstat(path), most) from error
        raise
    found = os.fstat(file)
    if (
        not stat.S_ISREG(found.st_mode)
        or (most is not None and found.st_size > most)
        or (writes and found.st_nlink > 1)
    ):
        os.close(file)
        raise _unexpected(path, found, most)
    return file


def check_regular(path: Path, most: int, *, writes: bool = False, through_links: bool = False) -> None:
    """Raise `UnexpectedFile` where something else than a regular file of at most so many bytes is at a path that a
    library is to open, and may write to. Not by opening it: to close one of SQLite's would free the locks that this
    process has on it."""
    try:
        found = os.stat(path) if through_links else os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_size > most or (writes and found.st_nlink > 1):
        raise _unexpected(path, found, most)


def links(folder: Path) -> Iterator[Path]:
    """The links in a folder, at any depth; the folder alone where it is one itself."""
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
        what = f"has {found.st_nlink - 1} more names, as hard links,"
        at_most = f"{at_most} that has none"
    return UnexpectedFile(errno.EINVAL, f"{what}; expected a regular file{at_most}", str(path))


def sha256(path: Path, most: int) -> str:
    """The digest of a file of at most so many bytes, in hexadecimal. Raises OSError as `read` does."""

    def digest() -> str:
        with opened(path, most) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(digest)


def read(path: Path, most: int) -> bytes:
    """A file's bytes, of which there may be so many. Raises OSError, which is `UnexpectedFile` where `opened` says
    so."""
    return patiently(lambda: _read(path, most))


def _read(path: Path, most: int) -> bytes:
    with opened(path, most) as file:
        parts = [file.read(said := os.fstat(file.fileno()).st_size)]
        while part := file.read(2**16):  # it grows, or says less of itself than it has, as those of /proc without end
            parts.append(part)
            if sum(map(len, parts)) > min(most, said + MOST_RECORD_BYTES):
                raise _unexpected(path, os.fstat(file.fileno()), most)
        return b"".join(parts)


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record as JSON that carries its own digest."""
    return json.dumps({**record, "sha256": _seal(record)}, indent=1).encode()


def parsed(data: bytes | str) -> Any:
    """The value in JSON that may be anybody's. Raises `ValueError`, also where it is nested too deeply."""
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
    """The record in JSON bytes, without its digest, which those of the first layout lack. Raises `CorruptFile`."""
    try:
        record = parsed(data)
        seal = record.pop("sha256", None)
        lost = seal is None and record.get("layout", 1) > 1  # the name of the digest was what changed
    except (ValueError, AttributeError, TypeError) as error:
        raise CorruptFile(f"{name} cannot be read ({error})") from error
    if lost or seal not in (None, _seal(record)):
        raise CorruptFile(f"{name} was altered since it was written: its digest does not fit")
    return dict(record)


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

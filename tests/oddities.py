"""What can be where a file is expected, and is none: from a FIFO, for which a reader waits, to a file of a terabyte."""

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ODDITIES = {
    "fifo": "is a FIFO; expected a regular file of at most",
    "socket": "is a socket; expected a regular file of at most",
    "folder": "is a folder; expected a regular file of at most",
    "endless": "is a device; expected a regular file of at most",
    "huge": "has 1,099,511,627,776 bytes; expected a regular file of at most",
}
"""Kinds, and what is said of each."""
UNFOLLOWED = ODDITIES | {"endless": "is a link; expected a regular file of at most"}
"""The same, where what is a link is not followed."""


def put(kind: str, path: Path) -> Path:
    """Have one of these kinds at a path, in the place of what is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # a socket's address may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**40)
    return path


def at_once(do: Callable[[], T], within: float = 60.0) -> T:
    """What `do` returns or raises; fails where it waits."""
    ended: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            ended.append((do(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within)
    assert ended, f"it hangs for {within:.0f} s"
    found, error = ended[0]
    if error is not None:
        raise error
    return found  # type: ignore[return-value]

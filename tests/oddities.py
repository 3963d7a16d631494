"""Things other than a small regular file at a path where one is expected, such as a FIFO or a file of a terabyte."""

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
"""Kinds, and the error message about each."""
UNFOLLOWED = ODDITIES | {"endless": "is a link; expected a regular file of at most"}
"""The same for code that does not follow links."""


def put(kind: str, path: Path) -> Path:
    """Create one of these kinds at a path. Replaces what is there, and returns the path."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # a short path: a socket's address is limited to 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"/proc/self/fd/{here}/{path.name}")
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
    """Return or raise what `do` does. Fails if it takes longer than `within` seconds."""
    ended: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            ended.append((do(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within)
    assert ended, f"the call has not returned after {within:.0f} s"
    found, error = ended[0]
    if error is not None:
        raise error
    return found  # type: ignore[return-value]

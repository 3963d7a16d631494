"""Standard streams that do not fail. A terminal is closed, a reader leaves, a disk is full: what cannot be said is not
said, and a run goes on to the status that it would have had.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

WAIT = 5.0  # seconds for which a stream that does not block may be full


def made_safe() -> None:
    """Replace standard output and standard error, once a process, before it opens anything else."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started this: the next file would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # also in the programs that this one starts
    sys.stdout = _unfailing(sys.stdout, 1)
    sys.stderr = _unfailing(sys.stderr, 2)


def _unfailing(stream: Any, number: int) -> Any:
    """A stream to the same file; one that is no file's, such as a notebook's, as it is."""
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except (OSError, ValueError, AttributeError):
        return stream
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    raw, at_once = (
        _Unfailing(number, "w", closefd=False),
        getattr(stream, "write_through", False),
    )  # as `python -u` asks
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # what this terminal has no letter for is no reason to fail, either
        line_buffering=number == 2 or os.isatty(number),
        write_through=at_once,
    )


class _Unfailing(io.FileIO):
    """Takes everything, and writes what can be written: where it stays full for `WAIT`, the rest is lost."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        with suppress(OSError):
            while rest:
                written = super().write(rest)
                if written is None and not select.select([], [self.fileno()], [], WAIT)[1]:
                    break
                rest = rest[written or 0 :]
        return size

"""Standard streams that do not fail. A terminal is closed, a reader leaves, a disk is full: what cannot be said is not
said, and a run goes on to the status that it would have had.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

WAIT = 1.0  # seconds for which a stream that does not block may be full


def made_safe() -> None:
    """Replace standard output and standard error, once a process, before it opens anything else."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started this: the next file would be taken for it
            os.open(os.devnull, os.O_RDWR)
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
    return io.TextIOWrapper(
        io.BufferedWriter(_Unfailing(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # what this terminal has no letter for is no reason to fail, either
        line_buffering=number == 2 or os.isatty(number),
        write_through=getattr(stream, "write_through", False),
    )


class _Unfailing(io.FileIO):
    """Takes everything, and writes what can be written."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            if written is None and select.select([], [self.fileno()], [], WAIT)[1]:
                written = super().write(data)
        except OSError:
            return size
        return size if written is None else written

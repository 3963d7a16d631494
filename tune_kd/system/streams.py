"""Standard streams that never raise. Output to a closed terminal, a closed pipe or a full disk is dropped. The exit
status is the same as without the failure.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

WAIT = 5.0  # seconds that a non-blocking stream may stay full


def made_safe() -> None:
    """Replace standard output and standard error. Call it once, before the process opens any file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the stream is closed, so the next open file would get its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # for child processes too
    sys.stdout = _unfailing(sys.stdout, 1)
    sys.stderr = _unfailing(sys.stderr, 2)


def _unfailing(stream: Any, number: int) -> Any:
    """Return a stream that writes to the same file and never raises. A stream without a file, such as a notebook's, is
    returned unchanged."""
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except (OSError, ValueError, AttributeError):
        return stream
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    raw = _Unfailing(number, "w", closefd=False)
    at_once = getattr(stream, "write_through", False)  # set by `python -u`
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # the terminal's encoding may lack a character
        line_buffering=number == 2 or os.isatty(number),
        write_through=at_once,
    )


class _Unfailing(io.FileIO):
    """Accepts all data and writes as much as possible. If the file stays full for `WAIT`, the rest is dropped."""

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

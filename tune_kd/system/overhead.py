"""Timers for the overhead of recording a run: ledger and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

spent = {"ledger": 0.0, "checkpoint": 0.0}
"""Seconds that this process has spent so far, by purpose."""


@contextmanager
def spending(what: Literal["ledger", "checkpoint"]) -> Iterator[None]:
    """Add the duration of this context to `spent`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[what] += time.perf_counter() - began

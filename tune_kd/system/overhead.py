"""What a process spends on keeping a run, besides training: seconds by what they went into."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

spent: Counter[str] = Counter()
"""Seconds of this process so far."""


@contextmanager
def spending(what: Literal["ledger", "checkpoint"]) -> Iterator[None]:
    """Count the time in which this lasts."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[what] += time.perf_counter() - began  # type: ignore[assignment]  # typeshed counts in whole numbers

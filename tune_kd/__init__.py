"""Controlled ablation studies of knowledge distillation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_kd.records.reader import Records


def load(*runs: Any, **options: Any) -> "Records":
    """The tables of one or several runs, or of somebody else's: see `tune_kd.records.reader.load`."""
    from tune_kd.records.reader import load  # here: pandas takes a second, and most commands need none

    return load(*runs, **options)

"""Inputs and reference values for the loss tests."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tune_kd.training.loss import Context, Shapes

REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "losses.json"

temperatures = st.floats(0.5, 20)
numbers = st.floats(-20, 20, width=32).map(float)


def wave(shape: tuple[int, ...], frequency: float, phase: float, scale: float = 1.0) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(frequency * steps + phase).reshape(shape)


STUDENT, TEACHER = wave((8, 10), 0.7, 0.1, 3), wave((8, 10), 0.9, 0.5, 5)
STUDENT_EMBEDDING, TEACHER_EMBEDDING = wave((8, 16), 0.11, 0.2), wave((8, 16), 0.23, 0.4)


def reference() -> dict[str, Any]:
    """Return the reference values. Skips the test if their file is missing."""
    if not REFERENCE.exists():
        pytest.skip("the file of reference values is not beside this checkout")
    return _read()


@cache
def _read() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(REFERENCE.read_text())
    return values


def taps(*channels: int) -> Shapes:
    return Shapes(tuple((count, 4, 4) for count in channels), channels[-1], 10)


def context(student: Shapes, teacher: Shapes, labels: Tensor | None = None, **settings: float) -> Context:
    labels = torch.zeros(8, dtype=torch.int64) if labels is None else labels
    return Context(student, teacher, 10, labels, epochs=2, steps_per_epoch=3, settings=settings)

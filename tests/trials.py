"""Trials for the training tests, each of which takes a fraction of a second."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tune_kd.data.datasets import DataSet
from tune_kd.records.schema import EPOCHS
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.trial import Epoch, Trial
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train
from tune_kd.training.teachers import Teacher

CPU = torch.device("cpu")
TIMES = (*EPOCHS.timing, "peak_memory_bytes")


def trial(method: str, seed: int = 1, teacher_id: str | None = None, **cell: Any) -> Trial:
    defaults = {"temperature": 4.0 if method == "logit" else None, "beta": 0.5 if method == "feature" else None}
    distils = {"teacher": "resnet50", "alpha": 0.5} if teacher_id else {"teacher": None, "alpha": None}
    return Trial(
        arm=f"cifar/{method}",
        phase="confirm",
        cell=Cell(**{"method": method, "width": 0.0625, **defaults, **distils, **cell}),
        recipe=Recipe(epochs=4, batch_size=16, lr=0.05),
        seed=seed,
        data=Data("pixels"),
        data_digest=None,
        scale="test",
        teacher_id=teacher_id,
    )


def as_teacher(student: Trial, epochs: int = 2) -> Trial:
    cell = Cell(teacher="resnet50", width=student.cell.width, temperature=None, alpha=None, beta=None)
    return replace(student, phase="teacher", cell=cell, seed=9, teacher_id=None, recipe=Recipe(epochs, 16, 0.05))


def run(each: Trial, data: DataSet, teacher: Teacher | None, folder: Path, **options: Any) -> list[Epoch]:
    return list(train(each, data, teacher, device=CPU, checkpoints=Checkpoints(folder), **options))


def two_epochs(each: Trial) -> Trial:
    return replace(each, recipe=replace(each.recipe, epochs=2))


def interrupted(each: Trial, data: DataSet, teacher: Teacher | None, folder: Path) -> list[Epoch]:
    """Stop a trial after its first epoch, resume it from its checkpoint, and return all epochs."""
    begun = train(each, data, teacher, device=CPU, checkpoints=Checkpoints(folder), checkpoint_every=0.0)
    first = next(begun)
    begun.close()
    return [first, *run(each, data, teacher, folder, acknowledged=1)]


def exact(epoch: Epoch, *without: str) -> dict[str, Any]:
    """Return the values of an epoch that must be reproducible bit by bit."""
    values = asdict(epoch)
    values |= values.pop("outcome") or {}
    return {name: value for name, value in values.items() if name not in (*TIMES, *without)}


def distilling(method: str, teacher: Teacher, **cell: Any) -> Trial:
    return trial(method, teacher_id=teacher.teacher_id, **cell)

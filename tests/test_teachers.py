"""Teachers: published whole, checked when loaded, asked once."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tune_kd import teachers
from tune_kd.data import DataSet, Views, draw_views
from tune_kd.models import build
from tune_kd.study import Cell, Data, Recipe
from tune_kd.teachers import Teacher, TeacherChanged, load_teacher, publish_teacher, published_epochs
from tune_kd.trial import Epoch, Trial

CPU = torch.device("cpu")
TAUGHT = Trial(
    arm="cifar/teacher",
    phase="teacher",
    cell=Cell(teacher="resnet18", width=0.0625, temperature=None, alpha=None, beta=None),
    recipe=Recipe(epochs=1),
    seed=9,
    data=Data("pixels"),
    data_digest=None,
    scale="test",
)
STUDENT = replace(
    TAUGHT, arm="cifar/logit", phase="confirm", cell=replace(TAUGHT.cell, method="logit"), teacher_id=TAUGHT.trial_id
)
EPOCH = Epoch(1, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1.0, 1.0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of teachers that holds one."""
    net = build("resnet18", stem="cifar", classes=2, width=0.0625, seed=3)
    publish_teacher(tmp_path, TAUGHT, net.state_dict(), [EPOCH])
    return tmp_path


@pytest.fixture
def teacher(home: Path, pixels: DataSet) -> Teacher:
    return load_teacher(home, STUDENT, pixels, CPU)


def views(pixels: DataSet, seed: int = 1, epoch: int = 1) -> Views:
    return draw_views(seed, epoch, len(pixels.train.labels), pad=pixels.pad, flip=pixels.flip)


def test_a_published_teacher_is_adopted_with_its_epochs(home: Path) -> None:
    assert published_epochs(home, TAUGHT.trial_id) == [EPOCH]
    assert published_epochs(home, "0" * 16) is None


def test_a_teacher_without_its_card_or_with_other_weights_is_not_adopted(home: Path) -> None:
    weights = home / TAUGHT.trial_id / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert published_epochs(home, TAUGHT.trial_id) is None
    weights.write_bytes(data)
    (home / TAUGHT.trial_id / "card.json").unlink()
    assert published_epochs(home, TAUGHT.trial_id) is None


def test_a_teacher_whose_file_was_changed_is_refused_with_both_digests(home: Path, pixels: DataSet) -> None:
    weights = home / TAUGHT.trial_id / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(TeacherChanged, match="changed after it was published"):
        load_teacher(home, STUDENT, pixels, CPU)


def test_answers_are_computed_once_for_all_who_ask_also_at_the_same_time(
    teacher: Teacher, home: Path, pixels: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    logits = Teacher._logits

    def counted(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return logits(self, images)

    monkeypatch.setattr(Teacher, "_logits", counted)
    found: list[torch.Tensor] = []
    others = [load_teacher(home, STUDENT, pixels, CPU) for _ in range(3)]
    threads = [threading.Thread(target=lambda t=t: found.append(t.answers(1, 1, views(pixels)))) for t in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(asked) == len(pixels.train.labels)
    assert all(torch.equal(each, found[0]) for each in found)
    teacher.answers(1, 2, views(pixels, epoch=2))
    assert sum(asked) == 2 * len(pixels.train.labels)


def test_answers_that_were_damaged_are_computed_again_to_the_same_bits(teacher: Teacher, pixels: DataSet) -> None:
    first = teacher.answers(1, 1, views(pixels))
    (path,) = teacher.home.glob("answers/*/seed-1-epoch-1.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert torch.equal(teacher.answers(1, 1, views(pixels)), first)
        assert path.read_bytes() == whole


def test_answers_of_another_teacher_are_not_believed(teacher: Teacher, pixels: DataSet) -> None:
    first = teacher.answers(1, 1, views(pixels))
    other = build("resnet18", stem="cifar", classes=2, width=0.0625, seed=4).eval()
    changed = teachers.Teacher(teacher.teacher_id, "another digest", other, teacher.home, pixels)
    assert not torch.equal(changed.answers(1, 1, views(pixels)), first)


def test_a_teacher_is_frozen(teacher: Teacher) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
    assert not teacher.net.training

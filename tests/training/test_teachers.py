"""Teachers: published atomically, verified when loaded, computed once per view."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import altered
from tune_kd.data.augment import Views, draw_views, prepare, show, view_numbers
from tune_kd.data.datasets import DataSet
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.trial import Answering, Epoch, Outcome, Trial
from tune_kd.training import logit_cache
from tune_kd.training.networks import build
from tune_kd.training.teachers import (
    Teacher,
    TeacherChanged,
    load_teacher,
    publish_teacher,
    published_epochs,
    unfit,
    wrong_with,
)

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
OUTCOME = Outcome(1, 0.5, 0.5, 0.5, None, None, None, 0.1, 1, "its weights", None, None)
EPOCH = Epoch(1, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1.0, 1.0, outcome=OUTCOME)
DRAWS = ((1, 3), (2, 3))  # two seeds of three epochs


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of teachers with one teacher."""
    net = build("resnet18", stem="cifar", classes=2, width=0.0625, seed=3)
    publish_teacher(tmp_path, TAUGHT, net.state_dict(), [EPOCH])
    return tmp_path


@pytest.fixture
def teacher(home: Path, pixels: DataSet) -> Teacher:
    return load_teacher(home, TAUGHT.trial_id, pixels, CPU)


def views(pixels: DataSet, seed: int = 1, epoch: int = 1) -> Views:
    return draw_views(seed, epoch, len(pixels.train.labels), pad=pixels.pad, flip=pixels.flip)


def test_a_published_teacher_is_adopted_with_its_epochs(home: Path) -> None:
    assert published_epochs(home, TAUGHT.trial_id) == [EPOCH]
    assert published_epochs(home, "0" * 16) is None


@pytest.mark.parametrize(
    ("epochs", "words"),
    [
        ([EPOCH], "has 1 epochs; this study's teacher has 2;"),
        ([EPOCH, EPOCH], "has 2 epochs; this study's teacher has 2;"),
        ([EPOCH, replace(EPOCH, epoch=2, outcome=None)], "must have one outcome, at its last epoch,"),
        ([EPOCH, replace(EPOCH, epoch=2)], "must have one outcome, at its last epoch,"),
        ([], "has 0 epochs;"),
        ([replace(EPOCH, outcome=None), replace(EPOCH, epoch=2)], None),
    ],
)
def test_a_teacher_is_adopted_only_if_its_card_has_the_epochs_of_the_trial(
    tmp_path: Path, epochs: list[Epoch], words: str | None
) -> None:
    longer = replace(TAUGHT, recipe=Recipe(epochs=2))
    assert unfit(tmp_path, longer) is None
    publish_teacher(
        tmp_path, longer, build("resnet18", stem="cifar", classes=2, width=0.0625, seed=3).state_dict(), epochs
    )
    found = unfit(tmp_path, longer)
    assert (found is None) == (words is None)
    assert words is None or (words in str(found) and f"remove {tmp_path / longer.trial_id} to have" in str(found))


def test_a_teacher_with_the_card_of_another_trial_is_not_adopted(home: Path) -> None:
    altered(home / TAUGHT.trial_id / "card.json", lambda record: record["trial"].update(seed=10))
    assert "belongs to trial" in str(unfit(home, TAUGHT))


@pytest.mark.parametrize("change", [
    lambda record: record.pop("epochs"),
    lambda record: record.pop("weights_sha256"),
    lambda record: record["epochs"][0].update(outcome={"x": 1}),
    lambda record: record["epochs"][0].update(outcome="abc"),
])  # fmt: skip
def test_a_teacher_with_an_invalid_card_is_not_adopted_and_is_reported_as_damaged(
    home: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    altered(home / TAUGHT.trial_id / "card.json", change)
    assert "is not a teacher's card" in str(unfit(home, TAUGHT))
    assert "card.json was changed after it was written" in str(wrong_with(home, TAUGHT.trial_id, "its weights"))
    assert published_epochs(home, TAUGHT.trial_id) is None


def test_a_teacher_without_its_card_or_with_other_weights_is_not_adopted(home: Path) -> None:
    weights = home / TAUGHT.trial_id / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert published_epochs(home, TAUGHT.trial_id) is None
    weights.write_bytes(data)
    (home / TAUGHT.trial_id / "card.json").unlink()
    assert published_epochs(home, TAUGHT.trial_id) is None


def test_a_teacher_with_changed_weights_is_rejected(home: Path, pixels: DataSet) -> None:
    weights = home / TAUGHT.trial_id / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(TeacherChanged, match="changed after it was published"):
        load_teacher(home, TAUGHT.trial_id, pixels, CPU)


def test_a_retrained_teacher_is_rejected_if_its_weights_differ(home: Path, pixels: DataSet) -> None:
    net = build("resnet18", stem="cifar", classes=2, width=0.0625, seed=3)
    publish_teacher(home, TAUGHT, net.state_dict(), [EPOCH])
    load_teacher(home, TAUGHT.trial_id, pixels, CPU, taught="its weights")
    with pytest.raises(TeacherChanged, match="was trained again, and its weights differ"):
        load_teacher(home, TAUGHT.trial_id, pixels, CPU, taught="others")


def loaded(home: Path, pixels: DataSet, answering: Answering) -> Teacher:
    return load_teacher(home, TAUGHT.trial_id, pixels, CPU, answering)


@pytest.mark.parametrize("ahead", [True, False])
def test_logits_of_a_view_are_computed_once_for_concurrent_students_seeds_and_epochs(
    home: Path, pixels: DataSet, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(logit_cache, "CHUNK", 16)
    students = [loaded(home, pixels, Answering(ahead, DRAWS)) for _ in range(3)]
    asked: list[int] = []
    found: list[torch.Tensor] = []

    def study(student: Teacher) -> None:
        for seed, epochs in DRAWS:
            for epoch in range(1, epochs + 1):
                logits, computed = student.logits(views(pixels, seed, epoch))
                asked.append(computed)
                found.append(logits)

    threads = [threading.Thread(target=study, args=[each]) for each in students]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drawn = {int(each) for seed, epochs in DRAWS for epoch in range(1, epochs + 1)
             for each in view_numbers(views(pixels, seed, epoch), pixels)}  # fmt: skip
    assert sum(asked) == (pixels.views_per_image * len(pixels.train.labels) if ahead else len(drawn))
    assert len(found) == 3 * sum(epochs for _, epochs in DRAWS)


@pytest.mark.parametrize("ahead", [True, False])
def test_cached_logits_are_those_of_the_views_that_students_see(home: Path, pixels: DataSet, ahead: bool) -> None:
    teacher = loaded(home, pixels, Answering(ahead, DRAWS))
    for seed, epoch in ((1, 1), (1, 2), (2, 3)):
        drawn = views(pixels, seed, epoch)
        with torch.no_grad():
            live = teacher.net(prepare(show(drawn, pixels), pixels))
        assert torch.allclose(teacher.logits(drawn)[0], live, atol=1e-5)


def test_cached_logits_do_not_depend_on_the_order_of_requests(home: Path, pixels: DataSet, tmp_path: Path) -> None:
    shutil.copytree(home / TAUGHT.trial_id, tmp_path / "again" / TAUGHT.trial_id)
    one = loaded(home, pixels, Answering(False, DRAWS))
    other = loaded(tmp_path / "again", pixels, Answering(False, DRAWS))
    forwards = [one.logits(views(pixels, 1, epoch))[0] for epoch in (1, 2, 3)]
    backwards = [other.logits(views(pixels, 1, epoch))[0] for epoch in (3, 2, 1)]
    assert all(torch.equal(*pair) for pair in zip(forwards, reversed(backwards), strict=True))


def test_a_teacher_whose_logits_are_cached_builds_no_network(home: Path, pixels: DataSet) -> None:
    first = loaded(home, pixels, Answering(True, DRAWS))
    expected, computed = first.logits(views(pixels))
    assert computed == pixels.views_per_image * len(pixels.train.labels)
    second = loaded(home, pixels, Answering(True, DRAWS))
    again, computed = second.logits(views(pixels))
    assert computed == 0
    assert torch.equal(again, expected)
    assert "net" not in vars(second)


def test_other_weights_or_preprocessing_have_separate_cached_logits(home: Path, pixels: DataSet) -> None:
    first = loaded(home, pixels, Answering(True, DRAWS)).logits(views(pixels))[0]
    shifted = replace(pixels, mean=(0.1, 0.2, 0.3), digest="another")
    second, computed = loaded(home, shifted, Answering(True, DRAWS)).logits(views(pixels))
    assert computed
    assert not torch.allclose(first, second)
    other = build("resnet18", stem="cifar", classes=2, width=0.0625, seed=4)
    publish_teacher(home, TAUGHT, other.state_dict(), [EPOCH])
    third, computed = loaded(home, pixels, Answering(True, DRAWS)).logits(views(pixels))
    assert computed
    assert not torch.allclose(first, third)


def test_the_cache_key_on_a_cpu_is_pinned(teacher: Teacher) -> None:
    """Otherwise all cached logits on CPUs would be computed again."""
    whose = replace(teacher, card=replace(teacher.card, weights_sha256="0" * 64))
    whose._cache("test", 1, lambda rows: teacher.data.test.images)
    (key,) = (teacher.home / "answers").iterdir()
    assert key.name == "b42a5c8a886ca23d"
    assert [each.name for each in (key / "test").glob("logits.*")] == ["logits.f32"]


def test_a_teacher_is_frozen(teacher: Teacher) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
    assert not teacher.net.training

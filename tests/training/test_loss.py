"""A study's own losses in a training process: the same numbers as a built-in loss, also after a resume."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trials import distilling, exact, interrupted, run, two_epochs
from tune_kd.data.datasets import DataSet
from tune_kd.study.brought import Code
from tune_kd.study.methods import Method
from tune_kd.study.trial import Trial
from tune_kd.training import loss as losses
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loss import bring
from tune_kd.training.teachers import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
from beside import squared

class KD(nn.Module):
    def __init__(self, context):
        super().__init__()
    def forward(self, batch, *, temperature):
        s = F.log_softmax(batch.student_logits / temperature, 1)
        t = F.log_softmax(batch.teacher_logits / temperature, 1)
        return squared(temperature) * F.kl_div(s, t, reduction="batchmean", log_target=True)

class Stages(nn.Module):
    def __init__(self, context):
        super().__init__()
        pairs = zip(context.student.taps, context.teacher.taps)
        self.maps = nn.ModuleList(nn.Conv2d(one[0], other[0], 1, bias=False) for one, other in pairs)
    def forward(self, batch, *, beta):
        pairs = zip((each(one) for each, one in zip(self.maps, batch.student_features)), batch.teacher_features)
        squares, angles = zip(*(
            (F.mse_loss(one, other), (1 - F.cosine_similarity(one.mean((2, 3)), other.mean((2, 3)))).mean())
            for one, other in pairs
        ))
        return torch.stack(squares).mean() + beta * torch.stack(angles).mean()

class Dropped(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(context.classes, context.classes)
    def forward(self, batch):
        return (self.head(self.drop(batch.student_logits)) - batch.teacher_logits).pow(2).mean()

class NotDropped(Dropped):
    def __init__(self, context):
        super().__init__(context)
        self.drop = nn.Identity()

class Remembers(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.register_buffer("bank", torch.randn(len(context.train_labels), context.classes))
    def forward(self, batch):
        before = self.bank[batch.index]
        self.bank[batch.index] = batch.student_logits.detach()
        return (batch.student_logits - before).pow(2).mean() + batch.progress * batch.student_logits.mean()

class Reuses(nn.Module):  # like SimKD (Chen et al. 2022): the teacher's classifier on mapped features
    def __init__(self, context):
        super().__init__()
    def student(self, net, context):
        return WithTheClassifier(net, context)
    def forward(self, batch):
        assert len(batch.student_features) == 4
        return (batch.student_embedding.mean() - batch.teacher_embedding.mean()) ** 2

class Shares(nn.Module):  # the mapping is a part of the student and of the loss
    def __init__(self, context):
        super().__init__()
        self.map = nn.Linear(context.student.embedding, context.teacher.embedding)
    def student(self, net, context):
        net.fc = nn.Sequential(self.map, context.classifier)
        return net
    def forward(self, batch):
        return (self.map(batch.student_embedding) - batch.teacher_embedding).pow(2).mean()

class Alone(Shares):  # the same, but the mapping is not a registered module of the loss
    def __init__(self, context):
        super().__init__(context)
        self.held = [self.map]
        del self.map
    def student(self, net, context):
        net.fc = nn.Sequential(self.held[0], context.classifier)
        return net
    def forward(self, batch):
        return (self.held[0](batch.student_embedding) - batch.teacher_embedding).pow(2).mean()

class WithTheClassifier(nn.Module):
    def __init__(self, net, context):
        super().__init__()
        self.net, self.classifier = net, context.classifier
        self.map = nn.Linear(context.student.embedding, context.teacher.embedding)
    def forward(self, images):
        out = self.net.maxpool(self.net.relu(self.net.bn1(self.net.conv1(images))))
        for stage in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            out = stage(out)
        return self.classifier(self.map(self.net.avgpool(out).flatten(1)))
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Modules that are imported here are removed before the next test."""
    with losses.brought([]):
        yield


def code(name: str, *, extra: str = "") -> Code:
    return Code(
        name, "mine.py", (("beside.py", b"def squared(x):\n    return x**2\n"), ("mine.py", (SOURCE + extra).encode()))
    )


def with_loss(trial: Trial, name: str, needs: str = "logits", **settings: float) -> Trial:
    own = code(name)
    bring([own])
    method = Method("mine", loss=f"mine.py:{name}", needs=needs, settings=settings, source=own.digest)
    return replace(trial, cell=replace(trial.cell, method="mine", **settings), brought=method)


@pytest.mark.parametrize(
    ("method", "name", "needs", "settings"),
    [("logit", "KD", "logits", {"temperature": 4.0}), ("feature", "Stages", "features", {"beta": 0.5})],
)
def test_a_custom_loss_equals_the_built_in_method_bit_for_bit(
    method: str, name: str, needs: str, settings: dict[str, float], pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    built_in = distilling(method, teacher)
    expected = run(built_in, pixels, teacher, tmp_path / "built_in")
    ours = run(with_loss(built_in, name, needs, **settings), pixels, teacher, tmp_path / "mine")
    assert [exact(epoch) for epoch in ours] == [exact(epoch) for epoch in expected]


@pytest.mark.parametrize("name", ["Dropped", "Remembers"])
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(
    name: str, pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    each = two_epochs(with_loss(distilling("logit", teacher), name))
    whole = run(each, pixels, teacher, tmp_path / "whole")
    torch.rand(3)  # other random draws must not matter
    cut = interrupted(each, pixels, teacher, tmp_path / "cut")
    assert [exact(epoch) for epoch in cut] == [exact(epoch) for epoch in whole]
    states = [Checkpoints(tmp_path / name).load() for name in ("whole", "cut")]
    assert states[0] is not None and states[1] is not None
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(tensor, states[1][0][name]) for name, tensor in states[0][0].items())
    assert any(name.startswith("loss.") for name in states[0][0])


def test_a_custom_loss_can_change_the_network_that_is_trained_and_evaluated(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    each = two_epochs(with_loss(distilling("feature", teacher), "Reuses", needs="features"))
    before = teacher.net.fc.weight.clone()
    whole = run(each, pixels, teacher, tmp_path / "whole")
    assert [exact(epoch) for epoch in interrupted(each, pixels, teacher, tmp_path / "cut")] == [
        exact(epoch) for epoch in whole
    ]
    saved = Checkpoints(tmp_path / "whole").load()
    assert saved is not None
    assert {"student.map.weight", "student.net.conv1.weight"} <= set(saved[0])
    assert torch.equal(saved[0]["student.classifier.weight"], before)  # the teacher's, which is not trained
    assert torch.equal(teacher.net.fc.weight, before)
    assert whole[-1].outcome is not None
    own = run(two_epochs(distilling("feature", teacher)), pixels, teacher, tmp_path / "own")[-1].outcome
    assert own is not None
    assert whole[-1].outcome.params != own.params


def test_a_module_shared_by_student_and_loss_is_trained_once_and_saved(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    each, other = (
        two_epochs(with_loss(distilling("feature", teacher), name, needs="features")) for name in ("Shares", "Alone")
    )
    whole = run(each, pixels, teacher, tmp_path / "whole")
    cut = interrupted(each, pixels, teacher, tmp_path / "cut")
    alone = run(other, pixels, teacher, tmp_path / "alone")
    assert [exact(epoch) for epoch in whole] == [exact(epoch) for epoch in cut] == [exact(epoch) for epoch in alone]
    saved = Checkpoints(tmp_path / "whole").load()
    assert saved is not None
    assert torch.equal(saved[0]["student.fc.0.weight"], saved[0]["loss.map.weight"])


def test_dropout_in_a_loss_drops_values(pixels: DataSet, teacher: Teacher, tmp_path: Path) -> None:
    """If dropout drew no random numbers, the test of a resumed trial would prove nothing."""
    first, other = (
        run(two_epochs(with_loss(distilling("logit", teacher), name)), pixels, teacher, tmp_path / name)[0].loss_kd
        for name in ("Dropped", "NotDropped")
    )
    assert first != pytest.approx(other, rel=0.01)


def test_copies_of_a_loss_are_private_named_by_digest_and_removed_after_import() -> None:
    """A killed worker has no chance to remove its files."""
    own = code("KD", extra="""
import os
MODE, FILES = os.stat(os.path.dirname(__file__)).st_mode, os.listdir(os.path.dirname(__file__))
def late():
    import beside
    return beside.squared(3)
""")  # fmt: skip
    path = list(sys.path)
    bring([own])
    method = Method("mine", loss="mine.py:KD", settings={"temperature": 4.0}, source=own.digest)
    module = sys.modules[losses.loss_class(method).__module__]
    assert own.digest[:16] in module.__name__
    assert module.MODE & 0o077 == 0
    assert {each for each in module.FILES if each.endswith(".py")} == {"mine.py", "beside.py"}
    assert not Path(str(module.__file__)).parent.exists()
    assert sys.path == path
    assert module.late() == 9


def test_an_edited_loss_is_loaded_as_a_different_class(tmp_path: Path) -> None:
    old, new = code("KD"), code("KD", extra="\nKD.edited = True\n")
    bring([old, new])
    classes = [losses.loss_class(Method("mine", loss="mine.py:KD", source=each.digest)) for each in (old, new)]
    assert [hasattr(each, "edited") for each in classes] == [False, True]


def test_an_installed_module_that_differs_from_the_planned_one_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed_there.py").write_text("class A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    there = Code("A", "installed_there", (("installed_there.py", b"class A: pass\n"),))
    bring([there])
    other = replace(there, files=(("installed_there.py", b"class A: x = 1\n"),))
    with pytest.raises(RuntimeError, match="differs from the file that the study was planned with"):
        bring([other])


def test_modules_of_a_study_are_removed_after_use() -> None:
    with losses.brought([code("KD")]):
        assert "beside" in sys.modules
    assert "beside" not in sys.modules

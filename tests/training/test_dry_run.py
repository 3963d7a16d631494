"""The dry run tries a study's own losses before any trial starts, and reports each fault in one message."""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import tiny
from tune_kd.study import brought
from tune_kd.study.methods import Method
from tune_kd.study.plan import plan
from tune_kd.study.spec import Compare, Factor, Study
from tune_kd.system import signals
from tune_kd.system.errors import UserError
from tune_kd.training import dry_run, loss as losses
from tune_kd.training.step import Step

LOSSES = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.context = context

class Good(Base):
    def __init__(self, context):
        super().__init__(context)
        shapes = zip(context.student.taps, context.teacher.taps, strict=True)
        self.maps = nn.ModuleList(nn.Conv2d(one[0], other[0], 1) for one, other in shapes)
        assert context.classes == 10 and len(context.train_labels) == 8
    def forward(self, batch, *, weight):
        pairs = zip(self.maps, batch.student_features, batch.teacher_features, strict=True)
        assert 0 <= batch.progress <= 1 and batch.epoch == 1 and batch.index.shape == batch.labels.shape == (8,)
        return weight * sum((each(one) - other).pow(2).mean() for each, one, other in pairs)

class TwoViews(Base):
    def forward(self, batch, *, weight):
        assert not torch.equal(batch.student_logits, batch.second.student_logits)
        assert (batch.second.teacher_before_relu[0] < 0).any()
        return (batch.student_logits - batch.second.teacher_logits).pow(2).mean()

class Rows(Base):
    def forward(self, batch, *, weight):
        return (batch.student_logits - batch.teacher_logits).pow(2).mean(1)

class NoGradient(Base):
    def forward(self, batch, *, weight):
        return batch.teacher_logits.mean()

class OwnAlone(Base):
    def __init__(self, context):
        super().__init__(context)
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, batch, *, weight):
        return self.scale * batch.teacher_logits.mean()

class NotANumber(Base):
    def forward(self, batch, *, weight):
        return (batch.student_logits * 0 / 0).mean()

class TeachersClassifier(Base):
    def student(self, net, context):
        net.fc = nn.Sequential(nn.Linear(context.student.embedding, context.teacher.embedding), context.classifier)
        return net
    def forward(self, batch, *, weight):
        return weight * (batch.student_logits - batch.teacher_logits).pow(2).mean()

class OfItsOwn(Base):
    def student(self, net, context):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, context.classes))
    def forward(self, batch, *, weight):
        return weight * batch.student_logits.mean()

class NoTap(Base):
    def forward(self, batch, *, weight):
        return batch.student_features[7].mean()

class Unknown(Base):
    def forward(self, batch, *, gamma):
        return gamma * batch.student_logits.mean()

class NoContext(nn.Module):
    def __init__(self):
        super().__init__()

class Word(Base):
    def forward(self, batch, *, weight):
        return "0.5"

class Second(Base):
    calls = 0
    def forward(self, batch, *, weight):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("at the second step")
        return batch.student_logits.mean()

class Explodes(Base):
    def __init__(self, context):
        super().__init__(context)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.ones(()))
    def forward(self, batch, *, weight):
        with torch.no_grad():
            self.seen.mul_(float("inf"))
        return self.scale * batch.student_logits.mean()

class Position(Base):
    def forward(self, batch, weight=2.0):
        return weight * batch.student_logits.mean()

class Keywords(Base):
    def forward(self, batch, **settings):
        return batch.student_logits.mean()

class Leaves(Base):
    def forward(self, batch, *, weight):
        raise SystemExit(0)

class Interrupts(Base):
    def forward(self, batch, *, weight):
        raise KeyboardInterrupt

class Late(Base):
    def forward(self, batch, *, weight):
        if not hasattr(self, "late"):
            self.late = nn.Linear(10, 10)
        return self.late(batch.student_logits).mean()

class LateBuffer(Base):
    def forward(self, batch, *, weight):
        self.register_buffer("seen", batch.student_logits.detach().mean())
        return batch.student_logits.mean()

class Grows(Base):
    def __init__(self, context):
        super().__init__(context)
        self.register_buffer("seen", torch.zeros(0))
    def forward(self, batch, *, weight):
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return batch.student_logits.mean()

class NoModule:
    def __init__(self, context):
        pass
    def forward(self, batch, *, weight):
        return batch.student_logits.mean()

class Prints(Base):
    def forward(self, batch, *, weight):
        print("noise")
        return batch.student_logits.mean()

class Changes(Base):
    def __init__(self, context):
        super().__init__(context)
        context.train_labels.zero_()
        nn.init.zeros_(context.classifier.weight)
    def forward(self, batch, *, weight):
        return batch.student_logits.mean()
"""


def tried(folder: Path, loss: str, needs: str = "features", **more: object) -> Study:
    (folder / "losses.py").write_text(LOSSES)
    method = Method("mine", loss=loss, needs=needs, settings={"weight": 2.0}, **more)
    study = replace(
        tiny(), methods=(method,), factors=(Factor("method", ("none", "mine")),), reference=(), moderator=None,
        contrasts=(Compare("method", "mine", "none"),),
    )  # fmt: skip
    study = brought.with_sources(study, folder)
    dry_run.check(plan(study), brought.codes(study, folder))
    return study


def test_a_working_loss_passes_and_leaves_no_modules_paths_or_files(tmp_path: Path) -> None:
    modules, path = set(sys.modules), list(sys.path)
    tried(tmp_path, "losses.py:Good")
    tried(tmp_path, "losses.py:TwoViews", "before_relu", views=2)
    tried(tmp_path, "losses.py:TeachersClassifier")
    assert sys.path == path
    assert not [name for name in set(sys.modules) - modules if name.startswith("losses")]
    assert [each.name for each in tmp_path.iterdir()] == ["losses.py"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("Rows", "returns a tensor of shape [8]; allowed: a 0-dim tensor, such as a mean"),
        ("NoGradient", "has no gradient for the student"),
        ("OwnAlone", "has no gradient for the student"),
        ("NotANumber", "is nan; allowed: a finite number"),
        ("NoTap", "fails in its dry run at losses.py, line 61: IndexError"),
        (
            "OfItsOwn",
            "needs 'features', but the student that it returns, Sequential, does not contain the network that it was",
        ),
        ("Unknown", "takes gamma; allowed: settings that the method declares (weight)"),
        ("NoContext", "TypeError"),
        ("Word", "returns str; allowed: a 0-dim tensor"),
        ("Second", "RuntimeError: at the second step"),
        ("Explodes", "leads to values that are not finite, in loss.seen"),
        ("Position", "takes the setting weight by position; allowed: settings as keywords, after *"),
        ("Keywords", "takes **settings, which stays empty; allowed: settings by name, after * (weight)"),
        ("Leaves", "fails in its dry run at losses.py"),
        ("Interrupts", "KeyboardInterrupt"),
        ("Late", "creates loss.late.weight during a step"),
        ("LateBuffer", "creates loss.seen during a step"),
        ("Grows", "creates loss.seen during a step"),
        ("NoModule", "is NoModule, which is not an nn.Module"),
        ("Nobody", "losses.py has no class Nobody; it defines "),
        ("Nobody", "Word, Second, Explodes, Position, "),
    ],
)
def test_a_fault_of_a_loss_is_reported_in_one_message_that_names_the_loss(
    tmp_path: Path, loss: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        tried(tmp_path, f"losses.py:{loss}")
    (problem,) = caught.value.problems
    assert problem.startswith(f"the loss losses.py:{loss} of method 'mine' ")
    assert words in problem


def test_a_module_that_fails_to_import_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nowhere_at_all\nclass A: pass\n")
    with pytest.raises(UserError, match=r"broken\.py, line 1: ModuleNotFoundError"):
        tried(tmp_path, "broken.py:A")


def test_a_data_file_beside_a_loss_is_not_available_in_the_dry_run(tmp_path: Path) -> None:
    (tmp_path / "reads.py").write_text(
        "from pathlib import Path\nTABLE = (Path(__file__).parent / 'table.txt').read_text()\nclass A: pass\n"
    )
    (tmp_path / "table.txt").write_text("1")
    with pytest.raises(UserError, match=r"reads\.py, line 2: FileNotFoundError"):
        tried(tmp_path, "reads.py:A")


def test_output_printed_by_a_loss_does_not_reach_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tried(tmp_path, "losses.py:Prints")
    assert capfd.readouterr().out == ""


def test_a_loss_cannot_change_the_teacher_or_the_labels_of_other_trials(tmp_path: Path) -> None:
    study = tried(tmp_path, "losses.py:Changes")
    trial = next(each for each in plan(study).trials if each.brought is not None)
    data = dry_run._images(trial)
    teacher = dry_run._teacher(trial, data)
    assert teacher is not None
    before, labels = teacher.net.fc.weight.clone(), data.train.labels.clone()
    with losses.brought(brought.codes(study, tmp_path)):
        Step(trial, data, teacher, torch.device("cpu"))
    assert torch.equal(teacher.net.fc.weight, before)
    assert torch.equal(data.train.labels, labels)


def test_a_signal_to_the_command_is_not_reported_as_a_fault_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal's handler raises SystemExit, and so does the loss `Leaves`."""
    monkeypatch.setattr(signals, "_asked", [signal.SIGINT])
    with pytest.raises(SystemExit) as left:
        tried(tmp_path, "losses.py:Leaves")
    assert left.value.code == 130

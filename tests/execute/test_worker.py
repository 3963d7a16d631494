"""What a worker does about a teacher that another run has, or is at."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import epoch
from conftest import tiny
from forms import SHORT
from tune_kd.data import datasets
from tune_kd.execute.worker import Task, Workplace, failure, work
from tune_kd.study.brought import Code
from tune_kd.study.methods import Method
from tune_kd.study.plan import plan
from tune_kd.study.spec import Data
from tune_kd.study.trial import Trial
from tune_kd.training.teachers import publish_teacher, writing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(None, None, tmp_path / "teachers", tmp_path / "checkpoints")


@pytest.fixture
def taught() -> Trial:
    """A teacher of two epochs."""
    return plan(tiny(), datasets.load("digits", train=60, validation=20, test=20).digest).teachers[0]


def test_who_waits_for_a_teacher_of_another_run_leaves_when_asked_to(place: Workplace, taught: Trial) -> None:
    place.drain.parent.mkdir()
    place.drain.touch()
    with (
        writing(place.teachers, taught.trial_id),
        pytest.raises(RuntimeError, match="waited for a teacher that another run trains, and was asked to leave"),
    ):
        next(work(Task(taught, 1, 0, 1.0, 0.0), place))


def test_a_teacher_that_another_run_published_comes_with_all_its_epochs(place: Workplace, taught: Trial) -> None:
    """Also with those that are on record: where they are not the same, the driver says so."""
    published = [epoch(1), replace(epoch(2, last=True), val_accuracy=0.75)]
    publish_teacher(place.teachers, taught, {"weight": torch.zeros(1)}, published)
    assert list(work(Task(taught, 2, 1, 1.0, 0.0), place)) == published


def test_what_a_trial_raises_leaves_the_worker_without_the_secret_in_it() -> None:
    """Ray keeps what a worker sends."""
    told = failure(OSError(f"no answer from https://me:{SHORT}@example.org/"))
    assert told.reason == "storage" and told.message == "OSError: no answer from https://me:***@example.org/"


def test_a_trial_imports_no_loss_of_another_method(place: Workplace) -> None:
    """Importing one may change torch, for example its default type, and ids of other arms do not cover it."""
    data = datasets.load("digits", train=60, validation=20, test=20)
    study = replace(tiny(), data=Data("digits", 60, 20, 20))
    control = next(each for each in plan(study, data.digest).trials if each.cell.method == "none")
    breaking = Code("Loss", "loss.py", (("loss.py", b"raise RuntimeError('imported')\n"),))
    mine = Method("mine", loss="loss.py:Loss", needs="nothing", source=breaking.digest)
    here = replace(place, codes=(breaking,), data=data)
    assert next(work(Task(control, 1, 0, 1.0, 0.0), here)).epoch == 1
    own = replace(control, cell=replace(control.cell, method="mine"), brought=mine)
    with pytest.raises(RuntimeError, match="imported"):
        next(work(Task(own, 1, 0, 1.0, 0.0), here))

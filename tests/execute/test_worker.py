"""Workers: teachers of other runs, classification of failures, and imports of custom losses."""

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
def teacher_trial() -> Trial:
    """A teacher of two epochs."""
    return plan(tiny(), datasets.load("digits", train=60, validation=20, test=20).digest).teachers[0]


def test_a_worker_that_waits_for_another_runs_teacher_stops_on_request(place: Workplace, teacher_trial: Trial) -> None:
    place.drain.parent.mkdir()
    place.drain.touch()
    with (
        writing(place.teachers, teacher_trial.trial_id),
        pytest.raises(RuntimeError, match="stopped while waiting for a teacher that another run is training"),
    ):
        next(work(Task(teacher_trial, 1, 0, 1.0, 0.0), place))


def test_a_teacher_that_another_run_published_comes_with_all_its_epochs(place: Workplace, teacher_trial: Trial) -> None:
    """Including epochs that are on record already. The driver reports differences."""
    published = [epoch(1), replace(epoch(2, last=True), val_accuracy=0.75)]
    publish_teacher(place.teachers, teacher_trial, {"weight": torch.zeros(1)}, published)
    assert list(work(Task(teacher_trial, 2, 1, 1.0, 0.0), place)) == published


def test_secrets_in_an_error_are_masked_before_it_leaves_the_worker() -> None:
    """Ray stores what a worker sends."""
    found = failure(OSError(f"no answer from https://me:{SHORT}@example.org/"))
    assert found.reason == "storage" and found.message == "OSError: no answer from https://me:***@example.org/"


ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA` to ..."
TERMINATED = "CUDA error: the MPS client has been terminated by the server"


@pytest.mark.parametrize(
    ("message", "reason", "broken"),
    [
        (ILLEGAL, "lost", True),
        ("CUDA error: unspecified launch failure", "lost", True),
        ("CUDA error: uncorrectable ECC error encountered", "lost", True),
        ("CUDA error: device-side assert triggered", "error", True),
        (TERMINATED, "mps", True),
        ("CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server", "mps", True),
        ("CUDA error: MPS server is not ready to accept new MPS client requests", "mps", True),
        ("CUDA error: ended\nSearch for `cudaErrorMpsRpcFailure' in https://docs.nvidia.com/", "mps", True),
        ("CUDA error: invalid argument", "error", False),
        ("CUDA error: out of memory", "error", False),
        ("MPS backend out of memory", "error", False),  # Metal Performance Shaders, on Apple's GPUs
        ("an illegal memory access, as an author might write", "error", False),
    ],
)
def test_a_cuda_error_is_classified_by_its_cause_and_whether_the_process_is_broken(
    message: str, reason: str, broken: bool
) -> None:
    found = failure(RuntimeError(message))
    assert (found.reason, found.broken, found.message) == (reason, broken, f"RuntimeError: {message}")


@pytest.mark.parametrize(("message", "reason"), [(TERMINATED, "mps"), (ILLEGAL, "lost"), ("", "error")])
def test_cuda_is_queried_if_a_library_of_cuda_fails_without_a_reason(
    monkeypatch: pytest.MonkeyPatch, message: str, reason: str
) -> None:
    def synchronize() -> None:
        if message:
            raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = failure(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert found.reason == reason and found.broken is bool(message)
    assert message in found.message and "CUDNN_STATUS_EXECUTION_FAILED" in found.message


def test_a_trial_does_not_import_the_loss_of_another_method(place: Workplace) -> None:
    """An import may change torch, for example its default dtype, and the ids of other arms do not cover that."""
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

"""The share of a GPU that is proposed: the rule by hand, the measurement for real on the CPU."""

from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from tune_kd.data import datasets
from tune_kd.data.datasets import DataSet
from tune_kd.execute import gpu_probe as probing
from tune_kd.execute.gpu_probe import Measured, measure, probe, propose
from tune_kd.study.brought import codes, with_sources
from tune_kd.study.methods import Method
from tune_kd.study.plan import plan
from tune_kd.study.spec import Factor, Study
from tune_kd.study.trial import Trial
from tune_kd.system.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("speeds", "memory", "share"),
    [
        ((100.0, 180.0, 300.0, 310.0), 80, 0.25),  # eight at a time bring 3 %, which is not worth it
        ((100.0, 180.0, 300.0, 400.0), 80, 0.125),
        ((100.0, 101.0), 80, 1.0),
        ((100.0, 180.0, 300.0, 400.0), 9, 0.25),  # eight would need 16 GiB
        ((100.0, 100 / 1.07, 100 / 1.1), 80, 1.0),  # an H100 without MPS (docs/performance.md)
        ((100.0, 100 / 0.79, 100 / 0.72), 80, 0.25),  # and with it
    ],
)
def test_the_fewest_at_a_time_that_reach_nearly_the_best_speed(
    speeds: tuple[float, ...], memory: int, share: float
) -> None:
    measured = [Measured(2**power, speed, 2 * GIB) for power, speed in enumerate(speeds)]
    assert propose(measured, memory * GIB) == share


def test_what_does_not_fit_even_alone_is_a_mistake_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="batch_size"):
        propose([Measured(1, 10.0, 10 * GIB)], 10 * GIB)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 10)), min_size=1, max_size=4), st.integers(12, 100))
def test_a_proposed_share_is_one_that_was_measured_and_fits(rows: list[tuple[float, int]], memory: int) -> None:
    measured = [Measured(2**power, speed, size) for power, (speed, size) in enumerate(rows)]
    share = propose(measured, memory)
    (chosen,) = [each for each in measured if 1 / each.together == share]
    assert chosen.together * chosen.bytes_each <= 0.9 * memory


@pytest.mark.slow  # in short: the next test
def test_a_real_probe_trains_the_heaviest_student_and_says_what_it_found(one_stem: Study) -> None:
    said: list[str] = []
    digits = datasets.load("digits", train=60, validation=20, test=20)
    share = probe(plan(one_stem, digits.digest), digits, torch.device("cpu"), said.append, numbers=(1, 2))
    assert share in (1.0, 0.5)
    assert said[0].startswith("1 at a time: ")
    assert "feature" in said[-1]


def test_a_study_without_features_is_probed_with_a_student_that_has_its_answers(one_stem: Study) -> None:
    said: list[str] = []
    digits = datasets.load("digits", train=60, validation=20, test=20)
    logits = replace(one_stem, factors=(Factor("method", ("logit",)),), control=None, contrasts=())
    assert probe(plan(logits, digits.digest), digits, torch.device("cpu"), said.append, numbers=(1,)) == 1.0
    assert "logit" in said[-1]


class TooLarge(DataSet):
    """A data set for whose views no memory is left."""

    @property
    def views_per_image(self) -> int:
        raise MemoryError("no memory for views")


def logit_student(study: Study) -> tuple[Trial, Trial]:
    trials = plan(study).trials
    student = next(trial for trial in trials if trial.cell.method == "logit")
    return student, next(trial for trial in trials if trial.trial_id == student.teacher_id)


def test_trials_that_run_out_of_memory_in_their_processes_are_no_measurement(one_stem: Study) -> None:
    digits = TooLarge(**vars(datasets.load("digits", train=60, validation=20, test=20)))
    assert measure(*logit_student(one_stem), digits, torch.device("cpu"), together=2) is None


def test_another_failure_of_a_probing_process_is_raised_here(one_stem: Study) -> None:
    student, teacher = logit_student(one_stem)
    digits = datasets.load("digits", train=60, validation=20, test=20)
    impossible = replace(teacher, cell=replace(teacher.cell, teacher="resnet7"))  # which a study refuses
    with pytest.raises(AssertionError):
        measure(student, impossible, digits, torch.device("cpu"), together=1)


def test_a_probe_evaluates_in_each_epoch_since_a_trial_will_and_that_takes_memory(
    one_stem: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Trial] = []
    monkeypatch.setattr(probing, "train", lambda each, *_, **__: iter(probed.append(each) or ()))
    student, _ = logit_student(one_stem)
    student = replace(student, recipe=replace(student.recipe, validate_every=100))
    digits, (ours, theirs) = datasets.load("digits", train=60, validation=20, test=20), Pipe()
    probing._train(student, None, digits, torch.device("cpu"), 1, (), theirs)
    assert isinstance(ours.recv(), StopIteration)
    assert [each.recipe.validate_every for each in probed] == [1]


def test_numbers_that_run_out_of_memory_end_the_search(one_stem: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*arguments: object) -> Measured | None:
        together = int(str(arguments[4]))
        return Measured(together, 100.0 * together, 1) if together < 4 else None

    said: list[str] = []
    monkeypatch.setattr(probing, "measure", fake)
    digits = datasets.load("digits", train=60, validation=20, test=20)
    assert probe(plan(one_stem, digits.digest), digits, torch.device("cpu"), said.append) == 0.5
    assert said[2] == "4 at a time: out of memory"


def test_more_at_a_time_are_not_tried_once_they_bring_nothing(one_stem: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(*arguments: object) -> Measured:
        asked.append(int(str(arguments[4])))
        return Measured(asked[-1], 100.0, 1)

    monkeypatch.setattr(probing, "measure", fake)
    digits = datasets.load("digits", train=60, validation=20, test=20)
    assert probe(plan(one_stem, digits.digest), digits, torch.device("cpu"), lambda _: None) == 1.0
    assert asked == [1, 2]


def test_a_loss_that_the_study_brings_is_there_in_the_processes_that_measure(one_stem: Study, tmp_path: Path) -> None:
    digits = datasets.load("digits", train=60, validation=20, test=20)
    (tmp_path / "a.py").write_text(
        "from torch import nn\nclass Loss(nn.Module):\n    def __init__(self, context):\n        super().__init__()\n"
        "    def forward(self, batch):\n        return batch.student_logits.mean()\n"
    )
    method = Method("mine", loss="a.py:Loss")
    study = replace(one_stem, methods=(method,), factors=(Factor("method", ("mine",)),), contrasts=(), reference=(),
                    control=None, moderator=None)  # fmt: skip
    study = with_sources(study, tmp_path)
    share = probe(plan(study, digits.digest), digits, torch.device("cpu"), lambda _: None, (1,), codes(study, tmp_path))
    assert share == 1

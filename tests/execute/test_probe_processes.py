"""Processes of a probe, for real on the CPU: they measure, run out of memory, fail and die."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import noise, tiny
from tune_kd.data.datasets import DataSet
from tune_kd.execute import probe_processes
from tune_kd.execute.probe_processes import Job, Measured, ProbeFailed, Process, job, measure, processes
from tune_kd.execute.worker import Failure
from tune_kd.study.brought import codes, with_sources
from tune_kd.study.methods import Method
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import Factor, Study
from tune_kd.study.trial import StopReason
from tune_kd.training import step

CPU, PLENTY = torch.device("cpu"), 2**60
PIXELS = noise()


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Process]]:
    with processes(2, {}) as made:
        yield made
    assert [each._process.returncode for each in made][1:] == [0], "it ends by itself"


def planned(**changes: Any) -> Plan:
    one = replace(tiny(), factors=(Factor("stem", ("cifar",)), *tiny().factors[1:]), moderator=None)
    return plan(replace(one, **changes), PIXELS.digest)


def of(method: str, folder: Path, data: DataSet = PIXELS, found: Plan | None = None, **more: Any) -> Job:
    found = found or planned()
    student = next(trial for trial in found.trials if trial.cell.method == method and trial.phase != "teacher")
    teacher = next((each for each in found.teachers if each.trial_id == student.teacher_id), None)
    return job(student, teacher, data, CPU, folder, **more)


def test_a_probe_evaluates_in_each_epoch_since_a_trial_will_and_that_takes_memory(tmp_path: Path) -> None:
    found = planned(recipe=replace(tiny().recipe, validate_every=2), screen=replace(tiny().screen, grace=2))
    assert of("none", tmp_path, found=found).trial.recipe.validate_every == 1


class TooLarge(DataSet):
    """A data set for whose views no memory is left."""

    @property
    def views_per_image(self) -> int:
        raise MemoryError("no memory for views")


@pytest.mark.long
def test_trials_of_each_kind_are_measured_one_after_another_in_the_same_processes(
    pool: list[Process], tmp_path: Path
) -> None:
    """The first is ready when the second begins, which is when more than one pays."""
    light = measure(pool, of("none", tmp_path), (1, 2), PLENTY)
    heavy = measure(pool, of("feature", tmp_path), (1, 2), PLENTY)
    for found in (light, heavy):
        assert [each.together for each in found] == [1, 2]
        assert all(each.images_per_second > 0 and each.bytes_each > 2**20 for each in found)


@pytest.mark.long
def test_a_student_that_needs_logits_has_them(pool: list[Process], tmp_path: Path) -> None:
    assert len(measure(pool, of("logit", tmp_path), (1,), PLENTY)) == 1


@pytest.mark.long
def test_a_trial_that_runs_out_of_memory_alone_is_no_measurement_and_the_process_lives(
    pool: list[Process], tmp_path: Path
) -> None:
    assert measure(pool, of("logit", tmp_path, TooLarge(**vars(PIXELS))), (1, 2), PLENTY) == []
    assert len(measure(pool, of("none", tmp_path), (1,), PLENTY)) == 1


@pytest.mark.long
def test_another_failure_says_what_it_was(pool: list[Process], tmp_path: Path) -> None:
    lost = replace(of("feature", tmp_path), folder=tmp_path / "nowhere")
    with pytest.raises(ProbeFailed, match=r"a probing process failed: .*TeacherChanged: teacher \w+ has no"):
        measure(pool, lost, (1,), PLENTY)


@pytest.mark.long
def test_a_loss_that_the_study_brings_is_there(pool: list[Process], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from torch import nn\nclass Loss(nn.Module):\n    def __init__(self, context):\n        super().__init__()\n"
        "    def forward(self, batch):\n        return batch.student_logits.mean()\n"
    )
    study: Study = planned().study
    study = replace(study, methods=(Method("mine", loss="a.py:Loss"),), factors=(Factor("method", ("mine",)),),
                    contrasts=(), reference=(), control=None)  # fmt: skip
    study = with_sources(study, tmp_path)
    mine = of("mine", tmp_path, found=plan(study, PIXELS.digest), codes=codes(study, tmp_path))
    assert len(mine.codes) == 1 and len(measure(pool, mine, (1,), PLENTY)) == 1


@pytest.mark.long
def test_a_process_that_dies_is_told_and_not_waited_for(pool: list[Process], tmp_path: Path) -> None:
    """The last test of these processes."""
    pool[0]._process.kill()
    with pytest.raises(ProbeFailed, match=r"a probing process died \(exit status -9\)"):
        measure(pool, of("none", tmp_path), (1,), PLENTY)


# The rule by which more are tried, with processes that answer as they are told


class Told(Process):
    """A process in a pool of which a number can be ready and so fast."""

    def __init__(self, pool: list["Told"], speeds: Sequence[float], size: int, fits: int) -> None:
        self._pool, self.speeds, self.size, self.fits = pool, speeds, size, fits
        self.said: list[Any] = []

    def tell(self, what: Job | str) -> None:
        self.said.append(what)

    def answer(self, until: float) -> Any:
        training = [each for each in self._pool if each.said[-1] == "train"]
        if self.said[-1] == "train":
            return self.speeds[len(training).bit_length() - 1] / len(training), self.size
        full = self.said[-1] != "rest" and self._pool.index(self) >= self.fits
        return Failure(StopReason.OUT_OF_MEMORY, "no memory") if full else None


@pytest.mark.parametrize(
    ("speeds", "size", "fits", "memory", "numbers"),
    [
        ((100.0, 150.0, 200.0, 300.0), 1, 8, PLENTY, [1, 2, 4, 8]),
        ((100.0, 150.0, 151.0, 300.0), 1, 8, PLENTY, [1, 2, 4]),  # no more once it brings nothing
        ((100.0, 90.0, 200.0, 300.0), 1, 8, PLENTY, [1, 2]),
        ((100.0, 150.0, 200.0, 300.0), 10, 8, 45, [1, 2, 4]),  # eight would need 80 bytes
        ((100.0, 150.0, 200.0, 300.0), 10, 8, 44, [1, 2]),  # four take more than 90 %
        ((100.0, 150.0, 200.0, 300.0), 1, 3, PLENTY, [1, 2]),  # the fourth runs out of memory
        ((100.0, 150.0, 200.0, 300.0), 1, 0, PLENTY, []),
    ],
)
def test_more_are_tried_while_it_pays_and_memory_lasts(
    speeds: Sequence[float], size: int, fits: int, memory: int, numbers: list[int], tmp_path: Path
) -> None:
    pool: list[Told] = []
    pool += [Told(pool, speeds, size, fits) for _ in range(8)]
    found = measure(pool, of("none", tmp_path), probe_processes.NUMBERS, memory)
    assert [each.together for each in found] == numbers
    assert [each.images_per_second for each in found] == list(speeds[: len(numbers)])
    prepared = [each for each in pool if any(isinstance(what, Job) for what in each.said)]
    assert all(sum(isinstance(what, Job) for what in each.said) == 1 for each in prepared), "each once"
    assert len(prepared) <= max(4 if fits == 3 else 1, *numbers, 0)


def test_a_process_that_says_nothing_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = time.monotonic()
    monkeypatch.setattr(probe_processes, "PATIENCE", 0.1)
    monkeypatch.setattr(probe_processes, "ENDING", 0.1)
    monkeypatch.setattr(probe_processes, "PROGRAM", "import time; time.sleep(600)")
    with processes(1, {}) as pool, pytest.raises(ProbeFailed, match=r"a probing process did not respond within 0 s"):
        measure(pool, of("none", tmp_path), (1,), PLENTY)
    assert pool[0]._process.returncode == -9
    assert time.monotonic() - begun < 10


def test_what_a_process_was_told_before_is_freed_when_it_rests(tmp_path: Path, one_thread: None) -> None:
    """In this process, with a step that is kept for the next trial."""
    said: list[Any] = []
    mine = of("none", tmp_path)

    class Pipe:
        def __init__(self) -> None:
            self.orders: list[Any] = [mine, "train", "rest"]

        def recv(self) -> Any:
            if not self.orders:
                raise EOFError
            return self.orders.pop(0)

        def send(self, answer: Any) -> None:
            said.append(answer)
            if len(said) == 1:
                step._idle["kept",] = object()  # type: ignore[assignment]

    probe_processes.serve(Pipe())  # type: ignore[arg-type]
    assert said[0] is None and said[2] is None and step._idle == {}
    assert Measured(1, *said[1]).images_per_second > 0

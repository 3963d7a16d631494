"""Real probing processes on the CPU: they measure, run out of memory, fail and die."""

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
    assert [each._process.returncode for each in made][1:] == [0], "a process that is not killed exits with status 0"


def planned(**changes: Any) -> Plan:
    base = replace(tiny(), factors=(Factor("stem", ("cifar",)), *tiny().factors[1:]), moderator=None)
    return plan(replace(base, **changes), PIXELS.digest)


def job_for(method: str, folder: Path, data: DataSet = PIXELS, found: Plan | None = None, **more: Any) -> Job:
    found = found or planned()
    student = next(trial for trial in found.trials if trial.cell.method == method and trial.phase != "teacher")
    teacher = next((each for each in found.teachers if each.trial_id == student.teacher_id), None)
    return job(student, teacher, data, CPU, folder, **more)


def test_a_probe_validates_in_every_epoch_since_validation_needs_memory(tmp_path: Path) -> None:
    found = planned(recipe=replace(tiny().recipe, validate_every=2), screen=replace(tiny().screen, grace=2))
    assert job_for("none", tmp_path, found=found).trial.recipe.validate_every == 1


class TooLarge(DataSet):
    """A data set whose views do not fit into memory."""

    @property
    def views_per_image(self) -> int:
        raise MemoryError("no memory for views")


@pytest.mark.long
def test_trials_of_each_kind_are_measured_one_after_another_in_the_same_processes(
    pool: list[Process], tmp_path: Path
) -> None:
    light = measure(pool, job_for("none", tmp_path), (1, 2), PLENTY)
    heavy = measure(pool, job_for("feature", tmp_path), (1, 2), PLENTY)
    for found in (light, heavy):
        assert [each.together for each in found] == [1, 2]
        assert all(each.images_per_second > 0 and each.bytes_each > 2**20 for each in found)


@pytest.mark.long
def test_a_student_that_needs_logits_has_them(pool: list[Process], tmp_path: Path) -> None:
    assert len(measure(pool, job_for("logit", tmp_path), (1,), PLENTY)) == 1


@pytest.mark.long
def test_a_trial_that_runs_out_of_memory_alone_is_not_measured_and_its_process_survives(
    pool: list[Process], tmp_path: Path
) -> None:
    assert measure(pool, job_for("logit", tmp_path, TooLarge(**vars(PIXELS))), (1, 2), PLENTY) == []
    assert len(measure(pool, job_for("none", tmp_path), (1,), PLENTY)) == 1


@pytest.mark.long
def test_another_failure_raises_with_its_error(pool: list[Process], tmp_path: Path) -> None:
    lost = replace(job_for("feature", tmp_path), folder=tmp_path / "nowhere")
    with pytest.raises(ProbeFailed, match=r"a probing process failed: .*TeacherChanged: teacher \w+ has no"):
        measure(pool, lost, (1,), PLENTY)


@pytest.mark.long
def test_a_probe_has_the_custom_loss_of_a_study(pool: list[Process], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from torch import nn\nclass Loss(nn.Module):\n    def __init__(self, context):\n        super().__init__()\n"
        "    def forward(self, batch):\n        return batch.student_logits.mean()\n"
    )
    study: Study = planned().study
    study = replace(study, methods=(Method("mine", loss="a.py:Loss"),), factors=(Factor("method", ("mine",)),),
                    contrasts=(), reference=(), control=None)  # fmt: skip
    study = with_sources(study, tmp_path)
    mine = job_for("mine", tmp_path, found=plan(study, PIXELS.digest), codes=codes(study, tmp_path))
    assert len(mine.codes) == 1 and len(measure(pool, mine, (1,), PLENTY)) == 1


@pytest.mark.long
def test_a_process_that_dies_is_reported_without_waiting(pool: list[Process], tmp_path: Path) -> None:
    """Must be the last test that uses `pool`, since it kills one of its processes."""
    pool[0]._process.kill()
    with pytest.raises(ProbeFailed, match=r"a probing process died \(exit status -9\)"):
        measure(pool, job_for("none", tmp_path), (1,), PLENTY)


# How many processes are tried, with fake processes


class FakeProcess(Process):
    """A fake process: `fits` of its pool fit into memory, and `speeds` are the images per second of 1, 2, 4 and 8."""

    def __init__(self, pool: list["FakeProcess"], speeds: Sequence[float], size: int, fits: int) -> None:
        self._pool, self.speeds, self.size, self.fits = pool, speeds, size, fits
        self.orders: list[Any] = []

    def tell(self, what: Job | str) -> None:
        self.orders.append(what)

    def answer(self, until: float) -> Any:
        training = [each for each in self._pool if each.orders[-1] == "train"]
        if self.orders[-1] == "train":
            return self.speeds[len(training).bit_length() - 1] / len(training), self.size
        full = self.orders[-1] != "rest" and self._pool.index(self) >= self.fits
        return Failure(StopReason.OUT_OF_MEMORY, "no memory") if full else None


@pytest.mark.parametrize(
    ("speeds", "size", "fits", "memory", "numbers"),
    [
        ((100.0, 150.0, 200.0, 300.0), 1, 8, PLENTY, [1, 2, 4, 8]),
        ((100.0, 150.0, 151.0, 300.0), 1, 8, PLENTY, [1, 2, 4]),  # stops, since four are hardly faster than two
        ((100.0, 90.0, 200.0, 300.0), 1, 8, PLENTY, [1, 2]),
        ((100.0, 150.0, 200.0, 300.0), 10, 8, 45, [1, 2, 4]),  # eight would need 80 bytes
        ((100.0, 150.0, 200.0, 300.0), 10, 8, 44, [1, 2]),  # four need 40 bytes, more than 90 % of 44
        ((100.0, 150.0, 200.0, 300.0), 1, 3, PLENTY, [1, 2]),  # the fourth runs out of memory
        ((100.0, 150.0, 200.0, 300.0), 1, 0, PLENTY, []),
    ],
)
def test_more_processes_are_tried_while_throughput_grows_and_memory_suffices(
    speeds: Sequence[float], size: int, fits: int, memory: int, numbers: list[int], tmp_path: Path
) -> None:
    pool: list[FakeProcess] = []
    pool += [FakeProcess(pool, speeds, size, fits) for _ in range(8)]
    found = measure(pool, job_for("none", tmp_path), probe_processes.NUMBERS, memory)
    assert [each.together for each in found] == numbers
    assert [each.images_per_second for each in found] == list(speeds[: len(numbers)])
    prepared = [each for each in pool if any(isinstance(what, Job) for what in each.orders)]
    assert all(sum(isinstance(what, Job) for what in each.orders) == 1 for each in prepared), (
        "each process is prepared once"
    )
    assert len(prepared) <= max(4 if fits == 3 else 1, *numbers, 0)


def test_a_process_that_never_answers_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = time.monotonic()
    monkeypatch.setattr(probe_processes, "PATIENCE", 0.1)
    monkeypatch.setattr(probe_processes, "ENDING", 0.1)
    monkeypatch.setattr(probe_processes, "PROGRAM", "import time; time.sleep(600)")
    with processes(1, {}) as pool, pytest.raises(ProbeFailed, match=r"a probing process did not respond within 0 s"):
        measure(pool, job_for("none", tmp_path), (1,), PLENTY)
    assert pool[0]._process.returncode == -9
    assert time.monotonic() - begun < 10


def test_a_resting_process_frees_its_trial_and_cached_step(tmp_path: Path, one_thread: None) -> None:
    """`serve` runs in this process, where the test can put a step into the cache."""
    answers: list[Any] = []
    mine = job_for("none", tmp_path)

    class Pipe:
        def __init__(self) -> None:
            self.orders: list[Any] = [mine, "train", "rest"]

        def recv(self) -> Any:
            if not self.orders:
                raise EOFError
            return self.orders.pop(0)

        def send(self, answer: Any) -> None:
            answers.append(answer)
            if len(answers) == 1:
                step._idle["kept",] = object()  # type: ignore[assignment]

    probe_processes.serve(Pipe())  # type: ignore[arg-type]
    assert answers[0] is None and answers[2] is None and step._idle == {}
    assert Measured(1, *answers[1]).images_per_second > 0

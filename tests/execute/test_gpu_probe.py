"""The GPU shares that a probe chooses: the rules, and the storage of measurements."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import noise
from tune_kd.data.datasets import DataSet
from tune_kd.execute import gpu_probe, mps, mps_daemon, probe_processes
from tune_kd.execute.gpu_probe import (
    Kind,
    Series,
    choose,
    images_of_kinds,
    kind_of,
    numbers_for,
    packed,
    probed,
    propose,
)
from tune_kd.execute.options import Options
from tune_kd.execute.probe_processes import NUMBERS, Measured, ProbeFailed
from tune_kd.execute.resources import Packing
from tune_kd.study.cost import flop
from tune_kd.study.plan import plan
from tune_kd.study.spec import Factor, Study
from tune_kd.system.errors import UserError

GIB = 2**30
CPU = torch.device("cpu")


def measured(*speeds: float, size: int = 2 * GIB) -> tuple[Measured, ...]:
    return tuple(Measured(2**power, speed, size) for power, speed in enumerate(speeds))


# Number of concurrent trials


@pytest.mark.parametrize(
    ("speeds", "memory", "together"),
    [
        ((100.0, 180.0, 300.0, 310.0), 80, 4),  # 8 are only 3 % faster than 4
        ((100.0, 180.0, 300.0, 400.0), 80, 8),
        ((100.0, 101.0), 80, 1),
        ((100.0, 180.0, 300.0, 400.0), 9, 4),  # 8 would need 16 GiB
        ((100.0, 100 / 1.07, 100 / 1.1), 80, 1),  # an H100 without MPS (docs/performance.md)
        ((100.0, 100 / 0.79, 100 / 0.72), 80, 4),  # an H100 with MPS
        ((100.0, 180.0), 2, 1),  # one trial ran, so one fits
    ],
)
def test_the_smallest_number_of_trials_with_nearly_the_best_speed_is_proposed(
    speeds: tuple[float, ...], memory: int, together: int
) -> None:
    assert propose(measured(*speeds), memory * GIB).together == together


ROWS = st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 10)), min_size=1, max_size=4)


@given(ROWS, st.integers(12, 100))
def test_the_proposal_was_measured_fits_and_is_nearly_as_fast_as_any_that_fits(
    rows: list[tuple[float, int]], memory: int
) -> None:
    found = [Measured(2**power, speed, size) for power, (speed, size) in enumerate(rows)]
    chosen = propose(found, memory)
    assert chosen in found
    assert chosen.together == 1 or chosen.together * chosen.bytes_each <= 0.9 * memory
    for other in found:
        if other.together * other.bytes_each <= 0.9 * memory:
            assert chosen.images_per_second * 1.05 >= other.images_per_second
    assert propose(found, 2 * memory).images_per_second * 1.05 >= chosen.images_per_second, "more memory is no slower"


@pytest.mark.parametrize(
    ("options", "cpus", "gpus", "numbers"),
    [
        (Options(), 16, 1, [1, 2, 4, 8]),
        (Options(), 16, 8, [1, 2]),
        (Options(), 3, 1, [1, 2]),
        (Options(), 3, 2, [1, 2]),
        (Options(cpus_per_trial=4.0), 16, 1, [1, 2, 4]),
        (Options(cpus_per_trial=0.5), 2, 1, [1, 2, 4]),
        (Options(max_concurrent=1), 16, 1, [1]),
        (Options(max_concurrent=5), 16, 1, [1, 2, 4]),
    ],
)
def test_no_more_trials_are_measured_than_can_run_concurrently_on_a_gpu(
    options: Options, cpus: int, gpus: int, numbers: list[int]
) -> None:
    assert numbers_for(options, cpus, gpus) == numbers


# Choice of trials, and of MPS


def test_the_heaviest_of_each_kind_is_measured_and_a_control_if_there_is_one(study: Study) -> None:
    found = probed(plan(study))
    assert list(found) == ["light", "heavy"]
    assert {kind: trial.arm for kind, trial in found.items()} == {"light": "cifar/none", "heavy": "cifar/feature"}
    logits = replace(study, factors=(Factor("method", ("logit",)),), control=None, contrasts=(), moderator=None)
    assert {kind: trial.cell.method for kind, trial in probed(plan(logits)).items()} == {"light": "logit"}


def test_the_images_of_a_kind_represent_the_work_of_all_its_trials_and_of_teachers(one_stem: Study) -> None:
    planned = plan(one_stem)
    students = probed(planned)
    images = images_of_kinds(planned, students)
    for kind, student in students.items():
        work = sum(flop(trial) for trial in planned.trials if kind_of(trial) == kind)
        assert images[kind] == pytest.approx(work / flop(student) * 60 * 2)
    assert kind_of(planned.teachers[0]) == "heavy"
    light = plan(replace(one_stem, factors=(one_stem.factors[0], Factor("method", ("none", "logit"))), contrasts=()))
    assert images_of_kinds(light, probed(light))["light"] > sum(
        trial.recipe.epochs * 60 for trial in light.trials if kind_of(trial) == "light"
    )


EVEN: Mapping[Kind, float] = {"light": 1000.0, "heavy": 1000.0}


@pytest.mark.parametrize(
    ("light", "heavy", "images", "served"),
    [
        ((100.0, 139.0), (100.0, 110.0), EVEN, True),
        ((100.0, 104.0), (100.0, 104.0), EVEN, False),  # less than 5 % faster
        ((100.0, 200.0), (100.0, 60.0), {"light": 1000.0, "heavy": 10.0}, True),  # most of the study is light
        ((100.0, 200.0), (100.0, 60.0), {"light": 10.0, "heavy": 1000.0}, False),
    ],
)
def test_mps_is_chosen_if_the_whole_study_is_five_percent_faster_with_it(
    light: tuple[float, float], heavy: tuple[float, float], images: Mapping[Kind, float], served: bool
) -> None:
    """`light` and `heavy` are the images per second of one trial without and with MPS."""
    series = [
        Series(kind, with_mps, measured(speeds[with_mps]))
        for with_mps in (False, True)
        for kind, speeds in (("light", light), ("heavy", heavy))
    ]  # type: ignore[misc]
    chosen, found = choose(series, images, 80 * GIB)
    assert found is served
    assert {kind: each.images_per_second for kind, each in chosen.items()} == {
        "light": light[served],
        "heavy": heavy[served],
    }
    for only in (False, True):
        assert choose([each for each in series if each.mps == only], images, 80 * GIB)[1] is only


# The whole probe, on a fake GPU

H100 = mps.Gpu("NVIDIA H100", 80 * GIB, served=False)
PIXELS = noise()


class Machine:
    """A fake machine with one GPU and 16 cores. Tests set the results of its measurements."""

    def __init__(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        self.study, self.gpu = study, H100
        self.messages: list[str] = []
        self.measured: list[tuple[str, bool]] = []
        self.speeds: Mapping[bool, Sequence[float]] = {False: (100.0, 95.0), True: (100.0, 130.0, 150.0, 151.0)}
        self.error: Exception | None = None
        self.nothing_fits = False
        self.mps_problem = ""
        self.started = 0
        self.data: DataSet = PIXELS
        self.options = Options()
        monkeypatch.setattr(mps, "asked", lambda: self.gpu)
        monkeypatch.setattr("os.cpu_count", lambda: 16)
        monkeypatch.setattr(gpu_probe, "WORTH_SECONDS", 0.0)
        monkeypatch.setattr(gpu_probe, "processes", self)
        monkeypatch.setattr(gpu_probe, "job", lambda trial, *_: SimpleNamespace(trial=trial))
        monkeypatch.setattr(mps_daemon, "is_there", lambda: True)
        monkeypatch.setattr(mps_daemon, "for_children", self.served)
        monkeypatch.setattr(gpu_probe, "measure", self.measure)

    @contextmanager
    def served(self) -> Iterator[dict[str, str]]:
        self.started += 1
        if self.mps_problem:
            raise mps_daemon.NotStarted(self.mps_problem)
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/nowhere"}

    def __call__(self, count: int, variables: Mapping[str, str]) -> "Machine":
        self.variables = variables
        return self

    def __enter__(self) -> bool:
        return bool(self.variables) or self.gpu.served

    def __exit__(self, *_: object) -> None: ...

    def measure(self, served: bool, job: Any, numbers: Sequence[int], memory: int) -> list[Measured]:
        self.measured.append((job.trial.cell.method, served))
        if self.error is not None:
            raise self.error
        return [] if self.nothing_fits else list(measured(*self.speeds[served][: len(numbers)]))

    def packed(self) -> Packing | None:
        return packed(plan(self.study, self.data.digest), self.data, self.options, self.messages.append, device=CPU)


@pytest.fixture
def machine(one_stem: Study, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(one_stem, monkeypatch)


def test_each_kind_is_measured_with_and_without_mps_and_the_next_run_reuses_the_result(machine: Machine) -> None:
    found = machine.packed()
    assert machine.measured == [("none", False), ("feature", False), ("none", True), ("feature", True)]
    assert found is not None and (found.light, found.heavy, found.mps) == (0.25, 0.25, True)
    explanation = (
        "with MPS 4 concurrent trials of cifar/none train 150 images/s, "
        "4 concurrent trials of cifar/feature train 150 images/s"
    )
    assert found.why == f"as measured now: {explanation}"
    assert "cifar/none, without MPS: 1, 2 concurrent trials train 100, 95 images/s; 2.00 GiB each" in machine.messages
    before = machine.messages[:]
    again = machine.packed()
    assert machine.messages == before and len(machine.measured) == 4
    assert again is not None and (again.light, again.heavy, again.mps) == (0.25, 0.25, True)
    assert again.why.startswith("as measured before (20") and again.why.endswith(explanation)


@pytest.mark.parametrize(
    ("option", "served", "found", "starts"),
    [
        ("off", False, False, False),
        ("off", True, False, False),
        ("on", False, True, True),
        ("on", True, True, False),
        ("auto", True, True, False),  # an MPS that serves already cannot be turned off
    ],
)
def test_with_a_forced_choice_of_mps_only_that_choice_is_measured(
    machine: Machine, option: str, served: bool, found: bool, starts: bool
) -> None:
    machine.options, machine.gpu = Options(mps=option), replace(H100, served=served)
    chosen = machine.packed()
    assert len(machine.measured) == 2
    assert chosen is not None and chosen.mps is found
    assert machine.started == starts


def with_recipe(study: Study, **changed: Any) -> Study:
    return replace(study, recipe=replace(study.recipe, **changed))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("gpu", lambda gpu: replace(gpu, name="NVIDIA A100")),
        ("gpu", lambda gpu: replace(gpu, memory=40 * GIB)),
        ("options", lambda options: replace(options, mps="off")),
        ("options", lambda options: replace(options, max_concurrent=2)),
        ("options", lambda options: replace(options, cpus_per_trial=2.0)),
        ("study", lambda study: with_recipe(study, batch_size=32)),
        ("study", lambda study: with_recipe(study, precision="bfloat16")),
        ("study", lambda study: replace(study, cell=replace(study.cell, width=0.125))),
        ("study", lambda study: replace(study, teacher_recipe=replace(study.teacher_recipe, precision="tf32"))),
        ("data", lambda data: replace(data, flip=False)),
    ],
)
def test_measurements_of_another_setup_are_not_reused(machine: Machine, part: str, change: Any) -> None:
    machine.packed()
    before = len(machine.measured)
    setattr(machine, part, change(getattr(machine, part)))
    machine.packed()
    assert len(machine.measured) > before


def test_measurements_are_stored_separately_for_each_option(machine: Machine) -> None:
    for option in ("auto", "off", "on", "auto", "off", "on"):
        machine.options = Options(mps=option)
        machine.packed()
    assert len(machine.measured) == 4 + 2 + 2


@pytest.mark.parametrize("name", ["torch", "tune_kd"])
def test_measurements_of_another_version_are_not_reused(
    machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.packed()
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0")
    else:
        monkeypatch.setattr(gpu_probe, "version", lambda _: "0.1")
    machine.packed()
    assert len(machine.measured) == 8


def test_measurements_are_reused_for_other_seeds_and_names(machine: Machine) -> None:
    machine.packed()
    confirm = replace(machine.study.confirm, seeds=(7, 8))
    machine.study = replace(machine.study, name="other", confirm=confirm)
    machine.packed()
    assert len(machine.measured) == 4


def stored() -> Path:
    (file,) = Path("cache/tune_kd/gpu-shares").iterdir()
    return file


def altered(change: Any) -> bytes:
    record = json.loads(stored().read_bytes())
    change(record)
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"{" * 1000,
        lambda: stored().read_bytes()[:-20],
        lambda: b" " * 2**17 + stored().read_bytes(),
        lambda: altered(lambda record: record.update(day="\x1b[2J")),
        lambda: altered(lambda record: record["series"].pop()),
        lambda: altered(lambda record: record["series"][0]["measured"].clear()),
        lambda: altered(lambda record: record["series"][0]["measured"].pop(0)),
        lambda: altered(lambda record: record["series"][0]["measured"][0].update(images_per_second=math.nan)),
        lambda: altered(lambda record: record["series"][0]["measured"][0].update(images_per_second=0.0)),
        lambda: altered(lambda record: record["series"][0]["measured"][0].update(together=-1)),
    ],
)
def test_measurements_in_a_damaged_or_foreign_file_are_repeated(machine: Machine, content: Any) -> None:
    machine.packed()
    stored().write_bytes(content())
    found = machine.packed()
    assert len(machine.measured) == 8 and found is not None and found.why.startswith("as measured now")
    machine.packed()
    assert len(machine.measured) == 8, "the new measurement is stored"


def test_without_a_cache_each_run_measures(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cache").write_text("no folder")
    assert machine.packed() is not None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise UserError("HOME is not set")

    monkeypatch.setattr(gpu_probe, "default_cache", homeless)
    assert machine.packed() is not None
    assert len(machine.measured) == 8


def test_a_probe_that_fails_is_a_warning_and_the_run_uses_the_default(machine: Machine) -> None:
    machine.error = ProbeFailed("a probing process died (exit status -11)")
    assert machine.packed() is None
    assert machine.messages[-1] == (
        "warning: the best GPU share cannot be measured (a probing process died (exit status -11)); "
        "the run uses the default share"
    )


def test_a_trial_that_does_not_fit_even_alone_is_an_error_that_names_the_setting(machine: Machine) -> None:
    machine.nothing_fits = True
    with pytest.raises(UserError, match=r"recipe\.batch_size is 16, and one trial of cifar/none does not fit"):
        machine.packed()


def test_mps_that_cannot_start_is_not_measured_and_nothing_is_stored(machine: Machine) -> None:
    machine.mps_problem = "it hangs"
    found = machine.packed()
    assert {served for _, served in machine.measured} == {False}
    assert found is not None and (found.light, found.mps) == (1.0, False)
    assert machine.messages[-1] == "MPS is not measured: it hangs"
    machine.packed()
    assert len(machine.measured) == 4
    machine.options = Options(mps="on")  # the run will raise the error
    assert machine.packed() is None


def test_a_short_study_one_trial_at_a_time_and_a_gpu_that_does_not_answer_are_not_measured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.options = Options(max_concurrent=1)
    assert machine.packed() is None
    machine.options, machine.gpu = Options(), None  # type: ignore[assignment]
    assert machine.packed() is None
    machine.gpu = H100
    monkeypatch.setattr(gpu_probe, "WORTH_SECONDS", 300.0)
    assert machine.packed() is None
    machine.study = replace(machine.study, rate=1e3)  # as on a CPU
    assert machine.packed() is None
    assert machine.messages == [] and machine.measured == []


# The measured job


def test_whether_a_trial_is_compiled_is_decided_by_all_images_of_the_run(one_stem: Study, tmp_path: Path) -> None:
    """The probe uses fewer images, and more epochs instead."""
    student = probed(plan(one_stem))["light"]
    student = replace(student, recipe=replace(student.recipe, epochs=1000, batch_size=1))
    many = replace(PIXELS, train=replace(PIXELS.train, images=PIXELS.train.images.repeat(3, 1, 1, 1),
                                         labels=PIXELS.train.labels.repeat(3)))  # fmt: skip
    job = probe_processes.job(student, None, many, CPU, tmp_path)
    assert (len(job.data.train.labels), job.trial.recipe.epochs) == (40, 3000)
    assert len(job.data.validation.labels) == 7  # a third, as of the training images, to keep its share of time
    assert job.more_bytes == (120 - 40 + 20 - 7 + 20 - 7) * 3 * 8 * 8
    assert probe_processes.job(student, None, many, torch.device("cuda"), tmp_path).more_bytes > 2**29
    short = replace(student, recipe=replace(student.recipe, epochs=1, batch_size=16))
    assert probe_processes.job(short, None, many, CPU, tmp_path).trial.recipe.epochs > 3 * len(NUMBERS) + 1

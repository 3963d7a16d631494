"""Tests that need a GPU: `pytest -m gpu`. Without a GPU, `test_placement.py` simulates one.

All of it takes under two minutes: Ray starts once, and trials are of the scale `smoke`.
"""

import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.levers import Launched
from placement import DRAWING, METHODS, distil, pupil
from trials import run
from tune_kd.data import datasets
from tune_kd.data.augment import crop, draw_views, prepare
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.execute import gpu_probe, mps_daemon
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.options import Options
from tune_kd.execute.worker import Task, Workplace, work
from tune_kd.records.ledger import Ledger
from tune_kd.study.discover import find, resolve
from tune_kd.study.plan import plan
from tune_kd.study.spec import PRECISIONS, STEMS, Study
from tune_kd.study.trial import Answering, Epoch, Trial
from tune_kd.training import notices, step as stepping
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import Captured
from tune_kd.training.loop import train
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher, load_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

GPU = torch.device("cuda")
CALM = 0.005  # at this learning rate a difference of one bit stays small; at 0.05 it grows to per cents in four epochs


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """Remove the steps, data and notices of other tests, and lift the memory cap."""
    stepping._idle.clear()
    on_device.cache_clear()
    notices.take()
    yield
    stepping._idle.clear()
    on_device.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def losses(rows: list[Epoch]) -> list[float]:
    return [row.train_loss for row in rows]


def trained(each: Trial, pixels: DataSet, teacher: Teacher | None, folder: Path, **options: Any) -> list[Epoch]:
    return list(train(each, pixels, teacher, device=GPU, checkpoints=Checkpoints(folder), **options))


@pytest.fixture
def taught(teacher: Teacher, pixels: DataSet) -> Teacher:
    """A teacher that was trained on the CPU, loaded on the GPU."""
    return load_teacher(teacher.home.parent, teacher.teacher_id, pixels, GPU, Answering(True, ()))


def calm(method: str, teacher: Teacher | None) -> Trial:
    """Four epochs of a student."""
    one = pupil(method, "cifar", teacher, lr=CALM)
    return replace(one, recipe=replace(one.recipe, epochs=4))


def test_cropping_and_preparing_images_on_the_gpu_matches_the_cpu(pixels: DataSet) -> None:
    images, views = pixels.train.images, draw_views(0, 1, 40, pad=1, flip=True)
    there = views.to(GPU)
    here = crop(images, views.top, views.left, views.flip, 1)
    cropped = crop(images.to(GPU), there.top, there.left, there.flip, 1)
    assert cropped.is_cuda and torch.equal(cropped.cpu(), here)
    torch.testing.assert_close(prepare(cropped, pixels).cpu(), prepare(here, pixels))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_each_method_and_stem_trains_resumes_and_is_evaluated_on_the_gpu(
    method: str, stem: str, pixels: DataSet, tmp_path: Path
) -> None:
    """It is resumed after its first epoch. A captured step reproduces that up to rounding."""
    whole, resumed = distil(GPU, pixels, method, stem, tmp_path, lr=CALM)
    assert all(map(math.isfinite, losses(resumed)))
    if method not in DRAWING:
        assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)
    outcome = whole[-1].outcome
    assert outcome is not None and outcome.peak_memory_bytes
    assert (outcome.agreement is None) == (method == "none")
    assert notices.take() == [], "the step was captured"


@pytest.mark.parametrize("method", [method for method in METHODS if method not in DRAWING])
def test_a_captured_step_trains_like_one_that_is_launched_kernel_by_kernel(
    method: str, pixels: DataSet, teacher: Teacher, taught: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 images in batches of 16: two captured steps and a last one of another shape, in each of four epochs. The
    next trial of the process reuses the step."""
    one = calm(method, taught if method != "none" else None)
    there, here = (None, None) if method == "none" else (taught, teacher)
    made: list[Step] = []
    begin = Step.__init__

    def watched(self: Step, *arguments: Any) -> None:
        made.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(Step, "__init__", watched)
    captured = losses(trained(one, pixels, there, tmp_path / "captured"))
    assert losses(trained(one, pixels, there, tmp_path / "replayed")) == pytest.approx(captured, rel=1e-3)
    assert len(made) == 1
    for each in (made[0]._run, made[0]._evaluate):  # the evaluation in the fourth epoch
        assert isinstance(each, Captured) and each.is_used
    monkeypatch.setattr(stepping, "Captured", Launched)
    stepping._idle.clear()
    assert captured == pytest.approx(losses(trained(one, pixels, there, tmp_path / "launched")), rel=1e-3)
    on_cpu = run(one, pixels, here, tmp_path / "cpu")
    assert captured == pytest.approx(losses(on_cpu), rel=1e-2)


def test_a_trial_resumed_after_another_trial_in_the_process_has_the_same_losses(
    pixels: DataSet, taught: Teacher, tmp_path: Path
) -> None:
    one = calm("logit", taught)
    whole = trained(one, pixels, taught, tmp_path / "whole")
    begun = train(one, pixels, taught, device=GPU, checkpoints=Checkpoints(tmp_path / "cut"), checkpoint_every=0.0)
    before = list(islice(begun, 2))
    begun.close()
    trained(pupil("none", "cifar", None), pixels, None, tmp_path / "other")  # uses the process meanwhile
    after = trained(one, pixels, taught, tmp_path / "cut", acknowledged=2)
    assert losses(before + after) == pytest.approx(losses(whole), rel=1e-3)


def test_a_step_that_cannot_be_captured_is_launched_and_the_next_trial_is_unaffected(
    pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step synchronizes with the GPU, which a capture does not allow."""
    monkeypatch.setattr(Captured, "given_up", set())
    monkeypatch.setattr(notices, "_told", set())
    one, train_step = calm("none", None), Step._train
    launched = losses(trained(one, pixels, None, tmp_path / "launched"))

    def asking(self: Step, *arguments: Any) -> None:
        train_step(self, *arguments)
        float(self.sums[0])

    stepping._idle.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Step, "_train", asking)
        assert losses(trained(one, pixels, None, tmp_path / "asking")) == pytest.approx(launched, rel=1e-3)
    (told,) = notices.take()
    assert told.startswith("a training step cannot be captured")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    stepping._idle.clear()
    assert losses(trained(one, pixels, None, tmp_path / "next")) == pytest.approx(launched, rel=1e-3)


def test_no_step_synchronizes_with_the_gpu(
    pixels: DataSet, taught: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are launched kernel by kernel: a capture that waits would fail before a step could raise."""
    step = Step.__call__

    def watched(self: Any, *arguments: Any) -> None:
        debug("error")
        try:
            step(self, *arguments)
        finally:
            debug("default")

    monkeypatch.setattr(stepping, "Captured", Launched)
    trained(pupil("none", "cifar", None), pixels, None, tmp_path / "first")  # creates what a process creates once
    monkeypatch.setattr(Step, "__call__", watched)
    for method in METHODS:
        teacher = None if method == "none" else taught
        assert len(trained(pupil(method, "cifar", teacher), pixels, teacher, tmp_path / method)) == 2
    assert torch.cuda.get_sync_debug_mode() == 0


def debug(mode: str) -> None:
    """Set the reaction when the host waits for the GPU. Setting it warns that it is a beta feature, and in tests
    warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def smoke(precision: str) -> Study:
    """The smoke ablation in a precision. No trial is stopped early, so all must complete."""
    settings = [f"{recipe}.precision={precision}" for recipe in ("recipe", "teacher_recipe")]
    return resolve(find("ablation"), "smoke", None, [*settings, "screen.min_peers=99"])


def driver(study: Study, folder: Path, gpus: float) -> tuple[Driver, Workplace, DataSet]:
    spec = study.data
    images = datasets.load(spec.name, train=spec.train, validation=spec.validation, test=spec.test)
    place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
    ledger = Ledger(folder / "ledger.sqlite")
    return Driver(plan(study, images.digest), "r", folder, ledger, place, cpus=0.5, gpus=gpus), place, images


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_trial_of_the_smoke_ablation_completes_through_ray(
    precision: str, share: float, ray_session: str, tmp_path: Path
) -> None:
    from tune_kd.execute import ray_tune

    made, place, images = driver(smoke(precision), tmp_path, share)  # half a CPU each: four fit on two
    ray_tune.run_on_ray(made, place, slots=round(1 / share), beat=lambda: None, data=images)
    rows = list(made.rows.values())
    assert [row["error"] for row in rows if row["status"] != "completed"] == []
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name(GPU)}
    assert {row["gpu_fraction"] for row in rows} == {share}


def test_a_trial_that_exceeds_its_gpu_share_is_retried_with_twice_the_share(tmp_path: Path) -> None:
    """A trial that reserves 60 % of the memory fits into all of it, but not into half."""
    made, place, _ = driver(smoke("tf32"), tmp_path, 0.5)
    shares: list[float] = []
    total = torch.cuda.get_device_properties(GPU).total_memory

    def greedy(task: Task, place: Workplace) -> Iterator[Epoch]:
        shares.append(task.gpus)
        with closing(work(task, place)) as epochs:
            yield next(epochs)  # sets the cap
            if len(shares) <= 2:
                torch.empty(int(0.6 * total), dtype=torch.uint8, device=GPU)
                torch.cuda.empty_cache()
            yield from epochs

    run_in_process(made, place, greedy)  # type: ignore[arg-type]
    assert shares[:3] == [0.5, 1.0, 0.5]
    rows = [row for row in made.rows.values() if row["error"]]
    assert len(rows) == 1 and "OutOfMemoryError" in rows[0]["error"]
    assert rows[0]["gpu_fraction"] == 1.0
    assert {row["status"] for row in made.rows.values()} == {"completed"}


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_probe_measures_light_and_heavy_trials_and_the_next_run_reuses_the_result(
    mode: str, one_stem: Study, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials are tiny, so the shares mean nothing. Memory is that of a process with CUDA."""
    monkeypatch.setattr(gpu_probe, "WORTH_SECONDS", 0.0)
    images = datasets.load("digits", train=60, validation=20, test=20)
    said: list[str] = []
    planned, options = plan(one_stem, images.digest), Options(max_concurrent=2, cpus_per_trial=0.5, mps=mode)
    found = gpu_probe.packed(planned, images, options, said.append)
    assert found is not None, said
    assert {found.light, found.heavy} <= {0.5, 1.0}
    rows = [line for line in said if "images/s" in line]
    assert len(rows) == (4 if any("with MPS" in line for line in rows) else 2), said
    assert all(0.5 < float(line.split()[-3]) < 4 for line in rows), said
    again = gpu_probe.packed(planned, images, options, said.append)
    assert again is not None and again.why.startswith("as measured before")


MPS = "nvidia-cuda-mps-control"
SERVED = "from tune_kd.execute import mps; print(mps.serves())"


@pytest.mark.skipif(shutil.which(MPS) is None, reason=f"needs {MPS}")
def test_mps_is_detected_only_if_its_daemon_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each check runs in a separate process, like the nodes of a cluster."""
    folder = tmp_path_factory.mktemp("mps")
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    (folder / "pipe").mkdir()

    def served() -> str:
        asked = [sys.executable, "-c", SERVED]
        return subprocess.run(asked, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    assert served() == "False\n"
    if subprocess.run([MPS, "-d"], env=environment, timeout=30, check=False).returncode:
        pytest.skip("MPS may not be started here")
    try:
        assert served() == "True\n"
    finally:
        subprocess.run([MPS], input="quit\n", env=environment, text=True, timeout=30, check=False)


@pytest.mark.skipif(shutil.which(MPS) is None, reason=f"needs {MPS}")
def test_an_mps_daemon_that_we_start_serves_its_clients_and_stops() -> None:
    folder = mps_daemon.folder_of(f"a test of process {os.getpid()}")

    def serves() -> str:
        asked, seen = [sys.executable, "-c", SERVED], {**os.environ, **mps_daemon.variables(folder)}
        return subprocess.run(asked, env=seen, capture_output=True, text=True, check=True, timeout=60).stdout

    try:
        with mps_daemon.started(folder):
            assert serves() == "True\n"
    except mps_daemon.NotStarted as error:
        pytest.skip(f"MPS may not be started here: {error}")
    assert serves() == "False\n" and not folder.exists()

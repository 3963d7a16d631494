"""The share of a GPU that a trial gets by default, and whether MPS serves a GPU."""

import ctypes
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from tune_kd.execute import cluster as connection, mps, session
from tune_kd.execute.monitoring import OPEN
from tune_kd.execute.resources import Mps, Packing, gpu_shares
from tune_kd.reporting.terminal import Terminal
from tune_kd.study.plan import plan
from tune_kd.study.spec import Factor, Study

NOT_SERVED = Mps(False, "MPS does not serve the GPUs")
SERVED = Mps(True, "MPS serves the GPUs")


@pytest.mark.parametrize(
    ("requested", "available", "mps", "gpus", "words"),
    [
        ("auto", 1.0, NOT_SERVED, 1.0, "a whole GPU, since MPS does not serve the GPUs, and without MPS trials"),
        ("auto", 1.0, SERVED, 0.25, "0.25 of a GPU, since MPS serves the GPUs, so four trials"),
        ("auto", 1.0, Mps(False, "--mps is off"), 1.0, "a whole GPU, since --mps is off, and without MPS trials"),
        ("auto", 0.0, Mps(False), 0.0, "no GPU, since Ray sees none"),
        (0.5, 1.0, NOT_SERVED, 0.5, "0.5 of a GPU, as --gpus-per-trial says; MPS does not serve the GPUs."),
        (2.0, 4.0, Mps(False), 2.0, "2 GPUs, as --gpus-per-trial says."),
        (0.0, 1.0, Mps(False), 0.0, "no GPU, as --gpus-per-trial says."),
    ],
)
def test_a_trial_gets_a_whole_gpu_unless_mps_serves_it_or_a_share_is_requested(
    requested: float | Literal["auto"], available: float, mps: Mps, gpus: float, words: str, one_stem: Study
) -> None:
    shares = gpu_shares(requested, plan(one_stem), available, mps, None)
    assert (shares.light, shares.heavy, shares.teacher) == (gpus, gpus, gpus)
    assert shares.words.startswith(f"Each trial gets {words}")


def test_on_a_cluster_the_message_says_that_shares_are_not_measured(one_stem: Study) -> None:
    shares = gpu_shares("auto", plan(one_stem), 1.0, NOT_SERVED, None, "; shares are not measured on a cluster")
    assert shares.words.endswith("would take turns on a GPU; shares are not measured on a cluster.")


WITH_MPS, WITHOUT_MPS = Packing(0.125, 0.5, True, "as measured"), Packing(0.5, 1.0, False, "as measured")


@pytest.mark.parametrize(
    ("packing", "mps", "light", "heavy"),
    [
        (WITH_MPS, SERVED, 0.125, 0.5),
        (WITH_MPS, NOT_SERVED, 1.0, 1.0),  # MPS could not be started
        (WITHOUT_MPS, Mps(False), 0.5, 1.0),
    ],
)
def test_measured_shares_apply_only_if_mps_serves_as_in_the_probe(
    packing: Packing, mps: Mps, light: float, heavy: float, one_stem: Study
) -> None:
    shares = gpu_shares("auto", plan(one_stem), 1.0, mps, packing)
    assert (shares.light, shares.heavy, shares.teacher) == (light, heavy, heavy)
    for trial in plan(one_stem).trials:
        expected = heavy if trial.phase == "teacher" or trial.cell.method == "feature" else light
        assert shares.of(trial.role, trial.cell.method) == expected
    assert shares.smallest == light


def test_the_message_names_the_share_of_each_kind(one_stem: Study) -> None:
    words = gpu_shares("auto", plan(one_stem), 2.0, SERVED, WITH_MPS).words
    assert words == "Each trial gets 0.125 of a GPU (with feature 0.5 of a GPU, a teacher a whole GPU), as measured."


@pytest.mark.parametrize(
    ("stems", "gpus", "share"),
    [
        (("cifar",), 1.0, 0.5),  # a screen and two seeds of the control need an eighth each
        (("cifar",), 2.0, 1.0),
        (("cifar", "imagenet"), 2.0, 0.5),
        (("cifar", "imagenet"), 3.0, 1.0),
    ],
)
def test_a_teacher_gets_a_whole_gpu_if_all_trials_that_can_start_still_fit(
    stems: tuple[str, ...], gpus: float, share: float, study: Study
) -> None:
    planned = plan(replace(study, factors=(Factor("stem", stems), *study.factors[1:]), moderator=None))
    assert gpu_shares("auto", planned, gpus, SERVED, WITH_MPS).teacher == share


def test_a_teacher_gets_a_whole_gpu_also_without_measured_shares(one_stem: Study) -> None:
    shares = gpu_shares("auto", plan(one_stem), 2.0, SERVED, None)  # three controls need a quarter each
    assert (shares.light, shares.heavy, shares.teacher) == (0.25, 0.25, 1.0)
    assert shares.words.startswith("Each trial gets 0.25 of a GPU (a teacher a whole GPU), since MPS serves the GPUs")


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_requested_share_applies_to_teachers_too(share: float, one_stem: Study) -> None:
    assert gpu_shares(share, plan(one_stem), 8.0, SERVED, None).teacher == share


class Cuda:
    """A fake NVIDIA driver. `served` says for each GPU whether MPS serves it; an old driver (`known=False`) lacks the
    attribute."""

    def __init__(self, *served: bool, starts: bool = True, known: bool = True) -> None:
        self.served, self.starts, self.known = served, starts, known

    def cuInit(self, flags: int) -> int:
        return 0 if self.starts else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.served)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 40 + number
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        assert attribute == 133
        if not self.known:
            return 1  # CUDA_ERROR_INVALID_VALUE
        value._obj.value = int(self.served[device.value - 40])
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: ctypes.c_int) -> int:
        name.value = b"a GPU"
        return 0 if device.value == 40 else 1

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:
        memory._obj.value = 80 * 2**30
        return 0 if device.value == 40 else 1


@pytest.mark.parametrize(
    ("cuda", "serves"),
    [
        (Cuda(True), True),
        (Cuda(True, True), True),
        (Cuda(True, False), False),
        (Cuda(False), False),
        (Cuda(), False),
        (Cuda(True, starts=False), False),
        (Cuda(True, known=False), False),
    ],
)
def test_mps_serves_if_the_driver_says_so_for_every_gpu(cuda: Cuda, serves: bool) -> None:
    assert mps.serves(lambda: cuda) is serves


def test_without_a_driver_nothing_is_served() -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert mps.serves(missing) is False
    assert mps.described(missing) is None


def test_a_gpu_is_described_by_its_name_and_memory() -> None:
    assert mps.described(lambda: Cuda(True, False)) == mps.Gpu("a GPU", 80 * 2**30, served=False)
    assert mps.described(lambda: Cuda(True)) == mps.Gpu("a GPU", 80 * 2**30, served=True)
    assert mps.described(lambda: Cuda(True, starts=False)) is None


def test_a_separate_process_describes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mps.asked() is None  # no GPU is visible
    monkeypatch.setattr(mps, "ASK", 'print(\'{"name": "a GPU", "memory": 7, "served": true}\')')
    assert mps.asked() == mps.Gpu("a GPU", 7, served=True)
    monkeypatch.setattr(mps, "ASK", "raise SystemExit(1)")
    assert mps.asked() is None


def test_a_node_that_cannot_run_a_task_is_reported_with_the_reason(ray_session: str) -> None:
    def broken() -> bool:
        raise ValueError("no such thing here")

    nodes = connection.alive()
    found, silent = connection.asked(lambda: 7, nodes, 60.0)
    assert list(found.values()) == [7] * len(nodes) and silent == {}
    found, silent = connection.asked(broken, nodes, 60.0)
    assert found == {}
    assert all("cannot run a task" in why and "no such thing here" in why for why in silent.values())


@pytest.mark.parametrize(("gpus", "lines", "guarded"), [(0.0, 0, True), (1.0, 1, False)])
def test_the_start_message_names_the_share_if_there_are_gpus_and_warns_if_ray_is_open(
    gpus: float, lines: int, guarded: bool, study: Any, tmp_path: Any
) -> None:
    from tune_kd.records.run_folder import Run

    out = StringIO()
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    cluster = SimpleNamespace(gpus=gpus, dashboard=None, guarded=guarded)
    console = Terminal()
    console.file, console.width = out, 200
    session._print_start(run, console, cluster, "Each trial gets a whole GPU, for a reason.")
    assert out.getvalue().count("Each trial gets a whole GPU, for a reason.") == lines
    assert (OPEN in out.getvalue()) is not guarded

"""The share of a GPU that a trial gets where none is asked for, and whether MPS serves a GPU."""

import ctypes
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest

from tune_kd.execute import cluster as connection, mps, session
from tune_kd.execute.monitoring import OPEN
from tune_kd.execute.resources import Mps, gpu_share
from tune_kd.reporting.terminal import Terminal

NOT = Mps(False, "MPS does not serve the GPUs")


@pytest.mark.parametrize(
    ("asked", "available", "mps", "gpus", "says"),
    [
        (None, 1.0, NOT, 1.0, "a whole GPU, since MPS does not serve the GPUs, and without it trials"),
        (None, 4.0, Mps(True, "MPS serves the GPUs"), 0.25, "0.25 of a GPU, since MPS serves the GPUs, on which four"),
        (None, 1.0, Mps(False, "--mps is off"), 1.0, "a whole GPU, since --mps is off, and without it trials"),
        (None, 0.0, Mps(False), 0.0, "no GPU, since Ray sees none"),
        (0.5, 1.0, NOT, 0.5, "0.5 of a GPU, as --gpus-per-trial says; MPS does not serve the GPUs."),
        (2.0, 4.0, Mps(False), 2.0, "2 GPUs, as --gpus-per-trial says."),
        (0.0, 1.0, Mps(False), 0.0, "no GPU, as --gpus-per-trial says."),
    ],
)
def test_a_trial_gets_a_whole_gpu_unless_mps_serves_it_or_a_share_is_asked_for(
    asked: float | None, available: float, mps: Mps, gpus: float, says: str
) -> None:
    share = gpu_share(asked, available, mps)
    assert share.gpus == gpus
    assert share.words.startswith(f"Each trial gets {says}")


class Cuda:
    """NVIDIA's driver with some GPUs, each served by MPS or not; with an old one the question is unknown."""

    def __init__(self, *served: bool, starts: bool = True, known: bool = True) -> None:
        self.served, self.starts, self.known = served, starts, known

    def cuInit(self, flags: int) -> int:
        return 0 if self.starts else 100  # no device

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.served)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 40 + number
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        assert attribute == 133
        if not self.known:
            return 1  # an invalid value
        value._obj.value = int(self.served[device.value - 40])
        return 0


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
def test_mps_serves_where_the_driver_says_so_of_every_gpu(cuda: Cuda, serves: bool) -> None:
    assert mps.serves(lambda: cuda) is serves


def test_without_a_driver_nothing_is_served() -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert mps.serves(missing) is False


def test_a_node_that_cannot_answer_is_said_to_with_the_reason(ray_session: str) -> None:
    def broken() -> bool:
        raise ValueError("no such thing here")

    nodes = connection.alive()
    found, silent = connection.asked(lambda: 7, nodes, 60.0)
    assert list(found.values()) == [7] * len(nodes) and silent == {}
    found, silent = connection.asked(broken, nodes, 60.0)
    assert found == {}
    assert all("cannot run a task" in why and "no such thing here" in why for why in silent.values())


@pytest.mark.parametrize(("gpus", "lines", "guarded"), [(0.0, 0, True), (1.0, 1, False)])
def test_a_run_says_at_its_start_which_share_trials_get_where_there_are_gpus_and_whether_ray_is_open(
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

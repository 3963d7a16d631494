"""The share of a GPU that a trial gets where none is asked for, and whether MPS serves a GPU."""

import ctypes
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest

from tune_kd.execute import cluster as connection, mps, session
from tune_kd.execute.monitoring import OPEN
from tune_kd.execute.resources import gpu_share
from tune_kd.reporting.terminal import Terminal


def never() -> bool:
    raise AssertionError("nobody has to ask")


@pytest.mark.parametrize(
    ("asked", "available", "served", "gpus", "says"),
    [
        (None, 1.0, lambda: False, 1.0, "a whole GPU, since MPS does not serve the GPUs, and without it trials"),
        (None, 4.0, lambda: True, 0.25, "0.25 of a GPU, since MPS serves the GPUs"),
        (None, 0.0, never, 0.0, "no GPU, since Ray sees none"),
        (0.5, 1.0, never, 0.5, "0.5 of a GPU, as --gpus-per-trial says"),
        (2.0, 4.0, never, 2.0, "2 GPUs, as --gpus-per-trial says"),
        (0.0, 1.0, never, 0.0, "no GPU, as --gpus-per-trial says"),
    ],
)
def test_a_trial_gets_a_whole_gpu_unless_mps_serves_it_or_a_share_is_asked_for(
    asked: float | None, available: float, served: Any, gpus: float, says: str
) -> None:
    share = gpu_share(asked, available, served)
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


def test_the_nodes_with_gpus_are_asked_and_all_have_to_be_served(
    ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real, on logical GPUs, of which no driver knows; then as if the nodes had answered."""
    assert connection.served_by_mps() is False
    nodes = [{"Alive": True, "Resources": {"GPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    asked: list[int] = []

    def answered(answers: dict[str, bool], silent: dict[str, str]) -> None:
        def ask(question: object, some: list[Any], patience: float) -> tuple[dict[str, bool], dict[str, str]]:
            asked.append(len(some))
            return answers, silent

        monkeypatch.setattr(connection, "_asked", ask)

    monkeypatch.setattr(connection, "_alive", lambda: nodes)
    for answers, silent, served in (
        ({"a": True}, {}, True),
        ({"a": True, "b": False}, {}, False),
        ({"a": True}, {"b": "does not run a task within 60 s"}, False),
    ):
        answered(answers, silent)
        assert connection.served_by_mps() is served
    monkeypatch.setattr(connection, "_alive", list)
    assert connection.served_by_mps() is False
    assert asked == [1, 1, 1, 0]


def test_a_node_that_cannot_answer_is_said_to_with_the_reason(ray_session: str) -> None:
    def broken() -> bool:
        raise ValueError("no such thing here")

    nodes = connection._alive()
    found, silent = connection._asked(lambda: 7, nodes, 60.0)
    assert list(found.values()) == [7] * len(nodes) and silent == {}
    found, silent = connection._asked(broken, nodes, 60.0)
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

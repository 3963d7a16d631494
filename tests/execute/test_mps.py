"""MPS that is started for a run on Ray, with a fake of NVIDIA's program and a GPU that only Ray knows."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import mps_control
from commands import STUDY, driver, wait_for, without_stops
from tune_kd.execute import mps, mps_daemon, mps_nodes, ray_tune
from tune_kd.execute.mps_nodes import served
from tune_kd.execute.worker import Task, Workplace
from tune_kd.study.spec import Study
from tune_kd.study.trial import Epoch, Outcome
from tune_kd.system import environment
from tune_kd.system.errors import UserError

# Responses of nodes, without Ray

NODES = [
    {"NodeID": 2 * "a1b2c3d4", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"GPU": 1.0}},
    {"NodeID": 2 * "b1b2c3d4", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"GPU": 1.0}},
    {"NodeID": 2 * "c1b2c3d4", "NodeManagerAddress": "10.0.0.3", "Alive": True, "Resources": {"CPU": 4.0}},
]
FIRST, SECOND = "10.0.0.1 (a1b2c3d4)", "10.0.0.2 (b1b2c3d4)"


class FakeNodes:
    """Fakes the responses of nodes. `states`: for each node, whether MPS serves it and whether it has NVIDIA's program.
    `own`: the problem with the MPS that we start, or an empty text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: tuple[bool, bool], own: str = "") -> None:
        self.states, self.own = states, own
        self.calls: list[str] = []
        monkeypatch.setattr(mps_nodes, "alive", lambda: [*NODES[: len(states)], NODES[2]])
        monkeypatch.setattr(mps_nodes, "asked", self.asked)
        monkeypatch.setattr(mps_nodes, "_own", self.started)

    def asked(self, question: object, nodes: list[Any], patience: float) -> tuple[dict[str, Any], dict[str, str]]:
        self.calls.append(f"asked {len(nodes)}")
        return dict(zip((FIRST, SECOND), self.states, strict=False)), {}

    @contextmanager
    def started(self, folder: Path, nodes: list[Any]) -> Iterator[str]:
        self.calls.append("started")
        yield self.own
        self.calls.append("ended")


LACKS, HAS, SERVED = (False, False), (False, True), (True, True)


@pytest.mark.parametrize(
    ("states", "own", "mode", "matters", "pays", "calls", "serves", "words"),
    [
        ([SERVED], "", "auto", True, True, ["asked 1"], True, "MPS serves the GPUs"),
        ([SERVED, SERVED], "", "on", False, False, ["asked 2"], True, "MPS serves the GPUs"),
        ([SERVED], "", "off", True, True, [], False, "--mps is off"),
        ([HAS], "", "auto", False, False, [], False, ""),
        ([HAS], "", "auto", True, False, ["asked 1"], False, "MPS does not serve the GPUs"),
        ([LACKS], "", "auto", True, False, ["asked 1"], False, "MPS does not serve the GPUs"),
        ([HAS], "", "auto", True, True, ["asked 1", "started", "ended"], True, "MPS, started for this run, serves"),
        ([HAS], "", "on", False, False, ["asked 1", "started", "ended"], True, "MPS, started for this run, serves"),
        ([HAS], "it hangs", "auto", True, True, ["asked 1", "started", "ended"], False,
         "MPS does not serve the GPUs (it hangs)"),
        ([LACKS], "", "auto", False, True, ["asked 1"], False,
         "MPS does not serve the GPUs (there is no nvidia-cuda-mps-control)"),
        ([HAS, LACKS], "", "auto", True, True, ["asked 2"], False,
         f"MPS does not serve the GPUs (there is no nvidia-cuda-mps-control, on the node {SECOND})"),
        ([SERVED, HAS], "", "auto", True, True, ["asked 2"], False,
         f"MPS does not serve the GPUs (another MPS is already running, on the node {FIRST})"),
    ],
)  # fmt: skip
def test_mps_is_started_if_it_pays_can_be_started_and_does_not_serve_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, states: list[tuple[bool, bool]], own: str, mode: str,
    matters: bool, pays: bool, calls: list[str], serves: bool, words: str,
) -> None:  # fmt: skip
    nodes = FakeNodes(monkeypatch, *states, own=own)
    with served(str(tmp_path), mode, matters=matters, pays=pays) as found:
        assert found.served is serves and found.words.startswith(words)
        assert ("ended" in nodes.calls) is bool(own)  # an MPS of our own that does not serve ends before the trials
        assert bool(found.variables) is ("started for this run" in words)
    assert nodes.calls == calls


@pytest.mark.parametrize(("state", "own", "why"), [(LACKS, "", "there is no nvidia-"), (HAS, "it hangs", "it hangs")])
def test_required_mps_that_cannot_be_started_is_an_error_that_names_the_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: tuple[bool, bool], own: str, why: str
) -> None:
    FakeNodes(monkeypatch, state, own=own)
    with (
        pytest.raises(UserError, match=f"--mps is on, and MPS cannot be started: {why}.*; allowed: auto or off"),
        served(str(tmp_path), "on", matters=True, pays=True),
    ):
        pass


@pytest.mark.parametrize(
    ("asked", "probed", "most", "cpus", "gpus", "matters", "pays"),
    [
        ("auto", None, None, 8.0, 1.0, True, True),
        ("auto", None, 1, 8.0, 1.0, True, False),
        ("auto", None, None, 1.0, 1.0, True, False),  # one CPU, so one trial at a time
        ("auto", True, None, 8.0, 1.0, True, True),  # found by a probe
        ("auto", False, None, 8.0, 1.0, False, False),
        (0.5, None, None, 8.0, 1.0, False, True),
        (1.0, None, None, 8.0, 1.0, False, False),
        (0.0, None, None, 8.0, 1.0, False, False),
        (0.5, None, 4, 8.0, 4.0, False, False),
    ],
)
def test_mps_pays_if_more_trials_run_concurrently_than_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, study: Study, asked: float | str, probed: bool | None,
    most: int | None, cpus: float, gpus: float, matters: bool, pays: bool,
) -> None:  # fmt: skip
    from types import SimpleNamespace

    from tune_kd.records.run_folder import Run

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(mps_nodes, "served", lambda *given, **more: seen.append({"mode": given[1], **more}))
    settings: dict[str, Any] = {"gpus_per_trial": asked, "max_concurrent": most, "cpus_per_trial": 1.0}
    settings |= {} if probed is None else {"packing": {"mps": probed}}
    cluster: Any = SimpleNamespace(cpus=cpus, gpus=gpus)
    mps_nodes.serving(Run("r", tmp_path / "r", study, "0" * 64, None, settings), cluster)
    assert seen == [{"mode": "auto", "matters": matters, "pays": pays}]


def test_without_a_gpu_no_module_for_mps_is_imported(study: Study, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from tune_kd.execute import session, cluster, ray_tune\n"
        "with session._mps(None, SimpleNamespace(gpus=0.0)) as mps: assert mps == session.resources.Mps(False)\n"
        "assert not [name for name in sys.modules if name.startswith('tune_kd.execute.mps')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# On Ray


@pytest.mark.parametrize(
    ("begun", "uses", "why"),
    [("", True, ""), ("it hangs", True, "it hangs"), ("", False, "MPS started, but CUDA does not use it")],
)
def test_a_keeper_on_the_node_starts_and_ends_mps(
    ray_session: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: str, uses: bool, why: str
) -> None:
    """A real actor with a fake keeper, which writes a file for each call."""

    class Keeper:
        def begin(self, folder: Path) -> str:
            (tmp_path / "begun").write_text(f"{folder} {os.getpid()}")
            return begun

        def end(self) -> None:
            (tmp_path / "ended").touch()

    monkeypatch.setattr(mps_nodes, "_Keeper", Keeper)
    monkeypatch.setattr(mps, "serves", lambda: uses and os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/nowhere/pipe")
    nodes = mps_nodes.alive()
    with mps_nodes._own(Path("/nowhere"), nodes) as problem:
        assert problem == why
        folder, keeper = (tmp_path / "begun").read_text().split()
        assert folder == "/nowhere" and psutil.pid_exists(int(keeper))
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()


@pytest.mark.long
def test_a_fatal_cuda_error_ends_its_process_and_all_trials_complete(
    ray_session: str, one_stem: Study, tmp_path: Path
) -> None:
    """Two trials share a GPU. One fails in its second epoch, and CUDA ends the other as well."""
    place = tmp_path / "pids"
    place.mkdir()

    def faulting(task: Task, workplace: Workplace) -> Generator[Epoch]:
        total = task.trial.recipe.epochs
        label = task.trial.label.replace("/", "-").replace(" ", "-")
        (place / f"{label}-{task.attempt}").write_text(str(os.getpid()))
        for number in range(task.acknowledged + 1, total + 1):
            guilty = "T=2" in task.trial.label
            if number == 2 and task.attempt == 1 and (guilty or "feature" in task.trial.label):
                why = "an illegal memory access was encountered" if guilty else "the MPS client has been terminated"
                raise RuntimeError(f"CUDA error: {why}")
            outcome = Outcome(number, 0.5, 0.5, 0.5, None, None, None, 0.1, 1, "none", None, None)
            last = outcome if number == total else None
            yield Epoch(number, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1e-3, 1.0, outcome=last)

    made, workplace = driver(without_stops(one_stem), tmp_path / "run", gpus=0.5)
    ray_tune.run_on_ray(made, workplace, slots=2, beat=lambda: None, work=faulting)
    rows = list(made.rows.values())
    assert {row["status"] for row in rows} == {"completed"}, [row["error"] for row in rows]
    by_error = {(row["method"], row["attempts"], row["error"]) for row in rows if row["attempts"] > 1}
    illegal = "attempt 1: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert by_error == {("logit", 2, illegal), ("feature", 2, None)}

    def struck(attempt: str) -> bool:
        return attempt.endswith("-1") and ("T=2" in attempt or "feature" in attempt)

    broken = {file.read_text() for file in place.iterdir() if struck(file.name)}
    times: dict[str, list[str]] = {}
    for file in sorted(place.iterdir(), key=lambda each: each.stat().st_mtime_ns):
        times.setdefault(file.read_text(), []).append(file.name)
    for pid in broken:
        assert struck(times[pid][-1]), "a process in which CUDA failed ran another trial"


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
# A command whose trials only log their environment, with a fake of CUDA's answer whether MPS serves the GPUs.
COMMAND = """
import json, os, sys, time
from functools import partial
from tune_kd import cli
from tune_kd.execute import mps, ray_tune

WITNESS, PAUSE = sys.argv.pop(1), float(sys.argv.pop(1))

def serves():
    return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere") + "/control")

def work(task, place):
    from tune_kd.study.trial import Epoch, Outcome

    pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    mode = pipe and oct(os.stat(os.path.dirname(pipe)).st_mode)
    total = task.trial.recipe.epochs
    for number in range(task.acknowledged + 1, total + 1):
        with open(WITNESS, "a") as lines:
            seen = {"pipe": pipe, "mode": mode, "at": time.time(), "gpus": task.gpus}
            lines.write(json.dumps(seen) + "\\n")
        time.sleep(PAUSE)
        outcome = Outcome(number, 0.5, 0.5, 0.5, None, None, None, 0.1, 1, "none", None, None)
        last = outcome if number == total else None
        yield Epoch(number, 0.5, 1.0, 1.0, 0.5, 1.0, None, 0.1, 1.0, 1e-3, 1.0, outcome=last)

if "--address" not in sys.argv:  # the command starts Ray
    import ray
    ray.init = partial(ray.init, num_gpus=1)
if "PACKED" in os.environ:  # simulates a machine with a GPU and this measurement
    import torch
    from tune_kd.execute import gpu_probe
    from tune_kd.execute.resources import Packing

    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    gpu_probe.packed = lambda *_, **__: Packing(**json.loads(os.environ["PACKED"]))
mps.serves = serves
ray_tune.run_on_ray = partial(ray_tune.run_on_ray, work=work)
cli.main()
"""


class Machine:
    """A Ray cluster with a GPU and the fake program on its PATH, and commands that run on it."""

    def __init__(self, folder: Path) -> None:
        environment.guard_token()
        self.folder, self.program, self.witness = folder, folder / "bin", folder / "witness.jsonl"
        self.environment = {
            **os.environ,
            "PATH": f"{self.program}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)  # empty in tests, which hides the GPU
        (folder / "own.py").write_text(STUDY)
        self.ray = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.ray.stdout is not None
        self.address = self.ray.stdout.readline().strip()
        assert self.address

    def begin(self, *arguments: str, pause: float = 0.0, here: bool = False) -> "subprocess.Popen[str]":
        """Start a command on this cluster, or (`here`) on a Ray that the command starts."""
        self.witness.unlink(missing_ok=True)
        arguments += () if here else ("--address", self.address)
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(self.witness), str(pause), *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, name: str, *arguments: str, here: bool = False) -> tuple[int, str]:
        """Run the study. Returns the exit status and the output."""
        begun = self.begin("run", "own.py", "--scale", "own", "--no-dry-run", "--name", name, *arguments, here=here)
        out, errors = begun.communicate(timeout=200)
        return begun.returncode, " ".join((out + errors).split())

    def seen(self) -> list[dict[str, Any]]:
        lines = self.witness.read_text().splitlines() if self.witness.exists() else []
        return [json.loads(line) for line in lines]

    def place(self, name: str) -> Path:
        """Return the folder for the MPS of a run."""
        return mps_daemon.folder_of(str((self.folder / "results" / name).resolve()))

    def installed(self, how: str = "") -> None:
        mps_control.kill(self.program)
        (self.program / "log.jsonl").unlink(missing_ok=True)
        mps_control.install(self.program, how)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    found = Machine(tmp_path_factory.mktemp("mps"))
    yield found
    found.ray.communicate(timeout=60)
    mps_control.kill(found.program)


@pytest.fixture
def machine(cluster: Machine) -> Machine:
    if torch.cuda.is_available():
        pytest.skip("simulates a machine whose GPU only Ray knows")
    cluster.installed()
    return cluster


@pytest.mark.long
def test_a_run_starts_mps_before_its_workers_only_for_them_and_ends_it_after_them(machine: Machine) -> None:
    code, output = machine.run("served")
    assert code == 0, output
    assert "Each trial gets 0.25 of a GPU, since MPS, started for this run, serves the GPUs, so four trials" in output
    began, quitting, ended = mps_control.log(machine.program)
    assert (began["what"], quitting["what"], ended["what"]) == ("started", "quit received", "ended")
    assert "CUDA_VISIBLE_DEVICES" not in began
    seen = machine.seen()
    assert {line["pipe"] for line in seen} == {str(machine.place("served") / "pipe")}
    assert {line["mode"] for line in seen} == {"0o40700"}
    assert {line["gpus"] for line in seen} == {0.25}
    assert began["at"] < min(line["at"] for line in seen) and max(line["at"] for line in seen) < ended["at"]
    assert not machine.place("served").exists()
    rows = pd.read_parquet(machine.folder / "results" / "served" / "trials.parquet")
    assert set(rows["status"]) == {"completed"} and set(rows["gpu_fraction"]) == {0.25}


@pytest.mark.long
def test_mps_that_cannot_start_is_reported_in_one_sentence_and_a_trial_takes_a_whole_gpu(machine: Machine) -> None:
    machine.installed("refuses")
    code, output = machine.run("alone")
    assert code == 0, output
    why = "nvidia-cuda-mps-control exited with 1: Cannot start: an instance of this daemon is already running"
    assert output.count("MPS") == 2, "MPS is mentioned only in the sentence below"
    assert f"a whole GPU, since MPS does not serve the GPUs ({why}), and without MPS trials would" in output
    assert {(line["pipe"], line["gpus"]) for line in machine.seen()} == {(None, 1.0)}
    code, output = machine.run("refused", "--mps", "on")
    assert code == 2 and f"--mps is on, and MPS cannot be started: {why}; allowed: auto or off" in output
    assert not (machine.folder / "results" / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("served", [True, False])
def test_a_run_uses_the_measured_shares_and_mps_as_in_the_measurement(
    machine: Machine, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"light": 0.25, "heavy": 0.5, "mps": served, "why": "as measured now: fast"}
    monkeypatch.setitem(machine.environment, "PACKED", json.dumps(found))
    name = f"measured-{served}"
    code, output = machine.run(name, here=True)
    assert code == 0, output
    assert "0.25 of a GPU (with feature 0.5 of a GPU, a teacher 0.5 of a GPU), as measured now: fast." in output
    assert bool(mps_control.log(machine.program)) is served
    assert {line["pipe"] is not None for line in machine.seen()} == {served}
    rows = pd.read_parquet(machine.folder / "results" / name / "trials.parquet")
    assert set(rows["status"]) == {"completed"}
    shares = {(method, share) for method, share in zip(rows["method"].fillna(""), rows["gpu_fraction"], strict=True)}
    assert shares == {("", 0.5), ("none", 0.25), ("logit", 0.25), ("feature", 0.5)}
    record = json.loads((machine.folder / "results" / name / "study.json").read_text())
    assert record["settings"]["packing"] == found and record["settings"]["gpus_per_trial"] == "auto"


def interrupted(
    machine: Machine, name: str, end: Callable[["subprocess.Popen[str]"], object], here: bool = False
) -> tuple[int, str]:
    """Start a run, wait until a trial runs, and call `end`. Returns the exit status and standard error."""
    begun = machine.begin("run", "own.py", "--scale", "own", "--no-dry-run", "--name", name, pause=0.5, here=here)
    wait_for(lambda: begun.poll() is not None or bool(machine.seen()))
    assert begun.poll() is None, begun.communicate()
    assert len(mps_control.alive(machine.program)) == 1
    end(begun)
    _, errors = begun.communicate(timeout=60)
    return begun.returncode, errors


@pytest.mark.slow  # short version: `test_an_error_within_the_context_ends_mps_too`
def test_mps_ends_with_a_run_that_is_interrupted(machine: Machine) -> None:
    code, output = interrupted(machine, "left", lambda begun: begun.send_signal(signal.SIGTERM))
    assert code == 143, output
    assert not mps_control.alive(machine.program) and not machine.place("left").exists()
    assert mps_control.log(machine.program, "ended")


def signal_to_the_job(begun: "subprocess.Popen[str]") -> None:
    """Send SIGTERM to a process and its descendants. The daemon and its watcher, to which `scancel` would send it as
    well, are no descendants."""
    for each in psutil.Process(begun.pid).children(recursive=True):
        each.send_signal(signal.SIGTERM)
    begun.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_lets_trials_end_before_mps(machine: Machine) -> None:
    code, output = interrupted(machine, "job", signal_to_the_job, here=True)
    assert code == 143, output
    assert [line["what"] for line in mps_control.log(machine.program)] == ["started", "quit received", "ended"]
    assert max(line["at"] for line in machine.seen()) < mps_control.log(machine.program, "quit received")[0]["at"]
    assert not machine.place("job").exists()


@pytest.mark.slow  # short version: `test_mps_ends_if_the_process_that_started_it_is_killed_and_holds_no_output_open`
def test_mps_ends_with_a_command_that_is_killed_with_its_own_ray(machine: Machine) -> None:
    interrupted(machine, "here", lambda begun: begun.kill(), here=True)
    wait_for(lambda: not mps_control.alive(machine.program), 60)


@pytest.mark.slow
def test_mps_ends_after_a_kill_and_resume_ends_one_that_was_left_behind(machine: Machine) -> None:
    interrupted(machine, "killed", lambda begun: os.killpg(begun.pid, signal.SIGKILL))
    wait_for(lambda: not machine.place("killed").exists(), 30)  # the watcher ended MPS
    assert mps_control.log(machine.program, "ended") and not mps_control.alive(machine.program)

    machine.installed()

    def also_the_watcher(begun: "subprocess.Popen[str]") -> None:
        for each in psutil.process_iter(["cmdline"]):
            if str(machine.place("cut")) in (each.info["cmdline"] or ()):
                each.kill()
        os.killpg(begun.pid, signal.SIGKILL)

    interrupted(machine, "cut", also_the_watcher)
    (left,) = mps_control.alive(machine.program)
    begun = machine.begin("resume", "cut")
    out, errors = begun.communicate(timeout=200)
    assert begun.returncode == 0, out + errors
    assert "MPS, started for this run" in " ".join(out.split())
    first, second = mps_control.log(machine.program, "started")
    assert first["pid"] == left
    assert [line["pid"] for line in mps_control.log(machine.program, "ended")] == [left, second["pid"]]
    assert not mps_control.alive(machine.program) and not machine.place("cut").exists()

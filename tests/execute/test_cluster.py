"""Runs that lose a node or all of Ray, and the protection of Ray's token."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import psutil
import pytest

from commands import (
    STUDY,
    assert_contiguous_epochs,
    assert_same_records,
    command,
    epochs_on_record,
    in_this_process,
    wait_for,
)
from stores import KEYS, store
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import LEDGER, TRIALS
from tune_kd.system import environment
from tune_kd.system.errors import UserError
from tune_kd.system.object_store import local

# A cluster with a head without CPUs and two nodes, each with its own XDG_DATA_HOME. A line on standard input removes a
# node, as in a power failure. At the end of its input, it prints how many bytes each node received from others, and
# stops.
CLUSTER = """
import json, sys, time, urllib.request
import ray
from ray.cluster_utils import Cluster

options = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 1000}}
cluster = Cluster(initialize_head=True, head_node_args=options)
nodes = [cluster.add_node(num_cpus=1, env_vars={"XDG_DATA_HOME": f"{sys.argv[1]}/{number}"}) for number in range(2)]
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
ray.init(cluster.address, log_to_driver=False)
time.sleep(2.5)
received = []
for node in ray.nodes():
    if node["Alive"] and node["Resources"].get("CPU"):
        port = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        lines = urllib.request.urlopen(port, timeout=10).read().decode().splitlines()
        received += [float(line.rsplit(" ", 1)[1]) for line in lines
                     if line.startswith("ray_object_manager_bytes") and 'Type="Received"' in line]
print(json.dumps(received), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@contextmanager
def cluster(homes: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A cluster in a new process. Yields the process and the address."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(homes)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.communicate(timeout=60)


def raylets(process: int) -> list[psutil.Process]:
    """Return the raylets among the descendants of a process, oldest first."""
    under = psutil.Process(process).children(recursive=True)
    return sorted((each for each in under if each.name() == "raylet"), key=psutil.Process.create_time)


@pytest.mark.slow
def test_a_lost_node_costs_nothing_but_time_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # required to join a cluster that requires a token
    environment.guard_token()
    (tmp_path / "own.py").write_text(STUDY)
    run = tmp_path / "results" / "moved"
    with cluster(tmp_path) as (nodes, address):
        begun = command(
            tmp_path, "run", "own.py", "--scale", "own", "--name", "moved", "--address", address,
            "--set", "recipe.epochs=12",
        )  # fmt: skip
        # With 20 epochs, the first students are running, one on each node.
        wait_for(lambda: begun.poll() is not None or epochs_on_record(run) >= 20)
        assert begun.poll() is None, begun.communicate()[1]
        raylet = raylets(nodes.pid)[-1]
        lost = [raylet, *raylet.children(recursive=True)]
        assert nodes.stdin is not None
        nodes.stdin.write("remove\n")
        nodes.stdin.flush()
        _, errors = begun.communicate(timeout=200)
        assert begun.returncode == 0, errors
        assert not [each for each in lost if each.is_running()]
    assert_contiguous_epochs(run)
    rows = pd.read_parquet(run / "trials.parquet")
    assert set(rows["status"]) == {"completed"}
    assert sorted(rows["attempts"])[-2:] == [1, 2]
    assert rows["error"].dropna().tolist() == ["attempt 1: its worker died"]

    assert_same_records(run, in_this_process(run, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "a node is lost"])
def test_two_nodes_that_share_a_store_alone_write_the_same_tables_as_one_and_fetch_data_and_teachers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    environment.guard_token()
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "driver"))
    (tmp_path / "own.py").write_text(STUDY)
    with store() as s3, cluster(tmp_path / "nodes") as (nodes, address):
        run = local(s3.url("kd")) / "moved"
        begun = command(
            tmp_path, "run", "own.py", "--scale", "own", "--name", "moved", "--address", address,
            "--out", s3.url("kd"), "--set", f"recipe.epochs={12 if lost else 4}",
        )  # fmt: skip
        if lost:
            wait_for(lambda: begun.poll() is not None or epochs_on_record(run) >= 20)
            assert begun.poll() is None and nodes.stdin is not None, begun.communicate()[1]
            nodes.stdin.write("remove\n")
            nodes.stdin.flush()
        _, errors = begun.communicate(timeout=250)
        assert begun.returncode == 0, errors
        output, _ = nodes.communicate(timeout=60)
        trials = pd.read_parquet(run / "trials.parquet")
        (teacher,) = trials.loc[trials["role"] == "teacher", "trial_id"]
        fetched = s3.gets(f"{teacher}/weights.safetensors")
    homes = [home for home in (tmp_path / "nodes").glob("*") if list(home.rglob("weights.safetensors"))]
    assert len(homes) in ((1, 2) if lost else (2,))  # nodes with students of the teacher
    assert fetched <= 2  # one node trained the teacher, the other fetches it; a larger object takes two requests
    images = sum(trials["dataset"] == "digits")
    assert images > 8
    size = 192 * (100 + 50 + 50)  # bytes of the images, each 3 x 8 x 8
    for received in json.loads(output.splitlines()[-1]):  # the lines before are Ray's
        assert size < received < 2 * size, "each node receives the data once, whatever runs on it"
    assert_same_records(run, in_this_process(run, tmp_path))
    assert_contiguous_epochs(run)


@pytest.mark.slow  # short version: `test_an_interrupted_run_ends_correctly_and_its_records_are_intact`
def test_a_run_whose_ray_died_exits_with_3_and_says_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    run = tmp_path / "results" / "cut"
    begun = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "cut", "--set", "recipe.epochs=1000")
    wait_for(lambda: epochs_on_record(run) >= 3)
    everything = psutil.Process(begun.pid).children(recursive=True)
    raylets(begun.pid)[0].kill()
    _, errors = begun.communicate(timeout=60)
    assert begun.returncode == 3
    assert "Ray died" in errors and "resume results/cut" in errors and "Traceback" not in errors
    wait_for(lambda: not any(each.is_running() for each in everything), 90)
    assert "failed" not in {row["status"] for row in Ledger(run / LEDGER, read_only=True).rows(TRIALS)}
    assert_contiguous_epochs(run)


def test_a_sigterm_while_ray_starts_leads_to_exit_status_143(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    begun = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "early")
    wait_for(lambda: bool(raylets(begun.pid)))
    begun.send_signal(signal.SIGTERM)
    _, errors = begun.communicate(timeout=60)
    assert begun.returncode == 143
    assert "Traceback" not in errors


@pytest.mark.long
def test_only_the_user_can_read_rays_token_and_ray_keeps_our_signal_handlers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = (
        "import signal\n"
        "from tune_kd.execute import cluster as connection\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "ours = signal.getsignal(signal.SIGTERM)\n"
        "cluster = connection.connect(None)\n"
        "print(signal.getsignal(signal.SIGTERM) is ours)\n"
        "connection.disconnect(cluster)\n"
        "print(signal.getsignal(signal.SIGTERM) is ours)\n"
        "token = Path.home() / '.ray' / 'auth_token'\n"
        "print(oct(token.stat().st_mode & 0o777), len(token.read_text()))"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert made.stdout.split() == ["True", "True", "0o600", "64"], made.stderr


@pytest.mark.long
def test_ray_uses_the_token_at_the_path_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token need not exist. Ray itself would create it in the home folder, which is not writable here."""
    (tmp_path / "home").write_text("a file, not a folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    script = (
        "from tune_kd.execute import cluster as connection\n"
        "cluster = connection.connect(None)\n"
        "print(int(cluster.cpus) > 0)\n"
        "connection.disconnect(cluster)"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert made.stdout.split() == ["True"], made.stderr
    assert len((tmp_path / "token").read_text()) == 64


def test_a_token_that_others_can_read_is_made_private_or_ray_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.write_text("0" * 64)
    token.chmod(0o644)
    environment.guard_token()
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o640)
    with (
        patch.object(Path, "chmod", side_effect=PermissionError),
        pytest.raises(UserError, match="has the mode 0640, so that others can read it; allowed: 0600"),
    ):
        environment.guard_token()

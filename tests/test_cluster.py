"""What a run does when parts of Ray are lost under it: a node, Ray itself; and who may read Ray's token."""

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

from test_ray import STUDY, command, contiguous, epochs_on_record, same_records, wait_for
from tune_kd.execute import connection
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records import LEDGER, TRIALS, Ledger
from tune_kd.run import Run, create, reopen
from tune_kd.study import Mistake

# A cluster of a head without CPUs and two nodes. A line on its standard input removes one of them as if its power
# had gone; the end of its input ends it.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
cluster.shutdown()
"""


@contextmanager
def cluster() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A cluster in a process of its own; gives the process and the address."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.communicate(timeout=60)


def raylets(of: int) -> list[psutil.Process]:
    """The raylets under a process, the youngest last."""
    under = psutil.Process(of).children(recursive=True)
    return sorted((each for each in under if each.name() == "raylet"), key=psutil.Process.create_time)


def test_a_lost_node_costs_nothing_but_time_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # Ray joins with it on, or not at all, a cluster that asks for one
    connection.guard_token()
    (tmp_path / "own.py").write_text(STUDY)
    run = tmp_path / "results" / "moved"
    with cluster() as (nodes, address):
        begun = command(
            tmp_path, "run", "own.py", "--scale", "own", "--name", "moved", "--address", address,
            "--set", "recipe.epochs=12",
        )  # fmt: skip
        wait_for(
            lambda: begun.poll() is not None or epochs_on_record(run) >= 20
        )  # of the first students, one on each node
        assert begun.poll() is None, begun.communicate()[1]
        raylet = raylets(nodes.pid)[-1]
        lost = [raylet, *raylet.children(recursive=True)]
        assert nodes.stdin is not None
        nodes.stdin.write("remove\n")
        nodes.stdin.flush()
        _, errors = begun.communicate(timeout=200)
        assert begun.returncode == 0, errors
        assert not [each for each in lost if each.is_running()]
    contiguous(run)
    rows = pd.read_parquet(run / "trials.parquet")
    assert set(rows["status"]) == {"completed"}
    assert sorted(rows["attempts"])[-2:] == [1, 2]
    assert rows["error"].dropna().tolist() == ["attempt 1: its worker died"]

    planned = reopen(run)
    here = Run("here", tmp_path / "here", planned.study, planned.data_digest, None, planned.settings)
    create(here)
    place = Workplace(None, None, here.teachers / "apart", here.checkpoints)
    ledger = Ledger(here.folder / LEDGER)
    run_in_process(Driver(here.plan, "here", here.folder, ledger, place, cpus=1.0, gpus=0.0), place)
    same_records(run, here.folder)


def test_a_run_whose_ray_died_ends_with_3_and_says_how_to_go_on(tmp_path: Path) -> None:
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
    contiguous(run)


def test_a_sigterm_while_ray_starts_ends_with_143(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    begun = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "early")
    wait_for(lambda: bool(raylets(begun.pid)))
    begun.send_signal(signal.SIGTERM)
    _, errors = begun.communicate(timeout=60)
    assert begun.returncode == 143
    assert "Traceback" not in errors


def test_ray_leaves_its_token_to_its_user_alone_and_signals_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = (
        "import signal\n"
        "from tune_kd.execute import connection\n"
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


def test_a_token_that_others_can_read_is_closed_to_them_or_ray_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.write_text("0" * 64)
    token.chmod(0o644)
    connection.guard_token()
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o640)
    with (
        patch.object(Path, "chmod", side_effect=PermissionError),
        pytest.raises(Mistake, match="has the mode 0640, so that others can read it; allowed: 0600"),
    ):
        connection.guard_token()

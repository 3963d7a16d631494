"""Studies on a remote cluster: submit, follow, status, resume and extend; and nodes that differ from the driver."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from commands import STUDY, assert_contiguous_epochs, command, epochs_on_record, token, wait_for
from conftest import free_port
from tune_kd.execute.jobs import client, dependencies, find, follow
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import TRIALS

NO_STOPS = (*("--scale", "smoke"), *("--set", "screen.min_peers=99"))


@contextmanager
def head(folder: Path) -> Iterator[str]:
    """Start a cluster with `ray start --head` and two CPUs, and yield the URL of its dashboard."""
    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
                   "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    ray = Path(sys.executable).with_name("ray")
    # The agent accepts jobs. Another Ray on this machine may use its default port.
    ports = f"--port=0 --dashboard-port={port} --dashboard-agent-listen-port={free_port()}"
    options = f"--head --block --num-cpus=2 --dashboard-host=127.0.0.1 {ports}"
    with (folder / "head.txt").open("w") as log:
        process = subprocess.Popen([str(ray), "start", *options.split()], env=environment, cwd=folder,
                                   stdout=log, stderr=log)  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(url))
        assert process.poll() is None, (folder / "head.txt").read_text()
        yield url
    finally:
        everything = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *everything):  # a graceful stop would take half a minute
            each.kill()
        process.wait(timeout=60)
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # otherwise `auto` would connect to it


def answers(url: str) -> bool:
    try:
        return bool(jobs(url) is not None)
    except OSError:
        return False


def jobs(url: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token()}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return list(json.loads(answer.read()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with head(tmp_path_factory.mktemp("head")) as url:
        yield url


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    answer, errors = process.communicate(timeout=200)
    return process.returncode, answer, errors


@pytest.mark.long
def test_a_study_is_submitted_followed_to_its_end_and_shown_by_status(cluster: str, tmp_path: Path) -> None:
    at = ("--address", cluster)
    code, answer, errors = outcome(
        command(tmp_path, "submit", "ablation", *NO_STOPS, "--name", "far", "--mps", "off", *at)
    )
    assert code == 0, answer + errors
    assert "Primary contrasts (points of test accuracy" in answer  # printed by the driver
    assert "stop:    ray job stop" in errors and "Traceback" not in errors
    assert_contiguous_epochs(tmp_path / "results" / "far")
    assert json.loads((tmp_path / "results" / "far" / "study.json").read_text())["settings"]["mps"] == "off"
    assert (tmp_path / "results" / "far" / "report" / "report.html").is_file()
    (job,) = (each for each in jobs(cluster) if each["submission_id"])
    assert job["metadata"] == {"job_name": "far", "run": "far", "study": "ablation", "scale": "smoke",
                               "out": str(tmp_path / "results")}  # fmt: skip

    code, answer, errors = outcome(command(tmp_path, "status", "far", *at))
    assert code == 0 and "confirm" in answer and "8/8" in answer, answer + errors
    code, answer, errors = outcome(command(tmp_path, "status", "near", *at))
    assert code == 2 and errors.splitlines() == [
        "tune_kd: RUN is 'near'; allowed: a run that was submitted to this cluster (far)"
    ]


LOSS = """
from torch import nn
from pulls import pull

class Pull(nn.Module):
    def __init__(self, context):
        super().__init__()
    def forward(self, batch):
        return pull(batch.student_logits, batch.teacher_logits)
"""
STUDY_WITH_LOSS = f"from peers import PEERS\nfrom tune_kd import Method\n{STUDY}".replace(
    "min_peers=99", "min_peers=PEERS"
)
STUDY_WITH_LOSS = STUDY_WITH_LOSS.replace(
    "*base.factors[1:]", 'Factor("method", ("none", "logit", "pull")), *base.factors[2:]'
)
STUDY_WITH_LOSS = STUDY_WITH_LOSS.replace(
    '"feature", "none")),', '"pull", "none")), methods=(Method("pull", "losses/pull.py:Pull"),),'
)


def stopped(cluster: str, folder: Path) -> Path:
    """Submit a study with custom code, stop it on the cluster, and return the folder of its run."""
    (folder / "peers.py").write_text("PEERS = 99\n")  # uploaded with the study
    (folder / "losses").mkdir()
    (folder / "losses" / "pull.py").write_text(LOSS)
    (folder / "pulls.py").write_text("def pull(one, other):\n    return (one - other).pow(2).mean()\n")
    (folder / "own.py").write_text(STUDY_WITH_LOSS)
    run, at = folder / "results" / "cut", ("--address", cluster)
    long = ("--set", "recipe.epochs=20")
    code, answer, errors = outcome(command(folder, "submit", "own.py", "--name", "cut", *long, *at, "--detach"))
    assert (code, answer) == (0, ""), errors
    assert f"resume cut --address {cluster} --study own.py" in errors  # only --study uploads its losses again
    wait_for(lambda: epochs_on_record(run) >= 10)
    (job,) = (each for each in jobs(cluster) if each["metadata"].get("out") == str(folder / "results"))
    stop = urllib.request.Request(
        f"{cluster}/api/jobs/{job['submission_id']}/stop", b"", {"Authorization": f"Bearer {token()}"}
    )
    urllib.request.urlopen(stop, timeout=30).close()
    wait_for(lambda: next(each for each in jobs(cluster) if each == each | {"job_id": job["job_id"]})["end_time"])
    shown: list[str] = []
    assert follow(client(cluster), job["submission_id"], shown.append) == 143  # 128 + SIGTERM
    assert "records in" in "".join(shown)
    assert {"pending", "running"} & {row["status"] for row in rows_of(run)}
    assert (run / "source" / "losses" / "pull.py").read_text() == LOSS
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return Ledger(run / "ledger.sqlite", read_only=True).rows(TRIALS)


@pytest.mark.long
def test_a_custom_study_resumes_after_it_was_stopped_on_the_cluster(cluster: str, tmp_path: Path) -> None:
    run = stopped(cluster, tmp_path)
    # --study uploads the study with what it imports, and executes it on the cluster.
    (tmp_path / "peers.py").write_text("PEERS = 99\nprint('peers of', __file__)\n")
    code, answer, errors = outcome(command(tmp_path, "resume", "cut", "--study", "own.py", "--address", cluster))
    assert code == 0, answer + errors
    (printed,) = {line for line in answer.splitlines() if line.startswith("peers of")}
    assert str(tmp_path) not in printed
    assert_contiguous_epochs(run)
    assert {row["method"] for row in rows_of(run) if row["phase"] != "teacher"} == {"none", "logit", "pull"}
    assert {row["status"] for row in rows_of(run)} == {"completed"}


@pytest.mark.slow
def test_a_custom_study_is_extended_on_the_cluster(cluster: str, tmp_path: Path) -> None:
    run, at = stopped(cluster, tmp_path), ("--address", cluster)
    code, answer, errors = outcome(command(tmp_path, "resume", "cut", *at))
    assert code == 2 and "whose study has its own code in" in answer and "or with --study" in answer
    code, answer, errors = outcome(command(tmp_path, "resume", "cut", "--study", "own.py", *at))
    assert code == 0, answer + errors
    (tmp_path / "peers.py").write_text("PEERS = 99\nSEEDS = (1, 2)\n")
    changed = (tmp_path / "own.py").read_text().replace("import PEERS", "import PEERS, SEEDS")
    (tmp_path / "own.py").write_text(f"{changed.rstrip()[:-1]}    confirm=replace(base.confirm, seeds=SEEDS),\n    )\n")
    code, answer, errors = outcome(command(tmp_path, "resume", "cut", "--study", "own.py", "--extend", *at))
    assert code == 0, answer + errors
    assert_contiguous_epochs(run)
    assert {row["seed"] for row in rows_of(run) if row["phase"] == "confirm"} == {1, 2}


@pytest.mark.long
def test_a_wrong_token_address_or_share_gives_one_message(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused = f"http://127.0.0.1:{free_port()}"
    code, answer, errors = outcome(command(tmp_path, "submit", "ablation", *NO_STOPS, "--address", unused))
    assert (code, answer, len(errors.splitlines())) == (2, "", 1)
    assert f"--address is {unused}, where no Ray dashboard responds" in errors
    code, answer, errors = outcome(command(tmp_path, "submit", "ablation", *NO_STOPS, "--address", "head:8265"))
    assert (code, answer, len(errors.splitlines())) == (2, "", 1)
    assert "--address is head:8265; allowed: the URL of the cluster's dashboard" in errors
    # All problems at once, before anything is sent.
    wrong = ("--scale", "smok", "--name", "../x", "--cpus-per-trial", "0", "--address", "http://192.0.2.1:1")
    code, answer, errors = outcome(
        command(tmp_path, "submit", "ablation", *wrong, "--gpus-per-trial", "x", "--mps", "y")
    )
    assert (code, answer) == (2, "")
    for field in (
        "--scale is 'smok'",
        "--name is '../x'",
        "--cpus-per-trial is 0",
        "--gpus-per-trial is x",
        "--mps is y",
        "--out is",
    ):
        assert sum(field in line for line in errors.splitlines()) == 1
    before = len(jobs(cluster))
    code, answer, errors = outcome(
        command(tmp_path, "submit", "ablation", *NO_STOPS, "--cpus-per-trial", "64", "--address", cluster)
    )
    assert code == 2
    assert [line for line in answer.splitlines() if line.startswith("tune_kd: ")] == [
        "tune_kd: --cpus-per-trial is 64; allowed: at most 2 (the CPUs that Ray has)"
    ]
    assert not list(tmp_path.glob("results/*")) and len(jobs(cluster)) == before + 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    code, answer, errors = outcome(command(tmp_path, "submit", "ablation", *NO_STOPS, "--address", cluster))
    assert (code, answer, len(errors.splitlines())) == (2, "", 1)
    assert f"--address is {cluster}, which refuses this token; allowed: the token that `ray get-auth-token`" in errors
    assert "0" * 64 not in errors
    code, answer, errors = outcome(command(tmp_path, "run", "ablation", *NO_STOPS, "--address", cluster))
    assert (code, answer, len(errors.splitlines())) == (2, "", 1)
    assert "allowed: auto, or HOST:PORT of a cluster that includes this machine. To run a study on a remote" in errors


def test_the_newest_job_of_a_run_says_where_its_records_are() -> None:
    def job(start: int, **metadata: str) -> SimpleNamespace:
        return SimpleNamespace(submission_id="x", start_time=start, metadata=metadata)

    jobs = [job(1, run="a", out="old"), job(3, run="a", out="new"), job(2, run="a", out="older"),
            job(4, run="b", out="other"), job(5, run="a"), job(6)]  # fmt: skip
    assert find(SimpleNamespace(list_jobs=lambda: jobs), "a") == {"run": "a", "out": "new"}


def test_a_cluster_would_install_the_versions_of_this_machine() -> None:
    import torch

    named = dict(each.split("==") for each in dependencies())
    assert named["torch"] == torch.__version__.partition("+")[0]
    assert "ray" not in named and {"pandas", "pyarrow", "safetensors", "optuna"} <= set(named)


NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": sys.argv[1]})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.long
def test_a_node_with_another_version_or_without_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    other = tmp_path / "other" / "torch-1.13.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.1\n")
    (other.parent / "sitecustomize.py").write_text(  # the node's results folder is not mounted
        "import os\nisdir = os.path.isdir\nos.path.isdir = lambda path: 'results' not in str(path) and isdir(path)\n"
    )
    nodes = subprocess.Popen(
        [sys.executable, "-c", NODES, str(other.parent)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert nodes.stdin is not None and nodes.stdout is not None
    try:
        address = nodes.stdout.readline().strip()
        code, answer, errors = outcome(
            command(tmp_path, "run", "ablation", *NO_STOPS, "--name", "far", "--address", address)
        )
    finally:
        nodes.communicate(timeout=60)
    assert (code, answer) == (2, "ablation at scale smoke\n"), errors
    assert "has torch 1.13.1, and the driver has " in errors and "allowed: the same version on all" in errors
    assert f" does not see {tmp_path / 'results' / 'far'}; allowed: a folder on storage that all nodes" in errors
    assert errors.count("tune_kd: ") == 2
    assert not list(tmp_path.glob("results/*"))

"""What others on this machine, or in its network, can reach of a run: Ray's ports, its folders, sockets and logs.

SECURITY.md says what is promised, and against whom.
"""

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from rich.console import Console

from commands import STUDY, call, command, epochs_on_record, token, wait_for
from tune_kd import cli
from tune_kd.execute import monitoring
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.system import environment
from tune_kd.system.errors import UserError

ROOT = Path(__file__).parents[2]

# Ray's door

METRICS = "GET /metrics"
DOORS = {
    "control store": ("gcs_server", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"),
    "raylet": ("raylet", "/ray.rpc.NodeManagerService/GetNodeStats"),
    "object manager": ("raylet", "/ray.rpc.ObjectManagerService/Pull"),
    "driver and workers": ("", "/ray.rpc.CoreWorkerService/GetCoreWorkerStats"),
    "dashboard": ("dashboard.py", "GET /api/jobs/"),
    "dashboard's agent": ("ray::DashboardAgent", "/ray.rpc.ReporterService/GetTraceback"),
    "dashboard's agent, HTTP": ("ray::DashboardAgent", "GET /api/job_agent/jobs/"),
    "agent of runtime environments": ("ray::RuntimeEnvAgent", "GET /get_or_create_runtime_env"),
    "metrics of nodes": ("ray::DashboardAgent", METRICS),
    "metrics of the dashboard": ("dashboard.py", METRICS),
    "metrics of the autoscaler": ("monitor.py", METRICS),
}
"""What listens, by the names of SECURITY.md: in which process, and a request that gives something away."""
FIXED = {"dashboard's agent, HTTP": 52365, "metrics of the dashboard": 44227, "metrics of the autoscaler": 44217}
"""Ports that one Ray of a machine has."""


def asked(port: int, request: str) -> str:
    """What comes of a request without a token: "refused", "answered", or "unknown" where nothing there knows it."""
    if request.startswith("GET "):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", request.removeprefix("GET "))
            known = {200: "answered", 401: "unknown" if request == METRICS else "refused"}
            return known.get(connection.getresponse().status, "unknown")
        return "unknown"
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(request)(b"", timeout=10)
        except grpc.RpcError as error:
            known = {grpc.StatusCode.UNAUTHENTICATED: "refused", grpc.StatusCode.UNIMPLEMENTED: "unknown",
                     grpc.StatusCode.UNAVAILABLE: "unknown"}  # fmt: skip
            return known.get(error.code(), "answered")
    return "answered"


def listening(of: int) -> list[tuple[str, str, int]]:
    """(command, address, port) of what listens among a process and all under it."""
    found = []
    for process in (psutil.Process(of), *psutil.Process(of).children(recursive=True)):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            found += [(words, each.laddr.ip, each.laddr.port) for each in process.net_connections("inet")
                      if each.status == psutil.CONN_LISTEN]  # fmt: skip
    return found


def doors(of: int) -> dict[str, str]:
    """What each part of the Ray under a process does with those who have no token. All its ports have to be known."""
    found = {}
    for words, _, port in listening(of):
        answers = {name: asked(port, request) for name, (process, request) in DOORS.items() if process in words}
        known = {name: answer for name, answer in answers.items() if answer != "unknown"}
        metrics = {name: answer for name, answer in known.items() if DOORS[name][1] == METRICS}
        known = metrics or known  # Prometheus's client gives the same answer to all that it is asked
        assert len(known) == 1, f"{words} listens on {port}, of which SECURITY.md does not tell: {answers}"
        found |= known
    return found


@contextmanager
def going_on(folder: Path, **around: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A run that goes on, and what it said at its start."""
    folder.mkdir()
    (folder / "own.py").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_AUTH_MODE", raising=False)  # which Ray itself sets
        for name, value in around.items():
            patched.setenv(name, value)
        begun = command(folder, "run", "own.py", "--scale", "own", "--name", "r", "--set", "recipe.epochs=10000")
    try:
        wait_for(lambda: begun.poll() is not None or epochs_on_record(folder / "results" / "r") > 0)
        assert begun.poll() is None, begun.communicate()
        assert begun.stdout is not None
        yield begun, os.read(begun.stdout.fileno(), 2**16).decode()
    finally:
        begun.send_signal(signal.SIGTERM)
        begun.communicate(timeout=60)


JOIN = """
import sys
from tune_kd.execute import cluster as connection
cluster = connection.connect(sys.argv[1])
print(cluster.cpus > 0, cluster.guarded, cluster.parts[1].port)
connection.disconnect(cluster)
"""


def is_taken(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.long
def test_nothing_of_a_runs_ray_is_open_to_other_machines_nor_to_those_without_the_token(tmp_path: Path) -> None:
    taken = {name for name, port in FIXED.items() if is_taken(port)}  # by another Ray, as that of other tests
    with going_on(tmp_path / "r") as (begun, said):
        assert f"({monitoring.GUARDED})" in said and "warning" not in said
        there = listening(begun.pid)
        assert {address.removeprefix("::ffff:") for _, address, _ in there} == {"127.0.0.1"}
        metrics = {name for name, (_, request) in DOORS.items() if request == METRICS}
        expected = {name: "answered" if name in metrics else "refused" for name in DOORS if name not in taken}
        assert {name: answer for name, answer in doors(begun.pid).items() if name not in taken} == expected
        # Who has the token is served as before: another command that joins, Ray's own, and the dashboard with its logs.
        (control_store,) = (port for process, _, port in there if "gcs_server" in process)
        around = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
        for address in (f"127.0.0.1:{control_store}", "auto"):
            joined = subprocess.run([sys.executable, "-c", JOIN, address], env=around, capture_output=True, text=True,
                                    timeout=60)  # fmt: skip
            assert joined.stdout.startswith("True True"), joined.stderr
            assert address == "auto" or joined.stdout.split()[-1] == str(control_store)
        url = dashboard_of(said)
        if "dashboard's agent, HTTP" not in taken:  # Ray serves the logs of the one agent that has this port
            log = urllib.request.Request(f"{url}/api/v0/logs/file?node_ip=127.0.0.1&filename=tune_kd-r.log&lines=9",
                                         headers={"Authorization": f"Bearer {token()}"})  # fmt: skip
            with urllib.request.urlopen(log, timeout=30) as answer:
                assert b" s  " in answer.read()
        told = subprocess.run([sys.executable, "-m", "tune_kd", "dashboard", "--out", str(tmp_path / "r" / "results")],
                              env=around, capture_output=True, text=True, timeout=60).stdout  # fmt: skip
        assert f"r: {url}" in told and "asks for the token" in told and "warning" not in told


def dashboard_of(said: str) -> str:
    found = re.search(r"Ray dashboard: (http://127.0.0.1:[0-9]+)", said)
    assert found is not None, said
    return found[1]


OPEN = """
import sys
from tune_kd.execute import cluster as connection
cluster = connection.connect(None)
print(cluster.guarded, cluster.dashboard, flush=True)
sys.stdin.read()
connection.disconnect(cluster)
"""


@pytest.mark.long
def test_a_ray_without_a_token_is_known_to_be_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", OPEN], env=around, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        guarded, url = process.stdout.readline().split()
        assert guarded == "False"
        for name in ("control store", "dashboard"):  # as the warning says
            part, request = DOORS[name]
            answers = {asked(port, request) for words, _, port in listening(process.pid) if part in words}
            assert answers - {"unknown"} == {"answered"}
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # which is not that of this Ray
        assert call(monkeypatch, "dashboard", "--address", url) == 0
        process.communicate(timeout=60)
    told = capsys.readouterr().out.replace("\n", " ")
    assert monitoring.OPEN in told and "get-auth-token" not in told


@pytest.mark.slow  # in short: the test before
def test_of_a_ray_without_a_token_a_run_and_dashboard_warn(tmp_path: Path) -> None:
    with going_on(tmp_path / "r", RAY_AUTH_MODE="disabled") as (begun, said):
        assert monitoring.OPEN in said and "get-auth-token" not in said
        for name in ("control store", "dashboard"):  # as the warning says
            process, request = DOORS[name]
            answers = {asked(port, request) for words, _, port in listening(begun.pid) if process in words}
            assert answers - {"unknown"} == {"answered"}
        around = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}  # which is not that of the run
        told = subprocess.run([sys.executable, "-m", "tune_kd", "dashboard", "--out", str(tmp_path / "r" / "results")],
                              env=around, capture_output=True, text=True, timeout=60).stdout  # fmt: skip
        assert monitoring.OPEN in told and "get-auth-token" not in told
        (control_store,) = (port for process, _, port in listening(begun.pid) if "gcs_server" in process)
        joined = subprocess.run([sys.executable, "-c", JOIN, f"127.0.0.1:{control_store}"], capture_output=True,
                                text=True, timeout=60, env=around | {"RAY_AUTH_MODE": "disabled"})  # fmt: skip
        assert joined.stdout.startswith("True False"), joined.stderr


def test_security_md_tells_of_all_that_listens() -> None:
    told = (ROOT / "SECURITY.md").read_text()
    rows = {line.split("|")[1].strip() for line in told.splitlines() if line.startswith("|")}
    assert set(DOORS) <= rows
    assert f"Ray {ray.__version__}" in told


# Folders, sockets and logs of a run


def open_to_others(top: Path) -> list[str]:
    """What is below a folder and others can use, but for what is below a folder that is closed to them."""
    found = []
    for folder, inner, files in os.walk(top):
        modes = {}
        for name in (*inner, *files):
            with suppress(FileNotFoundError):  # it was temporary
                modes[name] = os.lstat(Path(folder, name)).st_mode
        used = {name: mode for name, mode in modes.items() if mode & 0o077 and not stat.S_ISLNK(mode)}
        inner[:] = [name for name in inner if name in used]
        found += [f"{stat.filemode(mode)} {Path(folder, name)}" for name, mode in used.items()]
    return found


def held_open(of: int, results: str) -> set[str]:
    """Files in shared places, but for results, that a process and all under it have open, and others can use."""
    found = set()
    for process in psutil.Process(of).children(recursive=True):
        with suppress(OSError):
            for each in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    place, status = os.readlink(each), os.stat(each)
                    if not place.startswith(("/dev/shm/", "/tmp/")) or place.startswith((results, str(ROOT))):
                        continue
                    if status.st_mode & 0o077:
                        found.add(f"{stat.filemode(status.st_mode)} {place}")
    return found


@pytest.mark.long
def test_what_a_run_makes_outside_of_its_results_is_its_users_alone_also_without_a_umask() -> None:
    """Its results are what the umask says, also those that Ray's workers write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets have short paths
        top = Path(short)
        own, work = top / "own", top / "work"
        (own / "tmp").mkdir(parents=True)
        work.mkdir()
        home = {"HOME": str(own), "TMPDIR": str(own / "tmp"), "RAY_TMPDIR": str(own / "tmp"), "PYTHONPATH": str(ROOT)}
        around = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "RAY_", "TORCH"))}
        open_ = set()
        begun = subprocess.Popen(
            [sys.executable, "-m", "tune_kd", "run", "ablation", "--scale", "smoke", "--name=r", "--track=mlflow"],
            cwd=work, env=around | home, umask=0, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while begun.poll() is None:
            open_ |= {*open_to_others(own), *held_open(begun.pid, str(work))}
            time.sleep(0.2)
        assert begun.stdout is not None
        with begun.stdout as said:
            assert begun.returncode == 0, said.read()
        open_ |= set(open_to_others(own))
        assert {each for each in open_ if not each.endswith(f"{own}/tmp")} == set()
        (session,) = (own / "tmp" / f"ray-{os.getuid()}" / "ray").glob("session_2*")
        made = [path for path in session.rglob("*") if path.is_file() or path.is_socket()]
        assert len(made) > 10
        mine = session / "artifacts"  # of Tune, written by the driver with the user's umask into the closed folder
        assert [path for path in made if path.stat().st_mode & 0o077 and mine not in path.parents] == []
        for folder in (work / "results", work / "results" / "r", *(work / "results" / "teachers").iterdir()):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o777, folder


@pytest.mark.parametrize("how", ["a link", "a file", "open to others", "of another user"])
def test_a_folder_that_another_made_for_our_sockets_is_not_used(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(environment, "SOCKET_BYTES", 1000)
    user = os.getuid()
    if how == "of another user":
        monkeypatch.setattr("os.getuid", lambda: user + 1)
    place = tmp_path / f"ray-{os.getuid()}"
    if how == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    elif how == "a file":
        place.write_text("")
    else:
        place.mkdir(mode=0o700)
        place.chmod(0o770 if how == "open to others" else 0o700)
    why = {"a link": "is not a folder", "a file": "is not a folder", "of another user": f"belongs to the user {user}",
           "open to others": "has the mode 0770 (0700 is allowed), so that others can use it"}[how]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tune-kd", "run", "ablation", "--scale", "smoke", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"tune_kd: RAY_TMPDIR is '{tmp_path}', so Ray's folder is {place}, which {why}; set RAY_TMPDIR to a writable "
        "folder with a short absolute path\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_log_beside_rays_follows_no_link_waits_for_no_fifo_and_is_its_users_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "fifo")
    before = os.umask(0)
    try:
        for name in ("link", "fifo", "log"):
            with ProgressDisplay(Console(stderr=True), "r", tmp_path / name) as view:
                view.say("hello")
    finally:
        os.umask(before)
    assert (tmp_path / "mine").read_text() == "mine"
    assert "hello" in (tmp_path / "log").read_text() and stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_code_that_pytorch_compiles_is_kept_where_others_cannot_put_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    environment.guard_code()
    kept = tmp_path / f"ray-{os.getuid()}"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{kept}/torchinductor"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    environment.guard_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    kept.chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(UserError, match="has the mode 0777"):
        environment.guard_code()


def test_folders_for_secrets_and_caches_are_made_for_their_user_alone_with_those_above_them(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        environment.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]

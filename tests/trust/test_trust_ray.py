"""What other users of this machine and its network can access of a run: Ray's ports, its folders, sockets and logs.

SECURITY.md states what is promised, and against whom.
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

# Ray's ports

METRICS = "GET /metrics"
SERVICES = {
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
"""Listening services by their names in SECURITY.md: the process, and a request that gives something away."""
FIXED = {"dashboard's agent, HTTP": 52365, "metrics of the dashboard": 44227, "metrics of the autoscaler": 44217}
"""Fixed ports, which only one Ray on a machine can have."""


def response(port: int, request: str) -> str:
    """Send a request without a token. Returns "refused", "answered", or "unknown" if the service does not know it."""
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
    """(command, address, port) of every listening socket of a process and its descendants."""
    found = []
    for process in (psutil.Process(of), *psutil.Process(of).children(recursive=True)):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            found += [(words, each.laddr.ip, each.laddr.port) for each in process.net_connections("inet")
                      if each.status == psutil.CONN_LISTEN]  # fmt: skip
    return found


def responses(of: int) -> dict[str, str]:
    """How each Ray service under a process responds to requests without a token. Fails for an unknown port."""
    found = {}
    for words, _, port in listening(of):
        answers = {name: response(port, request) for name, (process, request) in SERVICES.items() if process in words}
        known = {name: answer for name, answer in answers.items() if answer != "unknown"}
        metrics = {name: answer for name, answer in known.items() if SERVICES[name][1] == METRICS}
        known = metrics or known  # Prometheus's client gives the same answer to every request
        assert len(known) == 1, f"{words} listens on {port}, which SECURITY.md does not list: {answers}"
        found |= known
    return found


@contextmanager
def running(folder: Path, **around: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A run in progress, and its output so far."""
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
def test_a_runs_ray_listens_only_on_loopback_and_requires_the_token_except_for_metrics(tmp_path: Path) -> None:
    taken = {name for name, port in FIXED.items() if is_taken(port)}  # by another Ray, such as that of other tests
    with running(tmp_path / "r") as (begun, printed):
        assert f"({monitoring.GUARDED})" in printed and "warning" not in printed
        there = listening(begun.pid)
        assert {address.removeprefix("::ffff:") for _, address, _ in there} == {"127.0.0.1"}
        metrics = {name for name, (_, request) in SERVICES.items() if request == METRICS}
        expected = {name: "answered" if name in metrics else "refused" for name in SERVICES if name not in taken}
        assert {name: answer for name, answer in responses(begun.pid).items() if name not in taken} == expected
        # With the token, access works: commands can join by address or `auto`, and the dashboard shows the logs.
        (control_store,) = (port for process, _, port in there if "gcs_server" in process)
        around = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
        for address in (f"127.0.0.1:{control_store}", "auto"):
            joined = subprocess.run([sys.executable, "-c", JOIN, address], env=around, capture_output=True, text=True,
                                    timeout=60)  # fmt: skip
            assert joined.stdout.startswith("True True"), joined.stderr
            assert address == "auto" or joined.stdout.split()[-1] == str(control_store)
        url = dashboard_url(printed)
        if "dashboard's agent, HTTP" not in taken:  # Ray serves the logs of the one agent that has this port
            log = urllib.request.Request(f"{url}/api/v0/logs/file?node_ip=127.0.0.1&filename=tune_kd-r.log&lines=9",
                                         headers={"Authorization": f"Bearer {token()}"})  # fmt: skip
            with urllib.request.urlopen(log, timeout=30) as answer:
                assert b" s  " in answer.read()
        shown = subprocess.run([sys.executable, "-m", "tune_kd", "dashboard", "--out", str(tmp_path / "r" / "results")],
                               env=around, capture_output=True, text=True, timeout=60).stdout  # fmt: skip
        assert f"r: {url}" in shown and "asks for the token" in shown and "warning" not in shown


def dashboard_url(printed: str) -> str:
    found = re.search(r"Ray dashboard: (http://127.0.0.1:[0-9]+)", printed)
    assert found is not None, printed
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
def test_dashboard_warns_about_a_ray_without_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", OPEN], env=around, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        guarded, url = process.stdout.readline().split()
        assert guarded == "False"
        for name in ("control store", "dashboard"):  # as the warning says
            part, request = SERVICES[name]
            answers = {response(port, request) for words, _, port in listening(process.pid) if part in words}
            assert answers - {"unknown"} == {"answered"}
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # unlike this Ray
        assert call(monkeypatch, "dashboard", "--address", url) == 0
        process.communicate(timeout=60)
    output = capsys.readouterr().out.replace("\n", " ")
    assert monitoring.OPEN in output and "get-auth-token" not in output


@pytest.mark.slow  # the test above is the short version
def test_run_and_dashboard_warn_about_a_ray_without_a_token(tmp_path: Path) -> None:
    with running(tmp_path / "r", RAY_AUTH_MODE="disabled") as (begun, printed):
        assert monitoring.OPEN in printed and "get-auth-token" not in printed
        for name in ("control store", "dashboard"):  # as the warning says
            process, request = SERVICES[name]
            answers = {response(port, request) for words, _, port in listening(begun.pid) if process in words}
            assert answers - {"unknown"} == {"answered"}
        around = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}  # unlike the run
        shown = subprocess.run([sys.executable, "-m", "tune_kd", "dashboard", "--out", str(tmp_path / "r" / "results")],
                               env=around, capture_output=True, text=True, timeout=60).stdout  # fmt: skip
        assert monitoring.OPEN in shown and "get-auth-token" not in shown
        (control_store,) = (port for process, _, port in listening(begun.pid) if "gcs_server" in process)
        joined = subprocess.run([sys.executable, "-c", JOIN, f"127.0.0.1:{control_store}"], capture_output=True,
                                text=True, timeout=60, env=around | {"RAY_AUTH_MODE": "disabled"})  # fmt: skip
        assert joined.stdout.startswith("True False"), joined.stderr


def test_security_md_lists_every_listening_service() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
    assert set(SERVICES) <= rows
    assert f"Ray {ray.__version__}" in text


# Folders, sockets and logs of a run


def open_to_others(top: Path) -> list[str]:
    """Paths below a folder that other users can access. Folders that are closed to them are not entered."""
    found = []
    for folder, inner, files in os.walk(top):
        modes = {}
        for name in (*inner, *files):
            with suppress(FileNotFoundError):  # a temporary file is gone
                modes[name] = os.lstat(Path(folder, name)).st_mode
        used = {name: mode for name, mode in modes.items() if mode & 0o077 and not stat.S_ISLNK(mode)}
        inner[:] = [name for name in inner if name in used]
        found += [f"{stat.filemode(mode)} {Path(folder, name)}" for name, mode in used.items()]
    return found


def held_open(of: int, results: str) -> set[str]:
    """Files in shared places, except results, that descendants of a process have open and other users can access."""
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
def test_files_outside_the_results_are_private_to_the_user_even_with_umask_0() -> None:
    """Results follow the umask, including those that Ray's workers write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # paths of sockets must be short
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
        with begun.stdout as printed:
            assert begun.returncode == 0, printed.read()
        open_ |= set(open_to_others(own))
        assert {each for each in open_ if not each.endswith(f"{own}/tmp")} == set()
        (session,) = (own / "tmp" / f"ray-{os.getuid()}" / "ray").glob("session_2*")
        made = [path for path in session.rglob("*") if path.is_file() or path.is_socket()]
        assert len(made) > 10
        mine = session / "artifacts"  # Tune's; the driver writes it with the user's umask, but into the private folder
        assert [path for path in made if path.stat().st_mode & 0o077 and mine not in path.parents] == []
        for folder in (work / "results", work / "results" / "r", *(work / "results" / "teachers").iterdir()):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o777, folder


@pytest.mark.parametrize("how", ["a link", "a file", "open to others", "of another user"])
def test_an_unsafe_folder_for_sockets_is_rejected(
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


def test_the_log_follows_no_link_does_not_wait_for_a_fifo_and_is_private(tmp_path: Path) -> None:
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


def test_compiled_code_is_stored_in_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_make_private_creates_private_folders_including_parents(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        environment.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]

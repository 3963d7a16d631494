"""Processes of a run with faults: started in a new session, and found by a tag in their environment."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = str(Path(__file__).parents[2])
TAG = "TUNE_KD_FAULTS_TAG"
WITNESS = Path(__file__).with_name("witness.py")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
NOT_TRIALS = ("ray::IDLE", *AGENTS)
SHARED = "/dev/shm"
LINGER = 75.0  # seconds: Ray's agents wait a minute for a killed head before they exit


def environment(tag: str, home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a run's processes: this checkout, the tag, and folders below `home` for other files."""
    return {
        **os.environ,
        "PYTHONPATH": ROOT,
        TAG: tag,
        "SPT_NOENV": "1",  # otherwise the titles of Ray's workers would overwrite the tag
        "TMPDIR": str(home),
        "RAY_TMPDIR": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        **(extra or {}),
    }


# As in a container: a new process namespace, in which process 1 is the driver's parent.
CONTAINED = ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh")


def containable() -> bool:
    """Whether this user may create a process namespace."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*CONTAINED, "true"], stderr=subprocess.DEVNULL).returncode == 0
    )


def start(
    log: Path, arguments: Sequence[str], env: Mapping[str, str], output: Path, checkpoint_every: float = 30.0,
    within: Sequence[str] = (),
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a witnessed `tune_kd` command, wrapped in the command `within`. Its output goes to a file, since a full
    pipe would block it."""
    every = ["--checkpoint-every", str(checkpoint_every)]
    command = [*within, sys.executable, str(WITNESS), *every, str(log), "--", *arguments]
    with output.open("ab") as sink:
        return subprocess.Popen(
            command, env=dict(env), cwd=log.parent, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )


def driver_of(guard: "subprocess.Popen[bytes]") -> psutil.Process:
    """Return the driver: the first child of the process that was started. Raises `IndexError` if it has none."""
    return psutil.Process(guard.pid).children()[0]


def print_stack(guard: "subprocess.Popen[bytes]") -> None:
    """Make a hung driver print its stack."""
    with suppress(psutil.Error, IndexError):
        driver_of(guard).send_signal(signal.SIGUSR2)


def tagged(tag: str) -> list[psutil.Process]:
    """Return all living processes with this tag, whatever their parents."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def workers(tag: str) -> list[psutil.Process]:
    """Return the processes that train trials. Their titles name the trials."""
    return [each for each in tagged(tag) if (title := _title(each)).startswith("ray::") and title not in NOT_TRIALS]


def raylets(tag: str) -> list[psutil.Process]:
    return [each for each in tagged(tag) if Path(_title(each)).name == "raylet"]


def gone(tag: str, seconds: float, besides: Sequence[str] = ()) -> bool:
    """Wait until no process with the tag is left, except those with titles in `besides`. Returns False if some are."""
    end = time.monotonic() + seconds
    while any(_title(each) not in besides for each in tagged(tag)):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def clean_up(tag: str) -> None:
    """Kill the remaining processes of a run, by process id."""
    for process in tagged(tag):
        with suppress(psutil.Error):
            process.kill()
    gone(tag, 10)


def shared_memory() -> set[str]:
    """Return the files in /dev/shm that no living process has open or mapped: others may be using those."""
    there = os.path.isdir(SHARED)
    names = {each.name for each in os.scandir(SHARED) if not each.is_dir()} if there else set[str]()
    return names - _in_use() if names else names


def _in_use() -> set[str]:
    found: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            paths = [*(each.path for each in process.memory_maps()), *(each.path for each in process.open_files())]
            found |= {Path(path).name for path in paths if path.startswith(SHARED)}
    return found


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str((process.cmdline() or [""])[0]).strip()
    return ""

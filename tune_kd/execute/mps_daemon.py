"""NVIDIA's MPS on this machine, started for the trials of one run and stopped at its end.

The daemon works in a private folder, `folder_of(run)`. The path depends only on the run, so a resumed run finds and
ends a daemon that a killed driver left. A small watcher process ends the daemon if the process that started it dies.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from tune_kd.system.environment import intruded, python_path

PROGRAM = "nvidia-cuda-mps-control"
PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
STARTING = 20.0  # seconds to wait for the daemon, which usually takes one
ENDING = 4.0  # seconds to wait for its end before it is killed; a preempted run has 15 for everything
BASE = Path("/tmp")  # not TMPDIR, which differs between nodes; and the path of a socket must be short


class NotStarted(RuntimeError):
    """MPS cannot be started on this machine; the message says why."""


def folder_of(run: str) -> Path:
    """Return the folder for the MPS of a run. `run` is the absolute path or URL of the run."""
    return BASE / f"tune_kd-mps-{os.getuid()}-{hashlib.sha256(run.encode()).hexdigest()[:12]}"


def variables(folder: Path) -> dict[str, str]:
    """Return the environment variables that make the daemon, its control program and its clients use a folder. Set them
    in a client before it initializes CUDA."""
    return {PIPE: str(folder / "pipe"), LOG: str(folder / "log")}


def is_there() -> bool:
    """Whether this machine has NVIDIA's MPS program."""
    return shutil.which(PROGRAM) is not None


@contextmanager
def started(folder: Path) -> Iterator[None]:
    """Within this context, an MPS of our own serves the clients of a folder. It also ends if this process dies. Raises
    `NotStarted`."""
    process = start(folder)
    watcher = None
    try:
        watcher = _watch(folder, process)
        yield
    finally:
        end(folder)
        if watcher is not None:
            with suppress(OSError):
                watcher.write(b"ended\n")  # so that the watcher does not end a later daemon
                watcher.close()


@contextmanager
def for_children() -> Iterator[dict[str, str]]:
    """Within this context, an MPS of our own serves child processes. Yields the environment variables to start them
    with. Raises `NotStarted`."""
    folder = folder_of(f"process {os.getpid()}")
    with started(folder):
        yield variables(folder)


def start(folder: Path) -> int:
    """Start a daemon and return its process id. First ends a daemon that a killed run left. Raises `NotStarted`."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise NotStarted(f"there is no {PROGRAM}")
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if (why := intruded(folder)) is not None:
            raise NotStarted(f"{folder} {why}")
        end(folder)
        for each in (folder, *map(Path, variables(folder).values())):
            each.mkdir(mode=0o700)
        return _start(program, folder)
    except OSError as error:
        raise NotStarted(f"{error.filename or folder}: {error.strerror}") from error


def _start(program: str, folder: Path) -> int:
    said = folder / "log" / "start.log"  # not a pipe, which would stay open as long as the daemon lives
    with said.open("wb") as sink:
        launched = subprocess.Popen(
            [program, "-d"],
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        why = _why_not(launched, folder, said)
    except BaseException:  # also for a signal
        _give_up(launched, folder)
        raise
    if why is not None:
        _give_up(launched, folder)
        raise NotStarted(why)
    found = daemon(folder)
    assert found is not None
    return found.pid


def _why_not(launched: "subprocess.Popen[bytes]", folder: Path, said: Path) -> str | None:
    """Wait for the daemon. Returns None once it runs, or the reason if it does not start."""
    last = time.monotonic() + STARTING
    while time.monotonic() < last:
        if launched.poll():
            words = said.read_text(errors="replace").split()
            return f"{PROGRAM} exited with {launched.returncode}{': ' if words else ''}{' '.join(words)[:200]}"
        if launched.poll() == 0 and (folder / "pipe" / "control").exists() and daemon(folder) is not None:
            return None
        time.sleep(0.05)
    return f"{PROGRAM} did not start within {STARTING:.0f} s"


def _give_up(launched: "subprocess.Popen[bytes]", folder: Path) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    end(folder)


def daemon(folder: Path) -> psutil.Process | None:
    """Return the daemon of a folder; None if it is not alive."""
    with suppress(OSError, ValueError, psutil.Error):
        number = int((folder / "pipe" / f"{PROGRAM}.pid").read_text())
        process = psutil.Process(number)
        if _lives(process) and _serves(process, folder):
            return process
    return None


def _serves(process: psutil.Process, folder: Path) -> bool:
    """Whether a process is the daemon of a folder. The recorded process id may belong to another process by now."""
    try:
        return process.environ().get(PIPE) == variables(folder)[PIPE]
    except psutil.AccessDenied:  # a process may hide its memory even from its own user
        return PROGRAM.startswith(process.name())  # Linux keeps the first 15 characters


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end(folder: Path) -> None:
    """End the daemon of a folder and its servers, if any, and remove the folder. Kills processes that do not end within
    `ENDING` seconds. Does nothing to another user's folder."""
    try:
        if intruded(folder) is not None:
            return
    except FileNotFoundError:
        return
    if (found := daemon(folder)) is not None:
        with suppress(psutil.Error):
            _end(found, folder)
    shutil.rmtree(folder, ignore_errors=True)


def _end(process: psutil.Process, folder: Path) -> None:
    everything = [process, *process.children(recursive=True)]
    last = time.monotonic() + ENDING
    with suppress(OSError, subprocess.SubprocessError):  # the program may be missing, or hang
        subprocess.run(
            [PROGRAM],
            input=b"quit\n",
            env=_environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=ENDING,
            check=True,
        )
        while any(map(_lives, everything)) and time.monotonic() < last:
            time.sleep(0.02)
    for each in everything:
        with suppress(psutil.Error):
            each.kill()
    last = time.monotonic() + 1.0
    while any(map(_lives, everything)) and time.monotonic() < last:
        time.sleep(0.02)


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of the daemon: this one without CUDA_VISIBLE_DEVICES.

    Ray hides the GPUs from an actor that requests none. And a daemon with this variable renumbers the GPUs, so that a
    client's own CUDA_VISIBLE_DEVICES would select other GPUs.
    """
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | variables(folder)


# The watcher

WATCH = "import sys; from tune_kd.execute import mps_daemon; mps_daemon.watch(*sys.argv[1:])"


def _watch(folder: Path, process: int) -> IO[bytes]:
    """Start the watcher and return a pipe to it. When the pipe closes, as at this process's death, the watcher ends the
    daemon."""
    starter = subprocess.Popen(
        [sys.executable, "-P", "-c", WATCH, str(folder), str(process)],
        env=os.environ | python_path(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert starter.stdin is not None
    starter.wait()  # it forks the watcher and exits. Ray kills a worker's children, but not this orphan
    return starter.stdin


def watch(folder: str, process: str) -> None:
    """Fork, and wait in the child for a line on standard input. If the input ends without a line, end the daemon."""
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # sent to the whole job; let the run shut down first
        signal.signal(number, signal.SIG_IGN)
    if not sys.stdin.readline():
        found = daemon(Path(folder))
        if found is not None and found.pid == int(process):
            end(Path(folder))

"""A fake of NVIDIA's `nvidia-cuda-mps-control`. As documented, `-d` starts a daemon in the background, with its process
id and a socket in CUDA_MPS_PIPE_DIRECTORY. Without `-d`, the program sends commands from standard input to that daemon.

The daemon keeps its standard output and error open, as badly behaved daemons do. It logs its actions as lines of JSON.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

NAME = "nvidia-cuda-mps-control"
PROGRAM = """#!{python} -S
import json, os, signal, socket, sys, time
how, log = {how!r}, {log!r}
pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere")
pid_file, control = pipe + "/nvidia-cuda-mps-control.pid", pipe + "/control"

def record(what):
    with open(log, "a") as lines:
        seen = {{name: value for name, value in os.environ.items() if name.startswith("CUDA_")}}
        lines.write(json.dumps({{"what": what, "pid": os.getpid(), "at": time.time(), **seen}}) + "\\n")

if sys.argv[1:] == ["-d"]:
    if how == "refuses":
        sys.exit("Cannot start: an instance of this daemon is already running")
    if how == "hangs":
        record("hangs")
        time.sleep(600)
    server = socket.socket(socket.AF_UNIX)
    server.bind(control)
    server.listen()
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    open(pid_file, "w").write(str(os.getpid()))
    record("started")
    while True:
        client, _ = server.accept()
        if client.recv(100).strip() == b"quit":
            break
        client.close()
    record("quit received")
    if how == "stays":
        time.sleep(600)
    os.unlink(control)
    os.unlink(pid_file)
    record("ended")
else:
    daemon = socket.socket(socket.AF_UNIX)
    try:
        daemon.connect(control)
    except OSError:
        sys.exit("Cannot find MPS control daemon process")
    daemon.sendall(sys.stdin.read().encode())
    daemon.recv(1)
"""


def install(folder: Path, how: str = "") -> Path:
    """Write the program into a folder for PATH, and return the folder. `how` is empty or the fault of the daemon:
    "refuses" (to start), "hangs" (on start) or "stays" (after `quit`)."""
    folder.mkdir(exist_ok=True)
    file = folder / NAME
    file.write_text(PROGRAM.format(python=os.path.realpath(sys.executable), how=how, log=str(folder / "log.jsonl")))
    file.chmod(0o755)
    return folder


def log(folder: Path, what: str = "") -> list[dict[str, Any]]:
    """Return the logged actions of the program, in order: all, or those named `what`."""
    with suppress(FileNotFoundError):
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [line for line in lines if what in ("", line["what"])]
    return []


def alive(folder: Path) -> list[int]:
    """Return the process ids of the daemons that are alive."""
    return [line["pid"] for line in log(folder, "started") if _alive(line["pid"])]


def _alive(number: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def kill(folder: Path) -> None:
    """Kill the remaining processes of the program."""
    for number in {line["pid"] for line in log(folder)}:
        with suppress(ProcessLookupError):
            if _alive(number) and NAME in " ".join(psutil.Process(number).cmdline()):
                os.kill(number, signal.SIGKILL)


def serves() -> bool:
    """Whether CUDA would use MPS in this environment. A fake of `tune_kd.execute.mps.serves`."""
    return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere") + "/control")

"""A stand-in for NVIDIA's `nvidia-cuda-mps-control`, which behaves as documented: `-d` starts a daemon in the
background, with its process id and a socket in CUDA_MPS_PIPE_DIRECTORY; without it, commands on standard input go to
that daemon.

Like the worst of daemons it keeps its standard output and error open. It logs what it does, a line of JSON each.
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
number, place = pipe + "/nvidia-cuda-mps-control.pid", pipe + "/control"

def tell(what):
    with open(log, "a") as lines:
        seen = {{name: value for name, value in os.environ.items() if name.startswith("CUDA_")}}
        lines.write(json.dumps({{"what": what, "pid": os.getpid(), "at": time.time(), **seen}}) + "\\n")

if sys.argv[1:] == ["-d"]:
    if how == "refuses":
        sys.exit("Cannot start: an instance of this daemon is already running")
    if how == "hangs":
        tell("hangs")
        time.sleep(600)
    there = socket.socket(socket.AF_UNIX)
    there.bind(place)
    there.listen()
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    open(number, "w").write(str(os.getpid()))
    tell("started")
    while True:
        asked, _ = there.accept()
        if asked.recv(100).strip() == b"quit":
            break
        asked.close()
    tell("asked to end")
    if how == "stays":
        time.sleep(600)
    os.unlink(place)
    os.unlink(number)
    tell("ended")
else:
    there = socket.socket(socket.AF_UNIX)
    try:
        there.connect(place)
    except OSError:
        sys.exit("Cannot find MPS control daemon process")
    there.sendall(sys.stdin.read().encode())
    there.recv(1)
"""


def install(folder: Path, how: str = "") -> Path:
    """Write the program into a folder for PATH, and return the folder. `how` is empty, "refuses" (to start), "hangs"
    (while it starts) or "stays" (when it is asked to end)."""
    folder.mkdir(exist_ok=True)
    file = folder / NAME
    file.write_text(PROGRAM.format(python=os.path.realpath(sys.executable), how=how, log=str(folder / "log.jsonl")))
    file.chmod(0o755)
    return folder


def log(folder: Path, what: str = "") -> list[dict[str, Any]]:
    """What the program did, in order."""
    with suppress(FileNotFoundError):
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [line for line in lines if what in ("", line["what"])]
    return []


def living(folder: Path) -> list[int]:
    """The process ids of daemons that were started and live."""
    return [line["pid"] for line in log(folder, "started") if _lives(line["pid"])]


def _lives(number: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def kill(folder: Path) -> None:
    """Kill what was left behind."""
    for number in {line["pid"] for line in log(folder)}:
        with suppress(ProcessLookupError):
            if _lives(number) and NAME in " ".join(psutil.Process(number).cmdline()):
                os.kill(number, signal.SIGKILL)


def serves() -> bool:
    """What CUDA would say of a GPU, to a process of this environment: see `tune_kd.execute.mps.serves`."""
    return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere") + "/control")

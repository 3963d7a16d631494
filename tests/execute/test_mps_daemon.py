"""Start, find and end MPS on one machine, with a fake of NVIDIA's program."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import mps_control
from commands import wait_for
from tune_kd.execute import mps_daemon
from tune_kd.execute.mps_daemon import NotStarted, folder_of, is_there, start, started, variables

Installed = Callable[..., Path]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Puts the fake program on PATH, and kills its remaining processes after the test."""
    here = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")

    def install(how: str = "") -> Path:
        return mps_control.install(here, how)

    yield install
    mps_control.kill(here)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    found = folder_of(str(tmp_path))
    yield found
    mps_daemon.end(found)


def test_mps_serves_from_a_private_folder_sees_all_gpus_and_leaves_nothing_behind(
    installed: Installed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = installed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for actors without a GPU
    with started(folder):
        (line,) = mps_control.log(program)
        assert mps_control.alive(program) == [line["pid"]]
        assert {name: line[name] for name in variables(folder)} == variables(folder)
        assert "CUDA_VISIBLE_DEVICES" not in line
        for each in (folder, *map(Path, variables(folder).values())):
            assert stat.S_IMODE(each.stat().st_mode) == 0o700
        assert len(os.fsencode(folder / "pipe" / "control")) < 100
    assert not mps_control.alive(program) and not folder.exists()
    assert [line["what"] for line in mps_control.log(program)] == ["started", "quit received", "ended"]


def test_an_error_within_the_context_ends_mps_too(installed: Installed, folder: Path) -> None:
    program = installed()
    with pytest.raises(SystemExit), started(folder):
        raise SystemExit(143)
    assert mps_control.log(program, "ended") and not folder.exists()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (
            "refuses",
            "nvidia-cuda-mps-control exited with 1: Cannot start: an instance of this daemon is already running",
        ),
        ("hangs", "nvidia-cuda-mps-control did not start within 1 s"),
    ],
)
def test_a_program_that_cannot_start_is_ended_and_the_reason_is_raised(
    installed: Installed, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str, why: str
) -> None:
    program = installed(how)
    monkeypatch.setattr(mps_daemon, "STARTING", 1.0)
    with pytest.raises(NotStarted) as error, started(folder):
        pass
    assert str(error.value) == why
    assert not folder.exists()
    assert not any(psutil.pid_exists(line["pid"]) for line in mps_control.log(program))


def test_without_the_program_no_folder_is_created(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not is_there()
    with pytest.raises(NotStarted, match="there is no nvidia-cuda-mps-control"):
        start(folder)
    assert not folder.exists()


def test_a_daemon_that_does_not_end_is_killed(
    installed: Installed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = installed("stays")
    monkeypatch.setattr(mps_daemon, "ENDING", 0.5)
    began = time.monotonic()
    with started(folder):
        pass
    assert [line["what"] for line in mps_control.log(program)] == ["started", "quit received"]
    assert not mps_control.alive(program) and not folder.exists()
    assert time.monotonic() - began < 10


def test_a_daemon_that_a_killed_run_left_is_ended_before_a_new_one_starts(installed: Installed, folder: Path) -> None:
    program = installed()
    left = start(folder)  # without a watcher
    with started(folder):
        (running,) = mps_control.alive(program)
        assert running != left
    assert [line["what"] for line in mps_control.log(program)][:3] == ["started", "quit received", "ended"]


def test_files_of_a_dead_daemon_are_no_obstacle_even_if_its_process_id_was_reused(
    installed: Installed, folder: Path
) -> None:
    program = installed()
    os.kill(start(folder), signal.SIGKILL)
    other = subprocess.Popen(["sleep", "600"])
    try:
        (folder / "pipe" / f"{mps_daemon.PROGRAM}.pid").write_text(str(other.pid))
        with started(folder):
            assert len(mps_control.alive(program)) == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("made", ["a link", "open to others", "a file"])
def test_a_folder_that_is_not_private_is_refused_and_left_alone(
    installed: Installed, folder: Path, tmp_path: Path, made: str
) -> None:
    program, other = installed(), tmp_path / "other"
    other.mkdir(mode=0o700)
    if made == "a link":
        folder.symlink_to(other)
    elif made == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    try:
        with pytest.raises(NotStarted, match=f"{folder} (is not a folder|has the mode 0755)"):
            start(folder)
        assert folder.exists() and other.exists() and not mps_control.log(program)
    finally:
        folder.rmdir() if made == "open to others" else folder.unlink()


def test_a_folder_of_another_user_is_refused(
    installed: Installed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    folder.mkdir(mode=0o700)
    with monkeypatch.context() as another:
        another.setattr("os.getuid", lambda: 54321)
        with pytest.raises(NotStarted, match="belongs to the user"):
            start(folder)
    assert folder.exists()


HOLDER = """
import sys, time
from pathlib import Path
from tune_kd.execute.mps_daemon import started
with started(Path(sys.argv[1])):
    print("serving", flush=True)
    time.sleep(600)
"""


def test_mps_ends_if_the_process_that_started_it_is_killed_and_holds_no_output_open(
    installed: Installed, folder: Path
) -> None:
    program = installed()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == "serving\n"
    assert len(mps_control.alive(program)) == 1
    holder.kill()
    holder.communicate(timeout=10)  # waits until all processes have closed its output
    wait_for(lambda: not mps_control.alive(program) and not folder.exists(), 20)
    assert mps_control.log(program, "ended")


def test_a_late_watcher_does_not_end_the_next_daemon(installed: Installed, folder: Path) -> None:
    program = installed()
    with started(folder):
        (running,) = mps_control.alive(program)
        watcher = mps_daemon._watch(folder, running + 1)  # the watcher of a daemon that no longer exists
        watcher.close()
        time.sleep(1.5)
        assert mps_control.alive(program) == [running]


def test_mps_for_child_processes_serves_only_them_and_ends_with_the_context(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = installed()
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    with mps_daemon.for_children() as variables:
        assert not mps_control.serves()
        with monkeypatch.context() as child:
            for name, value in variables.items():
                child.setenv(name, value)
            assert mps_control.serves()
    assert not mps_control.alive(program)

"""Signals that end a command, and the guard process that decides its exit status. `python tests/faults leaving` tests
both with Ray."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tune_kd.system.signals import SIGNALS

COMMAND = """
import os, subprocess, sys, time
from tune_kd.system import guard, signals

guard.WITHIN = {within}


def sleeper():
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=nowhere, stderr=nowhere)


def command():
    with signals.left_by_signals(), signals.advising("go on with: this"):
        child = sleeper()
        work(child)


def work(child):
{body}


guard.guarded(command)
"""
SLEEPS = """
    print(child.pid, flush=True)
    time.sleep(30)
"""
DRAINS = """
    drained = []
    with signals.handled(drained.append):
        print(child.pid, flush=True)
        while not drained:
            time.sleep(0.05)
        time.sleep({seconds})
        print("drained", drained, flush=True)
    child.kill()
"""
STUCK = """
    while True:
        try:
            print(child.pid, flush=True)
            time.sleep(30)
        except SystemExit:
            pass
"""


def begun(tmp_path: Path, body: str, *before: str, within: float = 10.0) -> "tuple[subprocess.Popen[str], int]":
    """Start a command in its own process group. Returns it and the id of the process that it started."""
    (tmp_path / "command.py").write_text(COMMAND.format(body=body, within=within))
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = subprocess.Popen(
        [*before, sys.executable, "command.py"], cwd=tmp_path, text=True, start_new_session=True, env=here,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert command.stdout is not None
    return command, int(command.stdout.readline())  # it now waits


def gone(child: int) -> bool:
    end = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def driver_of(command: "subprocess.Popen[str]") -> psutil.Process:
    """The process in which the command itself runs."""
    (driver,) = psutil.Process(command.pid).children()
    return driver


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ended_by_a_signal_exits_with_128_plus_its_number(number: signal.Signals, tmp_path: Path) -> None:
    command, child = begun(tmp_path, SLEEPS)
    command.send_signal(number)
    _, errors = command.communicate(timeout=10)
    assert (command.returncode, errors) == (128 + number, "")
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_drains_on_a_signal_and_exits_with_128_plus_its_number(
    number: signal.Signals, tmp_path: Path
) -> None:
    command, _ = begun(tmp_path, DRAINS.format(seconds=0.1))
    command.send_signal(number)
    said, _ = command.communicate(timeout=10)
    assert command.returncode == 128 + number
    assert said == f"drained [{int(number)}]\n"


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")
def test_the_two_signals_sent_by_timeout_count_as_one(tmp_path: Path) -> None:
    command, _ = begun(tmp_path, DRAINS.format(seconds=1.0), "timeout", "--preserve-status", "1")
    said, errors = command.communicate(timeout=10)
    assert (command.returncode, errors) == (143, "")
    assert said == "drained [15]\n"


def test_a_second_signal_ends_all_processes_at_once_and_prints_how_to_resume(tmp_path: Path) -> None:
    command, child = begun(tmp_path, DRAINS.format(seconds=30))
    command.send_signal(signal.SIGINT)
    time.sleep(0.7)
    started = time.monotonic()
    command.send_signal(signal.SIGTERM)
    said, errors = command.communicate(timeout=10)
    assert command.returncode == 130, "of the first"
    assert time.monotonic() - started < 5
    assert (said, errors) == ("", "tune_kd: interrupted; go on with: this\n")
    assert gone(child)


def test_a_command_that_does_not_exit_on_a_signal_is_killed_after_the_time_limit(tmp_path: Path) -> None:
    command, child = begun(tmp_path, STUCK, within=1.0)
    command.send_signal(signal.SIGUSR1)
    _, errors = command.communicate(timeout=10)
    assert command.returncode == 138
    assert errors == "tune_kd: interrupted, and some processes did not end within 1 s; go on with: this\n"
    assert gone(child)


HELD = """
    try:
        with signals.held_back():
            print(child.pid, flush=True)
            shielded = sleeper()
            print(shielded.pid, flush=True)
            time.sleep(2)
        print("never", flush=True)
    finally:
        time.sleep(1)
        print("cleaned up", flush=True)
"""


def test_held_back_signals_spare_processes_started_meanwhile_and_are_delivered_later(tmp_path: Path) -> None:
    command, child = begun(tmp_path, HELD)
    assert command.stdout is not None
    shielded = int(command.stdout.readline())
    started = time.monotonic()
    for number in SIGNALS:
        os.kill(shielded, number)
        os.kill(child, number)
    os.killpg(command.pid, signal.SIGTERM)
    said, errors = command.communicate(timeout=10)
    assert time.monotonic() - started > 1
    assert (command.returncode, said, errors) == (143, "cleaned up\n", "")
    assert gone(child), "which was started before"
    assert psutil.Process(shielded).status() != psutil.STATUS_ZOMBIE
    os.kill(shielded, signal.SIGKILL)


def test_a_hang_while_signals_are_held_back_is_killed_after_the_time_limit(tmp_path: Path) -> None:
    command, child = begun(tmp_path, HELD.replace("time.sleep(2)", "time.sleep(30)"), within=1.0)
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=10)
    assert command.returncode == 143
    assert re.fullmatch(r"tune_kd: interrupted, and some processes did not end within 1 s; go on with: this\n", errors)
    assert gone(child)


ENDS = """
    print(child.pid, flush=True)
    child.kill()
    {end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("return", 0), ("sys.exit(0)", 0), ("sys.exit(1)", 1), ("sys.exit(2)", 2), ("sys.exit()", 0), ("sys.exit('')", 1)],
)
def test_the_guard_exits_with_the_status_of_its_command(end: str, status: int, tmp_path: Path) -> None:
    command, _ = begun(tmp_path, ENDS.format(end=end))
    command.communicate(timeout=10)
    assert command.returncode == status


@pytest.mark.parametrize(
    ("end", "how"), [("os._exit(1)", "with 1"), ("os._exit(0)", "with 0"), ("os.abort()", "by signal 6")]
)
def test_a_driver_ended_by_rays_core_exits_with_3_and_leaves_no_process(end: str, how: str, tmp_path: Path) -> None:
    """Ray's core calls `_exit`: no `finally` and no Python handler runs."""
    command, child = begun(tmp_path, f"\n    print(child.pid, flush=True)\n    {end}\n")
    _, errors = command.communicate(timeout=10)
    assert command.returncode == 3
    assert f"tune_kd: Ray died: its core ended the driver {how}; go on with: this\n" in errors
    assert gone(child)


def test_a_driver_ended_by_ray_while_it_drains_exits_with_the_status_of_the_signal(tmp_path: Path) -> None:
    body = DRAINS.format(seconds=0.2).replace('print("drained", drained, flush=True)', "os._exit(1)")
    command, child = begun(tmp_path, body)
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=10)
    assert (command.returncode, errors) == (143, "tune_kd: interrupted; go on with: this\n")
    assert gone(child)


def test_a_signal_to_the_driver_is_handled_like_one_to_its_command(tmp_path: Path) -> None:
    command, child = begun(tmp_path, STUCK, within=1.0)
    driver_of(command).send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=10)
    assert command.returncode == 143
    assert errors == "tune_kd: interrupted, and some processes did not end within 1 s; go on with: this\n"
    assert gone(child)


def test_killing_either_the_guard_or_the_driver_ends_the_other(tmp_path: Path) -> None:
    command, child = begun(tmp_path, SLEEPS)
    driver = driver_of(command)
    command.kill()
    command.communicate(timeout=10)
    assert gone(driver.pid)
    os.kill(child, signal.SIGKILL)  # Ray's processes notice this themselves

    command, child = begun(tmp_path, SLEEPS)
    driver_of(command).kill()
    command.communicate(timeout=10)
    assert command.returncode == -signal.SIGKILL, "as if it had been killed itself"
    assert gone(child)


def test_signals_within_half_a_second_count_as_one(tmp_path: Path) -> None:
    command, _ = begun(tmp_path, DRAINS.format(seconds=0.6))
    for _ in range(3):
        command.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    said, errors = command.communicate(timeout=10)
    assert (command.returncode, said, errors) == (143, "drained [15]\n", "")


def test_advice_with_a_newline_in_a_folder_name_is_printed_unchanged(tmp_path: Path) -> None:
    """It is not mistaken for an exit status: messages from the driver to the guard are not separated by newlines."""
    body = SLEEPS.replace("time.sleep(30)", """
    with signals.advising("go on with: 'results\\nended 0'"):
        os.kill(os.getpid(), signal.SIGABRT)
""").replace("    print", "    import signal\n    print")  # fmt: skip
    command, _ = begun(tmp_path, body)
    _, errors = command.communicate(timeout=10)
    assert command.returncode == 3
    assert "go on with: 'results\nended 0'" in errors

"""Signals that ask a command to leave: it drains or unwinds in order, and ends with 128 and the signal's number.

That the end comes in time, whatever the command waits for, is seen to by the process around it: see
`tune_kd.system.guard`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from tune_kd.system.characters import visible

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a command to leave; the last is what a cluster's scheduler may send before it takes a machine away."""

_asked: list[int] = []  # by which signal this command was asked to leave
_advice: list[str] = []  # how to go on, while there is something to go on with
_guard: list[int] = []  # the pipe to the process around this one, where there is one


def guarded_through(pipe: int) -> None:
    """Have the process around this one told, sentence by sentence, what it cannot see."""
    _guard[:] = [pipe]


def tell_guard(line: str) -> None:
    """Tell the process around this one something, where there is one."""
    for pipe in _guard:
        with suppress(OSError):
            os.write(pipe, f"{line}\0".encode(errors="backslashreplace"))


def process_id() -> int:
    """The process that a user knows, and may send signals to: the one around this one, or this one."""
    return os.getppid() if _guard else os.getpid()


def asked() -> int | None:
    """The signal that asked this command to leave, or null."""
    return _asked[0] if _asked else None


def note(number: int) -> None:
    """Take note of the first signal; also of one that another's handler took."""
    if not _asked:
        _asked.append(number)
        tell_guard(f"asked {number}")


def check() -> None:
    """Leave where this command was asked to, and has not done so: what a handler raises is lost where it interrupts
    what catches everything, such as an import of a library that tries what is installed."""
    if _asked:
        raise SystemExit(128 + _asked[0])


@contextmanager
def advising(sentence: str) -> Iterator[None]:
    """Have a command that is ended at once say how to go on."""
    _advice.append(sentence)
    tell_guard(f"advice {sentence}")
    try:
        yield
    finally:
        _advice.pop()


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Call a handler, in the main thread, with the first signal of a command, and with the others nothing. Elsewhere
    than in the main thread, which alone may set handlers, do nothing."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not _asked:
            note(number)
            handler(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def left_by_signals() -> Iterator[None]:
    """A signal ends the command with 128 and its number, whatever it is at."""

    def leave_in_order(number: int) -> None:
        raise SystemExit(128 + number)

    _asked.clear()
    try:
        with handled(leave_in_order):
            yield
    finally:
        check()


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver signals when this is over, and have the processes that are started meanwhile never get any.

    They inherit that these signals are blocked. So Ray goes on where a signal is sent to all processes of a job, as
    `timeout` does to a process group, and `scancel`, systemd and Kubernetes to a cgroup, and trials can end their
    epoch. Ray ends its processes with SIGKILL where SIGTERM does nothing. Its dashboard alone, without which a run goes
    on, unblocks SIGINT and SIGTERM again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _restore(before)
        if held:
            signal.raise_signal(held[0])


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # of a library in C, which cannot be set from here
            signal.signal(number, handler)


def leave(status: int, sentence: str) -> NoReturn:
    """End this process and those that it started, at once, whatever its threads wait for. The status is that of the
    signal that came, where one did."""
    status = 128 + _asked[0] if _asked else status
    say("; ".join([sentence, *(each for each in _advice[-1:] if each not in sentence)]))
    kill_children()
    tell_guard(f"ended {status}")
    os._exit(status)


def say(sentence: str) -> None:
    """Say a last sentence on standard error, where nothing that buffers may work any more."""
    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # the live view hides it
    with suppress(OSError):
        os.write(2, f"{cursor}tune_kd: {visible(sentence)}\n".encode(errors="backslashreplace"))


def kill_children() -> None:
    """Kill what this process started, and what that started: Ray's agents would stay for a minute."""
    import psutil  # takes long, and most commands end by themselves

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()

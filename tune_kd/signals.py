"""Signals that ask a command to leave. What leaves in order does so in the main thread; a thread of its own sees to it
that the end comes in time, whatever the main thread waits for."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a command to leave; the last is what a cluster's scheduler may send before it takes a machine away."""
WITHIN = 15.0  # seconds from a signal to the end at the latest; SLURM and Kubernetes kill after 30
ONE = 0.5  # seconds in which signals are one: `timeout` sends its own to the command, and again to its process group

_asked: list[int] = []  # by which signal this command was asked to leave
_advice: list[str] = []  # how to go on, while there is something to go on with


def asked() -> int | None:
    """The signal that asked this command to leave, or null."""
    return _asked[0] if _asked else None


def note(number: int) -> None:
    """Say that a signal came, where another's handler took it."""
    if not _asked:
        _asked.append(number)


def check() -> None:
    """Leave where this command was asked to, and has not done so: what a handler raises is lost where it interrupts
    what catches everything, such as an import of a library that tries what is installed."""
    if _asked:
        raise SystemExit(128 + _asked[0])


@contextmanager
def advising(sentence: str) -> Iterator[None]:
    """Have a command that is ended at once say how to go on."""
    _advice.append(sentence)
    try:
        yield
    finally:
        _advice.pop()


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Call a handler with the first signal, in the main thread; with a process's other signals nothing. Elsewhere
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
        for number, each in before.items():
            signal.signal(number, each)


@contextmanager
def left_by_signals() -> Iterator[None]:
    """A signal ends the command with 128 and its number, whatever it is at: in order, and where that takes longer
    than `WITHIN` or a second signal comes, at once."""

    def leave_in_order(number: int) -> None:
        raise SystemExit(128 + number)

    _asked.clear()
    with _ended_in_time():
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
    epoch. Ray ends its processes with SIGKILL where SIGTERM does nothing.
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
        for number, each in before.items():
            signal.signal(number, each)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def _ended_in_time() -> Iterator[None]:
    """Watch for signals beside the main thread, which may wait in a library for as long as it likes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), name="tune_kd-signals", daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if not _asked:  # else the interpreter's end is watched, too
            signal.set_wakeup_fd(before)
            os.close(writer)


def _watch(reader: int) -> None:
    """End the process when its time is up, or a second signal comes. Python's own handler in C writes the numbers."""
    number, at = 0, 0.0
    while True:
        patience = max(0.0, at + WITHIN - time.monotonic()) if number else None
        if not select.select([reader], [], [], patience)[0]:
            leave(128 + number, f"interrupted, and not everything ended within {WITHIN:.0f} s")
        come = os.read(reader, 64)
        if not come:
            os.close(reader)
            return
        for each in come:
            if each in SIGNALS and not number:
                number, at = each, time.monotonic()
            elif each in SIGNALS and time.monotonic() - at >= ONE:
                leave(128 + number, "interrupted")


def leave(status: int, sentence: str) -> NoReturn:
    """End this process and those that it started, at once, whatever its threads wait for.

    The status is that of the signal that came, where one did.
    """
    import psutil  # takes long, and most commands end by themselves

    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # the live view hides it
    said = "; ".join([sentence, *(each for each in _advice[-1:] if each not in sentence)])
    with suppress(OSError):
        os.write(2, f"{cursor}tune_kd: {said}\n".encode())
    for process in psutil.Process().children(recursive=True):  # Ray's agents would stay for a minute
        with suppress(psutil.Error):
            process.kill()
    os._exit(128 + _asked[0] if _asked else status)

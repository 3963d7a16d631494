"""Signals that end a command: it finishes in order and exits with 128 plus the signal's number.

The parent process ensures that the command ends in time: see `tune_kd.system.guard`.
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
"""Signals that end a command. Cluster schedulers can send SIGUSR1 before they take a machine away."""

_asked: list[int] = []  # the signal that this command received first
_advice: list[str] = []  # how to continue the run, while there is one
_guard: list[int] = []  # the pipe to the guard process, if there is one


def guarded_through(pipe: int) -> None:
    """Set the pipe through which `tell_guard` sends messages to the guard process."""
    _guard[:] = [pipe]


def tell_guard(line: str) -> None:
    """Send a message to the guard process, if there is one."""
    for pipe in _guard:
        with suppress(OSError):
            os.write(pipe, f"{line}\0".encode(errors="backslashreplace"))


def process_id() -> int:
    """Return the id of the process that the user started and can signal: the guard, or this one without a guard."""
    return os.getppid() if _guard else os.getpid()


def asked() -> int | None:
    """Return the signal that this command received first, or None."""
    return _asked[0] if _asked else None


def note(number: int) -> None:
    """Record a signal as received, unless another was received earlier. Also for signals caught by a library's
    handler."""
    if not _asked:
        _asked.append(number)
        tell_guard(f"asked {number}")


def check() -> None:
    """Exit if a signal was received. The handler raises SystemExit, but code that catches every exception may have
    swallowed it, such as a library's optional imports."""
    if _asked:
        raise SystemExit(128 + _asked[0])


@contextmanager
def advising(sentence: str) -> Iterator[None]:
    """Within this context, a command that is killed prints how to continue."""
    _advice.append(sentence)
    tell_guard(f"advice {sentence}")
    try:
        yield
    finally:
        _advice.pop()


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Within this context, call `handler` with the first signal of a command and ignore the others. Does nothing
    outside the main thread, since only the main thread can set handlers."""

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
    """Within this context, a signal raises SystemExit with 128 plus its number."""

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
    """Delay signals until the end of this context, and block them permanently in processes started within it.

    Child processes inherit the signal mask. So Ray survives a signal to all processes of a job (`timeout` signals a
    process group; `scancel`, systemd and Kubernetes signal a cgroup), and trials can finish their epoch. Ray falls
    back to SIGKILL to end its processes. Only its dashboard unblocks SIGINT and SIGTERM; a run continues without the
    dashboard.
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
        if handler is not None:  # None is a handler set in C, which Python cannot restore
            signal.signal(number, handler)


def leave(status: int, sentence: str) -> NoReturn:
    """Kill the child processes and exit immediately, without waiting for threads. If a signal was received, the status
    is 128 plus its number."""
    status = 128 + _asked[0] if _asked else status
    say("; ".join([sentence, *(each for each in _advice[-1:] if each not in sentence)]))
    kill_children()
    tell_guard(f"ended {status}")
    os._exit(status)


def say(sentence: str) -> None:
    """Write a message to standard error without buffering, since Python's streams may no longer work."""
    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # the live view hides the cursor
    with suppress(OSError):
        os.write(2, f"{cursor}tune_kd: {visible(sentence)}\n".encode(errors="backslashreplace"))


def kill_children() -> None:
    """Kill all descendants of this process. Ray's agents would otherwise run for another minute."""
    import psutil  # not at the top, so that the guard process stays small

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()

"""The guard: a small parent process around a command that trains. It decides the exit status.

Ray's core runs inside the driver process. If its node dies, the core silently ends the driver with status 1, which in
tune_kd means that trials failed. So the user's command starts the guard, which starts the driver, forwards signals and
reports how the driver ended:

- The driver sends its exit status through a pipe. If it ends without sending one, Ray ended it: the guard prints a
  message and exits with status 3.
- The first signal is forwarded once, even if the driver also received it directly (as part of a process group). If the
  driver is still running `WITHIN` seconds later, or a second signal arrives, all processes are killed. The exit status
  is that of the first signal.
- If the guard is killed, the driver is killed too. No process that the driver started outlives it.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from tune_kd.system import signals

WITHIN = 15.0  # maximum seconds from a signal to the end; SLURM and Kubernetes kill after 30
ONE = 0.5  # seconds within which signals count as one: `timeout` signals first the command, then its process group
GLANCE = 0.1  # seconds between checks of the driver
_PDEATHSIG, _SUBREAPER = 1, 36  # prctl options: be killed with the parent; adopt orphaned descendants


def guarded(command: Callable[[], None]) -> None:
    """Run a command in a child process and exit with its status. Call it before any thread is started."""
    if sys.platform != "linux":  # prctl exists only there
        command()
        return
    reader, writer = os.pipe()
    prctl = ctypes.CDLL(None).prctl
    driver = os.fork()
    if driver:
        os.close(writer)
        prctl(_SUBREAPER, 1)
        _Guard(driver, reader).watch()
    os.close(reader)
    prctl(_PDEATHSIG, signal.SIGKILL)
    signals.guarded_through(writer)
    _told(command)


def _told(command: Callable[[], None]) -> None:
    """Run a command and send its exit status before the interpreter shuts down, which may fail after Ray."""
    try:
        command()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        signals.tell_guard(f"ended {status}")
        raise
    signals.tell_guard("ended 0")


class _Guard:
    """Watches one driver until it ends."""

    def __init__(self, driver: int, reader: int) -> None:
        self._driver = driver
        self._reader = reader
        self._text = ""  # messages of the driver, each terminated by NUL, since a path may contain newlines
        self._asked: tuple[int, float] | None = None  # the first signal and its monotonic time
        self._again = False  # whether a second signal arrived

    def watch(self) -> NoReturn:
        """Wait for the driver and exit with its status."""
        for number in signals.SIGNALS:
            signal.signal(number, self._on_signal)
        while (ended := self._ended()) is None:
            if self._again or (self._asked and time.monotonic() - self._asked[1] > WITHIN):
                self._kill("" if self._again else f", and some processes did not end within {WITHIN:.0f} s")
        self._listen()
        self._leave_with(ended)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = number, now
            with suppress(ProcessLookupError):
                os.kill(self._driver, number)
        elif now - self._asked[1] >= ONE:
            self._again = True

    def _ended(self) -> int | None:
        """Return the driver's wait status as `os.waitpid` does; None while it runs."""
        select.select([self._reader] if self._reader >= 0 else [], [], [], GLANCE)
        self._listen()
        while True:  # also reap the driver's orphans
            process, ended = os.waitpid(-1, os.WNOHANG)
            if process == self._driver:
                return ended
            if process == 0:
                return None

    def _listen(self) -> None:
        """Read the messages that the driver has sent so far."""
        while self._reader >= 0 and select.select([self._reader], [], [], 0)[0]:
            told = os.read(self._reader, 4096)
            if not told:
                os.close(self._reader)
                self._reader = -1
            self._text += told.decode(errors="replace")
        if self._asked is None and (number := self._told("asked")):  # only the driver received the signal
            self._asked = int(number), time.monotonic()

    def _told(self, what: str) -> str | None:
        """Return the driver's last message of a kind (asked, advice or ended), or None."""
        lines = [line.partition(" ")[2] for line in self._text.split("\0") if line.startswith(f"{what} ")]
        return lines[-1] if lines else None

    def _kill(self, why: str) -> NoReturn:
        assert self._asked is not None
        self._say(f"interrupted{why}")
        signals.kill_children()
        os._exit(128 + self._asked[0])

    def _leave_with(self, ended: int) -> NoReturn:
        if (status := self._told("ended")) is not None:
            os._exit(int(status))
        signals.kill_children()  # the driver ended without doing so
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL:  # end as if this process had received it
            os.kill(os.getpid(), signal.SIGKILL)
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in signals.SIGNALS:
            self._asked = self._asked or (os.WTERMSIG(ended), 0.0)
        if self._asked is not None:
            self._say("interrupted")
            os._exit(128 + self._asked[0])
        how = f"with {os.waitstatus_to_exitcode(ended)}" if os.WIFEXITED(ended) else f"by signal {os.WTERMSIG(ended)}"
        self._say(f"Ray died: its core ended the driver {how}")
        os._exit(3)

    def _say(self, sentence: str) -> None:
        advice = self._told("advice")
        signals.say(f"{sentence}; {advice}" if advice else sentence)

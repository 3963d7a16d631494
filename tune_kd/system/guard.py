"""The process around a command that trains. It owns the exit status, which Ray could otherwise decide.

Ray's core runs inside of the driver's process, and ends it with 1, without a word, where it finds that its node is
gone; here 1 means that trials failed. So the process that a user starts is a small one that starts the driver, passes
signals on, and says what became of it:

- The driver tells through a pipe how it ended. One that ended without that was ended by Ray: 3, and a sentence.
- A signal is passed on once, also where the driver got it itself, as with its process group. Where the driver has not
  ended `WITHIN` seconds later, or a second signal comes, everything is killed, with the status of the first.
- Where this process is killed, the driver is killed, too. Nothing that a driver started stays after it.
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

WITHIN = 15.0  # seconds from a signal to the end at the latest; SLURM and Kubernetes kill after 30
ONE = 0.5  # seconds in which signals are one: `timeout` sends its own to the command, and again to its process group
GLANCE = 0.1  # seconds between looks at the driver
_PDEATHSIG, _SUBREAPER = 1, 36  # of prctl: be killed with the parent; inherit the orphans of one's descendants


def guarded(command: Callable[[], None]) -> None:
    """Run a command in a process of its own and leave with its status. Only called where no thread runs yet."""
    if sys.platform != "linux":  # which alone has what this needs
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
    """Run a command, and tell how it ended before the interpreter does, whose end may fail for what Ray left in it."""
    try:
        command()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        signals.tell_guard(f"ended {status}")
        raise
    signals.tell_guard("ended 0")


class _Guard:
    """Watches one driver until its end."""

    def __init__(self, driver: int, reader: int) -> None:
        self._driver = driver
        self._reader = reader
        self._text = ""  # of what the driver told, each ended by a NUL: a path may have lines
        self._asked: tuple[int, float] | None = None  # the first signal, and when it came
        self._again = False  # whether a second one came

    def watch(self) -> NoReturn:
        """Leave with the status of the driver."""
        for number in signals.SIGNALS:
            signal.signal(number, self._on_signal)
        while (ended := self._ended()) is None:
            if self._again or (self._asked and time.monotonic() - self._asked[1] > WITHIN):
                self._kill("" if self._again else f", and not everything ended within {WITHIN:.0f} s")
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
        """How the driver ended, as `os.waitpid` says it; null while it goes on."""
        select.select([self._reader] if self._reader >= 0 else [], [], [], GLANCE)
        self._listen()
        while True:  # also its orphans are waited for
            process, ended = os.waitpid(-1, os.WNOHANG)
            if process == self._driver:
                return ended
            if process == 0:
                return None

    def _listen(self) -> None:
        """Read what the driver has told so far."""
        while self._reader >= 0 and select.select([self._reader], [], [], 0)[0]:
            told = os.read(self._reader, 4096)
            if not told:
                os.close(self._reader)
                self._reader = -1
            self._text += told.decode(errors="replace")
        if self._asked is None and (number := self._told("asked")):  # it alone was sent a signal
            self._asked = int(number), time.monotonic()

    def _told(self, what: str) -> str | None:
        """The last that the driver told of something."""
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
        signals.kill_children()  # of a driver that could not do it
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL:  # as if it had come to this process
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

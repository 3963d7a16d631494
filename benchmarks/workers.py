"""Warm processes that measure. If one of them fails, hangs or dies, the benchmark continues.

A kernel that faults makes CUDA unusable in its process, and a graph can hang. So nothing is measured in the benchmark's
own process, and every answer has a time limit.
"""

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

from tune_kd.execute import mps_daemon

ENDING = 5.0  # seconds for a process to exit before it is killed


class Failed(Exception):
    """An exception of a function in its process, as one line."""


@dataclass(frozen=True)
class Budget:
    """Seconds that a benchmark may take from now."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "started", self.clock())

    @property
    def left(self) -> float:
        return max(0.0, self.started + self.seconds - self.clock())


class Worker:
    """A process that calls functions sent to it, one by one. The state of their modules persists between calls."""

    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, folder))
        self._process.start()
        there.close()  # so that `recv` raises EOFError if the process dies

    def ask(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        with suppress(BrokenPipeError):  # it is dead; `answer` raises
            self._here.send((function, arguments))

    def answer(self, seconds: float) -> Any:
        """Return the function's result. Raises `Failed`, or TimeoutError after `seconds`."""
        if not self._here.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        try:
            returned, failure = self._here.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(ENDING)
            raise Failed(f"its process died with exit status {self._process.exitcode}") from error
        if failure:
            raise Failed(failure)
        return returned

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def end(self) -> None:
        """Let the process exit, and kill it if it does not."""
        self._here.close()
        self._process.join(ENDING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(ENDING)


def _serve(connection: Connection, folder: str) -> None:
    """Call the functions that arrive, until the other end closes. Temporary files go to `folder`, which the benchmark
    removes."""
    tempfile.tempdir = folder
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a function that cannot be imported
            traceback.print_exc()
            connection.send((None, in_a_line(error)))
            continue
        try:
            connection.send((function(*arguments), ""))
        except Exception as error:  # any kind; sent to the other process
            traceback.print_exc()
            connection.send((None, in_a_line(error)))


def in_a_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Pool:
    """Numbered processes, each started on first use. A process that fails is killed and replaced on its next use."""

    def __init__(self, budget: Budget, start: Callable[[str], Worker] = Worker, folder: str = "") -> None:
        self._budget, self._start, self._folder = budget, start, folder
        self._workers: dict[int, Worker] = {}
        self._prepared: dict[int, tuple[Any, Any]] = {}  # by process: arguments and answer of `prepare`

    def ask(self, function: Callable[..., Any], asked: Mapping[int, Sequence[Any]], seconds: float) -> dict[int, Any]:
        """Call a function in several processes at the same time, each with its own arguments. Returns the result or the
        exception of each. Takes at most `seconds`, and at most the budget."""
        ends = Budget(min(seconds, self._budget.left), self._budget.clock)
        for place, arguments in asked.items():
            if place not in self._workers:
                self._workers[place] = self._start(self._folder)
            self._workers[place].ask(function, arguments)
        answers: dict[int, Any] = {}
        for place in asked:
            try:
                answers[place] = self._workers[place].answer(ends.left)
            except (Failed, TimeoutError) as error:
                answers[place] = error
                self._workers.pop(place).kill()  # also after an error: after a faulty kernel, all later calls fail
                self._prepared.pop(place, None)
        return answers

    def prepare(
        self, function: Callable[..., Any], asked: Mapping[int, Sequence[Any]], seconds: float
    ) -> dict[int, Any]:
        """Like `ask`, but reuse the answer of a process that was prepared with the same arguments before."""
        anew = {place: each for place, each in asked.items() if self._prepared.get(place, ((), None))[0] != each}
        answers = self.ask(function, anew, seconds)
        self._prepared |= {place: (anew[place], each) for place, each in answers.items() if place in self._workers}
        return {place: answers[place] if place in answers else self._prepared[place][1] for place in asked}

    def end(self) -> None:
        ending = [threading.Thread(target=each.end) for each in self._workers.values()]
        self._workers.clear()
        for each in ending:
            each.start()
        for each in ending:
            each.join()


def fine(answer: Any) -> Any:
    """Return an answer. If it is an exception, raise it."""
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def under_mps(wanted: bool) -> Iterator[None]:
    """Within this context, processes that start have an MPS of our own if `wanted`, and if it can be started."""
    with ExitStack() as around:
        if wanted:
            with suppress(mps_daemon.NotStarted):
                around.enter_context(patch.dict(os.environ, around.enter_context(mps_daemon.for_children())))
        yield


@contextmanager
def pool(budget: Budget) -> Iterator[Pool]:
    """A pool that ends with this context. Its processes share the cores when they compile at the same time."""
    name, threads = "TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // 4))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, {name: os.environ.get(name, threads)}),
    ):
        made = Pool(budget, folder=folder)
        try:
            yield made
        finally:
            made.end()

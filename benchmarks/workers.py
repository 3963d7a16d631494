"""Processes that measure and stay warm: what fails, hangs or ends one of them does not end the benchmark.

A kernel that faults spoils CUDA for its process, and a graph can wait for ever; so nothing is measured in the
benchmark's own process, and every answer has a time limit.
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

ENDING = 5.0  # seconds that a process has to end itself


class Failed(Exception):
    """What a function raised in its process, in a line."""


@dataclass(frozen=True)
class Budget:
    """Seconds that a benchmark may take, from now on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "started", self.clock())

    @property
    def left(self) -> float:
        return max(0.0, self.started + self.seconds - self.clock())


class Worker:
    """A process that calls the functions that it is sent, one by one. What they leave in their modules stays."""

    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, folder))
        self._process.start()
        there.close()  # so that the death of the process ends what is received from it

    def ask(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        with suppress(BrokenPipeError):  # it is dead, which the answer tells
            self._here.send((function, arguments))

    def answer(self, seconds: float) -> Any:
        """What the function returned. Raises `Failed`, or TimeoutError if it takes longer than so many seconds."""
        if not self._here.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        try:
            returned, failure = self._here.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(ENDING)
            raise Failed(f"its process died with the status {self._process.exitcode}") from error
        if failure:
            raise Failed(failure)
        return returned

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def end(self) -> None:
        """Let the process end itself, and kill it if it does not."""
        self._here.close()
        self._process.join(ENDING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(ENDING)


def _serve(connection: Connection, folder: str) -> None:
    """Answer until the other end closes. Temporary files are in a folder that it removes."""
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
        except Exception as error:  # of any kind: it is told to the process that asked
            traceback.print_exc()
            connection.send((None, in_a_line(error)))


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Pool:
    """Numbered processes, each started when it is first needed. One that fails is killed, and started anew."""

    def __init__(self, budget: Budget, start: Callable[[str], Worker] = Worker, folder: str = "") -> None:
        self._budget, self._start, self._folder = budget, start, folder
        self._workers: dict[int, Worker] = {}
        self._prepared: dict[int, tuple[Any, Any]] = {}  # what each was asked to prepare, and what it answered

    def ask(self, function: Callable[..., Any], asked: Mapping[int, Sequence[Any]], seconds: float) -> dict[int, Any]:
        """Call a function in several processes at the same time, each with its own arguments, and return what each
        answered: for one that failed, the exception. It takes no longer than `seconds`, nor than the budget."""
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
                self._workers.pop(place).kill()  # also after an error: a faulty kernel spoils all that follow
                self._prepared.pop(place, None)
        return answers

    def prepare(
        self, function: Callable[..., Any], asked: Mapping[int, Sequence[Any]], seconds: float
    ) -> dict[int, Any]:
        """As `ask`, but where a process was prepared so before, it is its answer of then."""
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
    """An answer that is no exception. Raises one that is."""
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
    """A pool that ends with this context. Its processes share the cores where they compile at the same time."""
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

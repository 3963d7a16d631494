"""Precision settings, which end with their trial, and steps captured as CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from tune_kd.training import notices
from tune_kd.training.device import WARM_UP, Captured, autocast, float32_as


@pytest.mark.parametrize(("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_tf32_is_used_only_if_requested_and_reset_afterwards(precision: str, expected: str) -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [each.fp32_precision for each in settings]
    with float32_as(precision):
        assert [each.fp32_precision for each in settings] == [expected, expected]
    assert [each.fp32_precision for each in settings] == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_products_are_bfloat16_only_in_precision_bfloat16(precision: str) -> None:
    one = torch.ones(2, 2)
    with autocast(precision, torch.device("cpu")):
        product = one @ one
    assert (product.dtype == torch.bfloat16) == (precision == "bfloat16")


class Graphs:
    """Simulates CUDA graphs: a capture computes nothing, and a replay runs the captured step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.failure = failure
        self.capturing: list[Callable[[], None]] | None = None
        self.replayed = 0
        self.pools: list[object] = []  # passed to captures
        stream = SimpleNamespace(wait_stream=lambda other: None)
        graphs = self

        class Graph:
            def __init__(self) -> None:
                self.recorded: list[Callable[[], None]] = []

            def pool(self) -> object:
                return id(self)

            def replay(self) -> None:
                graphs.replayed += 1
                for operation in self.recorded:
                    operation()

        @contextmanager
        def capture(graph: Graph, pool: object, stream: object) -> Iterator[None]:
            self.pools.append(pool)
            self.capturing = graph.recorded
            try:
                yield
                if self.failure is not None:
                    raise self.failure
            finally:
                self.capturing = None

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(**vars(stream)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(Captured, "given_up", set())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(notices, "_told", set())
        notices.take()

    def adds(self, total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """A step that adds its input to a total."""

        def step(each: torch.Tensor) -> None:
            if self.capturing is None:
                total.add_(each.sum())
            else:
                self.capturing.append(lambda: total.add_(each.sum()))

        return step


BATCHES = [torch.full((size,), float(number)) for number, size in enumerate((4, 4, 2, 4, 4, 4, 2, 4, 4), start=1)]
SUM = sum(float(each.sum()) for each in BATCHES)


def test_a_step_is_captured_after_its_warm_up_and_trains_each_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, total = Graphs(monkeypatch), torch.zeros(())
    step = Captured(graphs.adds(total), torch.device("cuda"))
    for each in BATCHES:
        step(each)
    assert float(total) == SUM
    assert graphs.replayed == 7 - WARM_UP  # of seven full batches; the other two batches are launched
    assert notices.take() == []


def test_an_evaluation_beside_a_captured_step_shares_its_memory_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, totals = Graphs(monkeypatch), [torch.zeros(()), torch.zeros(())]
    step = Captured(graphs.adds(totals[0]), torch.device("cuda"))
    other = Captured(graphs.adds(totals[1]), torch.device("cuda"), "an evaluation", beside=step)
    for each in BATCHES:
        step(each)
        other(each)
    assert [float(total) for total in totals] == [SUM, SUM]
    assert step._graph is not None and graphs.pools == [None, step._graph.pool()]
    assert other._stream is step._stream


def test_an_evaluation_that_cannot_be_captured_leaves_the_training_step_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs, total = Graphs(monkeypatch), torch.zeros(())
    step = Captured(graphs.adds(total), torch.device("cuda"))
    for each in BATCHES:
        step(each)
    graphs.failure = RuntimeError("no")
    other = Captured(graphs.adds(torch.zeros(())), torch.device("cuda"), "an evaluation", beside=step)
    for each in BATCHES:
        other(each)
    before = graphs.replayed
    step(BATCHES[0])
    assert (step.is_used, other.is_used, graphs.replayed) == (True, False, before + 1)
    (told,) = notices.take()
    assert told.startswith("an evaluation cannot be captured")


def test_a_failed_capture_loses_no_batch_and_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, RuntimeError("operation not permitted\nwhen stream is capturing"))
    total = torch.zeros(())
    for _ in range(2):
        step = Captured(graphs.adds(total), torch.device("cuda"))
        for each in BATCHES:
            step(each)
    assert float(total) == 2 * SUM
    assert graphs.replayed == 0
    (told,) = notices.take()
    assert "cannot be captured as a CUDA graph here (operation not permitted)" in told


def test_a_capture_that_runs_out_of_memory_raises_so_that_the_trial_gets_a_larger_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = Graphs(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    step = Captured(graphs.adds(torch.zeros(())), torch.device("cuda"))
    for each in BATCHES[:4]:
        step(each)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step(BATCHES[4])


def test_an_error_in_the_step_is_raised_and_not_reported_as_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    Graphs(monkeypatch)

    def broken(each: torch.Tensor) -> None:
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        Captured(broken, torch.device("cuda"))(BATCHES[0])
    assert notices.take() == []

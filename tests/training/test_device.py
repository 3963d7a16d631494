"""How the arithmetic is set: for one trial, and not for what runs after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from tune_kd.training import notices
from tune_kd.training.device import WARM_UP, Captured, autocast, float32_as


@pytest.mark.parametrize(("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_float32_means_float32_unless_tf32_was_asked_for(precision: str, expected: str) -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [each.fp32_precision for each in settings]
    with float32_as(precision):
        assert [each.fp32_precision for each in settings] == [expected, expected]
    assert [each.fp32_precision for each in settings] == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_products_are_bfloat16_under_bfloat16_alone(precision: str) -> None:
    one = torch.ones(2, 2)
    with autocast(precision, torch.device("cpu")):
        product = one @ one
    assert (product.dtype == torch.bfloat16) == (precision == "bfloat16")


class Graphs:
    """CUDA graphs that are played: while one is captured nothing is computed, and a replay computes it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.capturing: list[Callable[[], None]] | None = None
        self.replayed = 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        graphs = self

        class Graph:
            def __init__(self) -> None:
                self.recorded: list[Callable[[], None]] = []

            def replay(self) -> None:
                graphs.replayed += 1
                for operation in self.recorded:
                    operation()

        @contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            self.capturing = graph.recorded
            try:
                yield
                if failure is not None:
                    raise failure
            finally:
                self.capturing = None

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(Captured, "given_up", False)
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
    assert graphs.replayed == 7 - WARM_UP  # of seven whole batches; the two others are launched
    assert notices.take() == []


def test_a_capture_that_fails_loses_no_batch_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_error_of_the_step_itself_is_raised_and_not_taken_for_one_of_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Graphs(monkeypatch)

    def broken(each: torch.Tensor) -> None:
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        Captured(broken, torch.device("cuda"))(BATCHES[0])
    assert notices.take() == []

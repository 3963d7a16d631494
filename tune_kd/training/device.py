"""How a trial's arithmetic is carried out: its precision, and on a GPU a step that is captured once and replayed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tune_kd.training.notices import tell

WARM_UP = 3  # steps before the capture: libraries choose their kernels, the optimizer makes its momentum


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in TF32 under "tf32", else in float32, and leave the setting as it was.

    PyTorch's own default for convolutions is TF32, which keeps 10 of 23 bits: nobody's float32.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass: bfloat16 for matrix products under "bfloat16", else nothing.

    Weights and their updates stay float32. Casts are not cached: every weight is used once a step, and a captured
    step must cast anew.
    """
    bfloat16 = precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16, cache_enabled=False)


class Captured:
    """A step on a GPU whose thousands of launches are captured once and then replayed as one CUDA graph.

    The step takes tensors, returns nothing, and leaves its results in tensors that live as long as it does. Inputs of
    another shape than the first (an epoch's last batch) run as they are. The steps before the capture are real ones,
    so capturing costs no training. A step that cannot be captured is launched kernel by kernel, and so are all others
    of the process, which is told once; one that runs out of memory raises, since a larger share may have what it needs.
    """

    given_up = False  # whether a capture has failed in this process

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._seen = 0

    def __call__(self, *inputs: Tensor) -> None:
        if not self._inputs and not self.given_up:
            self._begin(inputs)
        if self.given_up or [each.shape for each in inputs] != [each.shape for each in self._inputs]:
            self._step(*inputs)
            return
        for mine, each in zip(self._inputs, inputs, strict=True):
            mine.copy_(each)
        if self._graph is None and self._seen < WARM_UP:
            self._warm_up()
            return
        if self._graph is None:
            self._capture()
        if self._graph is None:
            self._step(*inputs)
        else:
            self._graph.replay()

    def _begin(self, inputs: tuple[Tensor, ...]) -> None:
        with self._or_give_up():
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._inputs = [each.clone() for each in inputs]

    def _warm_up(self) -> None:
        self._seen += 1
        assert self._stream is not None
        # On another stream, as a capture is: autograd remembers the stream on which a weight was first used.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(*self._inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        """Nothing is computed meanwhile, so that a capture that fails has trained nothing."""
        before = torch.cuda.current_stream()
        with self._or_give_up():
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._step(*self._inputs)
            finally:
                torch.cuda.set_stream(before)  # which an older torch does not where the capture fails
            self._graph = graph

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
            if (full := _out_of_memory(error)) is not None:
                raise full from error
            self._graph, self._stream, self._inputs = None, None, []
            Captured.given_up = True
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            tell(f"a training step cannot be captured as a CUDA graph here ({why}); it is launched kernel by kernel, "
                 "which gives the same results more slowly")  # fmt: skip


def _out_of_memory(error: BaseException) -> torch.cuda.OutOfMemoryError | None:
    """The want of memory behind an error, since the end of a capture raises one of its own; null without one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.cuda.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found

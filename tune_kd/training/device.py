"""The device of a trial: precision, peak memory, and on a GPU a training step captured as a CUDA graph."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tune_kd.training.notices import tell

WARM_UP = 3  # steps before the capture, in which libraries choose kernels and the optimizer creates its momentum


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in TF32 for "tf32", else in float32. Restores the settings at the end.

    PyTorch's default for convolutions is TF32, which keeps 10 of 23 bits.
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
    """The context of a forward pass: matrix products in bfloat16 for "bfloat16", else no change.

    Weights and their updates stay float32. Casts are not cached: a step uses every weight once, and a captured step
    must cast again at each replay.
    """
    bfloat16 = precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16, cache_enabled=False)


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks of any size for the next step.

    By default glibc returns blocks of megabytes to the system, which zeroes each page before its next use: thousands of
    page faults per step. Does nothing with other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # the maximum before glibc 2.35
    mallopt(trim_threshold, 2**31 - 1)


def start_measuring(device: torch.device) -> None:
    """Reset the peak memory of earlier trials."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # older versions of torch stay in capture mode after a failed capture
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident memory (Linux 4.0)
    except OSError:
        pass  # not allowed in some containers; there the peak covers the whole process


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: allocated on the GPU, or resident in the process. Returns None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None


class Captured:
    """A step on a GPU whose thousands of kernel launches are captured once and replayed as one CUDA graph.

    The step takes tensors, returns nothing, and writes its results to tensors that live as long as the step. Inputs
    with another shape than the first (the last batch of an epoch) are not captured. Warm-up steps train as well, so
    none is wasted. After a failed capture, the process launches all steps of this kind (`what`) kernel by kernel, and
    says so once. A capture that runs out of memory raises, since a larger share of the GPU may be enough.

    `beside` is another step that never runs at the same time. Both share their memory.
    """

    given_up: ClassVar[set[str]] = set()  # what could not be captured in this process

    def __init__(
        self,
        step: Callable[..., None],
        device: torch.device,
        what: str = "a training step",
        beside: "Captured | None" = None,
    ) -> None:
        self._step = step
        self._device = device
        self._what, self._beside = what, beside
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._seen = 0

    @property
    def is_used(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> None:
        if not self._inputs and self._what not in self.given_up:
            self._begin(inputs)
        if self._what in self.given_up or [each.shape for each in inputs] != [each.shape for each in self._inputs]:
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
            # The allocator keeps separate memory per stream, so steps that share memory must share a stream.
            theirs = self._beside and self._beside._stream
            self._stream = theirs or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._inputs = [each.clone() for each in inputs]

    def _warm_up(self) -> None:
        self._seen += 1
        assert self._stream is not None
        # On the stream of the capture: autograd remembers the stream on which a weight was first used.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(*self._inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        """Capture the step. Nothing is computed, so a failed capture has trained nothing."""
        before = torch.cuda.current_stream()
        with self._or_give_up():
            graph = torch.cuda.CUDAGraph()
            pool = self._beside._graph.pool() if self._beside is not None and self._beside._graph is not None else None
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                    self._step(*self._inputs)
            finally:
                torch.cuda.set_stream(before)  # older versions of torch do not restore it if the capture fails
            self._graph = graph

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            if (full := out_of_memory(error)) is not None:
                raise full from error
            self._graph, self._stream, self._inputs = None, None, []
            Captured.given_up.add(self._what)
            tell(
                f"{self._what} cannot be captured as a CUDA graph here ({first_line(error)}); it is launched kernel "
                "by kernel, which gives the same results more slowly"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def out_of_memory(error: BaseException) -> torch.cuda.OutOfMemoryError | None:
    """The out-of-memory error among an error's causes: a failed capture raises another error on top of it.

    Returns None if there is none.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.cuda.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found

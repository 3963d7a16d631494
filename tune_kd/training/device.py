"""The device of a trial: precision, peak memory, and on a GPU a training step captured as a CUDA graph."""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tune_kd.study.spec import Recipe
from tune_kd.training.notices import tell

Forward = Callable[[nn.Module, Tensor], Any]

COMPILING_PAYS = 10**6
"""Training images of a trial from which on it is compiled without being asked: an H100 saved 0.17 s in 45,000 images,
and took half a minute once for all trials of a network and machine (docs/performance.md)."""
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
    must cast anew.
    """
    bfloat16 = precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16, cache_enabled=False)


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks of any size for the next step.

    By default it returns blocks of megabytes to the system, which hands them out again zeroed, page by page:
    thousands of page faults per step. Does nothing with other C libraries.
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
        pass  # not allowed in some containers, where the peak is that of the whole process


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

    The step takes tensors, returns nothing, and writes its results to tensors that live as long as it does. Inputs with
    another shape than the first (the last batch of an epoch) are not captured. The warm-up steps train as well, so
    capturing wastes none. After a failed capture, all steps of the process are launched kernel by kernel, with one
    message. A capture that runs out of memory raises, since a larger share of the GPU may be enough.
    """

    given_up = False  # whether a capture failed in this process

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._seen = 0

    @property
    def is_used(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

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
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._step(*self._inputs)
            finally:
                torch.cuda.set_stream(before)  # older versions of torch do not, if the capture fails
            self._graph = graph

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            if (full := _out_of_memory(error)) is not None:
                raise full from error
            self._graph, self._stream, self._inputs = None, None, []
            Captured.given_up = True
            tell(
                f"a training step cannot be captured as a CUDA graph here ({first_line(error)}); it is launched kernel "
                "by kernel, which gives the same results more slowly"
            )


def first_line(error: BaseException) -> str:
    """What an error says first, or its name where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class Compiled:
    """A student's forward pass, compiled for the first shape of its images; for others it stays as it is.

    At its first use it is tried with a backward pass, after which the student is as it was. Where that fails and the
    recipe does not ask for it, all trials of the process stay as they are, with one message. Of processes that compile
    the same (`name`), one does and the others find what it left in the cache of torch.compile on disk.
    """

    given_up = False  # whether it failed in this process

    def __init__(self, forward: Forward, name: str, asked: bool) -> None:
        self._plain, self._name, self._asked = forward, name, asked
        self._compiled: Forward = torch.compile(forward, dynamic=False)
        self._shape: torch.Size | None = None
        self.is_used = False

    def __call__(self, student: nn.Module, images: Tensor) -> Any:
        if self._shape is None:
            self._shape = images.shape
            self._try(student, images)
        use = self.is_used and images.shape == self._shape
        return self._compiled(student, images) if use else self._plain(student, images)

    def _try(self, student: nn.Module, images: Tensor) -> None:
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        try:
            with _first(self._name), torch.random.fork_rng(devices=[]):
                found = [each for each in tree_leaves(self._compiled(student, images)) if isinstance(each, Tensor)]
                torch.stack([each.float().mean() for each in found]).sum().backward()  # type: ignore[no-untyped-call]
            self.is_used = True
        except Exception as error:  # of any kind: it comes from compilers
            if (full := _out_of_memory(error)) is not None:
                raise full from error
            if self._asked:
                raise
            Compiled.given_up = True
            tell(f"a student cannot be compiled here ({first_line(error)}); it trains as it is, which is slower")
        finally:
            student.load_state_dict(before)
            student.zero_grad(set_to_none=True)


def compiling_pays(recipe: Recipe, images: int, device: torch.device) -> bool:
    """Whether a trial that trains on so many images an epoch is compiled without being asked.

    In float32 the time goes to products and convolutions, which stay the same.
    """
    long = recipe.epochs * images >= COMPILING_PAYS
    return long and device.type == "cuda" and recipe.precision != "float32" and not Compiled.given_up


@contextmanager
def _first(name: str) -> Iterator[None]:
    """Wait for another process of this machine that compiles the same, in the folder where it leaves what it made."""
    place = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # which a worker sets
    if not place:
        yield
        return
    Path(place).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(place) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
        yield


def _out_of_memory(error: BaseException) -> torch.cuda.OutOfMemoryError | None:
    """The out-of-memory error behind an error, since the end of a capture raises another one. None if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.cuda.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found

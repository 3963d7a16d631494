"""Parts of a training step compiled with torch.compile, where that pays and works."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tune_kd.training.device import first_line, out_of_memory
from tune_kd.training.notices import tell

Function = Callable[..., Any]  # of tensors and tuples of them

MOST_FORMS = 10**6
COMPILING_PAYS = 10**6
"""Images that a network trains on, or that a teacher answers, from which on it is compiled without being asked: an H100
saved 0.17 s in 45,000 training images, and took half a minute once for all trials of a network and machine
(docs/performance.md)."""


class Compiled:
    """A function that uses the first of its compiled forms that works, for the shapes of its first call.

    `forms` are functions with a compiled part, by what is compiled, the fastest first. The first call tries them, with
    a backward pass where a result requires a gradient, after which the `modules` and the random numbers are as they
    were. A form that fails is not tried again in this process, with one message; where `asked`, its error is raised.
    Where none works, and for other shapes, such as those of the last batch, `plain` is called.

    Of processes that compile the same (`name`), one does, and the others find its work in the cache of torch.compile.
    """

    given_up: ClassVar[set[str]] = set()  # what could not be compiled in this process

    def __init__(
        self,
        plain: Function,
        forms: Mapping[str, Function],
        name: str,
        modules: Sequence[nn.Module] = (),
        asked: bool = False,
    ) -> None:
        self._plain, self._forms, self._name, self._asked = plain, forms, name, asked
        self._modules = modules
        self._shapes: list[torch.Size] | None = None
        self._form = plain
        self.used: str | None = None  # what is compiled; None before the first call, and where nothing is

    def __call__(self, *inputs: Any) -> Any:
        tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]
        shapes = [each.shape for each in tensors]
        if self._shapes is None:
            self._shapes = shapes
            self._choose(inputs, tensors[0].device)
        return self._form(*inputs) if shapes == self._shapes else self._plain(*inputs)

    def _choose(self, inputs: Sequence[Any], device: torch.device) -> None:
        for what, form in self._forms.items():
            if what in Compiled.given_up:
                continue
            try:
                with _unchanged(self._modules, device), _first(f"{what} {self._name}"):
                    _pass(form, inputs)
            except Exception as error:  # of any kind: it comes from compilers
                if (full := out_of_memory(error)) is not None:
                    raise full from error
                if self._asked:
                    raise
                Compiled.given_up.add(what)
                tell(f"{what} cannot be compiled here ({first_line(error)}), so a slower way is used")
            else:
                self.used, self._form = what, form
                return


def compiled(function: Function) -> Function:
    """The function, compiled at its first call. Its random numbers are those of the function itself."""
    from torch._dynamo import config

    # It counts the forms of a function over all networks of a process, and leaves the function as it is from the ninth.
    config.recompile_limit = config.accumulated_recompile_limit = MOST_FORMS
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


def compiling_pays(images: int, precision: str, device: torch.device) -> bool:
    """Whether a network that sees so many images in all is compiled without being asked.

    In float32 the time goes to products and convolutions, which stay the same.
    """
    return images >= COMPILING_PAYS and device.type == "cuda" and precision != "float32"


def _pass(function: Function, inputs: Sequence[Any]) -> None:
    """Call a function, and compute the gradients of what it returns."""
    found = [each for each in tree_leaves(function(*inputs)) if isinstance(each, Tensor) and each.requires_grad]
    if found:
        torch.stack([each.float().mean() for each in found]).sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def _unchanged(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Restore parameters, buffers and random numbers at the end, and remove gradients."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for module in modules:
            module.zero_grad(set_to_none=True)


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

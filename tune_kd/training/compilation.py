"""Compile parts of a training step with torch.compile, where that pays and works."""

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
"""A network that trains on this many images or more is compiled by default, and so is a teacher that answers as many.
On an H100, compiling saved 0.17 s per 45,000 training images, and took half a minute, once per network and machine
(docs/performance.md)."""


class Compiled:
    """A function that calls the first of its compiled forms that works, for the shapes of its first call.

    `forms` maps the name of the compiled part to a function with that part compiled, fastest first. The first call
    tries the forms in order, with a backward pass if a result requires a gradient. Then it restores the `modules` and
    the random state. A form that fails is reported once and not tried again in this process. If `asked`, its error is
    raised instead. `plain` is called if no form works, and for other shapes, such as those of the last batch.

    Of the processes that compile the same `name`, one compiles. The others load the result from torch.compile's cache.
    """

    given_up: ClassVar[set[str]] = set()  # names of the forms that failed in this process

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
        self.used: str | None = None  # name of the form in use; None before the first call and if no form works

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
            except Exception as error:  # compilers raise errors of any kind
                if (full := out_of_memory(error)) is not None:
                    raise full from error
                if self._asked:
                    raise
                Compiled.given_up.add(what)
                tell(f"{what} cannot be compiled here ({first_line(error)}); falling back to a slower path")
            else:
                self.used, self._form = what, form
                return


def compiled(function: Function) -> Function:
    """Compile a function at its first call. It draws the same random numbers as the uncompiled function."""
    from torch._dynamo import config

    # The limit counts a function's compiled forms over all networks of a process. The default, 8, would be too few.
    config.recompile_limit = config.accumulated_recompile_limit = MOST_FORMS
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


def compiling_pays(images: int, precision: str, device: torch.device) -> bool:
    """Whether a network that processes this many images in total is compiled by default.

    Not in float32: most of the time goes to matrix products and convolutions, which compiling does not change.
    """
    return images >= COMPILING_PAYS and device.type == "cuda" and precision != "float32"


def _pass(function: Function, inputs: Sequence[Any]) -> None:
    """Call a function, and run the backward pass of its results."""
    found = [each for each in tree_leaves(function(*inputs)) if isinstance(each, Tensor) and each.requires_grad]
    if found:
        torch.stack([each.float().mean() for each in found]).sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def _unchanged(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Restore parameters, buffers and random state at the end, and remove gradients."""
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
    """Wait for another process of this machine that compiles the same name. The lock is in Inductor's cache folder."""
    place = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # set by a worker
    if not place:
        yield
        return
    Path(place).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(place) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
        yield

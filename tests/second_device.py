"""A GPU that is simulated on the CPU: a tensor on the wrong device fails as on a real GPU.

Tensors of the simulated device are in the CPU's memory, and their storage is marked as being on the GPU. Results of
operations on them are marked, too. An operation on tensors of both devices raises. A tensor without dimensions on the
CPU may be combined with tensors on the GPU, as with a real one.

Not simulated: kernels and their rounding, streams and graphs (a captured step falls back to a launched one), the amount
of memory, and other processes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
MEMORY = 2**30  # bytes that the device reports
busy = [0]  # number of operations on the simulated device so far
CROSSING = ("copy_", "_to_copy", "set_")  # operations that accept tensors of both devices


def on_simulated_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the simulated device."""
    return getattr(tensor.untyped_storage(), "on_simulated_gpu", False)


def _mark(tensor: Tensor, there: bool) -> None:
    tensor.untyped_storage().on_simulated_gpu = there  # type: ignore[attr-defined]


def _names_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type != "meta"


def _names_gpu(value: Any) -> bool:
    return _names_device(value) and torch.device(value).type == "cuda"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Intercepts every operation, also of a backward pass. Checks that its tensors are on one device, and marks its
    results."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if name not in CROSSING:
            self._check(name, args, [tensor for tensor in given if tensor.dim() or on_simulated_gpu(tensor)])
        made = operation(*args, **(kwargs or {}))
        there = any(map(on_simulated_gpu, given))
        busy[0] += there
        storages = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in _tensors(made):
            if there and id(tensor.untyped_storage()) not in storages:
                _mark(tensor, there=True)
        return made

    @staticmethod
    def _check(name: str, args: Any, given: list[Tensor]) -> None:
        places = {on_simulated_gpu(tensor) for tensor in given}
        if name in ("index", "index_put", "index_put_") and on_simulated_gpu(args[0]):
            return  # a GPU accepts indices from either device
        if len(places) > 1:
            shapes = ", ".join(
                f"{list(each.shape)} on {'cuda:0' if on_simulated_gpu(each) else 'cpu'}" for each in given
            )
            raise RuntimeError(f"Expected all tensors to be on the same device in {name}, but found: {shapes}")


class _Functions(TorchFunctionMode):
    """Intercepts functions that name a device: queries of a tensor's device, moves, and creation of tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if on_simulated_gpu(args[0]) else function(*args)
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return on_simulated_gpu(args[0])
        if function in (Tensor.numpy, Tensor.__array__) and on_simulated_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function is Tensor.pin_memory:
            return args[0]
        if function is Tensor.cpu:
            return _moved(args[0], there=False)
        if function is Tensor.cuda:
            return _moved(args[0], there=True)
        if function is Tensor.to:
            return self._to(*args, **kwargs)
        made_there = _names_gpu(kwargs.get("device"))
        if made_there:
            kwargs["device"] = torch.device("cpu")
        made = function(*args, **kwargs)
        if made_there:
            for tensor in _tensors(made):
                _mark(tensor, there=True)
        return made

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Move the tensor first, then apply the other arguments (dtype, layout) on its new device."""
        wanted = [_names_gpu(each) for each in (*args, kwargs.get("device")) if _names_device(each)]
        wanted += [on_simulated_gpu(each) for each in args if isinstance(each, Tensor)]
        moved = _moved(tensor, there=wanted[0]) if wanted else tensor
        in_place = [torch.device("cpu") if _names_gpu(each) else each for each in args]
        if _names_gpu(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return moved.to(*in_place, **kwargs)


def _moved(tensor: Tensor, there: bool) -> Tensor:
    """Return the tensor itself if it is on that device already, else a copy."""
    if on_simulated_gpu(tensor) == there:
        return tensor
    copy = tensor.clone()
    _mark(copy, there)
    return copy


def _on_cpu(autocast: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device_type, **options: autocast("cpu", **options)


@contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Within this context, a simulated GPU is available. Yields its device."""
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "simulated device",
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "manual_seed": torch.default_generator.manual_seed,  # the simulated device uses the CPU's generator
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: MEMORY // 2,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch, "autocast", _on_cpu(torch.autocast)))
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield torch.device("cuda")

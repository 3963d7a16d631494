"""A GPU that is played on a CPU, so that a tensor in the wrong place fails here as it would there.

Tensors of the played device lie in the CPU's memory, and their storage carries a mark that says where they "are". What
is made of them has the mark, too; an operation that is given tensors of both sides raises. A number (a tensor without
dimensions) of the CPU may be used on either side, as on a GPU.

Not played: kernels and their rounding, streams and graphs (a captured step falls back to a launched one), the amount
of memory, and what runs in another process.
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
MEMORY = 2**30  # bytes that the device is said to have
busy = [0]  # operations that the played device has had to do
CROSSING = ("copy_", "_to_copy", "set_")  # operations that may have tensors of both sides


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the played device."""
    return getattr(tensor.untyped_storage(), "is_there", False)


def _put(tensor: Tensor, there: bool) -> None:
    tensor.untyped_storage().is_there = there  # type: ignore[attr-defined]


def _names_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type != "meta"


def _names_gpu(value: Any) -> bool:
    return _names_device(value) and torch.device(value).type == "cuda"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Every operation, also of a backward pass: its tensors are on one device, and so is what it makes."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if name not in CROSSING:
            self._check(name, args, [tensor for tensor in given if tensor.dim() or is_there(tensor)])
        made = operation(*args, **(kwargs or {}))
        there = any(map(is_there, given))
        busy[0] += there
        storages = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in _tensors(made):
            if there and id(tensor.untyped_storage()) not in storages:
                _put(tensor, there=True)
        return made

    @staticmethod
    def _check(name: str, args: Any, given: list[Tensor]) -> None:
        places = {is_there(tensor) for tensor in given}
        if name in ("index", "index_put", "index_put_") and is_there(args[0]):
            return  # a GPU takes indices from either side
        if len(places) > 1:
            shapes = ", ".join(f"{list(each.shape)} on {'cuda:0' if is_there(each) else 'cpu'}" for each in given)
            raise RuntimeError(f"Expected all tensors to be on the same device in {name}, but found: {shapes}")


class _Functions(TorchFunctionMode):
    """What names a device: questions for a tensor's place, moves, and tensors that are made on a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if is_there(args[0]) else function(*args)
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return is_there(args[0])
        if function in (Tensor.numpy, Tensor.__array__) and is_there(args[0]):
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
                _put(tensor, there=True)
        return made

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Move first, and have the rest (types, layouts) done where it lies."""
        wanted = [_names_gpu(each) for each in (*args, kwargs.get("device")) if _names_device(each)]
        wanted += [is_there(each) for each in args if isinstance(each, Tensor)]
        moved = _moved(tensor, there=wanted[0]) if wanted else tensor
        in_place = [torch.device("cpu") if _names_gpu(each) else each for each in args]
        if _names_gpu(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return moved.to(*in_place, **kwargs)


def _moved(tensor: Tensor, there: bool) -> Tensor:
    """The tensor itself where it is there already, else a copy."""
    if is_there(tensor) == there:
        return tensor
    copy = tensor.clone()
    _put(copy, there)
    return copy


def _on_cpu(autocast: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device_type, **options: autocast("cpu", **options)


@contextmanager
def played() -> Iterator[torch.device]:
    """While it lasts, the device that it gives is there."""
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "played device",
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "manual_seed": torch.default_generator.manual_seed,  # the played device draws on the CPU
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

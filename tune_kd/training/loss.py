"""The arguments of a method's loss, at its construction and at each step, and functions that losses share.

Axes in tensor names: B batch, K classes, C channels, H height, W width. Losses carry gradients to the student and to
their own parameters, and never to the teacher. Reductions over 16-bit inputs are computed in 32 bits.
"""

import inspect
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.study.brought import Code
from tune_kd.study.methods import Method


@dataclass(frozen=True)
class Shapes:
    """Shapes of a network's outputs for one image."""

    taps: tuple[tuple[int, int, int], ...]  # [C, H, W] of each feature
    embedding: int  # length of the classifier's input
    logits: int


@dataclass(frozen=True, eq=False)
class Context:
    """The argument of a loss's constructor: what is known before the first step of a trial."""

    student: Shapes
    teacher: Shapes | None  # None where the method has no teacher
    classes: int
    train_labels: Tensor  # int64 [N], by position in the training split
    epochs: int
    steps_per_epoch: int
    classifier: nn.Module | None = None  # a frozen copy of the teacher's; None if the method needs no features
    settings: Mapping[str, float] = field(default_factory=dict)  # those that `forward` does not take as keywords


@dataclass(frozen=True, eq=False)
class Batch:
    """The data of one step. Fields that the method does not need are None or empty. The teacher gets no gradient."""

    index: Tensor  # int64 [B], positions in the training split
    labels: Tensor  # int64 [B]
    student_logits: Tensor  # [B, K]
    teacher_logits: Tensor | None  # [B, K]
    student_features: tuple[Tensor, ...] = ()  # one per tap, [B, C_i, H_i, W_i]
    teacher_features: tuple[Tensor, ...] = ()
    student_before_relu: tuple[Tensor, ...] = ()  # the same before the tap's last ReLU
    teacher_before_relu: tuple[Tensor, ...] = ()
    student_embedding: Tensor | None = None  # [B, E], input of the classifier
    teacher_embedding: Tensor | None = None
    progress: Tensor | None = None  # 0-dim, from 0 at the first step to 1 at the last
    epoch: Tensor | None = None  # 0-dim, from 1
    second: "Batch | None" = None  # other crops of the same images, if the method has two views


_brought: dict[str, type[nn.Module]] = {}  # loss classes of studies, by the digest of their source


def loss_class(method: Method) -> type[nn.Module]:
    """The class of a method's loss. A class of the study's own must have been imported by `bring`."""
    if method.source is not None:
        return _brought[method.source]
    module, _, name = str(method.loss).partition(":")
    found: type[nn.Module] = getattr(import_module(module), name)
    return found


def bring(codes: Iterable[Code]) -> None:
    """Import the loss classes of a study, from copies of their files in a private folder of this process.

    The folder is removed after the import.
    Raises what their modules raise, and `RuntimeError` if an installed module differs from the study's.
    """
    for code in codes:
        if code.digest not in _brought:
            module = _installed(code) if code.is_installed else _unpacked(code)
            if not isinstance(found := getattr(module, code.name, None), type):
                there = [
                    each for each, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
                ]
                raise RuntimeError(f"{code.main} has no class {code.name}; it defines {', '.join(there) or 'nothing'}")
            _brought[code.digest] = found


def _installed(code: Code) -> ModuleType:
    module = import_module(code.main)
    here = Path(str(module.__file__))
    if replace(code, files=((code.files[0][0], here.read_bytes()),)).digest != code.digest:
        raise RuntimeError(f"{here} differs from the file that the study was planned with; install the same version")
    return module


def _unpacked(code: Code) -> ModuleType:
    """Import the module of the class. Imports all files now, then removes the copies: a worker may be killed later."""
    with tempfile.TemporaryDirectory(prefix="tune_kd-code-") as place:
        folder = Path(place)
        for path, content in code.files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        sys.path.insert(0, place)  # like the folder of a script
        try:
            package = ".".join(Path(code.main).parent.parts)  # for relative imports
            name = f"{package}.{Path(code.main).stem}_{code.digest[:16]}".removeprefix(".")
            spec = spec_from_file_location(name, folder / code.main)
            assert spec is not None and spec.loader is not None
            module = module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            for path in (path for path, _ in code.files if path != code.main):
                with suppress(Exception):  # raised again if a function imports the module later
                    import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        finally:
            sys.path.remove(place)
    return module


@contextmanager
def brought(codes: Sequence[Code]) -> Iterator[None]:
    """Import the loss classes of a study inside the context only: another study may have modules of the same names."""
    modules, before = dict(sys.modules), dict(_brought)
    try:
        bring(codes)
        yield
    finally:
        for name in [name for name in sys.modules if name not in modules]:
            known = vars(sys.modules[name])  # not getattr: a module may compute its attributes
            if "tune_kd-code-" in repr((known.get("__file__"), known.get("__path__"))):  # a package may have no file
                del sys.modules[name]
        _brought.clear()
        _brought.update(before)


def step_settings(kind: type[nn.Module]) -> tuple[str, ...]:
    """The settings that the loss takes at each step: the keyword-only arguments of `forward`."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """The mean over the batch of KL(softmax(t/T) || softmax(s/T)) of logits [B, K]. Scalar, in nats.

    Raises ValueError for shapes that differ and a temperature that is not above 0. A temperature that is a tensor, on
    the logits' device, is not checked, because that would synchronize.
    """
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    check_shape("student_logits", student_logits, teacher_logits, "BK")
    student_log_BK = F.log_softmax(at_least_32_bits(student_logits) / temperature, dim=1)
    teacher_log_BK = F.log_softmax(at_least_32_bits(teacher_logits) / temperature, dim=1)
    # Both as log-probabilities: a probability that underflows to 0 then adds 0, not NaN.
    return F.kl_div(student_log_BK, teacher_log_BK, reduction="batchmean", log_target=True)


def check_shape(name: str, got: Tensor, expected: Tensor, axes: str) -> None:
    """Raise ValueError unless both tensors have the same shape, with these axes."""
    if got.shape != expected.shape or got.ndim != len(axes):
        raise ValueError(
            f"{name} has shape {list(got.shape)}; expected the teacher's, {list(expected.shape)}, "
            f"with axes [{', '.join(axes)}]"
        )


def at_least_32_bits(tensor: Tensor) -> Tensor:
    """The tensor in its own precision, or in float32 if that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which matrix products on the tensor's device keep the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)

"""What the loss of a method is made from and given, and parts that losses share.

Axes in tensor names: B batch, K classes, C channels, H height, W width. Losses carry gradients to the student and to
their own parameters, and never to the teacher. Reductions over 16-bit inputs are computed in 32 bits.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shapes:
    """Shapes of what a network yields for an image."""

    taps: tuple[tuple[int, int, int], ...]  # [C, H, W] of each feature
    embedding: int  # length of the classifier's input
    logits: int


@dataclass(frozen=True, eq=False)
class Context:
    """What is known before the first step of a trial."""

    student: Shapes
    teacher: Shapes | None  # None where the method has no teacher
    classes: int
    train_labels: Tensor  # int64 [N], by position in the training split
    epochs: int
    steps_per_epoch: int
    classifier: nn.Module | None = None  # the teacher's, frozen; None where the method needs no features
    settings: Mapping[str, float] = field(default_factory=dict)  # those that `forward` does not take


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step sees. What the method does not need is None or empty. Of the teacher nothing requires a gradient."""

    index: Tensor  # int64 [B], positions in the training split
    labels: Tensor  # int64 [B]
    student_logits: Tensor  # [B, K]
    teacher_logits: Tensor | None  # [B, K]
    student_features: tuple[Tensor, ...] = ()  # one a tap, [B, C_i, H_i, W_i]
    teacher_features: tuple[Tensor, ...] = ()
    student_before_relu: tuple[Tensor, ...] = ()  # the same before the tap's last ReLU
    teacher_before_relu: tuple[Tensor, ...] = ()
    student_embedding: Tensor | None = None  # [B, E], input of the classifier
    teacher_embedding: Tensor | None = None
    progress: Tensor | None = None  # 0-dim, from 0 at the first step to 1 at the last
    epoch: Tensor | None = None  # 0-dim, from 1
    second: "Batch | None" = None  # of the same images in other crops, where the method has two views


def loss_class(name: str) -> type[nn.Module]:
    """The class that `package.module:CLASS` names."""
    module, _, attribute = name.partition(":")
    found: type[nn.Module] = getattr(import_module(module), attribute)
    return found


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
    """Raise ValueError unless both tensors have the same shape, of these axes."""
    if got.shape != expected.shape or got.ndim != len(axes):
        raise ValueError(
            f"{name} has shape {list(got.shape)}; expected the teacher's, {list(expected.shape)}, "
            f"of axes [{', '.join(axes)}]"
        )


def at_least_32_bits(tensor: Tensor) -> Tensor:
    """The tensor in its own precision, or in float32 if that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which matrix products on the tensor's device keep the precision of their factors."""
    return torch.autocast(tensor.device.type, enabled=False)

"""Distillation methods: what each needs of the teacher, its settings and its loss.

Axes in tensor names: B batch, K classes, C channels, H height, W width. Losses are pure functions on any device. They
carry gradients to the student and never to the teacher. Reductions over 16-bit inputs are computed in 32 bits.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """What a loss can use in a step. Whatever the method does not need is None or empty."""

    student_logits: Tensor  # [B, K]
    teacher_logits: Tensor | None  # [B, K]
    student_features: tuple[Tensor, ...]  # one a stage, [B, C_i, H_i, W_i]
    teacher_features: tuple[Tensor, ...]
    projections: Iterable[Projection]  # one a stage, from the student's channels to the teacher's


@dataclass(frozen=True)
class Method:
    """A distillation method. The loss of a trial is alpha * loss + (1 - alpha) * cross-entropy."""

    needs: Literal["nothing", "logits", "features"]  # of the teacher; features also of the student
    settings: tuple[str, ...] = ()  # fields of `Cell` that the loss takes, by keyword
    loss: Callable[..., Tensor] | None = None  # (batch, **settings) -> scalar; None trains without a teacher


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 * KL(softmax(t/T) || softmax(s/T)) of logits [B, K], summed over classes, averaged over the batch.

    T^2 keeps the scale of the gradient the same at every temperature. Scalar, in nats times T^2.
    Raises ValueError for shapes that differ and a temperature that is not above 0. A temperature that is a tensor, on
    the logits' device, is not checked, because that would synchronize.
    Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network".
    """
    loss: Tensor = temperature**2 * divergence(student_logits, teacher_logits.detach(), temperature)
    return loss


def feature(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    projections: Iterable[Projection],
    beta: float | Tensor,
) -> Tensor:
    """mse + beta * cosine of `feature_parts`, which has the shapes and errors. Scalar."""
    mse, cosine = feature_parts(student_features, teacher_features, projections)
    return mse + beta * cosine


def feature_parts(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], projections: Iterable[Projection]
) -> tuple[Tensor, Tensor]:
    """Distances of the projected features [B, C_i, H_i, W_i] of stages i from the teacher's: (mse, cosine).

    mse: the mean over all elements of (P_i s_i - t_i)^2, averaged over stages (Romero et al. 2015,
    "FitNets"). cosine: 1 - cos(GAP(P_i s_i), GAP(t_i)), averaged over the batch and then over stages,
    where GAP is the mean over H and W. Both scalars. Stages have equal weight, whatever their size.
    Raises ValueError for no stages, different numbers of stages, and shapes that differ after projection.
    """
    projections = list(projections)
    counts = len(student_features), len(teacher_features), len(projections)
    if len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(
            f"student_features, teacher_features and projections have {counts[0]}, {counts[1]} and "
            f"{counts[2]} stages; expected the same number of each, at least 1"
        )
    squares, angles = [], []
    stages = zip(student_features, teacher_features, projections, strict=True)
    for stage, (student_BCHW, teacher_BCHW, project) in enumerate(stages, start=1):
        teacher_BCHW = teacher_BCHW.detach()
        projected_BCHW = project(student_BCHW)
        check_shape(f"student_features of stage {stage}, projected,", projected_BCHW, teacher_BCHW, "BCHW")
        squares.append(F.mse_loss(_at_least_32_bits(projected_BCHW), _at_least_32_bits(teacher_BCHW)))
        cosine_B = F.cosine_similarity(_pooled(projected_BCHW), _pooled(teacher_BCHW), dim=1)
        angles.append((1 - cosine_B).mean())
    return torch.stack(squares).mean(), torch.stack(angles).mean()


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """The mean over the batch of KL(softmax(t/T) || softmax(s/T)) of logits [B, K]. Scalar, in nats.

    Raises ValueError as `kd` does.
    """
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    check_shape("student_logits", student_logits, teacher_logits, "BK")
    student_log_BK = F.log_softmax(_at_least_32_bits(student_logits) / temperature, dim=1)
    teacher_log_BK = F.log_softmax(_at_least_32_bits(teacher_logits) / temperature, dim=1)
    # Both as log-probabilities: a probability that underflows to 0 then adds 0, not NaN.
    return F.kl_div(student_log_BK, teacher_log_BK, reduction="batchmean", log_target=True)


def check_shape(name: str, got: Tensor, expected: Tensor, axes: str) -> None:
    """Raise ValueError unless both tensors have the same shape, of these axes."""
    if got.shape != expected.shape or got.ndim != len(axes):
        raise ValueError(
            f"{name} has shape {list(got.shape)}; expected the teacher's, {list(expected.shape)}, "
            f"of axes [{', '.join(axes)}]"
        )


def _pooled(features_BCHW: Tensor) -> Tensor:
    return _at_least_32_bits(features_BCHW).mean(dim=(2, 3))


def _at_least_32_bits(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logit_loss(batch: Batch, *, temperature: float | Tensor) -> Tensor:
    assert batch.teacher_logits is not None
    return kd(batch.student_logits, batch.teacher_logits, temperature)


def _feature_loss(batch: Batch, *, beta: float | Tensor) -> Tensor:
    return feature(batch.student_features, batch.teacher_features, batch.projections, beta)


METHODS = {
    "none": Method("nothing"),
    "logit": Method("logits", ("temperature",), _logit_loss),
    "feature": Method("features", ("beta",), _feature_loss),
}
"""All methods by name: nothing else in `training` depends on the name of one."""
SETTINGS = ("alpha", *(name for method in METHODS.values() for name in method.settings))
"""Numbers of a loss, as fields of `Cell`: a step reads them anew each time."""

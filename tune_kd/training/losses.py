"""What a student learns from a teacher, and how the two are compared after training.

Axes in tensor names: B batch, K classes, C channels, H height, W width, M bins. Pure functions on any
device. The losses carry gradients to the student and never to the teacher. Whatever is reduced over a
16-bit input is computed in 32 bits; the measures are computed in 64 bits and carry no gradients.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Callable[[Tensor], Tensor]


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 * KL(softmax(t/T) || softmax(s/T)) of logits [B, K]: summed over classes, averaged over the batch.

    T^2 keeps the gradient's scale the same at every temperature. Scalar, in nats times T^2.
    Raises ValueError for shapes that differ and temperatures that are not above 0; one that is a tensor on the
    logits' device is not looked at, which would wait for the device.
    Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network".
    """
    divergence: Tensor = temperature**2 * _divergence(student_logits, teacher_logits.detach(), temperature)
    return divergence


def feature(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    projections: Iterable[Projection],
    beta: float | Tensor,
) -> Tensor:
    """mse + beta * cosine of `feature_parts`, which see for shapes and errors. Scalar."""
    mse, cosine = feature_parts(student_features, teacher_features, projections)
    return mse + beta * cosine


def feature_parts(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], projections: Iterable[Projection]
) -> tuple[Tensor, Tensor]:
    """How far the projected features [B, C_i, H_i, W_i] of stages i are from the teacher's: (mse, cosine).

    mse: the mean over all elements of (P_i s_i - t_i)^2, averaged over stages (Romero et al. 2015,
    "FitNets"). cosine: 1 - cos(GAP(P_i s_i), GAP(t_i)), averaged over the batch and then over stages,
    where GAP is the mean over H and W. Both scalars. A stage counts the same whatever its size.
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
        _check_shape(f"student_features of stage {stage}, projected,", projected_BCHW, teacher_BCHW, "BCHW")
        squares.append(F.mse_loss(_at_least_32_bits(projected_BCHW), _at_least_32_bits(teacher_BCHW)))
        cosine_B = F.cosine_similarity(_pooled(projected_BCHW), _pooled(teacher_BCHW), dim=1)
        angles.append((1 - cosine_B).mean())
    return torch.stack(squares).mean(), torch.stack(angles).mean()


@torch.no_grad()
def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The fraction of images for which both logits [B, K] put the same class first. Scalar in [0, 1].

    Raises ValueError for shapes that differ.
    """
    _check_shape("student_logits", student_logits, teacher_logits, "BK")
    return (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).double().mean()


@torch.no_grad()
def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The mean over the batch of KL(softmax(t/T) || softmax(s/T)) for logits [B, K]. Scalar, in nats.

    Not multiplied by T^2, unlike `kd`. Raises ValueError as `kd` does.
    """
    return _divergence(student_logits.double(), teacher_logits.double(), temperature)


@torch.no_grad()
def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """The mean gap of confidence and accuracy over bins of confidence. Scalar in [0, 1].

    logits [B, K], labels [B]. The confidence is the largest softmax probability; bin m of M covers
    ((m - 1)/M, m/M], and is weighted by its share of the images.
    Raises ValueError for shapes that do not fit and fewer than 1 bin.
    Guo et al. 2017, "On calibration of modern neural networks".
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels have shapes {list(logits.shape)} and {list(labels.shape)}; expected [B, K] and [B]"
        )
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1")
    confidence_B, predicted_B = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.arange(1, bins, dtype=torch.float64, device=logits.device) / bins
    bin_B = torch.bucketize(confidence_B, edges)
    # Within a bin, count * |accuracy - mean confidence| is |sum of (correct - confidence)|.
    gap_M = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gap_M.index_add_(0, bin_B, (predicted_B == labels).double() - confidence_B)
    return gap_M.abs().sum() / len(labels)


def _divergence(student_BK: Tensor, teacher_BK: Tensor, temperature: float | Tensor) -> Tensor:
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    _check_shape("student_logits", student_BK, teacher_BK, "BK")
    student_log_BK = F.log_softmax(_at_least_32_bits(student_BK) / temperature, dim=1)
    teacher_log_BK = F.log_softmax(_at_least_32_bits(teacher_BK) / temperature, dim=1)
    # Both sides as logarithms: a probability that underflows to 0 then adds 0, not NaN.
    return F.kl_div(student_log_BK, teacher_log_BK, reduction="batchmean", log_target=True)


def _pooled(features_BCHW: Tensor) -> Tensor:
    return _at_least_32_bits(features_BCHW).mean(dim=(2, 3))


def _at_least_32_bits(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_shape(name: str, got: Tensor, expected: Tensor, axes: str) -> None:
    if got.shape != expected.shape or got.ndim != len(axes):
        raise ValueError(
            f"{name} has shape {list(got.shape)}; expected the teacher's, {list(expected.shape)}, "
            f"of axes [{', '.join(axes)}]"
        )

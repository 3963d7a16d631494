"""Metrics of a trained student: agreement with its teacher, and calibration.

Axes in tensor names: B batch, K classes, M bins. Computed in 64 bits on any device, without gradients.
"""

import torch
from torch import Tensor

from tune_kd.training.loss import check_shape, divergence


@torch.no_grad()
def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The fraction of images for which both logits [B, K] predict the same class. Scalar in [0, 1].

    Raises ValueError for shapes that differ.
    """
    check_shape("student_logits", student_logits, teacher_logits, "BK")
    return (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).double().mean()


@torch.no_grad()
def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The mean over the batch of KL(softmax(t/T) || softmax(s/T)) of logits [B, K]. Scalar, in nats.

    Not multiplied by T^2, unlike `kd`. Raises ValueError as `kd` does.
    """
    return divergence(student_logits.double(), teacher_logits.double(), temperature)


@torch.no_grad()
def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """The mean gap between confidence and accuracy over bins of confidence. Scalar in [0, 1].

    logits [B, K], labels [B]. The confidence is the largest softmax probability. Bin m of M covers
    ((m - 1)/M, m/M] and is weighted by its fraction of the images.
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

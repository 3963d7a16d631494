"""Distillation of distances and angles between embeddings: Park et al. 2019, "Relational knowledge distillation"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.training.loss import Batch, Context, at_least_32_bits, without_autocast

METHOD = Method(
    "rkd",
    loss="tune_kd.training.methods.rkd:RKD",
    needs="features",
    settings={"distance_weight": 25.0, "angle_weight": 50.0},
)


class RKD(nn.Module):
    """`rkd_parts` of the batch's embeddings, weighted."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, batch: Batch, *, distance_weight: float | Tensor, angle_weight: float | Tensor) -> Tensor:
        assert batch.student_embedding is not None and batch.teacher_embedding is not None
        distance, angle = rkd_parts(batch.student_embedding, batch.teacher_embedding)
        return distance_weight * distance + angle_weight * angle


def rkd_parts(student_embedding: Tensor, teacher_embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth L1 distances between the relations of embeddings [B, E_student] and [B, E_teacher]: (distance, angle).

    distance: of |e_i - e_j| divided by its mean over all pairs of different images, averaged over all B^2 pairs.
    angle: of the cosines of the angles at e_i between e_j and e_k, averaged over all B^3 triples. Both scalars.
    A relation that two equal embeddings leave undefined is 0, with a gradient of 0.
    Takes memory for B^2 E + B^3 numbers. Raises ValueError for other shapes.
    """
    shapes = student_embedding.shape, teacher_embedding.shape
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"student_embedding and teacher_embedding have shapes {list(shapes[0])} and {list(shapes[1])}; "
            "expected [B, E] with the same B"
        )
    with without_autocast(student_embedding):
        student_BB, student_BBB = _relations(student_embedding)
        teacher_BB, teacher_BBB = _relations(teacher_embedding.detach())
    return F.smooth_l1_loss(student_BB, teacher_BB), F.smooth_l1_loss(student_BBB, teacher_BBB)


def _relations(embedding_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean, [B, B], and cosines [B, B, B], the first index being the angle's vertex."""
    embedding_BE = at_least_32_bits(embedding_BE)
    count = len(embedding_BE)
    # Differences, not a product of embeddings, in which nearby embeddings would lose all their digits.
    difference_BBE = embedding_BE[None] - embedding_BE[:, None]
    distance_BB = torch.linalg.vector_norm(difference_BBE, dim=2)
    mean = distance_BB.sum() / max(1, count * (count - 1))
    direction_BBE = difference_BBE / _nonzero(distance_BB)[:, :, None]
    return distance_BB / _nonzero(mean), direction_BBE @ direction_BBE.mT


def _nonzero(length: Tensor) -> Tensor:
    """The length, or infinity for 0: a quotient with it is then 0, and so is its gradient."""
    return length.masked_fill(length == 0, math.inf)

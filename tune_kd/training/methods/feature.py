"""Distillation from the projected features of all stages, by squared error (Romero et al. 2015, "FitNets") and by the
angle between their means over positions."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.system.errors import UserError
from tune_kd.training.loss import Batch, Context, at_least_32_bits, check_shape

METHOD = Method("feature", loss="tune_kd.training.methods.feature:Feature", needs="features", settings={"beta": 0.5})

Projection = Callable[[Tensor], Tensor]


class Feature(nn.Module):
    """`feature` of the batch. A 1x1 convolution per stage, without bias, maps [B, C_student, H, W] to
    [B, C_teacher, H, W].

    It has PyTorch's default initialisation: Kaiming's gain would compensate for a ReLU, and none follows.
    Raises `UserError` for different numbers of stages.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        assert context.teacher is not None
        student, teacher = context.student.taps, context.teacher.taps
        if len(student) != len(teacher):
            raise UserError(
                f"the teacher has {len(teacher)} stages and the student {len(student)}; the numbers must be equal"
            )
        self.projections = nn.ModuleList(
            nn.Conv2d(one[0], other[0], kernel_size=1, bias=False) for one, other in zip(student, teacher, strict=True)
        )

    def forward(self, batch: Batch, *, beta: float | Tensor) -> Tensor:
        return feature(batch.student_features, batch.teacher_features, self.projections, beta)


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
    """Distances between projected features [B, C_i, H_i, W_i] of stages i and the teacher's: (mse, cosine).

    mse: the mean over all elements of (P_i s_i - t_i)^2, averaged over stages. cosine: 1 - cos(GAP(P_i s_i), GAP(t_i)),
    averaged over the batch and then over stages, where GAP is the mean over H and W. Both scalars. Stages have equal
    weight, whatever their size.
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
        teacher_BCHW, projected_BCHW = teacher_BCHW.detach(), project(student_BCHW)
        check_shape(f"student_features of stage {stage}, projected,", projected_BCHW, teacher_BCHW, "BCHW")
        # One cast for both distances: on a GPU a cast reads and writes the whole map.
        teacher_BCHW, projected_BCHW = at_least_32_bits(teacher_BCHW), at_least_32_bits(projected_BCHW)
        squares.append(F.mse_loss(projected_BCHW, teacher_BCHW))
        cosine_B = F.cosine_similarity(_pooled(projected_BCHW), _pooled(teacher_BCHW), dim=1)
        angles.append((1 - cosine_B).mean())
    return torch.stack(squares).mean(), torch.stack(angles).mean()


def _pooled(features_BCHW: Tensor) -> Tensor:
    return features_BCHW.mean(dim=(2, 3))

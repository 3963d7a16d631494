"""Distillation with one loss for the target's probability and one for the other classes': Zhao et al. 2022, "Decoupled
knowledge distillation"."""

import torch
from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.training.loss import Batch, Context, at_least_32_bits, check_shape, divergence

METHOD = Method(
    "dkd",
    loss="tune_kd.training.methods.dkd:DKD",
    needs="logits",
    settings={"temperature": 4.0, "target_weight": 1.0, "nontarget_weight": 8.0, "warmup": 20.0},
)


class DKD(nn.Module):
    """`dkd_parts` of the batch, weighted, times epoch / `warmup` in the first `warmup` epochs. 0 means no warm-up."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(
        self,
        batch: Batch,
        *,
        temperature: float | Tensor,
        target_weight: float | Tensor,
        nontarget_weight: float | Tensor,
        warmup: float | Tensor,
    ) -> Tensor:
        assert batch.teacher_logits is not None and batch.epoch is not None
        target, nontarget = dkd_parts(batch.student_logits, batch.teacher_logits, batch.labels, temperature)
        share = (batch.epoch / warmup).clamp(max=1)  # epoch / 0 is infinite
        return share * (target_weight * target + nontarget_weight * nontarget)


def dkd_parts(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """T^2 times two divergences of logits [B, K], K at least 2, and labels int64 [B]: (target, nontarget).

    With p = softmax(logits / T): target is KL between (p_y, 1 - p_y) of the teacher and of the student; nontarget is KL
    between their p_k / (1 - p_y) over the classes k other than y. Both are averaged over the batch. Scalars, in nats
    times T^2. `kd` of one image is target + (1 - p_y of the teacher) * nontarget.
    Raises ValueError as `divergence` does, and for labels of another shape.
    """
    check_shape("student_logits", student_logits, teacher_logits, "BK")
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [B], {list(student_logits.shape[:1])}")
    student_B2, student_BJ = _decoupled(student_logits, labels, temperature)
    teacher_B2, teacher_BJ = _decoupled(teacher_logits.detach(), labels, temperature)
    target = divergence(student_B2, teacher_B2, temperature=1)
    nontarget = divergence(student_BJ, teacher_BJ, temperature=1)
    return temperature**2 * target, temperature**2 * nontarget


def _decoupled(logits_BK: Tensor, labels_B: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Logits of (target, any other class), [B, 2], and of the J = K - 1 other classes, [B, J], divided by T."""
    scaled_BK = at_least_32_bits(logits_BK) / temperature
    labels_B1 = labels_B[:, None]
    others_J = torch.arange(logits_BK.shape[1] - 1, device=logits_BK.device)
    others_BJ = scaled_BK.gather(1, others_J + (others_J >= labels_B1))
    # exp(logsumexp) is the sum of the other classes' exponentials, so the softmax of both is (p_y, 1 - p_y).
    binary_B2 = torch.cat([scaled_BK.gather(1, labels_B1), others_BJ.logsumexp(1, keepdim=True)], dim=1)
    return binary_B2, others_BJ

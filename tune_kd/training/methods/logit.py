"""Knowledge distillation from logits: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network"."""

from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.training.loss import Batch, Context, divergence

METHOD = Method("logit", loss="tune_kd.training.methods.logit:Logit", needs="logits", settings={"temperature": 4.0})


class Logit(nn.Module):
    """`kd` of the batch."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, batch: Batch, *, temperature: float | Tensor) -> Tensor:
        assert batch.teacher_logits is not None
        return kd(batch.student_logits, batch.teacher_logits, temperature)


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 * KL(softmax(t/T) || softmax(s/T)) of logits [B, K], summed over classes, averaged over the batch.

    T^2 keeps the scale of the gradient the same at every temperature. Scalar, in nats times T^2.
    Raises ValueError as `divergence` does.
    """
    loss: Tensor = temperature**2 * divergence(student_logits, teacher_logits.detach(), temperature)
    return loss

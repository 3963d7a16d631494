"""Distillation from logits at a learned temperature, which makes them harder to match: Li et al. 2023, "Curriculum
temperature for knowledge distillation", with one temperature for all images."""

import math

import torch
from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.training.loss import Batch, Context
from tune_kd.training.methods.logit import kd

METHOD = Method(
    "ctkd",
    loss="tune_kd.training.methods.ctkd:CTKD",
    needs="logits",
    settings={"temperature_start": 1.0, "temperature_end": 21.0, "loops": 10.0},
)


class CTKD(nn.Module):
    """`kd` of the batch at temperature_start + (temperature_end - temperature_start) * sigmoid(`parameter`).

    The parameter is trained with the student. Its gradient is multiplied by `reversal`, so it increases the loss that
    the student decreases.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(()))

    def forward(
        self, batch: Batch, *, temperature_start: float | Tensor, temperature_end: float | Tensor, loops: float | Tensor
    ) -> Tensor:
        assert batch.teacher_logits is not None and batch.epoch is not None
        reversed_parameter = with_gradient_times(reversal(batch.epoch, loops), self.parameter)
        share = reversed_parameter.sigmoid()
        temperature = temperature_start + (temperature_end - temperature_start) * share
        return kd(batch.student_logits, batch.teacher_logits, temperature)


def reversal(epoch: Tensor, loops: float | Tensor) -> Tensor:
    """The factor of the parameter's gradient: a cosine from 0 before the first epoch to -1 at epoch `loops` and after.

    `epoch` is 0-dim, from 1. With 0 loops the factor is -1.
    """
    share = (epoch / loops).clamp(max=1)  # epoch / 0 is infinite
    return (torch.cos(math.pi * share) - 1) / 2


def with_gradient_times(factor: Tensor, value: Tensor) -> Tensor:
    """Return the value unchanged. Its gradient is multiplied by the factor in the backward pass."""
    return value.detach() + factor * (value - value.detach())

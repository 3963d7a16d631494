"""CTKD, checked against its formula in NumPy and gradients computed by hand."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.special import expit, rel_entr, softmax

from losses import STUDENT, TEACHER, context, taps
from trials import CPU, distilling, exact, interrupted, two_epochs
from tune_kd.data.datasets import DataSet
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train
from tune_kd.training.loss import Batch
from tune_kd.training.methods.ctkd import CTKD, METHOD, reversal, with_gradient_times
from tune_kd.training.methods.logit import kd
from tune_kd.training.teachers import Teacher

LABELS = torch.arange(8)


def module(parameter=1.0):
    built = CTKD(context(taps(8), taps(8))).double()
    with torch.no_grad():
        built.parameter.fill_(parameter)
    return built


def loss(built, student=STUDENT, teacher=TEACHER, epoch=1.0, **settings):
    batch = Batch(LABELS, LABELS, student, teacher, epoch=torch.tensor(float(epoch)))
    return built(batch, **{**METHOD.defaults, **settings})


def test_the_temperature_starts_at_its_published_value():
    built = CTKD(context(taps(8), taps(8)))
    assert built.parameter.shape == ()
    assert loss(built).item() == pytest.approx(kd(STUDENT, TEACHER, 1 + 20 * float(expit(1))).item(), rel=1e-6)


@given(st.floats(-4, 4), st.floats(0.5, 4), st.floats(5, 30))
def test_ctkd_matches_its_formula(parameter, start, end):
    t = start + (end - start) * expit(parameter)
    student, teacher = (softmax(each.numpy() / t, axis=1) for each in (STUDENT, TEACHER))
    expected = t**2 * rel_entr(teacher, student).sum(1).mean()
    settings = {"temperature_start": start, "temperature_end": end}
    assert loss(module(parameter), **settings).item() == pytest.approx(expected, rel=1e-9)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in settings.items()}
    assert loss(module(parameter), **tensors).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("epoch", "loops", "factor"),
    [(1, 10, (math.cos(math.pi / 10) - 1) / 2), (5, 10, -0.5), (10, 10, -1), (11, 10, -1), (200, 10, -1), (1, 0, -1)],
)
def test_the_reversal_follows_a_cosine_from_0_to_minus_1(epoch, loops, factor):
    assert reversal(torch.tensor(float(epoch)), loops).item() == pytest.approx(factor, rel=1e-5)
    assert reversal(torch.tensor(float(epoch)), torch.tensor(float(loops))).item() == pytest.approx(factor, rel=1e-5)


@given(st.floats(-1e6, 1e6), st.floats(-2, 2))
def test_the_gradient_is_scaled_and_the_value_is_unchanged(value, factor):
    one = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = with_gradient_times(torch.tensor(factor, dtype=torch.float64), one)
    assert found.item() == value
    (3 * found).backward()
    assert one.grad.item() == pytest.approx(3 * factor)


@pytest.mark.parametrize(("epoch", "factor"), [(1, (math.cos(math.pi / 10) - 1) / 2), (5, -0.5), (12, -1)])
def test_the_parameter_ascends_the_loss_that_the_student_descends(epoch, factor):
    built, student = module(0.3), STUDENT.clone().requires_grad_()
    loss(built, student, epoch=epoch).backward()

    parameter, same = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), STUDENT.clone().requires_grad_()
    kd(same, TEACHER, 1 + 20 * parameter.sigmoid()).backward()
    assert abs(parameter.grad) > 0.1
    assert built.parameter.grad.item() == pytest.approx(factor * parameter.grad.item(), rel=1e-6)
    torch.testing.assert_close(student.grad, same.grad)

    before = kd(STUDENT, TEACHER, 1 + 20 * torch.tensor(0.3).sigmoid()).item()
    with torch.no_grad():
        built.parameter -= 0.01 * built.parameter.grad
    assert loss(built).item() > before


def test_no_gradient_reaches_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    loss(module(), teacher=teacher).backward()
    assert teacher.grad is None


def test_half_precision_logits_are_divided_by_the_temperature_in_single_precision():
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(CTKD(context(taps(8), taps(8))), student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(module(), student.double(), teacher.double()).item(), rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(pixels: DataSet, teacher: Teacher, tmp_path):
    one, parameters, rows = two_epochs(distilling("ctkd", teacher)), [], []
    checkpoints = Checkpoints(tmp_path / "whole")
    for row in train(one, pixels, teacher, device=CPU, checkpoints=checkpoints, checkpoint_every=0.0):
        rows.append(row)
        parameters.append(checkpoints.load()[0]["loss.parameter"].item())
    assert [exact(each) for each in interrupted(one, pixels, teacher, tmp_path / "cut")] == [*map(exact, rows)]
    assert rows[1].train_loss < rows[0].train_loss
    assert rows[0].loss_kd > 0
    assert len({1.0, *parameters}) == 3  # it is trained in each epoch

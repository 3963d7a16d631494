"""DKD, checked against published values, its formula in NumPy, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from losses import STUDENT, TEACHER, context, numbers, reference, taps, temperatures
from trials import distilling, exact, interrupted, run, two_epochs
from tune_kd.data.datasets import DataSet
from tune_kd.training.loss import Batch
from tune_kd.training.methods.dkd import DKD, METHOD, dkd_parts
from tune_kd.training.methods.logit import kd
from tune_kd.training.teachers import Teacher

LABELS = torch.arange(8)

sizes = st.tuples(st.integers(1, 6), st.integers(2, 7))
cases = sizes.flatmap(
    lambda size: st.tuples(
        *[arrays(np.float64, size, elements=numbers)] * 2,
        arrays(np.int64, size[0], elements=st.integers(0, size[1] - 1)),
    )
)


def loss(student=STUDENT, teacher=TEACHER, labels=LABELS, epoch=1, warmup=0.0, **settings):
    batch = Batch(labels, labels, student, teacher, epoch=torch.tensor(float(epoch)))
    return DKD(context(taps(8), taps(8)))(batch, **{**METHOD.defaults, "warmup": warmup, **settings})


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 8)])
def test_dkd_has_the_reference_value(weights):
    target, nontarget = weights
    expected = reference()["values"][f"dkd(ls,lt,y,alpha={target},beta={nontarget},T=4)"]
    found = loss(target_weight=target, nontarget_weight=nontarget)
    assert found.item() == pytest.approx(expected, rel=1e-9)


@given(cases, temperatures)
def test_dkd_matches_its_formula(case, temperature):
    *both, labels = case
    rows = np.arange(len(labels))
    parts = []
    for logits in both:
        p = softmax(logits / temperature, axis=1)
        rest = np.stack([np.delete(row, label) for row, label in zip(logits, labels, strict=True)])
        target = p[rows, labels]
        others = np.array([np.delete(row, label).sum() for row, label in zip(p, labels, strict=True)])
        parts.append((np.stack([target, others], axis=1), softmax(rest / temperature, axis=1)))
    (student, student_rest), (teacher, teacher_rest) = parts
    expected = [rel_entr(t, s).sum(1).mean() for t, s in ((teacher, student), (teacher_rest, student_rest))]
    found = dkd_parts(*map(torch.from_numpy, case), temperature)
    assert [each.item() for each in found] == pytest.approx(temperature**2 * np.array(expected), rel=1e-9, abs=1e-9)


@given(cases, temperatures)
def test_kd_is_the_target_part_plus_the_weighted_nontarget_part(case, temperature):
    student, teacher, labels = (torch.from_numpy(each[:1]) for each in case)
    target, nontarget = dkd_parts(student, teacher, labels, temperature)
    other = 1 - (teacher / temperature).softmax(1)[0, labels[0]]
    assert (target + other * nontarget).item() == pytest.approx(kd(student, teacher, temperature).item(), abs=1e-9)


@given(cases, temperatures)
def test_both_parts_of_equal_logits_are_zero(case, temperature):
    logits, labels = torch.from_numpy(case[0]), torch.from_numpy(case[2])
    assert [each.item() for each in dkd_parts(logits, logits.clone(), labels, temperature)] == [0, 0]


@given(cases, temperatures)
def test_the_nontarget_part_ignores_the_logits_of_the_target(case, temperature):
    student, teacher, labels = map(torch.from_numpy, case)
    moved = student.scatter_add(1, labels[:, None], torch.full((len(labels), 1), 3.0, dtype=torch.float64))
    assert dkd_parts(moved, teacher, labels, temperature)[1] == dkd_parts(student, teacher, labels, temperature)[1]


@pytest.mark.parametrize(
    ("epoch", "warmup", "share"), [(1, 20, 0.05), (5, 20, 0.25), (20, 20, 1), (21, 20, 1), (1, 0, 1), (3, 0, 1)]
)
def test_warmup_scales_the_loss_linearly_with_the_epoch(epoch, warmup, share):
    whole = loss().item()
    assert loss(epoch=epoch, warmup=warmup).item() == pytest.approx(share * whole, rel=1e-6)
    assert loss(epoch=epoch, warmup=torch.tensor(float(warmup))).item() == pytest.approx(share * whole, rel=1e-6)


def test_tensor_settings_give_the_same_loss_as_numbers():
    settings = {"temperature": 3.0, "target_weight": 2.0, "nontarget_weight": 5.0, "warmup": 4.0}
    tensors = {name: torch.tensor(value) for name, value in settings.items()}
    assert loss(**tensors).item() == pytest.approx(loss(**settings).item(), rel=1e-6)
    assert loss(**settings).item() != pytest.approx(loss().item(), rel=0.1)


def test_only_the_student_gets_a_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: dkd_parts(s, TEACHER, LABELS, 4.0), student)
    # A constant added to a row changes nothing.
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(8, dtype=torch.float64))
    assert student.grad.abs().sum() > 1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_large_logits_in_single_precision_give_the_double_precision_loss(temperature):
    """If the target's probability is 1, the others' are 0, and the nontarget part depends on their ratios."""
    student, teacher = (1e3 * each for each in (STUDENT, TEACHER))
    student[torch.arange(8), LABELS] += 1e4
    single = student.float().requires_grad_()
    found = loss(single, teacher.float(), temperature=temperature)
    found.backward()
    assert found.item() == pytest.approx(loss(student, teacher, temperature=temperature).item(), rel=1e-5)
    assert single.grad.isfinite().all()
    assert single.grad.abs().sum() > 0


def test_half_precision_logits_are_divided_by_the_temperature_in_single_precision():
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    found = loss(student, teacher, temperature=3)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(student.double(), teacher.double(), temperature=3).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "message"),
    [
        ((8, 10), (8, 1), (8,), r"student_logits has shape \[8, 10\]; expected the teacher's, \[8, 1\]"),
        ((8, 10), (8, 10), (1,), r"labels has shape \[1\]; expected \[B\], \[8\]"),
        ((8, 10), (8, 10), (8, 1), r"labels has shape \[8, 1\]; expected \[B\], \[8\]"),
    ],
)
def test_shapes_that_would_broadcast_are_rejected(student, teacher, labels, message):
    with pytest.raises(ValueError, match=message):
        dkd_parts(torch.zeros(student), torch.zeros(teacher), torch.zeros(labels, dtype=torch.int64), 4.0)


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(pixels: DataSet, teacher: Teacher, tmp_path):
    one = two_epochs(distilling("dkd", teacher, temperature=4.0))
    whole = run(one, pixels, teacher, tmp_path / "whole")
    assert [exact(each) for each in interrupted(one, pixels, teacher, tmp_path / "cut")] == [*map(exact, whole)]
    assert whole[1].train_loss < whole[0].train_loss
    assert whole[0].loss_kd > 0

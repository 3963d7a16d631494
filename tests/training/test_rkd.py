"""RKD, checked against a published value, its formula in NumPy, and invariances."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from losses import STUDENT_EMBEDDING, TEACHER_EMBEDDING, context, numbers, reference, taps
from trials import distilling, exact, interrupted, run, two_epochs
from tune_kd.data.datasets import DataSet
from tune_kd.training.loss import Batch
from tune_kd.training.methods.rkd import METHOD, RKD, rkd_parts
from tune_kd.training.teachers import Teacher

sizes = st.tuples(st.integers(2, 6), st.integers(1, 5), st.integers(1, 5))
pairs = sizes.flatmap(lambda size: st.tuples(*(arrays(np.float64, (size[0], e), elements=numbers) for e in size[1:])))


def loss(student=STUDENT_EMBEDDING, teacher=TEACHER_EMBEDDING, **settings):
    zeros = torch.zeros(len(student), dtype=torch.int64)
    batch = Batch(zeros, zeros, zeros, None, student_embedding=student, teacher_embedding=teacher)
    return RKD(context(taps(8), taps(8)))(batch, **{**METHOD.defaults, **settings})


def smooth_l1(one, other):
    difference = np.abs(one - other)
    return np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()


def distances(e):
    count = len(e)
    found = np.array([[np.linalg.norm(e[i] - e[j]) for j in range(count)] for i in range(count)])
    return found / (found.sum() / (count * (count - 1)) or 1)


def cosines(e):
    count = len(e)
    found = np.zeros((count, count, count))
    for i, j, k in np.ndindex(count, count, count):
        one, other = e[j] - e[i], e[k] - e[i]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        found[i, j, k] = one @ other / lengths if lengths else 0
    return found


def test_rkd_has_the_reference_value():
    assert loss().item() == pytest.approx(reference()["values"]["rkd(es,et)"], rel=1e-9)


@given(pairs)
def test_rkd_matches_its_formula(pair):
    expected = [smooth_l1(*map(relation, pair)) for relation in (distances, cosines)]
    found = [each.item() for each in rkd_parts(*map(torch.from_numpy, pair))]
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)
    total = loss(*map(torch.from_numpy, pair), distance_weight=2.0, angle_weight=torch.tensor(3.0)).item()
    assert total == pytest.approx(2 * expected[0] + 3 * expected[1], rel=1e-7, abs=1e-9)


@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 9))
def test_rkd_is_invariant_to_scale_shift_and_rotation_of_the_embeddings(scale, shift, seed):
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).normal(size=(16, 16)))[0])
    moved = scale * STUDENT_EMBEDDING @ rotation + shift
    assert loss(moved).item() == pytest.approx(loss().item(), rel=1e-9)
    assert loss(moved, STUDENT_EMBEDDING).item() == pytest.approx(0, abs=1e-12)


def test_only_the_student_gets_a_gradient():
    student, teacher = STUDENT_EMBEDDING.clone().requires_grad_(), TEACHER_EMBEDDING.clone().requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0.1
    # Each pair is counted with both signs.
    torch.testing.assert_close(student.grad.sum(0), torch.zeros(16, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: rkd_parts(s, TEACHER_EMBEDDING), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_embeddings_give_bounded_gradients(dtype):
    """Replacing a length of 0 by an epsilon would give gradients of 1e12."""
    student = STUDENT_EMBEDDING.to(dtype).clone()
    apart = student.clone().requires_grad_()
    loss(apart, TEACHER_EMBEDDING.to(dtype)).backward()
    student[1] = student[0]
    student.requires_grad_()
    loss(student, TEACHER_EMBEDDING.to(dtype)).backward()
    assert 0 < student.grad.norm() < 10 * apart.grad.norm()
    alike = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    loss(alike, TEACHER_EMBEDDING[:4].to(dtype)).backward()
    assert torch.equal(alike.grad, torch.zeros(4, 3, dtype=dtype))
    assert loss(apart, torch.ones(8, 3, dtype=dtype)).isfinite()


def test_embeddings_far_from_the_origin_stay_accurate_in_single_precision():
    student = 100 + STUDENT_EMBEDDING.float()
    assert loss(student, TEACHER_EMBEDDING).item() == pytest.approx(
        loss(student.double(), TEACHER_EMBEDDING).item(), rel=1e-5
    )


def test_half_precision_embeddings_are_compared_in_single_precision():
    student, teacher = STUDENT_EMBEDDING.bfloat16(), TEACHER_EMBEDDING.bfloat16()
    exactly = loss(student.double(), teacher.double()).item()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = loss(student, teacher)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exactly, rel=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [((8, 4), (7, 4)), ((8, 4, 1), (8, 4)), ((8, 4), (8,))])
def test_invalid_embedding_shapes_are_rejected(student, teacher):
    message = f"have shapes {list(student)} and {list(teacher)}; expected [B, E] with the same B"
    with pytest.raises(ValueError, match=re.escape(message)):
        rkd_parts(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(pixels: DataSet, teacher: Teacher, tmp_path):
    one = two_epochs(distilling("rkd", teacher))
    whole = run(one, pixels, teacher, tmp_path / "whole")
    assert [exact(each) for each in interrupted(one, pixels, teacher, tmp_path / "cut")] == [*map(exact, whole)]
    assert whole[1].train_loss < whole[0].train_loss
    assert whole[0].loss_kd > 0

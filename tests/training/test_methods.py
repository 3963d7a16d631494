"""Losses of the methods, checked against published values, formulas in NumPy, and invariances."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import STUDENT, TEACHER, context, numbers, reference, taps, temperatures, wave
from tune_kd.study.methods import built_in
from tune_kd.system.errors import UserError
from tune_kd.training import metrics
from tune_kd.training.loss import Batch, loss_class, step_settings
from tune_kd.training.methods import feature, logit

shapes = st.tuples(st.integers(1, 6), st.integers(2, 7))
logits = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=numbers))
pairs = shapes.flatmap(lambda shape: st.tuples(*[arrays(np.float64, shape, elements=numbers)] * 2))

STUDENT_FEATURES = wave((4, 8, 8, 8), 0.013, 0.3), wave((4, 16, 4, 4), 0.019, 0.5)
TEACHER_FEATURES = wave((4, 32, 8, 8), 0.017, 0.8), wave((4, 64, 4, 4), 0.029, 0.9)
MATRICES = wave((32, 8), 0.37, 0.2, 0.3), wave((64, 16), 0.41, 0.6, 0.2)
PROJECTIONS = [lambda x, m=matrix: F.conv2d(x, m[:, :, None, None]) for matrix in MATRICES]


@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_kd_has_the_reference_value(temperature):
    expected = reference()["values"][f"kd(ls,lt,T={temperature})"]
    assert logit.kd(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-9)
    assert metrics.kl(STUDENT, TEACHER, temperature).item() == pytest.approx(expected / temperature**2, rel=1e-9)


def test_cross_entropy_has_the_reference_value():
    assert F.cross_entropy(STUDENT, torch.arange(8)).item() == pytest.approx(
        reference()["values"]["cross_entropy(ls,y)"], rel=1e-9
    )


def test_feature_has_the_reference_value():
    block = reference()["feature"]
    parts = feature.feature_parts(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS)
    assert [part.item() for part in parts] == pytest.approx([block["mse"], block["cosine"]], rel=1e-9)
    total = feature.feature(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS, block["inputs"]["beta"])
    assert total.item() == pytest.approx(block["total"], rel=1e-9)


@given(pairs, temperatures)
def test_kd_matches_its_formula(pair, temperature):
    student, teacher = (softmax(values / temperature, axis=1) for values in pair)
    expected = temperature**2 * np.mean(np.sum(rel_entr(teacher, student), axis=1))
    ours = logit.kd(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), temperature)
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_kd_matches_a_case_worked_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2), at T = 2 when the logits are twice the logarithms.
    student, teacher = torch.zeros(1, 2), 2 * torch.tensor([[0.75, 0.25]]).log()
    divergence = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert logit.kd(student, teacher, 2).item() == pytest.approx(4 * divergence, rel=1e-5)
    assert metrics.kl(student, teacher, 2).item() == pytest.approx(divergence, rel=1e-5)


@given(pairs, temperatures)
def test_kd_is_never_negative(pair, temperature):
    assert logit.kd(*map(torch.from_numpy, pair), temperature).item() >= -1e-11


@given(logits, temperatures)
def test_kd_of_equal_logits_is_zero(values, temperature):
    both = torch.from_numpy(values)
    assert logit.kd(both, both.clone(), temperature).item() == 0


@given(pairs, temperatures, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_a_row_does_not_change_kd(pair, temperature, to_student, to_teacher):
    student, teacher = map(torch.from_numpy, pair)
    rows = torch.arange(1.0, len(student) + 1, dtype=torch.float64)[:, None]
    shifted = logit.kd(student + to_student * rows, teacher + to_teacher / rows, temperature)
    assert shifted.item() == pytest.approx(logit.kd(student, teacher, temperature).item(), rel=1e-8, abs=1e-9)


@given(pairs)
def test_kd_at_a_high_temperature_is_half_the_mean_square_between_centred_logits(pair):
    student, teacher = (values - values.mean(axis=1, keepdims=True) for values in pair)
    limit = np.mean((student - teacher) ** 2) / 2
    ours = logit.kd(*map(torch.from_numpy, pair), temperature=1e5)
    # The next term is smaller by a factor of about |logits| / T. Below 1e-5 rounding shows, times T^2.
    assert ours.item() == pytest.approx(limit, rel=2e-3, abs=1e-4)


def test_only_the_student_gets_a_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    logit.kd(student, teacher, 4).backward()
    # d/ds of T^2 KL is T (softmax(s/T) - softmax(t/T)) / B.
    expected = 4 * ((STUDENT / 4).softmax(1) - (TEACHER / 4).softmax(1)) / 8
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_only_student_and_projections_get_a_gradient_from_features():
    student = [each.clone().requires_grad_() for each in STUDENT_FEATURES]
    teacher = [each.clone().requires_grad_() for each in TEACHER_FEATURES]
    projections = torch.nn.ModuleList(
        torch.nn.Conv2d(m.shape[1], m.shape[0], 1, bias=False, dtype=torch.float64) for m in MATRICES
    )
    feature.feature(student, teacher, projections, beta=0.5).backward()
    assert all(stage.grad.abs().sum() > 0 for stage in [*student, *projections.parameters()])
    assert all(stage.grad is None for stage in teacher)


@pytest.mark.parametrize("temperature", [1, 4])
def test_large_logits_in_single_precision_give_the_double_precision_loss(temperature):
    student, teacher = (1e3 * x for x in (STUDENT, TEACHER))
    single = student.float().requires_grad_()
    loss = logit.kd(single, teacher.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(logit.kd(student, teacher, temperature).item(), rel=1e-5)
    assert single.grad.isfinite().all()


def test_half_precision_logits_are_divided_by_the_temperature_in_single_precision():
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    loss = logit.kd(student, teacher, 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(logit.kd(student.double(), teacher.double(), 3).item(), rel=1e-5)


def test_half_precision_features_are_compared_in_single_precision():
    student = [each.bfloat16() for each in TEACHER_FEATURES]
    teacher = [0.5 * each.bfloat16() + 1 for each in TEACHER_FEATURES]
    same = [lambda x: x] * 2
    exact = feature.feature([x.double() for x in student], [x.double() for x in teacher], same, 0.5)
    loss = feature.feature(student, teacher, same, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_feature_parts_match_their_formulas_in_numpy():
    squares, angles = [], []
    for student, teacher, matrix in zip(STUDENT_FEATURES, TEACHER_FEATURES, MATRICES, strict=True):
        s, t = np.einsum("oc,bchw->bohw", matrix.numpy(), student.numpy()), teacher.numpy()
        squares.append(((s - t) ** 2).mean())
        s, t = s.mean((2, 3)), t.mean((2, 3))
        norms = np.linalg.norm(s, axis=1) * np.linalg.norm(t, axis=1)
        angles.append((1 - (s * t).sum(1) / norms).mean())
    mse, cosine = feature.feature_parts(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS)
    assert mse.item() == pytest.approx(np.mean(squares), rel=1e-9)
    assert cosine.item() == pytest.approx(np.mean(angles), rel=1e-9)
    total = feature.feature(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS, 0.25)
    assert total.item() == pytest.approx(np.mean(squares) + 0.25 * np.mean(angles), rel=1e-9)


def test_the_cosine_part_ignores_the_scale_of_the_student():
    _, cosine = feature.feature_parts([3 * t for t in TEACHER_FEATURES], TEACHER_FEATURES, [lambda x: x] * 2)
    assert cosine.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("compare", "student", "teacher", "message"),
    [
        (lambda s, t: logit.kd(s, t, 4), (8, 10), (8, 1), "[8, 10]; expected the teacher's, [8, 1]"),
        (lambda s, t: logit.kd(s, t, 4), (10,), (10,), "[10]; expected the teacher's, [10], with axes [B, K]"),
        (lambda s, t: metrics.kl(s, t, 4), (8, 10), (4, 10), "[8, 10]; expected the teacher's, [4, 10]"),
        (metrics.agreement, (8, 10), (1, 10), "[8, 10]; expected the teacher's, [1, 10]"),
        (
            lambda s, t: feature.feature([s], [t], [lambda x: x], 0.5),
            (2, 8, 4, 4),
            (2, 8, 1, 1),
            "stage 1, projected, has shape [2, 8, 4, 4]; expected the teacher's, [2, 8, 1, 1]",
        ),
        (metrics.expected_calibration_error, (8, 10), (8, 1), "[8, 10] and [8, 1]; expected [B, K] and [B]"),
    ],
)
def test_shapes_that_would_broadcast_are_rejected(compare, student, teacher, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("measure", [logit.kd, metrics.kl])
@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_rejected(measure, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; expected a finite number above 0"):
        measure(STUDENT, TEACHER, temperature)


@pytest.mark.parametrize("counts", [(2, 2, 1), (2, 1, 2), (1, 2, 2), (0, 0, 0)])
def test_different_numbers_of_stages_are_rejected(counts):
    students, teachers, projections = counts
    with pytest.raises(ValueError, match="have {}, {} and {} stages; expected the same".format(*counts)):
        feature.feature(STUDENT_FEATURES[:students], TEACHER_FEATURES[:teachers], PROJECTIONS[:projections], 0.5)


def test_projections_have_no_bias_and_map_student_channels_to_teacher_channels():
    loss = feature.Feature(context(taps(8, 16, 32, 64), taps(32, 64, 128, 256)))
    sizes = [tuple(each.weight.shape) for each in loss.projections]
    assert sizes == [(32, 8, 1, 1), (64, 16, 1, 1), (128, 32, 1, 1), (256, 64, 1, 1)]
    assert all(each.bias is None for each in loss.projections)


def test_networks_with_different_numbers_of_stages_are_rejected():
    with pytest.raises(UserError, match="the teacher has 1 stages and the student 2;"):
        feature.Feature(context(taps(8, 16), taps(32)))


def test_declarations_match_their_modules_and_are_read_without_importing_torch():
    for name, method in built_in().items():
        module = importlib.import_module(f"tune_kd.training.methods.{name}")
        assert method == module.METHOD
    there = "import sys; from tune_kd.study.methods import built_in; built_in(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", there], capture_output=True, text=True).stdout == "False\n"


def test_every_loss_takes_only_settings_that_its_method_declares():
    for name, method in built_in().items():
        if method.loss is None:
            assert not method.defaults
            continue
        kind = loss_class(method)
        assert kind.__module__ == f"tune_kd.training.methods.{name}"
        assert {*step_settings(kind)} <= {*method.defaults}


@pytest.mark.parametrize("name", [name for name, method in built_in().items() if method.loss])
def test_no_loss_reads_a_tensors_value_or_derives_a_shape_from_one(name):
    """Both would synchronize, and a CUDA graph cannot capture them."""
    method, labels = built_in()[name], torch.tensor([0, 1, 2, 1, 0, 2])
    kind = loss_class(method)
    fixed = {each: value for each, value in method.defaults.items() if each not in step_settings(kind)}
    built = kind(context(taps(8, 16), taps(32, 64), labels, **fixed))
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, features = torch.rand(4, 10, requires_grad=True), lambda *c: tuple(torch.rand(4, n, 4, 4) for n in c)
        batch = Batch(
            torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), logits, torch.rand(4, 10),
            features(8, 16), features(32, 64), features(8, 16), features(32, 64),
            torch.rand(4, 16, requires_grad=True), torch.rand(4, 64), torch.rand(()), torch.ones(()),
        )  # fmt: skip
        loss = built(batch, **{each: torch.full((), method.defaults[each]) for each in step_settings(kind)})
        assert loss.shape == ()
        loss.backward()

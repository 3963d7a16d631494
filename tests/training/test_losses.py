"""Losses and measures, against published values, formulas written out in numpy, and laws."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from tune_kd.training import losses

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "losses.json"

temperatures = st.floats(0.5, 20)
shapes = st.tuples(st.integers(1, 6), st.integers(2, 7))
numbers = st.floats(-20, 20, width=32).map(float)
logits = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=numbers))
pairs = shapes.flatmap(lambda shape: st.tuples(*[arrays(np.float64, shape, elements=numbers)] * 2))


def wave(shape: tuple[int, ...], frequency: float, phase: float, scale: float = 1.0) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(frequency * steps + phase).reshape(shape)


STUDENT, TEACHER = wave((8, 10), 0.7, 0.1, 3), wave((8, 10), 0.9, 0.5, 5)
STUDENT_FEATURES = wave((4, 8, 8, 8), 0.013, 0.3), wave((4, 16, 4, 4), 0.019, 0.5)
TEACHER_FEATURES = wave((4, 32, 8, 8), 0.017, 0.8), wave((4, 64, 4, 4), 0.029, 0.9)
MATRICES = wave((32, 8), 0.37, 0.2, 0.3), wave((64, 16), 0.41, 0.6, 0.2)
PROJECTIONS = [lambda x, m=matrix: F.conv2d(x, m[:, :, None, None]) for matrix in MATRICES]


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE.exists():
        pytest.skip("the file of reference values is not beside this checkout")
    return json.loads(REFERENCE.read_text())


@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_kd_has_the_reference_value(reference, temperature):
    expected = reference["values"][f"kd(ls,lt,T={temperature})"]
    assert losses.kd(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-9)
    assert losses.kl(STUDENT, TEACHER, temperature).item() == pytest.approx(expected / temperature**2, rel=1e-9)


def test_cross_entropy_that_goes_with_kd_has_the_reference_value(reference):
    assert F.cross_entropy(STUDENT, torch.arange(8)).item() == pytest.approx(
        reference["values"]["cross_entropy(ls,y)"], rel=1e-9
    )


def test_feature_has_the_reference_value(reference):
    block = reference["feature"]
    parts = losses.feature_parts(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS)
    assert [part.item() for part in parts] == pytest.approx([block["mse"], block["cosine"]], rel=1e-9)
    total = losses.feature(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS, block["inputs"]["beta"])
    assert total.item() == pytest.approx(block["total"], rel=1e-9)


@given(pairs, temperatures)
def test_kd_is_its_formula(pair, temperature):
    student, teacher = (softmax(values / temperature, axis=1) for values in pair)
    expected = temperature**2 * np.mean(np.sum(rel_entr(teacher, student), axis=1))
    ours = losses.kd(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), temperature)
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_kd_of_a_case_worked_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2), at T = 2 when the logits are twice the logarithms.
    student, teacher = torch.zeros(1, 2), 2 * torch.tensor([[0.75, 0.25]]).log()
    divergence = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert losses.kd(student, teacher, 2).item() == pytest.approx(4 * divergence, rel=1e-5)
    assert losses.kl(student, teacher, 2).item() == pytest.approx(divergence, rel=1e-5)


@given(pairs, temperatures)
def test_kd_is_never_negative(pair, temperature):
    assert losses.kd(*map(torch.from_numpy, pair), temperature).item() >= -1e-11


@given(logits, temperatures)
def test_kd_of_equal_logits_is_zero(values, temperature):
    both = torch.from_numpy(values)
    assert losses.kd(both, both.clone(), temperature).item() == 0


@given(pairs, temperatures, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_a_row_does_not_change_kd(pair, temperature, to_student, to_teacher):
    student, teacher = map(torch.from_numpy, pair)
    rows = torch.arange(1.0, len(student) + 1, dtype=torch.float64)[:, None]
    shifted = losses.kd(student + to_student * rows, teacher + to_teacher / rows, temperature)
    assert shifted.item() == pytest.approx(losses.kd(student, teacher, temperature).item(), rel=1e-8, abs=1e-9)


@given(pairs)
def test_kd_at_a_high_temperature_is_half_the_mean_square_between_centred_logits(pair):
    student, teacher = (values - values.mean(axis=1, keepdims=True) for values in pair)
    limit = np.mean((student - teacher) ** 2) / 2
    ours = losses.kd(*map(torch.from_numpy, pair), temperature=1e5)
    # The next term is smaller by a factor of about |logits| / T; below 1e-5 rounding is seen, times T^2.
    assert ours.item() == pytest.approx(limit, rel=2e-3, abs=1e-4)


def test_only_the_student_gets_a_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    losses.kd(student, teacher, 4).backward()
    # d/ds of T^2 KL is T (softmax(s/T) - softmax(t/T)) / B.
    expected = 4 * ((STUDENT / 4).softmax(1) - (TEACHER / 4).softmax(1)) / 8
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_only_student_and_projections_get_a_gradient_from_features():
    student = [feature.clone().requires_grad_() for feature in STUDENT_FEATURES]
    teacher = [feature.clone().requires_grad_() for feature in TEACHER_FEATURES]
    projections = torch.nn.ModuleList(
        torch.nn.Conv2d(m.shape[1], m.shape[0], 1, bias=False, dtype=torch.float64) for m in MATRICES
    )
    losses.feature(student, teacher, projections, beta=0.5).backward()
    assert all(stage.grad.abs().sum() > 0 for stage in [*student, *projections.parameters()])
    assert all(stage.grad is None for stage in teacher)


@pytest.mark.parametrize("temperature", [1, 4])
def test_large_logits_in_single_precision_give_the_double_precision_loss(temperature):
    student, teacher = (1e3 * x for x in (STUDENT, TEACHER))
    single = student.float().requires_grad_()
    loss = losses.kd(single, teacher.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(losses.kd(student, teacher, temperature).item(), rel=1e-5)
    assert single.grad.isfinite().all()


def test_half_precision_logits_are_divided_by_the_temperature_in_single_precision():
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    loss = losses.kd(student, teacher, 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.kd(student.double(), teacher.double(), 3).item(), rel=1e-5)


def test_half_precision_features_are_compared_in_single_precision():
    student = [feature.bfloat16() for feature in TEACHER_FEATURES]
    teacher = [0.5 * feature.bfloat16() + 1 for feature in TEACHER_FEATURES]
    same = [lambda x: x] * 2
    exact = losses.feature([x.double() for x in student], [x.double() for x in teacher], same, 0.5)
    loss = losses.feature(student, teacher, same, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_feature_parts_are_their_formulas_in_numpy():
    squares, angles = [], []
    for student, teacher, matrix in zip(STUDENT_FEATURES, TEACHER_FEATURES, MATRICES, strict=True):
        s, t = np.einsum("oc,bchw->bohw", matrix.numpy(), student.numpy()), teacher.numpy()
        squares.append(((s - t) ** 2).mean())
        s, t = s.mean((2, 3)), t.mean((2, 3))
        norms = np.linalg.norm(s, axis=1) * np.linalg.norm(t, axis=1)
        angles.append((1 - (s * t).sum(1) / norms).mean())
    mse, cosine = losses.feature_parts(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS)
    assert mse.item() == pytest.approx(np.mean(squares), rel=1e-9)
    assert cosine.item() == pytest.approx(np.mean(angles), rel=1e-9)
    total = losses.feature(STUDENT_FEATURES, TEACHER_FEATURES, PROJECTIONS, 0.25)
    assert total.item() == pytest.approx(np.mean(squares) + 0.25 * np.mean(angles), rel=1e-9)


def test_the_cosine_part_ignores_the_scale_of_the_student():
    _, cosine = losses.feature_parts([3 * t for t in TEACHER_FEATURES], TEACHER_FEATURES, [lambda x: x] * 2)
    assert cosine.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("compare", "student", "teacher", "message"),
    [
        (lambda s, t: losses.kd(s, t, 4), (8, 10), (8, 1), "[8, 10]; expected the teacher's, [8, 1]"),
        (lambda s, t: losses.kd(s, t, 4), (10,), (10,), "[10]; expected the teacher's, [10], of axes [B, K]"),
        (lambda s, t: losses.kl(s, t, 4), (8, 10), (4, 10), "[8, 10]; expected the teacher's, [4, 10]"),
        (losses.agreement, (8, 10), (1, 10), "[8, 10]; expected the teacher's, [1, 10]"),
        (
            lambda s, t: losses.feature([s], [t], [lambda x: x], 0.5),
            (2, 8, 4, 4),
            (2, 8, 1, 1),
            "stage 1, projected, has shape [2, 8, 4, 4]; expected the teacher's, [2, 8, 1, 1]",
        ),
        (losses.expected_calibration_error, (8, 10), (8, 1), "[8, 10] and [8, 1]; expected [B, K] and [B]"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(compare, student, teacher, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("measure", [losses.kd, losses.kl])
@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_zero_is_refused(measure, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; expected a finite number above 0"):
        measure(STUDENT, TEACHER, temperature)


@pytest.mark.parametrize("counts", [(2, 2, 1), (2, 1, 2), (1, 2, 2), (0, 0, 0)])
def test_different_numbers_of_stages_are_refused(counts):
    students, teachers, projections = counts
    with pytest.raises(ValueError, match="have {}, {} and {} stages; expected the same".format(*counts)):
        losses.feature(STUDENT_FEATURES[:students], TEACHER_FEATURES[:teachers], PROJECTIONS[:projections], 0.5)


def test_agreement_of_a_case_counted_by_hand():
    student = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 4, 3]])
    teacher = torch.tensor([[9.0, 1, 0], [3, 0, 1], [0, 0, 1], [1, 2, 3]])
    assert losses.agreement(student, teacher).item() == 0.5


@given(pairs)
def test_agreement_is_a_fraction_that_does_not_depend_on_the_order(pair):
    student, teacher = map(torch.from_numpy, pair)
    value = losses.agreement(student, teacher).item()
    assert 0 <= value <= 1
    assert value == losses.agreement(teacher, student).item()
    assert losses.agreement(student, student).item() == 1


def binary_logits(*confidences: float) -> torch.Tensor:
    """Two-class logits that predict class 0 with these probabilities."""
    chosen = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([chosen, 1 - chosen], dim=1).log()


def test_calibration_error_of_four_images_worked_by_hand():
    # Ten bins. (0.6, 0.7]: 0.65 right and 0.69 wrong, gap |0.5 - 0.67| = 0.17, weight 1/2.
    # (0.8, 0.9]: 0.85 right, gap 0.15, weight 1/4. (0.9, 1]: 0.95 wrong, gap 0.95, weight 1/4.
    labels = torch.tensor([0, 1, 0, 1])
    error = losses.expected_calibration_error(binary_logits(0.65, 0.69, 0.85, 0.95), labels, bins=10)
    assert error.item() == pytest.approx(0.17 / 2 + 0.15 / 4 + 0.95 / 4)


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    # Three of four right at 0.75, and four of five right at 0.8, in bins of their own.
    confidence = [0.75] * 4 + [0.8] * 5
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 1])
    error = losses.expected_calibration_error(binary_logits(*confidence), labels, bins=15)
    assert error.item() == pytest.approx(0, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # Equal logits of two classes: a confidence of exactly 0.5, the upper edge of (0.25, 0.5]. Together with
    # the other image in (0.5, 0.75] it would cancel: |1 - 0.5| and |0 - 0.6| have opposite signs.
    logits_BK = torch.cat([torch.zeros(1, 2, dtype=torch.float64), binary_logits(0.6)])
    labels = torch.tensor([int(logits_BK[0].argmax()), 1])
    error = losses.expected_calibration_error(logits_BK, labels, bins=4)
    assert error.item() == pytest.approx((0.5 + 0.6) / 2)


def calibration_error_as_a_loop(logits_BK: np.ndarray, labels: np.ndarray, bins: int) -> float:
    probabilities = torch.from_numpy(logits_BK).softmax(dim=1).numpy()
    total = 0.0
    for m in range(bins):
        confidences, hits = [], []
        for row, label in zip(probabilities, labels, strict=True):
            confidence = row.max()
            if m / bins < confidence <= (m + 1) / bins:
                confidences.append(confidence)
                hits.append(row.argmax() == label)
        if hits:
            total += len(hits) / len(labels) * abs(np.mean(hits) - np.mean(confidences))
    return total


@given(logits, st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_calibration_error_is_that_of_a_plain_loop(values, bins, seed):
    labels = np.random.default_rng(seed).integers(0, values.shape[1], len(values))
    ours = losses.expected_calibration_error(torch.from_numpy(values), torch.from_numpy(labels), bins).item()
    assert ours == pytest.approx(calibration_error_as_a_loop(values, labels, bins), abs=1e-12)
    assert 0 <= ours <= 1


def test_fewer_than_one_bin_is_refused():
    with pytest.raises(ValueError, match="bins is 0; expected at least 1"):
        losses.expected_calibration_error(STUDENT, torch.arange(8), bins=0)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
def test_measures_carry_no_gradient_and_stay_on_their_device(device):
    student, teacher = (x.float().to(device).requires_grad_() for x in (STUDENT, TEACHER))
    labels = torch.arange(8, device=device)
    values = {
        "agreement": losses.agreement(student, teacher),
        "kl": losses.kl(student, teacher, 4),
        "ece": losses.expected_calibration_error(student, labels),
    }
    for value in values.values():
        assert value.ndim == 0
        assert value.dtype == torch.float64
        assert value.device.type == device
        assert not value.requires_grad
    assert values["kl"].item() == pytest.approx(losses.kl(STUDENT, TEACHER, 4).item(), rel=1e-6)
    assert losses.kd(student, teacher, 4).requires_grad

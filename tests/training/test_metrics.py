"""Agreement, divergence and calibration, checked against cases worked by hand and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from tune_kd.training import metrics
from tune_kd.training.methods import logit

shapes = st.tuples(st.integers(1, 6), st.integers(2, 7))
numbers = st.floats(-20, 20, width=32).map(float)
logits = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=numbers))
pairs = shapes.flatmap(lambda shape: st.tuples(*[arrays(np.float64, shape, elements=numbers)] * 2))

steps = torch.arange(80, dtype=torch.float64).reshape(8, 10)
STUDENT, TEACHER = 3 * torch.sin(0.7 * steps + 0.1), 5 * torch.sin(0.9 * steps + 0.5)


def test_agreement_matches_a_case_counted_by_hand():
    student = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 4, 3]])
    teacher = torch.tensor([[9.0, 1, 0], [3, 0, 1], [0, 0, 1], [1, 2, 3]])
    assert metrics.agreement(student, teacher).item() == 0.5


@given(pairs)
def test_agreement_is_a_symmetric_fraction(pair):
    student, teacher = map(torch.from_numpy, pair)
    value = metrics.agreement(student, teacher).item()
    assert 0 <= value <= 1
    assert value == metrics.agreement(teacher, student).item()
    assert metrics.agreement(student, student).item() == 1


def binary_logits(*confidences: float) -> torch.Tensor:
    """Two-class logits that predict class 0 with these probabilities."""
    chosen = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([chosen, 1 - chosen], dim=1).log()


def test_calibration_error_matches_a_case_worked_by_hand():
    # Ten bins. (0.6, 0.7]: 0.65 right and 0.69 wrong, gap |0.5 - 0.67| = 0.17, weight 1/2.
    # (0.8, 0.9]: 0.85 right, gap 0.15, weight 1/4. (0.9, 1]: 0.95 wrong, gap 0.95, weight 1/4.
    labels = torch.tensor([0, 1, 0, 1])
    error = metrics.expected_calibration_error(binary_logits(0.65, 0.69, 0.85, 0.95), labels, bins=10)
    assert error.item() == pytest.approx(0.17 / 2 + 0.15 / 4 + 0.95 / 4)


def test_calibration_error_is_zero_when_confidence_equals_accuracy():
    # Three of four right at 0.75, and four of five right at 0.8, in separate bins.
    confidence = [0.75] * 4 + [0.8] * 5
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 1])
    error = metrics.expected_calibration_error(binary_logits(*confidence), labels, bins=15)
    assert error.item() == pytest.approx(0, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # Equal logits of two classes: a confidence of exactly 0.5, the upper edge of (0.25, 0.5]. Together with
    # the other image in (0.5, 0.75] it would cancel: |1 - 0.5| and |0 - 0.6| have opposite signs.
    logits_BK = torch.cat([torch.zeros(1, 2, dtype=torch.float64), binary_logits(0.6)])
    labels = torch.tensor([int(logits_BK[0].argmax()), 1])
    error = metrics.expected_calibration_error(logits_BK, labels, bins=4)
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
def test_calibration_error_matches_a_plain_loop(values, bins, seed):
    labels = np.random.default_rng(seed).integers(0, values.shape[1], len(values))
    ours = metrics.expected_calibration_error(torch.from_numpy(values), torch.from_numpy(labels), bins).item()
    assert ours == pytest.approx(calibration_error_as_a_loop(values, labels, bins), abs=1e-12)
    assert 0 <= ours <= 1


def test_fewer_than_one_bin_is_rejected():
    with pytest.raises(ValueError, match="bins is 0; expected at least 1"):
        metrics.expected_calibration_error(STUDENT, torch.arange(8), bins=0)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_measures_carry_no_gradient_and_stay_on_their_device(device):
    student, teacher = (x.float().to(device).requires_grad_() for x in (STUDENT, TEACHER))
    labels = torch.arange(8, device=device)
    values = {
        "agreement": metrics.agreement(student, teacher),
        "kl": metrics.kl(student, teacher, 4),
        "ece": metrics.expected_calibration_error(student, labels),
    }
    for value in values.values():
        assert value.ndim == 0
        assert value.dtype == torch.float64
        assert value.device.type == device
        assert not value.requires_grad
    assert values["kl"].item() == pytest.approx(metrics.kl(STUDENT, TEACHER, 4).item(), rel=1e-6)
    assert logit.kd(student, teacher, 4).requires_grad

"""How the arithmetic is set: for one trial, and not for what runs after it."""

import pytest
import torch

from tune_kd.kernels import autocast, float32_as


@pytest.mark.parametrize(("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_float32_means_float32_unless_tf32_was_asked_for(precision: str, expected: str) -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [each.fp32_precision for each in settings]
    with float32_as(precision):
        assert [each.fp32_precision for each in settings] == [expected, expected]
    assert [each.fp32_precision for each in settings] == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_products_are_bfloat16_under_bfloat16_alone(precision: str) -> None:
    one = torch.ones(2, 2)
    with autocast(precision, torch.device("cpu")):
        product = one @ one
    assert (product.dtype == torch.bfloat16) == (precision == "bfloat16")

"""The price: multiplications counted without torch are those that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tune_kd import data, models
from tune_kd.plan import plan
from tune_kd.price import BLOCKS, IMAGES, macs, price
from tune_kd.study import Confirm, Factor, Study


@pytest.mark.parametrize("architecture", BLOCKS)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize(("size", "width"), [(32, 1.0), (16, 0.125), (33, 0.25)])
def test_multiplications_are_those_that_torch_counts(architecture: str, stem: str, size: int, width: float) -> None:
    net = models.build(architecture, stem=stem, classes=10, width=width, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    assert counter.get_total_flops() == 2 * macs(architecture, stem=stem, width=width, size=size, classes=10)


def test_the_sizes_that_the_price_knows_are_those_of_the_data() -> None:
    digits, known = data.load("digits"), IMAGES["digits"]
    assert [len(each.labels) for each in (digits.train, digits.validation, digits.test)] == [
        known.train, known.validation, known.test
    ]  # fmt: skip
    assert digits.train.images.shape[-1] * digits.upsample == known.size
    assert len(digits.classes) == known.classes


def test_a_temperature_more_costs_a_control_more_since_the_teacher_answers_once(one_stem: Study) -> None:
    def of(temperatures: tuple[float, ...]) -> float:
        factors = (*one_stem.factors[:2], Factor("temperature", temperatures))
        return price(plan(replace(one_stem, factors=factors))).flop

    second = of((2.0, 4.0)) - of((2.0, 4.0, 8.0))
    control = plan(replace(one_stem, factors=(one_stem.factors[0], Factor("method", ("none",))), contrasts=()))
    assert -second == pytest.approx(price(control).flop)


def test_the_price_grows_with_the_seeds(study: Study) -> None:
    assert price(plan(replace(study, confirm=Confirm((1, 2, 3))))).flop > price(plan(study)).flop

"""The cost of a plan: the number of multiplications, computed without torch, equals the count of torch."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tune_kd.data import datasets
from tune_kd.study.cost import (
    BLOCKS,
    IMAGES,
    WORTH_ANSWERING_ALL,
    answering,
    estimate,
    flop,
    macs,
    state_bytes,
    views_answered,
)
from tune_kd.study.plan import plan
from tune_kd.study.spec import STEMS, Cell, Confirm, Data, Factor, Recipe, Study
from tune_kd.study.trial import Answering, Trial
from tune_kd.training import networks
from tune_kd.training.teachers import drawn_numbers


def cost(study: Study) -> float:
    planned = plan(study)
    return estimate(planned.trials, planned.answering, study.rate).flop


@pytest.mark.parametrize("architecture", BLOCKS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("width", [1.0, 0.3])
def test_multiplications_and_state_bytes_equal_torchs_counts(architecture: str, stem: str, width: float) -> None:
    net = networks.build(architecture, stem=stem, classes=10, width=width, seed=0).eval().to("meta")
    for size in (16, 33):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, size, size, device="meta"))
        assert counter.get_total_flops() == 2 * macs(architecture, stem=stem, width=width, size=size, classes=10)
    trial = Trial("none", "confirm", Cell(architecture, None, stem, width=width), Recipe(), 0, Data(), None, "test")
    state = [value for value in net.state_dict().values() if value.is_floating_point()]
    # The classifier counts as if it were normalised: four values per class in place of its bias.
    assert sum(value.nbytes for value in state) == state_bytes(trial) - 4 * (4 - 1) * 10


def test_the_sizes_assumed_for_the_cost_match_the_digits_data() -> None:
    digits, known = datasets.load("digits"), IMAGES["digits"]
    assert [len(each.labels) for each in (digits.train, digits.validation, digits.test)] == [
        known.train, known.validation, known.test
    ]  # fmt: skip
    assert digits.train.images.shape[-1] * digits.upsample == known.size
    assert len(digits.classes) == known.classes
    assert digits.views_per_image == known.views


def test_another_temperature_costs_as_much_as_a_control_since_logits_are_cached(one_stem: Study) -> None:
    def of(temperatures: tuple[float, ...]) -> float:
        factors = (*one_stem.factors[:2], Factor("temperature", temperatures))
        return cost(replace(one_stem, factors=factors))

    second = of((2.0, 4.0)) - of((2.0, 4.0, 8.0))
    control = plan(replace(one_stem, factors=(one_stem.factors[0], Factor("method", ("none",))), contrasts=()))
    assert -second == pytest.approx(sum(flop(trial) for trial in control.trials))


def test_an_epoch_that_is_not_validated_costs_no_evaluation() -> None:
    images, cell = IMAGES["digits"], Cell(method="none", teacher=None)
    every = Trial("none", "confirm", cell, Recipe(epochs=7), 0, Data("digits"), None, "test")
    third = replace(every, recipe=replace(every.recipe, validate_every=3))  # after the epochs 3, 6 and 7
    forward = 2 * macs("resnet18", stem=cell.stem, width=1.0, size=images.size, classes=10)
    assert flop(every) - flop(third) == 4 * images.validation * forward


def test_the_cost_grows_with_the_number_of_seeds(study: Study) -> None:
    assert cost(replace(study, confirm=Confirm((1, 2, 3)))) > cost(study)


def logit_student(seed: int, epochs: int, data: Data) -> Trial:
    cell = Cell(method="logit", beta=None)
    return Trial("logit", "confirm", cell, Recipe(epochs=epochs), seed, data, None, "test", "t")


def test_the_expected_number_of_drawn_views_matches_an_actual_draw() -> None:
    digits = datasets.load("digits")
    draws = ((0, 3), (5, 3), (6, 2))
    found = len(drawn_numbers(draws, digits))
    expected = views_answered(Answering(False, draws), logit_student(0, 3, Data("digits")))
    assert found == pytest.approx(expected, rel=0.01)
    assert views_answered(Answering(True, draws), logit_student(0, 3, Data("digits"))) == 9 * 1079


@pytest.mark.parametrize(
    ("seeds", "epochs", "ahead"), [(6, 100, True), (4, 6, False), (3, 100, False), (4, 123, True), (4, 122, False)]
)
def test_logits_of_all_views_are_computed_ahead_when_that_costs_little_more(
    seeds: int, epochs: int, ahead: bool
) -> None:
    """The study at paper scale draws each of an image's 162 views 3.7 times; a small study draws few of them."""
    chosen = answering([logit_student(seed, epochs, Data("cifar10")) for seed in range(seeds)])
    assert chosen == Answering(ahead, tuple((seed, epochs) for seed in range(seeds)))
    undrawn = (161 / 162) ** (seeds * epochs)
    assert ahead == (WORTH_ANSWERING_ALL * (1 - undrawn) >= 1)

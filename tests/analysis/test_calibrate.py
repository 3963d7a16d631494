"""Studies of nothing: the draws have no arm that is better, and the procedure finds few."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest

from conftest import tunable
from search_spaces.ablation import study as ablation
from tune_kd.analysis import calibrate as calibration, contrasts as results
from tune_kd.analysis.calibrate import Rate, calibrate, null_study
from tune_kd.records.reader import Records
from tune_kd.study.spec import Confirm
from tune_kd.study.tuning import LogUniform, Range, Tuning

LOOKS = replace(ablation(), confirm=Confirm(looks=(5, 10, 20)))


def test_no_arm_is_drawn_better_than_another_and_trials_spread_as_the_study_expects() -> None:
    study = ablation()
    tests = np.array([[calibration._Draws(study, number).trial(arm, 1)[1] for arm in ("a", "b")]
                      for number in range(2000)])  # fmt: skip
    assert tests.std(axis=0) == pytest.approx(study.deviation, rel=0.06)
    assert abs(tests[:, 0].mean() - tests[:, 1].mean()) < 4 * study.deviation * (2 / 2000) ** 0.5
    assert abs(np.corrcoef(tests.T)[0, 1]) < 0.1
    curves = np.array([calibration._Draws(study, number).trial("a", 1)[0] for number in range(500)])
    spread = curves.std(axis=0)
    assert spread[9] > 10 * spread[-1]  # as in published curves: 2.6 points at epoch 10, 0.2 at the end
    assert np.corrcoef(curves[:, -1], tests[:500, 0])[0, 1] == pytest.approx(0.7, abs=0.1)


def test_the_draws_of_a_replay_follow_from_its_number() -> None:
    one, again = (calibration._Draws(LOOKS, 3).trial("cifar/none", 4) for _ in range(2))
    assert one == again
    assert one != calibration._Draws(LOOKS, 4).trial("cifar/none", 4)


def test_a_difference_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise finding nothing would be no merit."""
    drawn = calibration._Draws.trial

    def better(self: calibration._Draws, arm: str, seed: int) -> tuple[tuple[float, ...], float]:
        curve, test = drawn(self, arm, seed)
        return curve, test + (0.01 if arm == "cifar/feature" else 0.0)

    monkeypatch.setattr(calibration._Draws, "trial", better)
    found = calibration.null_study(LOOKS, 0).false
    assert found["designed"] and found["until_significant"]


@pytest.mark.long
def test_the_procedure_finds_few_and_adding_seeds_until_something_is_found_more() -> None:
    found = calibrate(LOOKS, 30, 1)
    rates = found.rates
    # A procedure that kept to 0.05 would be beyond this once in a thousand times; one that did not adjust for its 21
    # contrasts finds something in most studies.
    assert rates["designed"].found <= binom.ppf(0.999, 30, 0.05)
    assert rates["designed"].found <= rates["until_significant"].found
    # What plain ASHA lets finish was selected by validation accuracy, so its test accuracy is too high.
    assert 0.05 < found.finished < 0.3
    assert 0.2 < found.bias < 1


def test_a_rate_has_a_binomial_standard_error() -> None:
    assert Rate(5, 100).share == 0.05
    assert Rate(5, 100).standard_error == pytest.approx((0.05 * 0.95 / 100) ** 0.5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("confirm", [Confirm(), Confirm(looks=(5, 10, 20))])
def test_in_a_thousand_studies_of_nothing_the_level_is_kept(confirm: Confirm) -> None:
    rate = calibrate(replace(ablation(), confirm=confirm), 1000, 2).rates["designed"]
    assert rate.share <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5
    assert binomtest(rate.found, rate.studies, 0.05, alternative="greater").pvalue > 0.01


def test_a_study_that_is_tuned_is_judged_on_its_tuned_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    judged, contrasts = [], results.contrasts

    def watched(records: Records) -> pd.DataFrame:
        judged.append(contrasts(records))
        return judged[-1]

    monkeypatch.setattr(results, "contrasts", watched)
    null_study(tunable(Tuning((Range("lr", LogUniform(0.01, 0.5)),), budget=12)), 1)
    assert len(judged) == 1 and set(judged[0]["n"]) == {2}
    assert "logit - none, tuned" in judged[0]["contrast"].tolist()

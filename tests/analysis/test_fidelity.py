"""Likeness to the teacher and calibration: the same model as for accuracy, a separate family, plain directions."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from scipy import stats
from test_contrasts import looked, made, noisy, row

from tune_kd.analysis import contrasts, fidelity, statistics
from tune_kd.records.reader import Records
from tune_kd.study.spec import Study

MEASURES = ("agreement", "kl_t1", "kl_t4", "ece")
PAIR = "cifar: T=2 - T=4"


def measured(records: Records, **shifts: float) -> Records:
    """The records with measures of noise; `shifts` moves those of `cifar/logit/T=2`. Controls have only ECE."""
    trials, rng = records.trials.copy(), random.Random(0)
    students = trials["role"] == "student"
    for name in MEASURES:
        values = [0.5 + rng.gauss(0, 0.001) for _ in range(len(trials))]
        trials[name] = pd.Series(values, index=trials.index, dtype="float64")
        trials.loc[trials["arm"] == "cifar/logit/T=2", name] += shifts.get(name, 0.0)
        trials.loc[~students | (trials["teacher"].isna() & (name != "ece")), name] = None
    return replace(records, trials=trials)


def of(table: pd.DataFrame, measure: str, name: str = PAIR) -> dict[Any, Any]:
    return row(table[table["measure"] == measure], name)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_judged_like_an_accuracy_with_the_same_values(study: Study, measure: str) -> None:
    records = measured(made(study, noisy(0.01)), agreement=0.01)
    found = fidelity.fidelity(records)
    as_accuracy = replace(records, trials=records.trials.assign(test_accuracy_best=records.trials[measure]))
    expected = contrasts.contrasts(as_accuracy)
    compared = found[found["measure"] == measure]
    assert len(compared) == (6 if measure == "ece" else 2)
    for each in compared.to_dict("records"):
        other = row(expected, each["contrast"])
        for name in ("n", "planned", "estimate", "low", "high", "error", "df", "p"):
            assert each[name] == pytest.approx(other[name]), (each["contrast"], name)


@pytest.mark.parametrize(
    ("measure", "shift", "expected"),
    [
        ("agreement", 0.05, "closer to teacher"),
        ("agreement", -0.05, "further from teacher"),
        ("kl_t1", -0.05, "closer to teacher"),
        ("kl_t4", 0.05, "further from teacher"),
        ("ece", -0.05, "better calibrated"),
        ("ece", 0.05, "worse calibrated"),
        ("ece", 0.0, "no difference found"),
    ],
)
def test_the_verdict_names_the_direction_of_the_difference(
    study: Study, measure: str, shift: float, expected: str
) -> None:
    found = fidelity.fidelity(measured(made(study, noisy(0.01)), **{measure: shift}))
    assert of(found, measure)["verdict"] == expected


def test_likeness_is_judged_only_if_both_arms_have_a_teacher_and_calibration_always(study: Study) -> None:
    found = fidelity.fidelity(measured(made(study, noisy(0.01))))
    asked = {name: tuple(rows["measure"]) for name, rows in found.groupby("contrast")}
    assert asked == {
        **{f"{stem}: {method} - none": ("ece",) for stem in ("cifar", "imagenet") for method in ("logit", "feature")},
        **{f"{stem}: T=2 - T=4": MEASURES for stem in ("cifar", "imagenet")},
    }


def test_all_measures_form_one_family_separate_from_accuracy(study: Study) -> None:
    records = made(study, noisy(0.01))
    with_measures = measured(records, agreement=0.002)
    found = fidelity.fidelity(with_measures)
    assert found["p_holm"].tolist() == pytest.approx(statistics.holm(found["p"]).tolist())
    assert found["p_holm"].min() == pytest.approx(len(found) * found["p"].min())
    pd.testing.assert_frame_equal(contrasts.contrasts(with_measures), contrasts.contrasts(records))


def test_an_unjudged_comparison_stays_in_the_family_with_its_reason(study: Study) -> None:
    records = measured(made(study, noisy(0.01)), agreement=0.002)
    whole = fidelity.fidelity(records)
    records = replace(records, trials=records.trials.copy())
    waiting = (records.trials["arm"] == "imagenet/logit/T=2") & (records.trials["seed"] == 2)
    records.trials.loc[waiting, "status"] = "running"
    lost = (records.trials["arm"] == "cifar/none") & (records.trials["seed"] == 4)
    records.trials.loc[lost, "ece"] = None
    found = fidelity.fidelity(records)
    assert len(found) == len(whole)
    unjudged = of(found, "agreement", "imagenet: T=2 - T=4")
    assert (unjudged["n"], unjudged["verdict"], unjudged["note"]) == (
        0,
        "not judged",
        "1 of its trials are waiting or running",
    )
    assert pd.isna(unjudged["estimate"]) and pd.isna(unjudged["df"])
    assert found["p_holm"].min() == pytest.approx(len(whole) * found["p"].min())
    short = of(found, "ece", "cifar: logit - none")
    assert (short["n"], short["note"]) == (4, "1 of 5 seeds are missing")


def test_a_study_with_one_seed_has_no_verdict_and_no_sentence(study: Study) -> None:
    records = measured(made(study, noisy(0.01)), agreement=0.1)
    records.studies["r"]["study"]["confirm"]["seeds"] = (1,)
    found = of(fidelity.fidelity(records), "agreement")
    assert (found["n"], found["verdict"], found["note"]) == (1, "not judged", "no estimate of its spread")
    assert found["estimate"] == pytest.approx(0.1, abs=0.01)
    assert fidelity.sentence(records, contrasts.contrasts(records)) is None


def test_measures_at_a_look_use_its_share_of_the_level(study: Study) -> None:
    found = fidelity.fidelity(measured(looked(study, lambda trial: 0.9, 0), agreement=0.01))
    each, share = of(found, "agreement"), 0.05 * 3 / 10
    adjusted = dict(
        zip(zip(found["contrast"], found["measure"], strict=True), statistics.holm(found["p"]), strict=True)
    )
    assert each["p_holm"] == pytest.approx(min(1.0, adjusted[PAIR, "agreement"] / share * 0.05))
    half = stats.t.ppf(1 - share / 2, each["df"]) * each["error"]
    assert each["high"] - each["estimate"] == pytest.approx(half)


def test_a_verdict_of_an_earlier_look_persists(study: Study) -> None:
    def faded(records: Records) -> Records:
        trials = measured(records, agreement=0.05).trials
        later = trials["arm"].eq("cifar/logit/T=2") & trials["seed"].isin([4, 5])
        return replace(records, trials=trials.assign(agreement=trials["agreement"].where(~later, 0.44)))

    first = of(fidelity.fidelity(faded(looked(study, lambda trial: 0.9, 0))), "agreement")
    second = of(fidelity.fidelity(faded(looked(study, lambda trial: 0.9, 1))), "agreement")
    assert first["verdict"] == second["verdict"] == "closer to teacher"
    assert second["n"] == 5 and second["p"] > 0.05


def test_without_a_study_or_effects_the_table_is_empty_and_there_is_no_sentence(study: Study) -> None:
    records = made(study, noisy(0.01))
    alone = replace(records, studies={})
    records.studies["r"]["contrasts"] = [each for each in records.study["contrasts"] if each["kind"] != "effect"]
    for each in (alone, records):
        table = fidelity.fidelity(each)
        assert table.empty and list(table.columns) == fidelity.COLUMNS.split()
        assert fidelity.sentence(each, contrasts.contrasts(each)) is None


def warm(gain: float) -> Callable[[Any], float]:
    """Accuracies in which `cifar/logit/T=2` gains; the others are noise."""

    def accuracy(trial: Any) -> float:
        noise = random.Random(f"{trial.arm} {trial.seed}").gauss(0, 0.0005)
        return 0.9 + noise + (gain if trial.arm == "cifar/logit/T=2" else 0.0)

    return accuracy


CLOSER = (
    "in 1 of 2 comparisons of distilled students, one student is closer to its teacher, in agreement or KL divergence,"
)
NOT_BETTER = f"{CLOSER} but is not found to be more accurate"
BETTER = f"{CLOSER} and is also more accurate"
NEITHER = "in 2 comparisons of distilled students, no student is found to be closer to its teacher"


@pytest.mark.parametrize(
    ("gain", "shifts", "expected"),
    [
        (0.0, {"agreement": 0.05}, NOT_BETTER),
        (-0.02, {"agreement": 0.05}, NOT_BETTER),
        (0.02, {"agreement": -0.05}, NOT_BETTER),
        (0.0, {"kl_t4": -0.05}, NOT_BETTER),
        (0.02, {"agreement": 0.05}, BETTER),
        (-0.02, {"kl_t1": 0.05, "kl_t4": 0.02}, BETTER),
        (0.02, {}, NEITHER),
        (0.0, {"ece": -0.05}, NEITHER),
        (0.0, {"kl_t1": 0.05, "kl_t4": -0.05}, NEITHER),
    ],
)
def test_the_sentence_states_whether_likeness_comes_with_higher_accuracy(
    study: Study, gain: float, shifts: dict[str, float], expected: str
) -> None:
    records = measured(made(study, warm(gain)), **shifts)
    said = fidelity.sentence(records, contrasts.contrasts(records))
    assert said is not None
    assert said.startswith(f"Exploratory: {expected}. ")


@pytest.mark.parametrize("measure", fidelity.LIKENESS)
def test_the_sentence_gives_the_numbers_of_the_clearest_difference(study: Study, measure: str) -> None:
    records = measured(made(study, warm(0.0)), **{measure: 0.05})
    each, accuracy = of(fidelity.fidelity(records), measure), row(contrasts.contrasts(records), PAIR)
    said = fidelity.sentence(records, contrasts.contrasts(records))
    ends = [f"{100 * accuracy[name]:+.2f}" for name in ("estimate", "low", "high")]
    expected = f"accuracy {ends[0]} points, 95 % interval {ends[1]} to {ends[2]}; 5 seeds)."
    assert said is not None and said.endswith(expected)
    scale, unit = (100, "points") if measure == "agreement" else (1, "nats")
    digits = 2 if measure == "agreement" else 4
    value, low, high = (f"{scale * each[name]:+.{digits}f}" for name in ("estimate", "low", "high"))
    assert (
        f"is {PAIR}, {each['verdict']} ({fidelity.LIKENESS[measure]} {value} {unit}, 95 % interval {low} to {high};"
        in said
    )


def test_the_sentence_names_the_run_if_there_are_several(study: Study) -> None:
    one, other = (measured(made(study, warm(0.0), run), agreement=0.05) for run in ("one", "two"))
    both = Records(
        *(
            pd.concat([getattr(one, name), getattr(other, name)], ignore_index=True)
            for name in ("trials", "epochs", "decisions")
        ),
        one.studies | other.studies,
    )
    said = fidelity.sentence(both, contrasts.contrasts(both))
    assert (
        said is not None and said.startswith("Exploratory: in 2 of 4 comparisons") and "one: cifar: T=2 - T=4" in said
    )

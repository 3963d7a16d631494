"""Verdicts of contrasts, and the claims that they allow. Expected numbers are computed by hand."""

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import pytest
from scipy import stats as scipy_stats

from tune_kd.analysis import accuracy, contrasts, evidence, provenance, statistics, summary, verdicts
from tune_kd.analysis.accuracy import confirmed
from tune_kd.records.reader import Records
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, first_row
from tune_kd.records.tables import frame
from tune_kd.study.plan import plan
from tune_kd.study.spec import Compare, Confirm, Study
from tune_kd.study.trial import Trial

SEEDS = (1, 2, 3, 4, 5)
NOISE = (0.0007, -0.0004, 0.0001, -0.0006, 0.0002)  # effect of a seed, equal in all arms


def made(study: Study, accuracy: Callable[[Trial], float], run: str = "r", **changes: Any) -> Records:
    """The records of a run whose trials all completed with these accuracies. `changes` sets columns by arm."""
    study = replace(study, confirm=Confirm(seeds=SEEDS))
    planned = plan(study, "0" * 64)
    rows = []
    for trial in planned.trials:
        row = first_row(run, trial) | {"status": "completed", "epochs_run": 2, "train_seconds": 3.0}
        row |= {"test_accuracy_best": accuracy(trial), "val_accuracy_best": 0.5, "val_accuracy": 0.5}
        rows.append(row | changes.get(trial.arm.replace("/", "_").replace("=", ""), {}))
    record = {
        "run": run,
        "study": asdict(study),
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
        "data": {"name": "digits", "digest": "0" * 64},
    }
    return Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {run: record})


def noisy(gain: float, spread: float = 0.0005) -> Callable[[Trial], float]:
    """The control has 0.9; logit gains about `gain` at every seed; feature is the control with other noise."""

    def accuracy(trial: Trial) -> float:
        if trial.phase != "confirm":
            return 0.95
        wobble = spread * (-1) ** trial.seed * (1 + trial.seed / 10)
        effect = {"none": 0.0, "logit": gain + wobble, "feature": wobble / 20}[trial.cell.method]
        return 0.9 + NOISE[trial.seed - 1] + effect

    return accuracy


def row(table: pd.DataFrame, name: str) -> dict[Any, Any]:
    (found,) = table[table["contrast"] == name].to_dict("records")
    return found


@pytest.mark.parametrize(
    ("gain", "name", "expected"),
    [
        (0.02, "cifar: logit - none", "better"),
        (-0.02, "cifar: logit - none", "worse"),
        (0.0, "cifar: feature - none", "equivalent"),
        (0.001, "cifar: logit - none", "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_interval(study: Study, gain: float, name: str, expected: str) -> None:
    table = contrasts.contrasts(made(study, noisy(gain)))
    found = row(table, name)
    assert found["verdict"] == expected
    assert found["words"].startswith(f"{expected}: ")


def test_a_paired_t_test_is_reported_and_p_values_are_adjusted_within_each_family(study: Study) -> None:
    records = made(study, noisy(0.001))
    table = contrasts.contrasts(records)
    values = confirmed(records)
    expected = scipy_stats.ttest_rel(values["cifar/logit/T=4"], values["cifar/none"])
    found = row(table, "cifar: logit - none")
    interval = expected.confidence_interval()
    assert found["p_pairs"] == pytest.approx(expected.pvalue)
    assert (found["low_pairs"], found["high_pairs"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found["smallest_exact_p"] == 0.0625
    assert found["p_exact"] >= 0.0625
    for _, family in table.groupby("family"):
        assert family["p_holm"].min() == pytest.approx(min(1.0, family["p"].min() * len(family)))
    assert set(table["family"]) == {"primary", "secondary"}


def test_contrasts_use_the_block_model_within_a_stratum_and_pairs_across_strata(study: Study) -> None:
    across = Compare("stem", "cifar", "imagenet", where={"method": "none"})
    table = contrasts.contrasts(made(replace(study, contrasts=(across, *study.contrasts)), noisy(0.001)))
    stem, logit = row(table, "none: cifar - imagenet"), row(table, "cifar: logit - none")
    assert (stem["rule"], stem["df"], stem["p"]) == ("pairs", 4, stem["p_pairs"])
    assert (logit["rule"], logit["df"]) == ("block model", 12)
    assert logit["error"] != pytest.approx(logit["sd"] / 5**0.5)


def test_a_run_of_an_earlier_version_is_judged_by_pairs_in_a_single_family(study: Study) -> None:
    records = made(study, noisy(0.001))
    for contrast in records.study["contrasts"]:
        del contrast["family"]
    table = contrasts.contrasts(records)
    assert table["p"].tolist() == table["p_pairs"].tolist()
    assert table["p_holm"].min() == pytest.approx(min(1.0, table["p"].min() * len(table)))
    assert set(table["rule"]) == {evidence.DECLARED_EARLIER}


def test_pairs_needed_is_the_smallest_number_with_80_percent_power(study: Study) -> None:
    found = row(contrasts.contrasts(made(study, noisy(0.0002))), "cifar: logit - none")
    size = abs(found["estimate"]) / (found["error"] * 5**0.5)
    reached = [n for n in (found["pairs_needed"] - 1, found["pairs_needed"]) if _power(size, n) >= 0.8]
    assert reached == [found["pairs_needed"]]


def _power(size: float, n: int) -> float:
    critical = scipy_stats.t.ppf(0.975, n + 7)
    return float(scipy_stats.nct.sf(critical, n + 7, size * n**0.5))


def test_the_words_of_a_verdict_state_estimate_seeds_and_interval(study: Study) -> None:
    table = contrasts.contrasts(made(study, noisy(0.02)))
    said = row(table, "cifar: logit - none")["words"]
    assert said.startswith("better: +1.99 points over 5 seeds, 95 % interval +1.9")
    same = row(contrasts.contrasts(made(study, lambda trial: 0.9)), "cifar: logit - none")["words"]
    assert same == ("inconclusive, since there is no estimate of its spread: +0.00 points over 5 seeds")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((-0.001, 0.0021), "gains above 0.21 points and losses above 0.10 points"),
        ((0.0003, 0.0021), "gains above 0.21 points and all losses"),
        ((-0.002, -0.0001), "all gains and losses above 0.20 points"),
    ],
)
def test_rules_out_states_the_gains_and_losses_that_the_interval_excludes(ends: tuple[float, float], said: str) -> None:
    low, high = ends
    row = {"verdict": "inconclusive", "n": 5, "low": low, "high": high, "error": 0.001}
    assert verdicts.rules_out(row) == said
    assert verdicts.gains_ruled_out(row) == said.split(" and ")[0]
    assert verdicts.rules_out(row | {"verdict": "better"}) == verdicts.gains_ruled_out(row | {"n": 1}) == ""


@pytest.mark.parametrize(
    ("column", "value"),
    [("epochs_planned", 9), ("dataset", "cifar10"), ("data_digest", "f" * 64), ("scale", "other"), ("recipe_id", "x")],
)
def test_arms_that_differ_in_an_undeclared_setting_are_not_judged(study: Study, column: str, value: Any) -> None:
    records = made(study, noisy(0.02), cifar_logit_T4={column: value})
    found = row(contrasts.contrasts(records), "cifar: logit - none")
    assert (found["n"], found["verdict"]) == (0, "not judged")
    assert found["words"].startswith(f"not judged: {column} is ")
    assert row(contrasts.contrasts(records), "imagenet: logit - none")["n"] == 5


def test_a_stopped_arm_is_not_confirmed_and_its_contrast_is_not_judged(study: Study) -> None:
    stopped = {"status": "stopped", "stop_reason": "asha", "test_accuracy_best": None}
    records = made(study, noisy(0.02), cifar_feature=stopped)
    assert "cifar/feature" not in confirmed(records)
    arm = accuracy.arms(records).set_index("arm").loc["cifar/feature"]
    assert (arm["n"], arm["planned"], arm["note"]) == (0, 5, "stopped in the screen")
    found = row(contrasts.contrasts(records), "cifar: feature - none")
    assert found["words"] == "not judged: cifar/feature has no completed confirmation trial"


@pytest.mark.parametrize("how", ["failed", "without a row", "without a result"])
def test_a_missing_seed_makes_its_arm_incomplete_and_is_noted_in_the_contrast(study: Study, how: str) -> None:
    records = made(study, noisy(0.02))
    lost = (records.trials["arm"] == "cifar/none") & (records.trials["seed"] == 4)
    if how == "failed":
        records.trials.loc[lost, ["status", "test_accuracy_best"]] = ["failed", None]
    elif how == "without a result":
        records.trials.loc[lost, "test_accuracy_best"] = None
    else:
        records = replace(records, trials=records.trials[~lost])
    arm = accuracy.arms(records).set_index("arm").loc["cifar/none"]
    assert (arm["n"], arm["planned"], arm["note"]) == (4, 5, "incomplete")
    found = row(contrasts.contrasts(records), "cifar: logit - none")
    assert (found["n"], found["note"]) == (4, "1 of 5 seeds are missing")
    assert "over 4 of 5 seeds" in found["words"]


def test_an_arm_whose_trials_differ_in_settings_has_no_mean(study: Study) -> None:
    records = made(study, noisy(0.02))
    changed = (records.trials["arm"] == "cifar/none") & (records.trials["seed"] == 4)
    records.trials.loc[changed, "epochs_planned"] = 9
    arm = accuracy.arms(records).set_index("arm").loc["cifar/none"]
    assert pd.isna(arm["mean"])
    assert arm["note"] == "epochs_planned is 2 and 9"


def test_an_arm_with_pending_trials_is_reported_as_not_finished(study: Study) -> None:
    waiting = {"status": "pending", "epochs_run": 0, "test_accuracy_best": None}
    records = made(study, noisy(0.02), cifar_feature=waiting)
    assert accuracy.arms(records).set_index("arm").loc["cifar/feature", "note"] == "not finished"
    assert any("cifar/feature: not finished" in sentence for sentence in provenance.limits(records))


def test_screen_results_are_exploratory_and_count_the_arms_tried(study: Study) -> None:
    records = made(study, noisy(0.02))
    explored = accuracy.exploratory(records)
    assert explored["what"].tolist() == ["screen"] * 8
    assert explored["tried"].tolist() == [8] * 8
    assert explored["mean"].tolist() == [0.95] * 8
    assert accuracy.arms(records)["mean"].max() < 0.95


def test_seeds_that_were_added_to_the_plan_are_exploratory(study: Study) -> None:
    records = made(study, noisy(0.02))
    added = records.trials[records.trials["arm"].eq("cifar/logit/T=4") & records.trials["seed"].eq(1)].assign(
        seed=6, trial_id="added", test_accuracy_best=1.0
    )
    more = replace(records, trials=pd.concat([records.trials, added], ignore_index=True))
    pd.testing.assert_frame_equal(contrasts.contrasts(more), contrasts.contrasts(records))
    explored = accuracy.exploratory(more)
    assert explored.loc[explored["what"] == "added seeds", ["arm", "n", "mean"]].to_numpy().tolist() == [
        ["cifar/logit/T=4", 1, 1.0]
    ]


def test_an_arm_that_was_added_later_is_exploratory_and_in_no_contrast(study: Study) -> None:
    records = made(study, noisy(0.02))
    added = records.trials[records.trials["arm"].eq("cifar/logit/T=4")].assign(arm="cifar/logit/T=8")
    added = added.assign(trial_id=[f"added {number}" for number in range(len(added))])
    more = replace(records, trials=pd.concat([records.trials, added], ignore_index=True))
    pd.testing.assert_frame_equal(contrasts.contrasts(more), contrasts.contrasts(records))
    pd.testing.assert_frame_equal(accuracy.arms(more), accuracy.arms(records))
    explored = accuracy.exploratory(more)
    assert explored.loc[explored["what"] == "added arm", ["arm", "n"]].to_numpy().tolist() == [["cifar/logit/T=8", 5]]
    assert any("Arms that were added later (cifar/logit/T=8) are exploratory" in each
               for each in provenance.limits(more))  # fmt: skip


def looked(study: Study, accuracy: Callable[[Trial], float], look: int) -> Records:
    """The records of a study with looks at 3, 5 and 10 seeds, at one of these looks."""
    declared = replace(study, confirm=Confirm((1, 2, 3), looks=(3, 5, 10)))
    planned = plan(declared, "0" * 64, look)
    rows = [first_row("r", trial) | {"status": "completed", "epochs_run": 2, "test_accuracy_best": accuracy(trial)}
            for trial in planned.trials]  # fmt: skip
    fixed = {"study": asdict(declared), "look": look, "data": {"name": "digits"}}
    fixed |= {"contrasts": [asdict(each) for each in planned.contrasts]}
    fixed |= {"arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms]}
    return Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {"r": fixed})


def gains(*by_seed: float) -> Callable[[Trial], float]:
    """Logit at T=4 with the cifar stem has these gains at seeds 1, 2, and so on; other arms differ by noise."""

    def accuracy(trial: Trial) -> float:
        noise = random.Random(f"{trial.arm} {trial.seed}").gauss(0, 1e-5)
        if trial.phase == "confirm" and trial.arm == "cifar/logit/T=4":
            return 0.9 + by_seed[trial.seed - 1] + noise
        return 0.9 + noise

    return accuracy


NAME = "cifar: logit - none"


def test_a_look_uses_its_share_of_the_level_and_p_values_are_scaled_accordingly(study: Study) -> None:
    accuracy = gains(0.010, 0.014, 0.011)
    table = contrasts.contrasts(looked(study, accuracy, 0))
    values = confirmed(looked(study, accuracy, 0))
    test = scipy_stats.ttest_rel(values["cifar/logit/T=4"], values["cifar/none"])
    found = row(table, NAME)
    share = 0.05 * 3 / 10
    interval = test.confidence_interval(1 - share)
    assert found["planned"] == found["n"] == 3
    assert (found["low_pairs"], found["high_pairs"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    half = scipy_stats.t.ppf(1 - share / 2, found["df"]) * found["error"]
    assert found["high"] - found["estimate"] == pytest.approx(half)
    family = table[table["family"] == found["family"]]
    adjusted = dict(zip(family["contrast"], statistics.holm(family["p"]), strict=True))
    assert found["p_holm"] == pytest.approx(min(1.0, adjusted[NAME] * 10 / 3))


def test_a_verdict_of_an_earlier_look_persists_unless_the_estimate_changes_sign(study: Study) -> None:
    strong = (0.0100, 0.01001, 0.01002)
    first = row(contrasts.contrasts(looked(study, gains(*strong), 0)), NAME)
    assert first["verdict"] == "better"
    faded = row(contrasts.contrasts(looked(study, gains(*strong, -0.009, 0.012), 1)), NAME)
    assert (faded["n"], faded["verdict"]) == (5, "better")
    assert faded["p_holm"] == pytest.approx(first["p_holm"])
    assert faded["p"] > 0.05
    assert "as found at an earlier look" in faded["words"]
    said = summary.summary(looked(study, gains(*strong, -0.009, 0.012), 1)).sentences
    assert ", 5 seeds, as found at an earlier look)" in " ".join(said)
    assert "earlier" not in first["words"]
    turned = row(contrasts.contrasts(looked(study, gains(*strong, -0.1, 0.04), 1)), NAME)
    assert (turned["estimate"] < 0, turned["verdict"]) == (True, "inconclusive")


def unended(records: Records, *, gone: bool = False, **where: Any) -> Records:
    """The records with some trials pending or missing."""
    chosen = pd.Series(True, index=records.trials.index)
    for name, value in where.items():
        chosen &= records.trials[name] == value
    if gone:
        return replace(records, trials=records.trials[~chosen])
    changed = records.trials.copy()
    changed.loc[chosen, "status"] = "pending"
    changed.loc[chosen, "test_accuracy_best"] = None
    return replace(records, trials=changed)


@pytest.mark.long
@pytest.mark.parametrize("gone", [False, True])
def test_an_unfinished_look_changes_no_contrast_and_is_reported(study: Study, gone: bool) -> None:
    accuracy = gains(0.010, 0.014, 0.011, 0.013, 0.012)
    whole = looked(study, accuracy, 1)
    for partial in (unended(whole, gone=gone, seed=5), unended(whole, seed=5, arm="imagenet/none")):
        pd.testing.assert_frame_equal(contrasts.contrasts(partial), contrasts.contrasts(looked(study, accuracy, 0)))
        assert any(each.startswith("Judged at look 1 of the 3") for each in provenance.limits(partial))
        assert "Look 2 is running: no contrast uses its seeds until all of them have finished." in provenance.limits(
            partial
        )
    assert row(contrasts.contrasts(whole), NAME)["n"] == 5


def test_a_contrast_with_unfinished_trials_is_not_judged(study: Study) -> None:
    table = contrasts.contrasts(unended(made(study, noisy(0.02)), arm="cifar/logit/T=4", seed=2))
    assert (row(table, NAME)["verdict"], row(table, NAME)["note"]) == (
        "not judged",
        "1 of its trials are waiting or running",
    )
    assert row(table, "imagenet: logit - none")["verdict"] == "better"


@pytest.mark.long
@pytest.mark.parametrize("rest", [0.0, 1e-14, -1e-14])
def test_a_finding_whose_estimate_later_rounds_to_zero_becomes_inconclusive(study: Study, rest: float) -> None:
    def accuracy(trial: Trial) -> float:
        gain = {1: 640, 2: 641, 3: 642, 4: -1000, 5: -923}.get(trial.seed, 0)  # in 2**-16, so that the sum is exactly 0
        treated = trial.phase == "confirm" and trial.arm == "cifar/logit/T=4"
        return 0.875 + (gain / 2**16 + rest if treated else 0.0)

    assert row(contrasts.contrasts(looked(study, accuracy, 0)), NAME)["verdict"] == "better"
    found = row(contrasts.contrasts(looked(study, accuracy, 1)), NAME)
    assert found["estimate"] == pytest.approx(rest, rel=0.01)
    assert found["verdict"] == "inconclusive"


def test_equivalence_from_an_earlier_look_is_withdrawn_when_the_estimate_leaves_the_margin(study: Study) -> None:
    alike = (0.00001, -0.00001, 0.00001)
    assert row(contrasts.contrasts(looked(study, gains(*alike), 0)), NAME)["verdict"] == "equivalent"
    inside = row(contrasts.contrasts(looked(study, gains(*alike, 0.002, -0.001), 1)), NAME)
    assert inside["verdict"] == "equivalent"
    assert "as found at an earlier look" in inside["words"]
    outside = row(contrasts.contrasts(looked(study, gains(*alike, 0.01, 0.012), 1)), NAME)
    assert (outside["verdict"], outside["p_equivalence"] > 0.05) == ("inconclusive", True)


def test_the_limits_name_the_current_look_and_its_level(study: Study) -> None:
    said = provenance.limits(looked(study, gains(*[0.01] * 5), 1))
    (sentence,) = (each for each in said if each.startswith("Judged at look"))
    assert sentence.startswith("Judged at look 2 of the 3 that the study declared (5 of 10 seeds)")
    assert "this look has 0.01" in sentence


def test_duplicate_trials_of_an_arm_and_seed_are_rejected(study: Study) -> None:
    records = made(study, noisy(0.02))
    twice = pd.concat([records.trials, records.trials.assign(trial_id="again")], ignore_index=True)
    with pytest.raises(ValueError, match="40 confirmed trials have the run, arm and seed of another"):
        confirmed(replace(records, trials=twice))


def test_levels_are_compared_in_each_context_and_paired_if_no_seed_is_missing(study: Study) -> None:
    records = made(study, noisy(0.02))
    table = contrasts.compare(records, "stem", "cifar", "imagenet")
    assert len(table) == 4  # none, feature, and logit at two temperatures
    assert set(table["how"]) == {"paired"}
    assert table["estimate"].abs().max() == pytest.approx(0.0)
    lost = (records.trials["arm"] == "cifar/none") & (records.trials["seed"] == 4)
    fewer = replace(records, trials=records.trials[~lost])
    assert sorted(contrasts.compare(fewer, "stem", "cifar", "imagenet")["how"]) == [
        "paired",
        "paired",
        "paired",
        "welch",
    ]


def test_arms_of_two_runs_are_compared_by_welch_and_differing_settings_are_reported(study: Study) -> None:
    one, other = made(study, noisy(0.0), "one"), made(study, noisy(0.01), "two")
    other.studies["two"]["study"]["recipe"]["lr"] = 0.2
    other.trials.loc[other.trials["arm"] == "cifar/none", "epochs_planned"] = 9
    both = Records(
        *(pd.concat([getattr(one, name), getattr(other, name)], ignore_index=True)
          for name in ("trials", "epochs", "decisions")),
        one.studies | other.studies,
    )  # fmt: skip
    table = provenance.between_runs(both).set_index("arm")
    values = confirmed(both)
    expected = scipy_stats.ttest_ind(values.loc["two", "cifar/logit/T=4"], values.loc["one", "cifar/logit/T=4"],
                                     equal_var=False)  # fmt: skip
    assert table.loc["cifar/logit/T=4", "p"] == pytest.approx(expected.pvalue)
    assert table.loc["cifar/logit/T=4", "estimate"] == pytest.approx(0.01)
    assert table.loc["cifar/none", "note"] == "epochs_planned is 2 and 9"
    assert pd.isna(table.loc["cifar/none", "estimate"])
    assert len(contrasts.contrasts(both)) == len(contrasts.contrasts(one)) + len(contrasts.contrasts(other))
    differences = provenance.differences(both).set_index("what differs")
    assert differences.loc["study.recipe.lr"].tolist() == [str(study.recipe.lr), "0.2"]
    assert "study.recipe.momentum" not in differences.index

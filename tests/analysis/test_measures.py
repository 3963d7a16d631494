"""Measures besides accuracy, and the audit of early stopping: numbers computed by hand, on small tables."""

from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import pytest
from scipy import stats as scipy_stats

from tune_kd.analysis import early_stopping, measures, statistics
from tune_kd.records.reader import Records
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS
from tune_kd.records.tables import frame
from tune_kd.study.spec import Data, Recipe, Screen, Study
from tune_kd.system.errors import UserError


def records(
    trials: list[dict[str, Any]], epochs: Any = (), decisions: Any = (), studies: dict[str, Any] | None = None
) -> Records:
    def filled(schema: Any, rows: Any) -> pd.DataFrame:
        return frame(schema, [dict.fromkeys(schema.columns) | {"run": "r"} | row for row in rows])

    return Records(filled(TRIALS, trials), filled(EPOCHS, epochs), filled(DECISIONS, decisions), studies or {})


def trial(arm: str, seed: int, accuracy: float | None, **values: Any) -> dict[str, Any]:
    stem, method, *rest = arm.split("/")
    return {
        "trial_id": f"{arm}{seed}", "arm": arm, "phase": "confirm", "role": "student", "student": "resnet18",
        "stem": stem, "weights": "none", "width": 1.0, "method": method, "seed": seed, "teacher_id": "t",
        "temperature": float(rest[0].removeprefix("T=")) if rest else None,
        "alpha": None if method == "none" else 0.5, "teacher": None if method == "none" else "resnet50",
        "status": "completed" if accuracy is not None else "stopped", "test_accuracy_best": accuracy,
        "train_seconds": 10.0, "wall_seconds": 12.0, "threads": 2, "gpu_fraction": 0.25, **values,
    }  # fmt: skip


TEACHER = {"trial_id": "t", "arm": "teacher", "phase": "teacher", "role": "teacher", "seed": 1000, "stem": "cifar",
           "status": "completed", "test_accuracy_best": 0.95}  # fmt: skip


def test_measures_are_means_and_deviations_over_completed_trials() -> None:
    table = measures.measures(
        records([
            trial("cifar/logit/T=4", 1, 0.9, agreement=0.8, ece=0.1), trial("cifar/logit/T=4", 2, 0.9, agreement=0.9),
            trial("cifar/logit/T=4", 3, None, ece=0.5),
        ])
    ).iloc[0]  # fmt: skip
    assert (table["n"], table["agreement"]) == (2, pytest.approx(0.85))
    assert table["agreement_sd"] == pytest.approx(0.1 / 2**0.5)
    assert table["ece"] == pytest.approx(0.1)
    assert pd.isna(table["ece_sd"])
    assert pd.isna(table["kl_t1"])


def test_costs_count_gpu_and_cpu_seconds_and_epochs_to_a_target() -> None:
    def curve(of: str, *accuracies: float) -> list[dict[str, Any]]:
        return [{"trial_id": of, "epoch": number, "val_accuracy": each} for number, each in enumerate(accuracies, 1)]

    some = records(
        [trial("cifar/none", 1, 0.9, val_accuracy_best=0.8), trial("cifar/none", 2, 0.9, val_accuracy_best=0.6)],
        [*curve("cifar/none1", 0.5, 0.7, 0.6, 0.8), *curve("cifar/none2", 0.1, 0.2, 0.6, 0.5)],
    )
    assert measures.target_accuracy(some) == pytest.approx(0.99 * 0.7)
    (row,) = measures.costs(some).to_dict("records")
    assert row["gpu_seconds"] == pytest.approx(3.0)
    assert row["cpu_seconds"] == pytest.approx(24.0)
    assert row["reached"] == 1
    assert pd.isna(row["epochs_to_target"])  # a mean over only the trials that reached it would be too low
    (row,) = measures.costs(some, target=0.6).to_dict("records")
    assert (row["reached"], row["epochs_to_target"]) == (2, 2.5)
    (row,) = measures.costs(some, target=0.99).to_dict("records")
    assert row["reached"] == 0
    assert pd.isna(row["epochs_to_target"])


def test_a_response_has_one_row_per_level_with_the_control_of_its_context() -> None:
    arms = {"cifar/none": 0.90, "imagenet/none": 0.80, "cifar/logit/T=1": 0.91, "cifar/logit/T=4": 0.93,
            "imagenet/logit/T=4": 0.83}  # fmt: skip
    some = records([trial(arm, seed, value + seed / 1000) for arm, value in arms.items() for seed in (1, 3)])
    table = measures.response(some, "temperature")
    assert table[["stem", "temperature", "n"]].to_numpy().tolist() == [["cifar", 1.0, 2], ["cifar", 4.0, 2]]
    assert table["mean"].tolist() == pytest.approx([0.912, 0.932])
    assert table["control"].tolist() == pytest.approx([0.902, 0.902])
    assert measures.response(some, "alpha").empty


def test_intervals_of_a_response_stay_within_0_and_1() -> None:
    wide = {("cifar/logit/T=1", 1): 0.1, ("cifar/logit/T=1", 3): 0.9, ("cifar/logit/T=4", 1): 0.5}
    table = measures.response(records([trial(arm, seed, value) for (arm, seed), value in wide.items()]), "temperature")
    assert (table["low"][0], table["high"][0]) == (0.0, 1.0)
    assert table[["low", "high"]].iloc[1].isna().all()


def test_gaps_report_the_teachers_lead_and_the_gain_over_the_control() -> None:
    some = records([TEACHER, trial("cifar/none", 1, 0.90), trial("cifar/logit/T=4", 1, 0.92)])
    (row,) = measures.gaps(some).to_dict("records")
    assert (row["gap"], row["gain"]) == (pytest.approx(0.05), pytest.approx(0.02))
    assert measures.gaps(records([trial("cifar/none", 1, 0.90), trial("cifar/logit/T=4", 1, 0.92)])).empty


def test_a_control_with_another_epoch_budget_is_ignored() -> None:
    some = records([
        TEACHER, trial("cifar/none", 1, 0.90, epochs_planned=100), trial("cifar/none", 2, 0.50, epochs_planned=10),
        trial("cifar/logit/T=4", 1, 0.92, epochs_planned=100),
    ])  # fmt: skip
    (row,) = measures.gaps(some).to_dict("records")
    assert row["control"] == pytest.approx(0.90)


def test_settings_unknown_for_both_arms_do_not_separate_them() -> None:
    unknown = {"weights": None, "width": None, "stem": None}
    some = records([TEACHER, trial("cifar/none", 1, 0.90, **unknown), trial("cifar/logit/T=4", 1, 0.92, **unknown)])
    (row,) = measures.gaps(some).to_dict("records")
    assert row["gain"] == pytest.approx(0.02)


def decision(of: str, epoch: int, metric: float, action: str = "continue", reason: str = "ahead") -> dict[str, Any]:
    return {"trial_id": of, "arm": of, "phase": "screen", "stratum": "s", "epoch": epoch, "rung": 0, "metric": metric,
            "rank": 1, "peers": 3, "action": action, "reason": reason}  # fmt: skip


def test_the_audit_pairs_each_comparison_with_the_final_accuracy_except_for_stopped_trials() -> None:
    trials = [{"trial_id": name, "arm": name, "phase": "screen", "role": "student", "seed": 0, "val_accuracy": final,
               "status": "completed" if name != "d" else "stopped"}
              for name, final in {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.2}.items()]  # fmt: skip
    made = [
        decision("a", 2, 0.5),
        decision("b", 2, 0.4),
        decision("c", 2, 0.6),
        decision("d", 2, 0.1, "stop", "behind"),
    ]
    some = records(trials, decisions=made)
    assert early_stopping.audit(some)["final"].tolist()[:3] == [0.9, 0.8, 0.7]
    assert pd.isna(early_stopping.audit(some)["final"].iloc[3])
    assert early_stopping.decisions(some)[["action", "reason", "comparisons", "arms"]].to_numpy().tolist() == [
        ["continue", "ahead", 3, 3],
        ["stop", "behind", 1, 1],
    ]


def curves(accuracy: dict[str, list[float]], study: Study, **values: Any) -> Records:
    """Completed trials `ARM SEED` of a study with these validation accuracies."""
    trials = [trial(name.split()[0], int(name.split()[1]), 0.9, trial_id=name, epochs_planned=len(each), **values)
              for name, each in accuracy.items()]  # fmt: skip
    epochs = [{"trial_id": name, "epoch": number, "val_accuracy": value}
              for name, each in accuracy.items() for number, value in enumerate(each, 1)]  # fmt: skip
    return records(trials, epochs, studies={"r": {"study": asdict(study)}})


def test_the_audit_correlates_ranks_at_each_rung_with_final_ranks_in_each_stratum(study: Study) -> None:
    study = replace(study, recipe=Recipe(epochs=4), screen=Screen(grace=1, reduction=2))
    ends = [0.1, 0.2, 0.3, 0.4, 0.5]
    logits = {
        f"cifar/logit/T={2 + 2 * (place % 2)} {place}": [1 - end, 0.5, end, end] for place, end in enumerate(ends)
    }
    other = {f"cifar/none {seed}": [0.1 * seed, 0.2, 0.3, 0.1 * seed] for seed in range(3)}
    some = curves(logits | other, study)
    table = early_stopping.rank_correlations(some)
    found = {(row["stratum"], row["epoch"]): row for row in table.to_dict("records")}
    assert set(found) == {(name, epoch) for name in ("cifar/logit", "cifar/none") for epoch in (1, 2)}
    assert (found["cifar/logit", 1]["n"], found["cifar/logit", 1]["rho"]) == (5, pytest.approx(-1.0))
    assert pd.isna(found["cifar/logit", 2]["rho"])  # all tied
    assert (found["cifar/none", 1]["rho"], found["cifar/none", 1]["n"]) == (pytest.approx(1.0), 3)
    assert pd.isna(found["cifar/none", 1]["rho_low"])
    expected = statistics.rank_correlation([1 - end for end in ends], ends)
    assert (found["cifar/logit", 1]["rho_low"], found["cifar/logit", 1]["rho_high"]) == (expected.low, expected.high)
    everywhere = early_stopping.rank_correlations(some, everywhere=True)
    assert everywhere.loc[everywhere["stratum"] == "cifar/logit", "epoch"].tolist() == [1, 2, 3]
    assert everywhere["rung"].isna().sum() == 2


def test_the_audit_of_long_trials_samples_about_a_thousand_epochs_and_all_rungs(study: Study) -> None:
    """A study may declare a million epochs."""
    study = replace(study, recipe=Recipe(epochs=2500), screen=Screen(grace=100, reduction=5))
    some = curves({f"cifar/none {seed}": [0.1 * seed] * 2500 for seed in range(3)}, study)
    table = early_stopping.rank_correlations(some, everywhere=True)
    epochs = table["epoch"].tolist()
    assert 800 < len(epochs) <= 1002 and {1, 100, 500} <= set(epochs) and max(epochs) < 2500
    assert table.loc[table["rung"].notna(), "epoch"].tolist() == [100, 500] and (table["n"] == 3).all()


@pytest.mark.parametrize(("epochs", "every", "shown"), [(5, 2, [2, 4]), (5, 3, [3]), (2500, 2, range(2, 2500, 4))])
def test_the_audit_uses_only_validated_epochs(study: Study, epochs: int, every: int, shown: object) -> None:
    recipe = Recipe(epochs=epochs, validate_every=every)
    study = replace(study, recipe=recipe, screen=Screen(grace=every * (epochs // every)))
    nan = float("nan")
    some = curves(
        {f"cifar/none {seed}": [0.1 * seed if recipe.validates(each + 1) else nan for each in range(epochs)]
         for seed in range(3)},
        study,
    )  # fmt: skip
    table = early_stopping.rank_correlations(some, everywhere=True)
    assert set(shown) <= {*table["epoch"]} and len(table) <= 1001  # type: ignore[call-overload]
    assert (table["n"] == 3).all() and (table["epoch"] % every == 0).all()


def test_a_target_is_reached_at_a_validated_epoch(study: Study) -> None:
    study = replace(study, recipe=Recipe(epochs=5, validate_every=2), screen=Screen(grace=5))
    nan = float("nan")
    some = curves({"cifar/none 1": [nan, 0.2, nan, 0.6, 0.7], "cifar/none 2": [nan, 0.6, nan, 0.5, 0.7]}, study)
    (row,) = measures.costs(replace(some, studies={}), 0.5).to_dict("records")
    assert (row["reached"], row["epochs_to_target"]) == (2, 3.0)


def test_noise_margins_come_from_the_spread_of_controls_between_seeds(study: Study) -> None:
    study = replace(study, recipe=Recipe(epochs=4), screen=Screen(grace=1, reduction=2))
    some = curves(
        {"cifar/none 1": [0.5, 0.7, 0.8, 0.9], "cifar/none 2": [0.7, 0.7, 0.8, 0.9], "cifar/logit/T=4 1": [0.1] * 4,
         "imagenet/none 1": [0.2, 0.3, 0.5, 0.5], "imagenet/none 2": [0.2, 0.5, 0.5, 0.5]},
        study, dataset="digits", scale="test",
    )  # fmt: skip
    # Two groups of two: the pooled deviation is sqrt((0.1^2 + 0.1^2) / 2) at epoch 1, with spread in one group only.
    deviation = (2 * 0.1**2 / 2) ** 0.5
    expected = scipy_stats.t.ppf(0.95, 2) * 2**0.5 * deviation
    assert early_stopping.noise_margins(some, study) == [pytest.approx(expected, abs=1e-6)] * 2
    with pytest.raises(UserError, match=r"no control .none. has two seeds that completed 9 epochs on digits"):
        early_stopping.noise_margins(some, replace(study, recipe=Recipe(epochs=9)))
    gaps = replace(
        some, epochs=some.epochs.assign(val_accuracy=some.epochs["val_accuracy"].mask(some.epochs["epoch"] == 2))
    )
    with pytest.raises(
        UserError, match=r"at scale .*, validated at the rungs \(1, 2\); name a run with such a control"
    ):
        early_stopping.noise_margins(gaps, study)
    with pytest.raises(UserError, match=r"screen.grace 4 of 4 epochs leaves no rung"):
        early_stopping.noise_margins(some, replace(study, screen=Screen(grace=4)))
    with pytest.raises(UserError, match="on cifar10"):
        early_stopping.noise_margins(some, replace(study, data=Data("cifar10")))


def test_the_timeline_assigns_trials_to_slots_without_overlap() -> None:
    def ran(seed: int, started: float, seconds: float, host: str = "one") -> dict[str, Any]:
        return trial("cifar/none", seed, 0.9, started=started, wall_seconds=seconds, host=host)

    table = early_stopping.timeline(
        records([ran(1, 100, 10), ran(2, 101, 4), ran(3, 105.5, 9), ran(4, 110.5, 1), ran(5, 102, 1, "two")])
    )
    slots = table.set_index("seed")["slot"].to_dict()
    assert slots == {1: 0, 2: 1, 3: 1, 4: 0, 5: 0}
    assert table.set_index("seed").loc[3, ["begin", "end"]].tolist() == [5.5, 14.5]

"""The warnings of a plan that come from an earlier run's audit."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tune_kd.analysis import early_stopping, grace
from tune_kd.records import reader
from tune_kd.study.plan import plan
from tune_kd.study.spec import Confirm, Data, Factor, Recipe, Screen, Study


@pytest.fixture
def long(one_stem: Study) -> Study:
    return replace(
        one_stem,
        factors=(*one_stem.factors[:2], Factor("temperature", (1.0, 2.0, 4.0, 8.0))),
        recipe=Recipe(epochs=6, batch_size=16, lr=0.05),
        screen=Screen(grace=2, reduction=2),
        confirm=Confirm((1, 2)),
    )


def left_behind(out: Path, study: Study, lows: dict[str, list[float | None]], run: str = "earlier") -> None:
    rows = [
        {"stratum": name, "epoch": epoch, "n": 12, "rho": 0.5, "rho_low": low, "rho_high": 0.9}
        for name, of in lows.items()
        for epoch, low in enumerate(of, 1)
    ]
    (out / run).mkdir(parents=True)
    grace.record(out / run, run, study, pd.DataFrame(rows))


def test_a_grace_period_shorter_than_an_audit_supports_gives_a_warning(long: Study, tmp_path: Path) -> None:
    left_behind(tmp_path, long, {"cifar/logit": [-0.5, -0.4, -0.1, 0.2, 0.3]})
    (warning,) = grace.warnings(plan(long), tmp_path)
    assert warning == (
        "screen.grace is 2, shorter than the run earlier supports: in cifar/logit the ranks at epoch 2 did not "
        "predict the final ranks (Spearman +0.50, 95 % interval -0.40 to +0.90, 12 trials); from epoch 4 on they did"
    )
    later = replace(long, screen=Screen(grace=4, reduction=2))
    assert grace.warnings(plan(later), tmp_path) == []


def test_good_epochs_before_a_bad_one_support_no_grace_period(long: Study, tmp_path: Path) -> None:
    left_behind(tmp_path, long, {"cifar/logit": [0.3, 0.3, -0.1, 0.3, None]})
    (warning,) = grace.warnings(plan(long), tmp_path)
    assert "the ranks at epoch 3" in warning
    assert warning.endswith("no grace period is supported")


def test_a_grace_period_is_judged_at_the_next_validated_epoch(long: Study, tmp_path: Path) -> None:
    left_behind(tmp_path, long, {"cifar/logit": [-0.5, -0.4, -0.1, 0.2, 0.3]})
    audit = tmp_path / "earlier" / "audit.json"
    left = json.loads(audit.read_text())
    left["strata"]["cifar/logit"] = {each: left["strata"]["cifar/logit"][each] for each in ("3", "5")}
    audit.write_text(json.dumps(left))
    (warning,) = grace.warnings(plan(long), tmp_path)
    assert "at epoch 3" in warning and warning.endswith("from epoch 5 on they did")


def test_incomparable_runs_immune_strata_and_damaged_audits_give_no_warning(
    long: Study, study: Study, tmp_path: Path
) -> None:
    bad: list[float | None] = [-0.5] * 5
    left_behind(tmp_path, replace(long, data=Data("cifar10")), {"cifar/logit": bad}, "other-data")
    left_behind(tmp_path, replace(long, recipe=Recipe(epochs=9)), {"cifar/logit": bad}, "longer")
    left_behind(tmp_path, long, {"cifar/none": bad, "cifar/feature": bad}, "immune")
    by_method = replace(study, recipe=long.recipe, screen=Screen(grace=2, reduction=2, min_peers=1, strata=("method",)))
    left_behind(tmp_path, by_method, {"none": bad}, "two-controls")
    assert grace.warnings(plan(by_method), tmp_path) == []
    (tmp_path / "broken").mkdir()
    for damaged in (
        '{"strata"',
        "[]",
        '{"strata": {"cifar/logit": 3}}',
        '{"run": "x", "strata": {"a": {"b": {}}}}',
        "[" * 10**5,
    ):
        (tmp_path / "broken" / "audit.json").write_text(damaged)
        assert grace.warnings(plan(long), tmp_path) == []
    assert grace.warnings(plan(long), tmp_path) == []


def test_record_writes_the_audit_of_a_finished_run(finished: Path, study: Study, tmp_path: Path) -> None:
    records = reader.load(finished)
    table = early_stopping.rank_correlations(records, everywhere=True)
    grace.record(tmp_path, "tiny", study, table)
    left = json.loads((tmp_path / "audit.json").read_text())
    assert (left["run"], left["data"], left["scale"], left["epochs"]) == ("tiny", "digits", "test", 2)
    assert left["strata"]["cifar/logit"]["1"]["n"] == table.set_index("stratum").loc["cifar/logit", "n"]

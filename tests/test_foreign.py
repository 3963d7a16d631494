"""Somebody else's tables: the published study, and small ones."""

from pathlib import Path

import pandas as pd
import pytest

from conftest import SHARED
from tune_kd import results
from tune_kd.cli import main
from tune_kd.foreign import Adapter, parse_phases
from tune_kd.study import Mistake
from tune_kd.tables import Records, load

PUBLISHED = SHARED / "data" / "published"
PHASES = {"select": "screen", "stem_ablation": "confirm", "teachers": "teacher"}
needs_published = pytest.mark.skipif(
    not PUBLISHED.with_name("published_trials.parquet").is_file(), reason="the published tables are not here"
)


@pytest.fixture(scope="module")
def published() -> Records:
    return load(PUBLISHED, adapt=Adapter(phases=PHASES))


@needs_published
def test_the_published_tables_are_read_through_an_adapter(published: Records) -> None:
    assert published.runs == ["published"]
    assert (len(published.trials), len(published.epochs)) == (71, 8200)
    assert published.trials["phase"].value_counts().to_dict() == {"screen": 48, "confirm": 14, "teacher": 9}
    assert published.decisions.empty
    assert published.studies == {}


@needs_published
@pytest.mark.parametrize(
    ("arm", "printed"),
    [
        ("resnet18/cifar/none", "94.86 ± 0.14"),
        ("resnet18/imagenet/none", "87.71 ± 0.22"),
        ("resnet34/imagenet/none", "88.28 ± 0.06"),
    ],
)
def test_the_published_stem_ablation_comes_out_to_the_printed_digits(
    published: Records, arm: str, printed: str
) -> None:
    row = results.arms(published).set_index("arm").loc[arm]
    assert row["n"] == 3
    assert f"{100 * row['mean']:.2f} ± {100 * row['sd']:.2f}" == printed


@needs_published
def test_the_published_effect_of_the_stem_is_about_seven_points_with_its_interval(published: Records) -> None:
    table = results.compare(published, "stem", "cifar", "imagenet").set_index("context")
    row = table.loc["resnet18/100"] if "resnet18/100" in table.index else table.loc["resnet18"]
    assert (row["how"], row["n"]) == ("paired", 3)
    assert row["estimate"] == pytest.approx(0.9486 - 0.8771, abs=1e-4)
    assert 0.06 < row["low"] < row["estimate"] < row["high"] < 0.085
    assert row["p"] < 0.001


@needs_published
def test_the_published_selection_grid_is_exploratory_and_claims_nothing(published: Records) -> None:
    explored = results.exploratory(published)
    assert len(explored) == 48
    assert set(explored["what"]) == {"screen"}
    assert set(explored["tried"]) == {48}
    assert results.contrasts(published).empty
    assert not set(results.arms(published)["arm"]) & set(explored["arm"])


@needs_published
def test_the_report_of_published_tables_makes_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [part for theirs, ours in PHASES.items() for part in ("--phase", f"{theirs}={ours}")]
    monkeypatch.setattr("sys.argv", ["tune_kd", "report", str(PUBLISHED), "--to", str(tmp_path / "r"), *phases])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "everything in them is exploratory" in said
    page = (tmp_path / "r" / "report.html").read_text()
    assert "there is no verdict" in page
    assert "resnet18/imagenet/none" in page


def small(folder: Path) -> Path:
    """Tables with the least that there has to be."""
    pd.DataFrame({"id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.6]}).to_parquet(
        folder / "their_trials.parquet"
    )
    pd.DataFrame({"id": ["a", "a", "b"], "epoch": [1, 2, 1], "acc": [0.1, 0.2, 0.3]}).to_parquet(
        folder / "their_epochs.parquet"
    )
    return folder / "their"


def test_columns_of_other_names_are_renamed_and_missing_ones_made(tmp_path: Path) -> None:
    records = load(small(tmp_path), adapt=Adapter(columns={"id": "trial_id", "acc": "val_accuracy"}))
    assert records.trials["run"].tolist() == ["their", "their"]
    assert records.trials[["phase", "role", "status", "arm"]].drop_duplicates().to_numpy().tolist() == [
        ["confirm", "student", "completed", "all"]
    ]
    assert results.arms(records).loc[0, "mean"] == pytest.approx(0.55)
    assert records.epochs["val_accuracy"].tolist() == [0.1, 0.2, 0.3]


def test_tables_without_what_there_has_to_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"their_trials\.parquet: lacks the columns trial_id; has id, seed"):
        load(small(tmp_path))


def test_a_trial_that_ran_less_than_planned_counts_as_stopped_and_is_in_no_mean(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.9]})
    trials.assign(epochs_run=[7, 100], epochs_planned=100).to_parquet(tmp_path / "t_trials.parquet")
    records = load(tmp_path / "t")
    assert records.trials["status"].tolist() == ["stopped", "completed"]
    assert results.confirmed(records)["all"].tolist() == [0.9]


def test_arms_of_other_data_or_budgets_are_other_arms(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b"], "seed": [1, 2], "test_accuracy_best": [0.5, 0.9]})
    trials.assign(dataset=["x", "y"], epochs_run=[10, 20], lr=0.1).to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["arm"].tolist() == ["x", "y"]


def test_what_differs_within_an_arm_is_named(tmp_path: Path) -> None:
    trials = pd.DataFrame({"trial_id": ["a", "b", "c"], "seed": [1, 2, 3], "method": ["none", "none", "logit"]})
    trials.assign(lr=[0.1, 0.2, 0.1], epochs_run=[9, 9, 10]).to_parquet(tmp_path / "t_trials.parquet")
    assert load(tmp_path / "t").trials["arm"].tolist() == ["none/lr=0.1", "none/lr=0.2", "logit/lr=0.1"]


def test_columns_that_come_to_have_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="trials has more than one column seed"):
        load(small(tmp_path), adapt=Adapter(columns={"id": "seed"}))


def test_methods_are_compared_though_a_control_has_no_temperature(tmp_path: Path) -> None:
    rows = [{"trial_id": f"{method}{seed}", "seed": seed, "method": method, "test_accuracy_best": accuracy + seed / 100,
             "temperature": 4.0 if method == "logit" else None}
            for method, accuracy in (("none", 0.5), ("logit", 0.6)) for seed in (1, 2, 3)]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "t_trials.parquet")
    (found,) = results.compare(load(tmp_path / "t"), "method", "logit", "none").to_dict("records")
    assert (found["how"], found["n"], found["estimate"]) == ("paired", 3, pytest.approx(0.1))
    with pytest.raises(Mistake, match=r"method has no level 'logits'; allowed: none, logit"):
        results.compare(load(tmp_path / "t"), "method", "logits", "none")
    with pytest.raises(Mistake, match="factor is 'methods'"):
        results.compare(load(tmp_path / "t"), "methods", "logit", "none")


def test_phases_are_given_as_theirs_and_ours() -> None:
    assert parse_phases(["select=screen", "x=confirm"]) == {"select": "screen", "x": "confirm"}
    with pytest.raises(Mistake) as caught:
        parse_phases(["select", "x=later"])
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "--phase is 'select'",
        "--phase is 'x=later'",
    ]

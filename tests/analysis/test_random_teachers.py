"""Teachers as a random effect: compared with the analysis of variance, statsmodels and studies with a known truth, and
in a run from plan to report."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose
from scipy import special, stats as scipy_stats
from statsmodels.regression.mixed_linear_model import MixedLM

from conftest import tiny, trained
from tune_kd.analysis import accuracy, contrasts, measures, provenance, simulate, statistics
from tune_kd.analysis.teachers import crossed
from tune_kd.cli.reading import print_report
from tune_kd.execute import metrics
from tune_kd.execute.resources import Shares
from tune_kd.execute.trackers.background import settings_of
from tune_kd.execute.worker import Task
from tune_kd.records import adaptive_plan, reader
from tune_kd.records.reader import Records, load
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, first_row, labels
from tune_kd.records.tables import frame
from tune_kd.reporting import report
from tune_kd.reporting.terminal import Terminal
from tune_kd.study.plan import plan
from tune_kd.study.spec import Compare, Confirm, Factor, Study
from tune_kd.study.trial import Trial
from tune_kd.study.tuning import LogUniform, Range, Tuning

LOGIT = "cifar: logit - none"


def differences(seed: int, teachers: int, seeds: int, spread: float, studies: int | None = None) -> np.ndarray:
    """Differences [(studies,) teachers, seeds] in points. Students and controls have a deviation of 0.15 points."""
    chance = np.random.default_rng(seed)
    lead = () if studies is None else (studies,)
    taught = spread * chance.standard_normal((*lead, teachers, 1))
    student, control = (0.15 * chance.standard_normal((*lead, count, seeds)) for count in (teachers, 1))
    return np.asarray(taught + student - control)


def layout(teachers: int, seeds: int, per_seed: int) -> np.ndarray:
    """The cyclic layout of `Study.teachers_of`: whether a teacher and a seed meet."""
    return np.array([[(row - column) % teachers < per_seed for column in range(seeds)] for row in range(teachers)])


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    teachers, seeds = d.shape
    by_teacher, by_seed = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    rest = d - by_teacher - by_seed + d.mean()
    return (
        seeds * float(((by_teacher - d.mean()) ** 2).sum()) / (teachers - 1),
        teachers * float(((by_seed - d.mean()) ** 2).sum()) / (seeds - 1),
        float((rest**2).sum()) / ((teachers - 1) * (seeds - 1)),
    )


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(2, 6))
def test_a_complete_layout_gives_the_analysis_of_variance(seed: int, teachers: int, seeds: int) -> None:
    d = differences(seed, teachers, seeds, 0.2)
    found, (of_teacher, of_seed, rest) = crossed(d), mean_squares(d)
    components = np.maximum([(of_teacher - rest) / seeds, (of_seed - rest) / teachers, rest], 0)
    of_teacher, of_seed = max(of_teacher, rest), max(of_seed, rest)
    variance = of_teacher + of_seed - rest
    parts = [(of_teacher, teachers - 1), (of_seed, seeds - 1), (rest, (teachers - 1) * (seeds - 1))]
    assert_allclose(found.mean, d.mean(), atol=1e-12)
    assert_allclose(found.variances, components, atol=1e-12)
    assert_allclose(found.error**2, variance / d.size, rtol=1e-9)
    satterthwaite = variance**2 / sum(part**2 / df for part, df in parts)
    assert_allclose(found.df, max(satterthwaite, min(teachers, seeds) - 1), rtol=1e-9)


def test_estimates_and_components_match_a_mixed_model() -> None:
    """REML equals the analysis of variance on balanced data if every component is positive."""
    compared = 0
    for seed in range(6):
        d = 10 * differences(seed, 5, 6, 0.2)  # MixedLM warns of variances below 0.01
        found = crossed(d)
        if not (found.variances > 0.3).all():
            continue
        rows, columns = np.indices(d.shape)
        table = pd.DataFrame({"y": d.ravel(), "teacher": rows.ravel(), "seed": columns.ravel(), "all": 1})
        crossing = {"teacher": "0 + C(teacher)", "seed": "0 + C(seed)"}
        model = MixedLM.from_formula("y ~ 1", table, groups="all", vc_formula=crossing, re_formula="0")
        fitted = model.fit(reml=True, method=["powell", "lbfgs"])
        names = model.exog_vc.names
        assert_allclose(fitted.fe_params["Intercept"], found.mean, atol=1e-10)
        expected = [*(fitted.vcomp[names.index(name)] for name in ("teacher", "seed")), fitted.scale]
        assert_allclose(found.variances, expected, rtol=0.02)
        assert_allclose(found.error, fitted.bse_fe["Intercept"], rtol=0.01)
        compared += 1
    assert compared >= 3


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 6), st.integers(0, 6))
def test_the_error_of_a_layout_with_missing_cells_follows_from_its_variance_components(
    seed: int, teachers: int, seeds: int, lost: int
) -> None:
    d = differences(seed, teachers, seeds, 0.2)
    d[np.unravel_index(np.random.default_rng(seed).permutation(d.size)[:lost], d.shape)] = np.nan
    present = ~np.isnan(d)
    if present.any(1).sum() < 2 or present.any(0).sum() < 2:
        assert np.isnan(crossed(d).error)
        return
    found = crossed(d)
    of_teacher, of_seed, cells = present.sum(1), present.sum(0), present.sum()
    shares = np.array([(of_teacher**2).sum(), (of_seed**2).sum(), cells]) / cells**2
    told = ~np.isnan(found.variances)
    assert told.tolist() == [of_teacher.max() > 1, of_seed.max() > 1, True]
    assert_allclose(found.mean, np.nanmean(d), atol=1e-12)
    assert_allclose(found.error**2, shares[told] @ found.variances[told], rtol=1e-9, atol=1e-15)
    assert found.df >= min(found.teachers, found.seeds) - 1


@pytest.mark.parametrize("lost", [0, 5])
def test_components_are_unbiased_with_and_without_missing_cells(lost: int) -> None:
    """Components are unbiased before negative ones are set to zero, which hardly happens here."""
    d = differences(3, 6, 8, 0.3, studies=4000)
    d[:, *np.unravel_index(np.random.default_rng(0).permutation(48)[:lost], (6, 8))] = np.nan
    found = crossed(d)
    assert_allclose(found.variances.mean(0), [0.09, 0.0225, 0.0225], rtol=0.05)
    assert_allclose((found.error**2).mean(), found.mean.var(), rtol=0.05)


def test_one_teacher_per_seed_gives_a_t_test_of_the_teacher_means() -> None:
    d = np.where(layout(4, 8, 1), differences(5, 4, 8, 1.0), np.nan)
    found = crossed(d)
    expected = scipy_stats.ttest_1samp(np.nanmean(d, axis=1), 0.0)
    assert np.isnan(found.variances[1])
    assert_allclose(found.df, 3)
    assert_allclose(found.mean / found.error, expected.statistic)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
@pytest.mark.parametrize(
    ("teachers", "seeds", "per_seed", "most"),
    [(2, 5, 2, 100.0), (3, 5, 3, 99.5), (5, 5, 5, 97.5), (10, 5, 10, 97.0), (3, 6, 2, 100.0), (5, 10, 3, 98.5)],
)
def test_intervals_cover_the_effect_over_all_teachers(
    teachers: int, seeds: int, per_seed: int, most: float, spread: float
) -> None:
    """Coverage in percent over 4,000 studies. With two or three teachers, the verdicts are conservative."""
    d = differences(teachers, teachers, seeds, spread, studies=4000)
    found = crossed(np.where(layout(teachers, seeds, per_seed), d, np.nan))
    half = special.stdtrit(found.df, 0.975) * found.error
    assert 94.0 <= 100 * float((np.abs(found.mean) <= half).mean()) <= most


def test_degrees_of_freedom_are_teachers_minus_1_if_teachers_dominate_the_variance() -> None:
    for teachers in (2, 3, 5):
        assert_allclose(np.median(crossed(differences(1, teachers, 5, 50.0, studies=500)).df), teachers - 1, rtol=0.01)


@pytest.mark.parametrize(("teachers", "seeds"), [(2, 5), (3, 5), (5, 5), (10, 5)])
def test_the_detectable_gain_over_teachers_matches_the_noncentral_t(teachers: int, seeds: int) -> None:
    gain = statistics.detectable_over_teachers(teachers, seeds, teachers, 0.15)
    df = min(teachers, seeds) - 1
    critical = scipy_stats.t.ppf(0.975, df)
    error = 0.15 * (1 / teachers + 1 / seeds + 1 / (teachers * seeds)) ** 0.5
    assert gain is not None and statistics.t_quantile(df) == pytest.approx(critical, rel=1e-5)
    assert scipy_stats.nct.sf(critical, df, gain / error) == pytest.approx(0.8, abs=1e-4)
    found = crossed(gain + differences(teachers, teachers, seeds, 0.15, studies=4000))
    assert float((found.mean - special.stdtrit(found.df, 0.975) * found.error > 0).mean()) > 0.78
    assert statistics.detectable_over_teachers(1, seeds, 1, 0.15) is None


def made(
    study: Study, value: Callable[[Trial, int], float], lost: Callable[[Trial], bool] = lambda _: False
) -> Records:
    """The records of a run. `value` takes a trial and its teacher seed (0 without a teacher). `lost` trials failed."""
    planned = plan(study, "0" * 64)
    rows = []
    for trial in planned.trials:
        row: dict[str, Any] = first_row("r", trial) | {"status": "completed", "epochs_run": 2, "train_seconds": 3.0}
        row |= {"test_accuracy_best": value(trial, trial.teacher_seed or 0), "val_accuracy_best": 0.5}
        if lost(trial):
            row |= {"status": "failed", "test_accuracy_best": None}
        rows.append(row)
    record = {
        "run": "r",
        "study": asdict(study),
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
        "data": {"name": "digits", "digest": "0" * 64},
    }
    return Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {"r": record})


def drawn(trial: Trial, teacher: int) -> float:
    """Accuracies of students that gain 0.3 points, and 0.1 points more or less depending on the teacher."""
    chance = np.random.default_rng([trial.seed, teacher, *trial.arm.encode()])
    of_teacher = np.random.default_rng([teacher, len(trial.cell.stem)]).standard_normal()
    gain = 0.0 if trial.cell.method == "none" else 0.003 + 0.001 * of_teacher
    return 0.9 + gain + 0.001 * float(chance.standard_normal())


@pytest.fixture
def several(study: Study) -> Study:
    """The tiny study with three teachers and four seeds."""
    return replace(study, teacher_seeds=(7, 8, 9), confirm=Confirm(seeds=(1, 2, 3, 4)))


def row(table: pd.DataFrame, name: str) -> dict[Any, Any]:
    (found,) = table[table["contrast"] == name].to_dict("records")
    return found


def test_a_contrast_of_an_arm_with_several_teachers_is_judged_over_teachers(several: Study) -> None:
    records = made(several, drawn)
    found = row(contrasts.contrasts(records), LOGIT)
    trials = accuracy.completed_trials(records)
    seeds = records.trials[records.trials["role"] == "teacher"].set_index("trial_id")["seed"]
    theirs = trials[trials["arm"] == "cifar/logit/T=4"]
    control = trials[trials["arm"] == "cifar/none"].set_index("seed")["test_accuracy_best"]
    d = theirs.assign(teacher_seed=theirs["teacher_id"].map(seeds)).pivot(
        index="teacher_seed", columns="seed", values="test_accuracy_best"
    ).astype(float)  # fmt: skip
    expected = crossed((d - control[d.columns]).to_numpy(dtype=float))
    assert (found["rule"], found["teachers"], found["n"], found["planned"]) == ("random teachers", 3, 4, 4)
    assert found["estimate"] == pytest.approx(float(expected.mean), abs=1e-12)
    assert found["error"] == pytest.approx(float(expected.error))
    assert [found["low"], found["high"]] == pytest.approx([float(end) for end in expected.interval()])
    assert found["p"] == pytest.approx(2 * scipy_stats.t.sf(found["estimate"] / found["error"], found["df"]))
    pairs = scipy_stats.ttest_1samp((d - control[d.columns]).mean().to_numpy(dtype=float), 0.0)
    assert found["p_pairs"] == pytest.approx(pairs.pvalue)
    assert pd.isna(found["pairs_needed"])
    assert "over 4 seeds and 3 teachers, 95 % interval" in found["words"]


def test_a_stem_contrast_of_controls_is_judged_by_pairs(several: Study) -> None:
    across = Compare("stem", "cifar", "imagenet", where={"method": "none"})
    table = contrasts.contrasts(made(replace(several, contrasts=(across, *several.contrasts)), drawn))
    stem = row(table, "none: cifar - imagenet")
    assert (stem["rule"], stem["df"], pd.isna(stem["teachers"])) == ("pairs", 3, True)
    assert "teacher" not in stem["words"]
    assert set(table["rule"]) == {"pairs", "random teachers"}


def test_the_block_model_uses_only_arms_without_teachers(several: Study) -> None:
    """Means over teachers spread less than single trials, and would make the model's variance too small."""
    wider = Compare("width", 0.125, 0.0625, where={"method": "none"})
    widths = (*several.factors, Factor("width", (0.0625, 0.125)))
    records = made(replace(several, factors=widths, contrasts=(wider,), moderator=None, reference=()), drawn)
    for found in contrasts.contrasts(records).to_dict("records"):
        assert (found["rule"], found["df"], found["n"]) == ("block model", 3, 4)
        assert found["error"] == pytest.approx(found["sd"] / 2)


def test_moderations_and_contrasts_of_two_distilled_arms_are_judged_over_teachers(several: Study) -> None:
    table = contrasts.contrasts(made(several, drawn))
    for name in ("(logit - none): cifar - imagenet", "cifar: T=2 - T=4"):
        assert (row(table, name)["rule"], row(table, name)["teachers"]) == ("random teachers", 3)
    same = row(contrasts.variances(made(several, drawn)), "cifar: T=2 - T=4")
    assert same["sd_teacher"] < 0.0007 < row(contrasts.variances(made(several, drawn)), LOGIT)["sd_rest"]


def test_a_missing_trial_removes_only_its_pair_of_seed_and_teacher(several: Study) -> None:
    def lost(trial: Trial) -> bool:
        return (trial.arm, trial.seed, trial.teacher_seed) == ("cifar/logit/T=4", 2, 8)

    table = contrasts.contrasts(made(several, drawn, lost))
    assert row(table, LOGIT)["note"] == "1 of 12 pairs of seed and teacher are missing"
    assert (row(table, LOGIT)["teachers"], row(table, LOGIT)["n"]) == (3, 4)
    arm = accuracy.arms(made(several, drawn, lost)).set_index("arm").loc["cifar/logit/T=4"]
    assert (arm["n"], arm["planned"], arm["note"]) == (11, 12, "incomplete")


def test_a_contrast_with_one_remaining_teacher_is_inconclusive(several: Study) -> None:
    found = row(contrasts.contrasts(made(several, drawn, lambda trial: trial.teacher_seed in (8, 9))), LOGIT)
    assert (found["verdict"], found["teachers"], pd.isna(found["p"])) == ("inconclusive", 1, True)
    assert found["words"].startswith(
        "inconclusive, since one teacher gives no estimate of the spread between teachers: "
    )


def test_two_teachers_with_one_teacher_per_seed_leave_one_degree_of_freedom(several: Study) -> None:
    turns = replace(several, teacher_seeds=(7, 8), confirm=replace(several.confirm, teachers_per_seed=1))
    found = row(contrasts.contrasts(made(turns, drawn)), LOGIT)
    assert (found["rule"], found["teachers"], found["note"]) == ("random teachers", 2, "")
    assert found["df"] == pytest.approx(1.0)
    assert pd.isna(row(contrasts.variances(made(turns, drawn)), LOGIT)["sd_seed"])


def test_rotating_teachers_of_an_earlier_version_are_judged_like_a_single_teacher(several: Study) -> None:
    turns = replace(several, teacher_seeds=(7, 8), confirm=replace(several.confirm, teachers_per_seed=1))
    records = made(turns, drawn)
    del records.study["study"]["confirm"]["teachers_per_seed"]
    table = contrasts.contrasts(records)
    alone = contrasts.contrasts(made(replace(turns, teacher_seeds=(7,)), lambda trial, _: value_of(records, trial)))
    assert table.drop(columns="words").equals(alone.drop(columns="words"))
    assert contrasts.variances(records).empty
    assert "Seeds took turns over 2 teachers. Verdicts are conditional on these teachers." in provenance.limits(records)


def value_of(records: Records, trial: Trial) -> float:
    """The recorded accuracy of a trial's arm, phase and seed."""
    rows = records.trials
    same = rows[(rows["arm"] == trial.arm) & (rows["seed"] == trial.seed) & (rows["phase"] == trial.phase)]
    return float(same["test_accuracy_best"].iloc[0]) if len(same) else 0.9


def test_variance_shares_sum_to_1_and_match_the_components(several: Study) -> None:
    table = contrasts.variances(made(several, drawn))
    assert len(table) == len(contrasts.contrasts(made(several, drawn)).query("rule == 'random teachers'"))
    shares = table[["share_teacher", "share_seed", "share_rest"]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * len(table))
    squares = table[["sd_teacher", "sd_seed", "sd_rest"]].to_numpy() ** 2
    assert_allclose(squares / squares.sum(1, keepdims=True), shares.to_numpy())


def test_the_interval_of_an_arm_with_several_teachers_includes_their_spread(several: Study) -> None:
    def value(trial: Trial, teacher: int) -> float:
        return 0.9 + 0.001 * teacher + 0.0001 * trial.seed

    table = accuracy.arms(made(several, value)).set_index("arm")
    taught, control = table.loc["cifar/logit/T=4"], table.loc["cifar/none"]
    assert (taught["n"], taught["planned"], taught["note"]) == (12, 12, "")
    assert (control["n"], control["planned"]) == (4, 4)
    of_means = scipy_stats.t.ppf(0.975, 2) * 0.001 / 3**0.5
    assert (taught["high"] - taught["low"]) / 2 == pytest.approx(of_means, rel=0.1)
    levels = measures.response(made(several, value), "temperature")
    assert (levels["high"] - levels["low"]).tolist() == pytest.approx([taught["high"] - taught["low"]] * len(levels))


def test_exploratory_comparisons_have_one_value_per_seed_over_all_teachers(several: Study) -> None:
    records = made(several, drawn)
    table = contrasts.compare(records, "method", "logit", "none")
    assert set(table["how"]) == {"paired"}
    assert set(table["n"]) == {4}
    again = replace(
        records, trials=records.trials.assign(run="other"), studies={"other": records.study | {"run": "other"}}
    )
    both = Records(
        pd.concat([records.trials, again.trials], ignore_index=True), records.epochs, records.decisions,
        records.studies | again.studies,
    )  # fmt: skip
    assert set(provenance.between_runs(both)["n_treated"]) == {4}


def test_limits_state_that_intervals_include_the_spread_between_teachers(several: Study) -> None:
    said = " ".join(provenance.limits(made(several, drawn)))
    assert "conditional on" not in said
    assert "each interval includes the spread between the 3 teachers of the study. 3 teachers estimate" in said


def test_labels_include_the_teacher_seed_only_with_several_teachers(several: Study) -> None:
    trials = plan(several).trials
    names = labels([first_row("r", trial) for trial in trials])
    assert names == {trial.trial_id: trial.label for trial in trials}
    alone = plan(replace(several, teacher_seeds=(7,))).trials
    assert not any(", teacher seed" in name for name in labels([first_row("r", trial) for trial in alone]).values())


def test_tracker_settings_include_the_teacher_seed(several: Study) -> None:
    for trial in plan(several).trials:
        settings = settings_of(Task(trial, 1, 0, 1.0, 0.0))
        assert settings.get("teacher_seed") == trial.teacher_seed


def test_tuning_uses_the_first_teacher_and_confirmation_uses_all(several: Study) -> None:
    tuned = replace(
        several,
        factors=(Factor("method", ("none", "logit")),),
        contrasts=several.contrasts[:1],
        moderator=None,
        tuning=Tuning((Range("lr", LogUniform(0.01, 0.5)),), budget=2, startup=1),
    )
    planned = plan(tuned)
    logit = next(each for each in planned.searches if each.name == "logit")
    draw = adaptive_plan.drawn(planned, logit, {"lr": 0.1})
    assert (draw.teacher_seed, draw.seed) == (7, 0)
    best = first_row("r", draw) | {"lr": 0.1}
    confirmed = [(trial.seed, trial.teacher_seed) for trial in adaptive_plan.confirmed(planned, logit, best)]
    assert sorted(confirmed) == list(itertools.product((1, 2, 3, 4), (7, 8, 9)))


def test_a_confirmed_pair_counts_as_complete_only_with_all_its_teachers(several: Study) -> None:
    planned = plan(several)
    rows = [first_row("r", trial) | {"status": "completed"} for trial in planned.trials]

    def pairs() -> tuple[float, float]:
        found = {sample.name: sample.value for sample in metrics.samples(planned, rows, (), Shares.equal(0.0))}
        return found["tune_kd_confirm_pairs"], found["tune_kd_confirm_pairs_planned"]

    effects = sum(each.kind == "effect" for each in planned.contrasts)
    assert pairs() == (4 * effects, 4 * effects)
    (one,) = (place for place, trial in enumerate(planned.trials)
              if trial.label == "cifar/feature seed 1, teacher seed 8" and trial.phase == "confirm")  # fmt: skip
    rows[one] = rows[one] | {"status": "running"}
    assert pairs() == (4 * effects - 1, 4 * effects)


@pytest.fixture(scope="session")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with two teachers, two seeds, one stem and two arms."""
    base = tiny()
    study = replace(
        base,
        factors=(Factor("method", ("none", "logit")),),
        contrasts=base.contrasts[:1],
        moderator=None,
        teacher_seeds=(7, 8),
    )
    return trained(study, tmp_path_factory.mktemp("results") / "teachers")


def test_a_run_with_two_teachers_and_two_seeds_is_trained_and_reported(
    two_by_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = load(two_by_two)
    counts = records.trials.groupby(["phase", "arm"]).size().to_dict()
    assert counts == {
        ("teacher", "teacher"): 2,
        ("screen", "none"): 1,
        ("screen", "logit"): 1,
        ("confirm", "none"): 2,
        ("confirm", "logit"): 4,
    }
    assert (records.trials["status"] == "completed").all()
    students = accuracy.completed_trials(records)
    assert students.loc[students["arm"] == "logit", "weights_digest"].nunique() == 4
    print_report(records, tmp_path / "report", Terminal(), as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "and for teachers of their kind" in shown and "share one teacher" not in shown
    assert "Spread in points of test accuracy" in shown
    for name in ("report.md", "report.html", "tables/contrasts.csv", "tables/variances.csv", "tables/variances.tex"):
        assert "share one teacher" not in (tmp_path / "report" / name).read_text()
    assert "variances" in report.tables(records)
    print_report(records, tmp_path / "report", Terminal(), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["contrasts"][0]["rule"] == "random teachers"
    assert answer["variances"][0]["teachers"] == 2


def test_curves_of_several_teachers_are_replayed_with_one_teacher_per_seed(two_by_two: Path) -> None:
    found = simulate.curves(load(two_by_two), tiny(), ["stem"])
    assert [len(grid) for grid in found.grids.values()] == [2, 2, 2]
    assert found.left_out == ("2 trials repeat an arm and a seed with another teacher; a screen has one",)


def test_tables_without_a_study_average_over_teachers(two_by_two: Path, tmp_path: Path) -> None:
    for name in ("trials", "epochs", "decisions"):
        (tmp_path / f"{name}.parquet").write_bytes((two_by_two / f"{name}.parquet").read_bytes())
    records = reader.load(tmp_path)
    values, trials = accuracy.confirmed(records)["logit"], records.trials
    one = trials[(trials["arm"] == "logit") & (trials["phase"] == "confirm") & (trials["seed"] == 1)]
    assert values.iloc[0] == pytest.approx(one["test_accuracy_best"].mean())
    assert len(accuracy.arms(records)) == 2

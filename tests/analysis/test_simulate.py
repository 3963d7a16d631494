"""Early stopping over recorded curves: the same decisions as in a run, and figures that are recomputed here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr

import commands
from conftest import SHARED
from search_spaces.ablation import study as ablation
from tune_kd.analysis import simulate as simulation
from tune_kd.analysis.simulate import Curve, Curves
from tune_kd.records import reader
from tune_kd.records.importer import Adapter
from tune_kd.records.reader import Records
from tune_kd.study.plan import arrival_order
from tune_kd.study.spec import Screen
from tune_kd.system.errors import UserError

ROOT = Path(__file__).parents[2]
PUBLISHED = SHARED / "data" / "published"
USUAL = Screen(grace=10, reduction=3, margin=0.005, min_peers=2)


def written(folder: Path, trials: list[dict[str, Any]], accuracy: dict[str, list[float]]) -> Path:
    """Write tables in the format of another tool, with a common prefix."""
    pd.DataFrame(trials).to_parquet(folder / "mine_trials.parquet")
    rows = [
        {"trial_id": of, "epoch": number, "val_accuracy": value}
        for of, values in accuracy.items()
        for number, value in enumerate(values, 1)
    ]
    pd.DataFrame(rows).to_parquet(folder / "mine_epochs.parquet")
    return folder / "mine"


def some(folder: Path, *, arms: int = 6, epochs: int = 40, seeds: int = 2, pairs: int = 2) -> Path:
    """Curves of two pairs of arms without a control, whose noise shrinks, and two controls."""
    chance = np.random.default_rng(7)
    trials, accuracy = [], {}
    for pair in range(pairs):
        for seed in range(seeds):
            for arm in range(arms):
                of = f"{pair} {seed} {arm}"
                row = {"trial_id": of, "phase": "select", "student": "resnet18", "teacher": f"resnet{pair}"}
                trials.append(row | {"stem": "cifar", "method": "logit", "temperature": 1.0 + arm, "seed": seed,
                                     "epochs_run": epochs})  # fmt: skip
                noise = chance.normal(0, 1, epochs) * np.linspace(0.03, 0.001, epochs)
                accuracy[of] = list(0.9 + chance.normal(0, 0.004) + noise)
    for seed in range(2):
        row = {"trial_id": f"none {seed}", "phase": "select", "student": "resnet18", "teacher": None, "stem": "cifar"}
        trials.append(row | {"method": "none", "temperature": None, "seed": seed, "epochs_run": epochs})
        accuracy[f"none {seed}"] = list(0.5 + np.arange(epochs) / 1000)
    return written(folder, trials, accuracy)


def read(path: Path, **phases: str) -> Records:
    return reader.load(path, adapt=Adapter(rest="screen", phases=phases))


def asha(values: NDArray[np.float64], order: list[int], screen: Screen) -> NDArray[np.int64]:
    """The epoch at which each arm ends, computed without the schedule, for arms that start in this order."""
    arms, budget = values.shape
    ended = np.full(arms, budget)
    for epoch in (screen.grace * screen.reduction**power for power in range(20)):
        if epoch >= budget:
            break
        seen: list[float] = []
        going = [arm for arm in order if ended[arm] == budget]
        for arm in going:
            here = values[arm, epoch - 1]
            left = (ended == budget).sum()
            if len(seen) >= screen.min_peers and left > 1:
                place = (1 - 1 / screen.reduction) * (len(seen) - 1)
                low, high = sorted(seen)[int(place)], sorted(seen)[min(int(place) + 1, len(seen) - 1)]
                assert isinstance(screen.margin, float)
                if here < low + (high - low) * (place - int(place)) - screen.margin:
                    ended[arm] = epoch
            seen.append(here)
    return ended


def check_against_computation(path: Path, screen: Screen, orders: int) -> dict[str, Any]:
    """Compare each pair's figures with figures that are computed here from the files alone."""
    recorded = simulation.curves(read(path), ablation(), ["student", "teacher"])
    found = simulation.simulate(screen, recorded, orders)
    trials = pd.read_parquet(f"{path}_trials.parquet")
    trials = trials[trials["teacher"].notna()]
    epochs = pd.read_parquet(f"{path}_epochs.parquet").pivot(index="trial_id", columns="epoch", values="val_accuracy")
    curves_of = {seed: epochs.loc[of_seed["trial_id"]].dropna(axis=1) for seed, of_seed in trials.groupby("seed")}
    names = {curve.trial_id: curve.arm for grid in recorded.grids.values() for curve in grid}
    assert set(found) == {f"{student}/{teacher}" for student, teacher in trials.groupby(["student", "teacher"]).groups}
    for (student, teacher), of_pair in trials.groupby(["student", "teacher"]):
        saved, regret = [], []
        for seed, whole in curves_of.items():
            mine = whole.index.isin(of_pair["trial_id"])
            everyone = [names[each] for each in whole.index]
            for number in range(orders):
                by_arm = {arm: place for place, arm in enumerate(np.array(everyone)[mine])}
                order = [by_arm[arm] for arm in arrival_order(everyone, number) if arm in by_arm]
                values = whole[mine].to_numpy()
                ended = asha(values, order, screen)
                saved.append(1 - ended.sum() / (len(order) * whole.shape[1]))
                regret.append(values[:, -1].max() - values[ended == whole.shape[1], -1].max())
            assert seed in found[f"{student}/{teacher}"].seeds
        each = found[f"{student}/{teacher}"]
        assert each.stopping.epochs_saved == pytest.approx(np.mean(saved))
        assert each.stopping.mean_regret == pytest.approx(np.mean(regret))
        assert each.stopping.best_lost == pytest.approx(np.mean(np.array(regret) > 0))
        table = epochs.loc[of_pair["trial_id"]].dropna(axis=1)
        for epoch in (1, screen.grace, table.shape[1] - 1):
            expected = spearmanr(table[epoch], table[table.shape[1]]).statistic
            assert each.rank_correlation[epoch].rho == pytest.approx(expected)
    return found


def test_savings_and_regret_match_a_computation_without_the_schedule(tmp_path: Path) -> None:
    found = check_against_computation(some(tmp_path), replace(USUAL, grace=4), 40)
    assert all(0 < each.stopping.epochs_saved < 1 and each.stopping.mean_regret > 0 for each in found.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published curves are not here")
def test_published_curves_match_a_computation_without_the_schedule(tmp_path: Path) -> None:
    found = check_against_computation(PUBLISHED, USUAL, 100)
    assert {name: each.arms for name, each in found.items()} == {
        f"{student}/{teacher}": 12
        for student, teacher in (("resnet18", "resnet34"), ("resnet18", "resnet50"), ("resnet34", "resnet101"),
                                 ("resnet34", "resnet50"))
    }  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published curves are not here")
def test_the_default_screen_has_a_mean_regret_of_at_most_0_05_points_on_published_pairs() -> None:
    recorded = simulation.curves(read(PUBLISHED), ablation(), ["student", "teacher"])
    found = simulation.simulate(ablation().screen, recorded, 1000)
    assert max(each.stopping.mean_regret for each in found.values()) <= 0.0005


def test_baselines_stop_as_many_arms_as_the_screen(tmp_path: Path) -> None:
    recorded = simulation.curves(read(some(tmp_path)), ablation(), ["student", "teacher"])
    for each in simulation.simulate(replace(USUAL, grace=4, margin=0.0), recorded, 50).values():
        stops = sum(sum(when.values()) for when in each.stopped.values()) / each.arms
        assert each.random.epochs_saved == pytest.approx(stops)
        assert each.cut.epochs_saved == pytest.approx(stops * (1 - 4 / 40))


def test_the_cut_baseline_keeps_the_arms_that_are_best_at_the_first_rung() -> None:
    """By hand: three arms arrive in the order a, b, c. Only c is stopped, at epoch 2, although a is the worst there."""
    curves = {"a": (0.3, 0.1, 0.9), "b": (0.1, 0.8, 0.7), "c": (0.9, 0.4, 0.5)}
    grid = tuple(Curve(arm, arm, "s", False, values) for arm, values in curves.items())
    seed = next(seed for seed in range(99) if arrival_order(list(curves), seed) == ["a", "b", "c"])
    screen = Screen(grace=2, reduction=2, margin=0.0, min_peers=2)
    tally = simulation._Tally("s", screen, Curves({(0, 3): grid}, ()))
    stops = {each.arm: each.epoch for each in simulation.replay(screen, grid, arrival_order(list(curves), seed))
             if each.action == "stop"}  # fmt: skip
    assert stops == {"c": 2}
    tally.add(grid, stops, np.random.default_rng(0))
    assert tally.outcome().stopping == simulation.Result(pytest.approx(1 / 9), 0.0, 0.0)
    assert tally.outcome().cut == simulation.Result(pytest.approx(1 / 9), pytest.approx(0.2), 1.0)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Curve, ...]:
    epochs, arms = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    values = st.lists(st.floats(0, 1), min_size=epochs, max_size=epochs).map(tuple)
    return tuple(
        Curve(str(arm), str(arm), draw(st.sampled_from("ab")), draw(st.booleans()), draw(values)) for arm in range(arms)
    )


@given(
    grids(),
    st.builds(Screen, grace=st.integers(1, 6), reduction=st.integers(2, 4), margin=st.sampled_from([0.0, 0.1]),
              min_peers=st.integers(1, 3)),
    st.integers(0, 99),
)  # fmt: skip
def test_immune_arms_are_never_stopped_and_each_stratum_keeps_an_arm(
    grid: tuple[Curve, ...], screen: Screen, seed: int
) -> None:
    made = simulation.replay(screen, grid, arrival_order([curve.arm for curve in grid], seed))
    out = {each.arm for each in made if each.action == "stop"}
    assert not out & {curve.arm for curve in grid if curve.immune}
    assert {curve.stratum for curve in grid if curve.arm not in out} == {curve.stratum for curve in grid}
    reached = {(each.arm, each.epoch) for each in made}
    for curve in grid:  # arms that continue are compared at every rung
        if curve.arm not in out:
            assert {epoch for arm, epoch in reached if arm == curve.arm} == set(screen.rungs(len(curve.accuracy)))


def test_trials_that_cannot_be_replayed_are_skipped_and_reported(tmp_path: Path) -> None:
    path = some(tmp_path)
    trials = pd.read_parquet(f"{path}_trials.parquet").assign(epochs_planned=40)
    trials.loc[0, "epochs_run"] = 20
    trials.to_parquet(f"{path}_trials.parquet")
    epochs = pd.read_parquet(f"{path}_epochs.parquet")
    epochs.loc[(epochs["trial_id"] == "0 0 1") & (epochs["epoch"] == 3), "val_accuracy"] = None
    epochs.to_parquet(f"{path}_epochs.parquet")
    recorded = simulation.curves(read(path), ablation(), ["student", "teacher"])
    assert recorded.left_out == (
        "2 trials without a level of student or teacher belong to no stratum",
        "1 trials did not complete",
        "1 trials have no complete curve of val_accuracy",
    )
    assert len(recorded.grids[0, 40]) == 10


def test_only_controls_are_immune_in_imported_curves(tmp_path: Path) -> None:
    recorded = simulation.curves(read(some(tmp_path)), ablation(), None)
    immune = {curve.arm for grid in recorded.grids.values() for curve in grid if curve.immune}
    assert immune == {curve.arm for grid in recorded.grids.values() for curve in grid if "none" in curve.arm}
    assert recorded.strata == ["all"]
    without = simulation.curves(read(some(tmp_path)), replace(ablation(), control=None, contrasts=()), None)
    assert not any(curve.immune for grid in without.grids.values() for curve in grid)


def test_inconsistent_curves_are_rejected_with_a_suggested_option(tmp_path: Path) -> None:
    path = some(tmp_path)
    trials = pd.read_parquet(f"{path}_trials.parquet")
    trials.loc[1, "temperature"] = trials.loc[0, "temperature"]  # the same arm and seed twice
    epochs = pd.read_parquet(f"{path}_epochs.parquet")
    epochs = epochs[(epochs["trial_id"] != "1 0 0") | (epochs["epoch"] <= 20)]
    trials.to_parquet(f"{path}_trials.parquet")
    epochs.to_parquet(f"{path}_epochs.parquet")
    with pytest.raises(UserError) as caught:
        simulation.curves(read(path), ablation(), ["student", "teacher"])
    twice, budgets = sorted(caught.value.problems, key=lambda problem: "epochs" in problem)
    assert "more than one trial of the arm" in twice
    assert "trials with 20 and 40 epochs in the stratum resnet18/resnet1" in budgets
    assert all("--phase NAME=teacher" in problem for problem in caught.value.problems)


def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a separate process, which reports at its end whether it imported Ray or torch."""
    code = f"""
import sys
from tune_kd.__main__ import main
sys.argv = ["tune_kd", "simulate", *{list(arguments)!r}]
try:
    main()
finally:
    assert not {{"ray", "torch"}} & set(sys.modules)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_command_prints_json_without_importing_ray_or_torch(tmp_path: Path) -> None:
    done = call("ablation", "--curves", str(some(tmp_path)), "--strata", "student,teacher", "--orders", "20",
                "--set", "screen.grace=4", "--set", "screen.margin=0.0", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer["strata"]) == ["resnet18/resnet0", "resnet18/resnet1"]
    recorded = simulation.curves(read(some(tmp_path)), ablation(), ["student", "teacher"])
    screen = replace(ablation().screen, grace=4, margin=0.0)
    for name, each in simulation.simulate(screen, recorded, 20).items():
        said = answer["strata"][name]
        assert said["arms"] == 6
        assert (said["epochs_saved"], said["mean_regret"]) == (each.stopping.epochs_saved, each.stopping.mean_regret)
        assert said["best_lost"] == each.stopping.best_lost
        assert said["rank_correlation"]["4"] == each.rank_correlation[4].rho
        assert set(said["baselines"]) == {"cut", "random"}


def test_the_text_output_names_the_stopped_arms_and_their_epochs(tmp_path: Path) -> None:
    done = call("ablation", "--curves", str(some(tmp_path)), "--strata", "student,teacher", "--orders", "20",
                "--set", "screen.grace=4", "--set", "screen.margin=0.0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("epochs", "regret", "best", "Rank correlation", "resnet18/resnet0: stopped", "epoch 12", "T=3"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--curves", "nowhere"], ("--curves is 'nowhere'",)),
        (["--orders", "0"], ("--orders is 0", "from 1")),
        (["--strata", "depth"], ("--strata is 'depth'", "student, teacher")),
        (["--strata", "alpha"], ("--strata is 'alpha'",)),
        (["--set", "screen.grace=50"], ("screen.grace is 50", "curves of 40 epochs")),
        (["--set", "screen.margin=[0.1,0.1,0.1]", "--set", "screen.grace=9"], ("3 margins", "each rung (2: 9, 27)")),
        (["--scale", "huge"], ("--scale is 'huge'",)),
        (["--phase", "select=later"], ("--phase is 'select=later'",)),
        (["--phase", "select=teacher"], ("no student trial",)),
        (["--margin-from", "nowhere"], ("--margin-from is 'nowhere'",)),
        (["--margin-from", ""], ("--margin-from is '.'",)),
        (["--curves", ""], ("--curves is '.'",)),
        (["--curves", "/"], ("--curves is '/'",)),
        (["--phase", "scren=teacher"], ("no trial has the phase 'scren'", "'select'")),
        (["--strata", "stem,stem"], ("--strata is 'stem,stem'", "each column once")),
    ],
)
def test_invalid_arguments_exit_with_2_and_a_message_without_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    assert commands.call(monkeypatch, "simulate", "ablation", "--curves", str(some(tmp_path)), *arguments) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in words), errors
    assert "Traceback" not in errors


def test_curves_of_a_run_use_its_roles_and_an_undeclared_scale_becomes_paper(finished: Path) -> None:
    from tune_kd.cli.planning import _scale_of_curves
    from tune_kd.study.discover import find

    records = reader.load(finished)
    recorded = simulation.curves(records, ablation(), ["stem", "method"])
    immune = {curve.arm for grid in recorded.grids.values() for curve in grid if curve.immune}
    roles = {arm["name"]: arm["role"] for arm in records.study["arms"]}
    there = {curve.arm for grid in recorded.grids.values() for curve in grid}
    assert immune == {arm for arm in there if roles[arm] != "compared"} > {"cifar/none", "imagenet/none"}
    assert _scale_of_curves(find("ablation"), "auto", records)[0] == "paper"  # "test" is not one of its scales


def test_defaults_follow_the_data_of_the_curves_and_a_useless_grace_period_gives_a_warning(tmp_path: Path) -> None:
    path = some(tmp_path, epochs=6)
    trials = pd.read_parquet(f"{path}_trials.parquet").assign(scale="laptop", dataset="cifar10")
    trials.to_parquet(f"{path}_trials.parquet")
    arguments = ("ablation", "--curves", str(path), "--strata", "student,teacher", "--orders", "5")
    done = call(*arguments, "--json")
    assert json.loads(done.stdout)["screen"]["grace"] == 4  # of CIFAR-10; it would be 6 for the digits
    done = call(*arguments, "--set", "screen.grace=6")
    assert "warning: screen.grace is 6, so curves of 6 epochs are never compared" in done.stdout


def test_an_extended_run_uses_the_roles_of_its_extension(finished: Path) -> None:
    records = reader.load(finished)
    records.study["extended"] = {"arms": [arm | {"role": "compared"} for arm in records.study["arms"]]}
    recorded = simulation.curves(records, ablation(), ["stem", "method"])
    assert {curve.immune for grid in recorded.grids.values() for curve in grid} == {False}


def decisions(records: Records) -> Iterator[tuple[Any, ...]]:
    for row in records.decisions.to_dict("records"):
        yield tuple(None if pd.isna(value) else value for name, value in row.items() if name != "run")


def test_a_replayed_screen_makes_the_same_decisions_as_the_run(finished: Path) -> None:
    """Replay the curves of a run that was trained in this process, in the order in which its arms arrived."""
    records = reader.load(finished)
    study = replace(ablation(), screen=Screen(**records.study["study"]["screen"]))
    epochs = records.epochs.groupby("trial_id")["val_accuracy"].apply(list)
    screened = records.trials[records.trials["phase"] == "screen"].set_index("arm")
    roles = {arm["name"]: arm["role"] != "compared" for arm in records.study["arms"]}
    order = list(dict.fromkeys(records.decisions["arm"]))
    grid = tuple(
        # A stopped trial has no later epochs; the replay must not ask for them.
        Curve(row["trial_id"], arm, f"{row['stem']}/{row['method']}", roles[arm],
              tuple([*epochs[row["trial_id"]], 0.0][: int(row["epochs_planned"])]))
        for arm, row in screened.iterrows()
    )  # fmt: skip
    made = simulation.replay(study.screen, grid, order)
    theirs = list(decisions(records))
    assert theirs
    assert sorted(tuple(vars(each).values()) for each in made) == sorted(theirs)


def test_a_seed_may_lack_curves_of_a_stratum() -> None:
    grid = (Curve("1", "x", "a", False, (0.1, 0.2)), Curve("2", "y", "b", False, (0.1, 0.2)))
    found = simulation.simulate(Screen(grace=1, reduction=2), Curves({(0, 2): grid, (1, 2): grid[:1]}, ()), orders=2)
    assert found["a"].seeds == (0, 1)
    assert found["b"].seeds == (0,)
    assert found["a"].stopping == found["b"].stopping == simulation.Result(0.0, 0.0, 0.0)

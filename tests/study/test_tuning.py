"""Studies with tuning: valid declarations, how the plan grows, and equal budgets for all arms."""

import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from hashlib import sha256
from math import log10, prod
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, strategies as st
from sqlalchemy.exc import OperationalError

from bench import HERE, Bench, epoch
from conftest import ODD_NAMES, tiny, tunable
from tune_kd.analysis import accuracy, contrasts as results, provenance, tuned
from tune_kd.analysis.simulate import curves
from tune_kd.execute import preflight
from tune_kd.execute.session import with_those_to_come
from tune_kd.execute.verify import verify
from tune_kd.execute.worker import Failure, Task
from tune_kd.records import adaptive_plan, reader, rebuild
from tune_kd.records.ledger import Ledger, reading
from tune_kd.records.run_folder import reopen, trials
from tune_kd.records.schema import LEDGER, TRIALS, Row
from tune_kd.reporting import figures, report as reporting
from tune_kd.study import sampler as search
from tune_kd.study.cost import estimate
from tune_kd.study.discover import from_json
from tune_kd.study.plan import plan
from tune_kd.study.spec import Confirm, Study
from tune_kd.study.tuning import Choice, Integer, LogUniform, Range, Tuning, Uniform
from tune_kd.study.validate import check
from tune_kd.system.errors import UserError

LR = Range("lr", LogUniform(0.01, 1.0))
RANGES = (
    LR,
    Range("temperature", LogUniform(1.0, 16.0)),
    Range("alpha", Uniform(0.0, 1.0)),
    Range("beta", Uniform(0.0, 2.0), methods=("feature",)),
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, if possible, since these tests do not test the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def study() -> Study:
    return tunable(Tuning(RANGES, budget=6, startup=3))


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        (
            (Range("momentum", Uniform(0, 1)),),
            "tuning.ranges names 'momentum'; allowed: temperature, beta, alpha, ce_weight, kd_weight, lr",
        ),
        ((LR, Range("beta", Uniform(0, 1), ("logit",))), "beta for logit, but no such method of the study uses it"),
        ((LR, Range("alpha", Uniform(0.5, 0.5))), "alpha over .* which is not a valid range; allowed: low below high"),
        ((LR, Range("temperature", LogUniform(0, 8))), "temperature over .* allowed: low above 0"),
        ((LR, Range("temperature", Choice((4.0,)))), "allowed: at least two levels"),
        ((LR, Range("temperature", Integer(5, 4))), "allowed: low below high"),
        ((LR, Range("alpha", Uniform(0, 1.5))), "alpha is 1.5; allowed: from 0 to 1"),
        ((Range("lr", LogUniform(1e-5, 1)),), r"lr is 1e-05; allowed: 0.0001 or more"),
        ((Range("lr", Uniform(0.1, 1)),), r"its default 0.05 lies outside 0.1 to 1"),
        ((LR, Range("temperature", Choice((1.0, 2.0)))), "its default 4.0 lies outside 1 or 2"),
        ((LR, LR), "lr more than once for the method none"),
        ((Range("alpha", Uniform(0, 1)),), "no range for the method none; allowed: at least one for every method"),
        ((), "no range for the method none"),
        ((Range("lr", Choice((0.05, 0.1))),), "has 1 configurations for the method none besides the default"),
        ((LR, Range("method", Uniform(0, 1))), "names 'method'"),
    ],
)
def test_an_invalid_range_is_rejected(ranges: tuple[Range, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(tunable(Tuning(ranges)))


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (Tuning(RANGES, budget=10), "tuning.budget is 10 trials; allowed: at least 11 trials, since TPE begins after"),
        (Tuning(RANGES, budget=40, budget_unit="epochs"), r"40 epochs; allowed: at least 11 trials \(of 4 epochs"),
        (Tuning(RANGES, budget=0, sampler="random"), "tuning.budget is 0 trials; allowed: at least 1"),
        (Tuning(RANGES, sampler="grid"), "tuning.sampler is 'grid'; allowed: tpe, random, quasi-random"),  # type: ignore[arg-type]
        (Tuning(RANGES, budget_unit="hours"), "tuning.budget_unit is 'hours'; allowed: trials, epochs"),  # type: ignore[arg-type]
        (Tuning(RANGES, parallel=0, startup=0, seed=-1), "parallel is 0; allowed: at least 1"),
    ],
)
def test_an_invalid_budget_sampler_unit_or_parallelism_is_rejected(tuning: Tuning, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(tunable(tuning))


def test_a_setting_cannot_be_both_a_factor_and_tuned() -> None:
    declared = tiny()
    with pytest.raises(UserError, match="temperature, which is also a factor"):
        check(replace(declared, tuning=Tuning(RANGES)))


def test_a_tuned_study_round_trips_through_json(study: Study) -> None:
    mixed = (*RANGES[:1], Range("temperature", Integer(1, 16)), Range("alpha", Choice((0.3, 0.5))))
    for each in (study, tunable(Tuning(mixed, budget=20, budget_unit="epochs", parallel=2))):
        assert from_json(asdict(each)) == each


def test_every_arm_is_tuned_in_its_own_settings_and_confirmed_with_its_default(study: Study) -> None:
    planned = plan(study, "0" * 64)
    assert {each.name: [over.name for over in each.ranges] for each in planned.searches} == {
        "none": ["lr"],
        "logit": ["lr", "temperature", "alpha"],
        "feature": ["lr", "alpha", "beta"],
    }
    arms = ["none", "logit", "feature"]
    assert [arm.name for arm in planned.arms] == [f"{arm}/{how}" for arm in arms for how in ("default", "tuned")]
    assert {trial.phase for trial in planned.trials} == {"teacher", "confirm"}
    assert {trial.arm for trial in planned.trials if trial.phase == "confirm"} == {f"{arm}/default" for arm in arms}
    assert [(each.name, dict(each.weights)) for each in planned.contrasts] == [
        ("logit - none, tuned", {"logit/tuned": 1.0, "none/tuned": -1.0}),
        ("feature - none, tuned", {"feature/tuned": 1.0, "none/tuned": -1.0}),
        *((f"{arm}: tuned - default", {f"{arm}/tuned": 1.0, f"{arm}/default": -1.0}) for arm in arms),
    ]


def test_forecast_trials_and_cost_of_a_tuned_study_match_the_run(study: Study, tmp_path: Path) -> None:
    planned = plan(study, "0" * 64)
    foreseen = (*planned.trials, *adaptive_plan.to_come(planned))
    bench = Bench(replace(study, screen=replace(study.screen, grace=4)), tmp_path)
    done = bench.run()
    assert sorted((trial.arm, trial.phase, trial.seed) for trial in foreseen) == sorted(
        (task.trial.arm, task.trial.phase, task.trial.seed) for task in done
    )
    assert adaptive_plan.to_come(planned, bench.rows()) == []
    told = estimate(foreseen, planned.answering, study.rate)
    assert told.flop == estimate([task.trial for task in done], planned.answering, study.rate).flop


def quality(task: Task) -> float:
    """A response surface on which every arm can improve, by its learning rate."""
    return 0.9 - abs(task.trial.recipe.lr - 0.3)


def test_the_best_draw_is_confirmed_beside_the_default_and_draws_are_distinct(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    bench.run(quality)
    for name in ("none", "logit", "feature"):
        drawn = bench.rows(arm=name)
        assert {row["phase"] for row in drawn} == {"screen"} and {row["seed"] for row in drawn} == {0}
        ended = [row for row in drawn if row["status"] == "completed"]
        best = max(ended, key=lambda row: float(row["val_accuracy_best"]))
        for how, lr in (("tuned", best["lr"]), ("default", study.recipe.lr)):
            confirmed = bench.rows(arm=f"{name}/{how}", status="completed")
            assert [row["seed"] for row in confirmed] == [1, 2]
            assert {row["lr"] for row in confirmed} == {lr}
            assert {row["phase"] for row in confirmed} == {"confirm"}
        values = [tuple(row[each] for each in ("lr", "temperature", "alpha", "beta")) for row in drawn]
        assert len(set(values)) == len(values) == 6
    logit = bench.rows(arm="logit")
    assert all(1 <= row["temperature"] <= 16 and 0 <= row["alpha"] <= 1 and row["beta"] is None for row in logit)
    assert {row["beta"] for row in bench.rows(arm="none")} == {None}
    assert len({row["teacher_id"] for row in bench.rows() if row["method"] == "logit"}) == 1


def test_a_draw_is_in_the_ledger_before_it_runs(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    task = bench.start()
    (row,) = bench.rows(trial_id=task.trial.trial_id)
    assert row["status"] == "running" and row["lr"] == task.trial.recipe.lr
    assert [len(bench.rows(arm=arm)) for arm in ("none", "logit", "feature")] == [1, 1, 1]
    bench.finish(task, 0.5)
    assert [row["status"] for row in bench.rows(arm=task.trial.arm)] == ["completed", "pending"]


def test_draws_compete_only_within_their_arm(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    worse = {"none": 0.1, "logit": 0.5, "feature": 0.9}
    bench.run(lambda task: worse[task.trial.cell.method] + task.trial.recipe.lr / 100)
    for decision in bench.driver.decisions:
        theirs = [each for each in bench.driver.decisions if each.arm == decision.arm]
        assert decision.stratum == decision.arm
        assert abs(decision.metric - (decision.cutoff or decision.metric)) < 0.02
        assert decision.peers < len(theirs)
    assert {each.arm for each in bench.driver.decisions} == set(worse)


@pytest.mark.parametrize("unit", ["trials", "epochs"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_every_arm_spends_the_same_budget_to_within_one_trial(tmp_path: Path, unit: Any, parallel: int) -> None:
    budget = 8 if unit == "trials" else 32
    bench = Bench(tunable(Tuning(RANGES, budget, unit, startup=3, parallel=parallel)), tmp_path)
    chance = random.Random(f"budget {unit} {parallel}")
    bench.run(lambda task: chance.random())
    spent = {}
    for arm in ("none", "logit", "feature"):
        rows = bench.rows(arm=arm)
        assert any(row["status"] == "stopped" for row in rows)  # otherwise the two units would not differ
        spent[arm] = len(rows) if unit == "trials" else sum(row["epochs_run"] for row in rows)
        assert budget <= spent[arm] < budget + (1 if unit == "trials" else 4)
        assert unit == "trials" or len(rows) > budget / 4
    assert max(spent.values()) - min(spent.values()) <= (0 if unit == "trials" else 4)


def test_diverged_draws_count_in_the_budget_and_are_never_confirmed(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    while (task := bench.driver.next()) is not None:
        bench.driver.on_start(task)
        if task.trial.phase == "screen" and task.trial.recipe.lr > 0.1:
            bench.driver.on_end(task.trial.trial_id, Failure("diverged", "the loss is not finite"))
        else:
            bench.finish(task)
    for arm in ("none", "logit", "feature"):
        rows = bench.rows(arm=arm)
        assert len(rows) == 6 and any(row["status"] == "failed" for row in rows)
        assert {row["lr"] <= 0.1 for row in bench.rows(arm=f"{arm}/tuned")} <= {True}


def test_a_budget_in_epochs_ends_even_if_every_draw_fails_in_its_first_epoch(tmp_path: Path) -> None:
    bench = Bench(tunable(Tuning(RANGES, 12, "epochs", "random")), tmp_path)
    while (task := bench.driver.next()) is not None:
        bench.driver.on_start(task)
        if task.trial.phase == "screen":
            bench.driver.on_end(task.trial.trial_id, Failure("error", "ValueError"))
        else:
            bench.finish(task)
    for arm in ("none", "logit", "feature"):
        assert [row["status"] for row in bench.rows(arm=arm)] == ["failed"] * 12
        assert not bench.rows(arm=f"{arm}/tuned")


def test_arms_whose_teacher_failed_are_blocked_and_the_control_continues(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    while (task := bench.driver.next()) is not None:
        bench.driver.on_start(task)
        if task.trial.role == "teacher":
            bench.driver.on_end(task.trial.trial_id, Failure("error", "ValueError"))
        else:
            bench.finish(task)
    assert [(row["arm"], row["status"]) for row in bench.rows(status="blocked") if row["phase"] == "screen"] == [
        ("logit", "blocked"),
        ("feature", "blocked"),
    ]
    assert len(bench.rows(arm="none/tuned", status="completed")) == 2
    assert not bench.rows(arm="logit/tuned") and bench.driver.finished
    assert adaptive_plan.to_come(plan(study, "0" * 64), bench.rows()) == []


def play(bench: Bench, salt: str, most: int = 2**31, accuracy: Callable[[Task], float] = quality) -> None:
    """Run all ready trials concurrently. The salt and the reports so far determine which trial reports next, so that a
    kill after `most` reports does not change the order."""
    running: dict[str, tuple[Task, int]] = {}
    while True:
        while (task := bench.driver.next()) is not None:
            bench.driver.on_start(task)
            running[task.trial.trial_id] = task, task.acknowledged + 1
        if not running or most == 0:
            return
        most -= 1
        trial_id = min(running, key=lambda each: sha256(f"{salt} {each} {running[each][1]}".encode()).digest())
        task, number = running[trial_id]
        running[trial_id] = task, number + 1
        report = epoch(number, round(accuracy(task), 6), last=number == task.trial.recipe.epochs)
        if not bench.driver.on_epoch(trial_id, report, HERE):
            bench.driver.on_end(trial_id, None)
            del running[trial_id]


def drawn(rows: Sequence[Row]) -> dict[str, list[tuple[float | None, ...]]]:
    """The draws of each arm, in order."""
    found: dict[str, list[tuple[float | None, ...]]] = {}
    for row in rows:
        if row["phase"] == "screen":
            found.setdefault(row["arm"], []).append(tuple(row[each] for each in ("lr", "temperature", "alpha", "beta")))
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random", "quasi-random"])
def test_draws_depend_on_the_seed_and_not_on_the_order_of_reports(sampler: Any, tmp_path: Path) -> None:
    """With one draw per arm at a time, a draw depends only on its own arm."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / str(number)).mkdir()
        bench = Bench(tunable(Tuning(RANGES, 6, sampler=sampler, startup=3, seed=seed)), tmp_path / str(number))
        play(bench, f"order {number}")
        found.append(drawn(bench.rows()))
    assert found[0] == found[1]
    assert all(found[0][arm] != found[2][arm] for arm in found[0])
    assert len({draws[0][0] for draws in found[0].values()}) == 3  # each arm has its own sampler


ONCE, OFTEN = (7, 20), (1, 1, 30, 1, 25)  # reports between kills


@pytest.mark.parametrize(
    ("parallel", "all_kills"),
    [
        (1, (ONCE,)),
        (2, (OFTEN,)),
        *(pytest.param(parallel, ((3,), ONCE, OFTEN), marks=pytest.mark.slow) for parallel in (1, 2)),
    ],
)
@pytest.mark.parametrize("sampler", ["tpe", "random", "quasi-random"])
def test_the_same_configurations_are_drawn_after_kills(
    sampler: Any, parallel: int, all_kills: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    """The order of reports is the same with and without kills. The samplers get only the ledger."""
    declared = tunable(Tuning(RANGES, 6, sampler=sampler, startup=3, parallel=parallel))
    whole = Bench(declared, tmp_path)
    play(whole, "an order")
    for kills in all_kills:
        folder = tmp_path / "-".join(map(str, kills))
        folder.mkdir()
        for reports in kills:
            play(Bench(declared, folder), "an order", reports)
        again = Bench(declared, folder)
        play(again, "an order")
        assert drawn(again.rows()) == drawn(whole.rows())
        outcomes = [sorted((row["trial_id"], row["status"], row["epochs_run"]) for row in each.rows())
                    for each in (again, whole)]  # fmt: skip
        assert outcomes[0] == outcomes[1]


def test_with_parallel_draws_the_order_of_reports_changes_later_draws(tmp_path: Path) -> None:
    """Otherwise the previous test would be meaningless."""
    found = []
    for salt in ("one", "other"):
        (tmp_path / salt).mkdir()
        bench = Bench(tunable(Tuning(RANGES, 8, startup=3, parallel=2)), tmp_path / salt)
        play(bench, salt)
        found.append(drawn(bench.rows()))
    assert found[0] != found[1]


def test_optunas_storage_has_every_ended_draw_after_a_kill_and_resume(study: Study, tmp_path: Path) -> None:
    play(Bench(study, tmp_path), "an order", 25)
    bench = Bench(study, tmp_path)
    play(bench, "an order")
    for arm in ("none", "logit", "feature"):
        stored = optuna.load_study(study_name=f"r: {arm}", storage=f"sqlite:///{tmp_path / search.STORAGE}")
        rows = bench.rows(arm=arm)
        assert sorted(trial.params["lr"] for trial in stored.trials) == sorted(row["lr"] for row in rows)
        best = max(row["val_accuracy_best"] for row in rows if row["status"] == "completed")
        assert stored.best_value == best
        states = {"completed": optuna.trial.TrialState.COMPLETE, "stopped": optuna.trial.TrialState.PRUNED}
        assert {trial.params["lr"]: trial.state for trial in stored.trials} == {
            row["lr"]: states[row["status"]] for row in rows
        }


def test_added_seeds_confirm_the_settings_already_found(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    bench.run(quality)
    before = bench.rows()
    more = Bench(replace(study, confirm=Confirm((1, 2, 3))), tmp_path)
    done = more.run(quality)
    assert sorted((task.trial.arm, task.trial.seed) for task in done) == sorted(
        (f"{arm}/{how}", 3) for arm in ("none", "logit", "feature") for how in ("default", "tuned")
    )
    assert more.rows()[: len(before)] == before


SPACES = st.tuples(
    st.sampled_from(["tpe", "random", "quasi-random"]),
    st.integers(1, 12),
    st.lists(
        st.sampled_from([Choice((0.2, 0.5, 0.8)), Integer(0, 1), Uniform(0.0, 1.0), LogUniform(0.5, 1.0)]),
        min_size=1,
        max_size=4,
    ),
)


@given(SPACES, st.integers(0, 1000))
def test_draws_lie_in_their_ranges_and_are_distinct(space: tuple[Any, int, list[Any]], seed: int) -> None:
    """If there are only a few configurations, every one of them is drawn."""
    sampler, count, overs = space
    names = ("alpha", "beta", "lr", "weight_decay")
    ranges = tuple(Range(name, over) for name, over in zip(names, overs, strict=False))
    tuning = Tuning(ranges, count, sampler=sampler, startup=2, seed=seed)
    default = {each.name: 0.5 if each.over.holds(0.5) else 1.0 for each in ranges}
    sizes = [len(each.configurations) if each.configurations else 10**6 for each in ranges]
    count = min(count, prod(sizes) - 1)
    rows: list[Row] = []
    for number in range(count):
        values = search.draw(tuning, "an arm", ranges, default, rows)
        assert list(values) == [each.name for each in ranges]
        assert all(each.over.holds(values[each.name]) for each in ranges)
        assert values != default and values not in [{name: row[name] for name in values} for row in rows]
        ended = {"status": "completed", "stop_reason": None, "epochs_run": 3, "val_accuracy": 0.5}
        rows.append(values | ended | {"val_accuracy_best": number / 20})


def test_every_draw_has_its_own_random_generator() -> None:
    """Otherwise each draw would start with the values of the first draw, and run out of attempts."""
    ranges = (Range("alpha", Uniform(0.0, 1.0)),)
    tuning = Tuning(ranges, 3 * search.TRIES, sampler="random")
    rows: list[Row] = []
    for _ in range(tuning.budget):
        rows.append(search.draw(tuning, "an arm", ranges, {"alpha": 0.5}, rows) | ENDED)
    assert len({row["alpha"] for row in rows}) == tuning.budget


def test_sixteen_quasi_random_draws_fall_one_in_each_sixteenth_of_a_range() -> None:
    ranges = (Range("alpha", Uniform(0.0, 1.0)), Range("lr", LogUniform(0.01, 1.0)))
    tuning = Tuning(ranges, 16, sampler="quasi-random")
    rows: list[Row] = []
    for _ in range(16):
        rows.append(search.draw(tuning, "an arm", ranges, {"alpha": 0.5, "lr": 0.1}, rows) | ENDED)
    assert sorted(int(16 * row["alpha"]) for row in rows) == list(range(16))  # one in each sixteenth
    assert sorted(int(8 * (2 + log10(row["lr"]))) for row in rows) == list(range(16))


ENDED = {"status": "completed", "stop_reason": None, "epochs_run": 3, "val_accuracy": 0.5, "val_accuracy_best": 0.5}


def test_importances_identify_the_setting_that_matters() -> None:
    ranges = (LR, Range("alpha", Uniform(0.0, 1.0)))
    chance = random.Random("importance")
    rows = [{"lr": 10 ** chance.uniform(-2, 0), "alpha": chance.random()} | ENDED for _ in range(40)]
    rows = [row | {"val_accuracy_best": 0.9 - row["lr"] / 10 - row["alpha"] / 1000} for row in rows]
    shares = search.importances(ranges, rows)
    assert shares["lr"] > 0.9 and sum(shares.values()) == pytest.approx(1)
    assert search.importances(ranges, rows[:1]) == {}
    assert search.importances(ranges, [row | {"val_accuracy_best": 0.5} for row in rows]) == {}


def test_a_tuned_run_reports_budgets_tuned_settings_and_contrasts_of_tuned_arms(fair: Path) -> None:
    records = reader.load(fair)
    trials = records.trials
    spent = tuned.budgets(records).set_index("arm")
    assert spent["draws"].to_dict() == {"none": 5, "logit": 5, "feature": 5}
    drawn = trials[trials["phase"] == "screen"]
    assert spent["epochs"].to_dict() == drawn.groupby("arm")["epochs_run"].sum().to_dict()
    found = tuned.settings(records).set_index(["arm", "setting"])
    assert set(found.index) == {
        ("none", "lr"),
        ("logit", "lr"),
        ("logit", "alpha"),
        ("feature", "lr"),
        ("feature", "alpha"),
    }
    for arm in spent.index:
        ended = drawn[(drawn["arm"] == arm) & (drawn["status"] == "completed")]
        best = ended.loc[ended["val_accuracy_best"].astype(float).idxmax()]
        assert found.loc[(arm, "lr"), "tuned"] == best["lr"]
        assert set(trials.loc[trials["arm"] == f"{arm}/tuned", "lr"]) == {best["lr"]}
        assert found.loc[(arm, "lr"), "default"] == 0.05
    contrasts = results.contrasts(records).set_index("contrast")
    assert contrasts["n"].tolist() == [2] * 5  # recipes may differ here
    values = accuracy.confirmed(records)
    gain = float((values["logit/tuned"] - values["none/tuned"]).mean())
    assert contrasts.loc["logit - none, tuned", "estimate"] == pytest.approx(gain)
    assert "exploratory" in " ".join(provenance.limits(records))
    assert set(accuracy.exploratory(records)["what"]) == {"draws"}


def test_the_report_of_a_tuned_run_has_its_table_and_figure(fair: Path, tmp_path: Path) -> None:
    records = reader.load(fair)
    page = reporting.report(records, tmp_path).read_text()
    assert "Tuned settings and their importance" in page and "logit: tuned - default" in page
    assert (tmp_path / "figures" / "tuning.png").stat().st_size > 10_000
    (picture,) = [each for each in figures.draw(records) if each.name == "tuning"]
    assert [axes.get_xlabel() for axes in picture.figure.axes] == ["lr", "alpha"]
    for axes, setting in zip(picture.figure.axes, ("lr", "alpha"), strict=True):
        shown = [x for line in axes.lines if line.get_marker() != "None" for x in line.get_xdata()]
        ended = records.trials.query("phase == 'screen' and status == 'completed'")
        assert set(
            ended.loc[ended[setting].notna() & (ended["arm"] != ("none" if setting == "alpha" else "")), setting]
        ) <= set(shown)


def test_a_tuned_run_verifies_and_its_ledger_is_rebuilt_from_its_tables(fair: Path, tmp_path: Path) -> None:
    shutil.copytree(fair.parent, tmp_path / "results")
    folder = tmp_path / "results" / fair.name
    assert verify(folder) == []
    with reading(folder / LEDGER) as ledger:
        before = ledger.rows(TRIALS)
    (folder / LEDGER).write_bytes(b"nothing")
    run = reopen(folder)
    rebuild.opened(run, lambda _: None).close()
    with reading(folder / LEDGER) as ledger:
        assert sorted(map(str, ledger.rows(TRIALS))) == sorted(map(str, before))
    assert all(row["status"] != "pending" for row in trials(run))


def test_a_draw_with_altered_values_is_rejected_as_outside_the_plan(fair: Path, tmp_path: Path) -> None:
    shutil.copytree(fair.parent, tmp_path / "results")
    folder = tmp_path / "results" / fair.name
    ledger = Ledger(folder / LEDGER)
    row = next(row for row in ledger.rows(TRIALS) if row["arm"] == "logit")
    ledger.put(TRIALS, row | {"lr": 0.123})
    ledger.close()
    with pytest.raises(UserError, match=f"trials that are not in the plan.*{row['trial_id']}"):
        rebuild.opened(reopen(folder), lambda _: None)


def test_the_disk_space_check_counts_draws_still_to_come(fair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(preflight, "disk_bytes", lambda trials, *_: counted.append(len(trials)) or 0)
    run = reopen(fair)
    preflight.check(run, [], 2)
    preflight.check(run, trials(run), 2)
    assert counted == [1 + 3 * (5 + 2 + 2), 0]


def test_a_tuned_run_is_rejected_as_the_curves_of_a_simulation(fair: Path) -> None:
    with pytest.raises(UserError, match="is a run of a tuned study, whose draws are not a grid"):
        curves(reader.load(fair), tiny(), None)


def test_the_run_checker_detects_an_altered_draw(fair: Path, tmp_path: Path) -> None:
    from faults import checker

    shutil.copytree(fair.parent, tmp_path / "results")
    folder = tmp_path / "results" / fair.name
    assert list(checker.as_planned(checker.read(folder), 0)) == []
    ledger = Ledger(folder / LEDGER)
    row = next(row for row in ledger.rows(TRIALS) if row["arm"] == "logit")
    ledger.put(TRIALS, row | {"alpha": 0.123})
    ledger.close()
    assert any("phantom" in each for each in checker.as_planned(checker.read(folder), 0))


def test_the_progress_display_includes_draws_still_to_come(study: Study, tmp_path: Path) -> None:
    bench = Bench(study, tmp_path)
    while True:
        rows = list(bench.driver.rows.values())
        shown = with_those_to_come(bench.driver.plan, "r", rows)
        assert len(shown) == 1 + 3 * (6 + 2 + 2)  # a teacher; draws, tuned and default
        assert shown[: len(rows)] == rows and {row["status"] for row in shown[len(rows) :]} <= {"pending"}
        if bench.driver.finished:
            break
        bench.finish(bench.start())
    assert len(rows) == len(shown)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_optunas_storage_works_in_a_run_folder_with_an_odd_name(name: str, tmp_path: Path, study: Study) -> None:
    folder = tmp_path / name
    folder.mkdir()
    bench = Bench(study, folder)
    bench.run(quality)
    assert not [each for each in bench.messages if "warning" in each]
    with closing(sqlite3.connect(folder / search.STORAGE)) as stored:
        assert stored.execute("SELECT COUNT(*) FROM trials").fetchone() == (3 * 6,)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert optuna.load_study(study_name="r: none", storage=search.url(folder / search.STORAGE)).trials


FAILURES = [
    optuna.exceptions.StorageInternalError("database is locked"),
    OperationalError("SELECT 1", {}, Exception("unable to open database file")),
    KeyError("alembic"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["__init__", "add", "close"])
def test_a_run_continues_with_a_warning_when_optunas_storage_fails(
    where: str, error: Exception, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dashboard may hold its lock, the disk may be full, and four packages are involved."""
    does, calls = getattr(search.Storage, where), []

    def fails(storage: search.Storage, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == (3 if where == "add" else 1):
            raise error
        does(storage, *arguments)

    monkeypatch.setattr(search.Storage, where, fails)
    bench = Bench(study, tmp_path)
    bench.run(quality)
    bench.driver.conclude()
    assert len(calls) == (3 if where == "add" else 1)
    assert {row["status"] for row in bench.rows()} == {"completed", "stopped"}
    (said,) = [each for each in bench.messages if "warning" in each]
    why = " ".join(str(error).split())
    assert f"optuna.sqlite cannot be written to ({type(error).__name__}: {why}); the run continues without it" in said
    monkeypatch.undo()
    Bench(study, tmp_path)
    stored = optuna.load_study(study_name="r: none", storage=f"sqlite:///{tmp_path / search.STORAGE}")
    assert len(stored.trials) == 6

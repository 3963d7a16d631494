"""A trained study that validates every other epoch: its records, report, simulation and rebuilt ledger."""

import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny, trained_once
from tune_kd.analysis import early_stopping, simulate
from tune_kd.execute.verify import verify
from tune_kd.records import rebuild
from tune_kd.records.ledger import Ledger, reading
from tune_kd.records.reader import Records, load
from tune_kd.records.run_folder import reopen
from tune_kd.records.schema import EPOCHS, LEDGER, TRIALS
from tune_kd.reporting import figures, report as reporting
from tune_kd.study.spec import Confirm, Factor
from tune_kd.system.errors import UserError

EPOCHS_RUN = 5  # validated: 2, 4 and 5


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny()
    study = replace(
        base,
        factors=(Factor("stem", ("cifar",)), Factor("method", ("none", "logit"))),
        contrasts=base.contrasts[:1],
        moderator=None,
        reference=(),
        recipe=replace(base.recipe, epochs=EPOCHS_RUN, validate_every=2),
        teacher_recipe=replace(base.teacher_recipe, validate_every=2),
        screen=replace(base.screen, grace=2, strata=("stem",)),
        confirm=Confirm(seeds=(1,)),
    )
    return trained_once(study, "seldom", tmp_path_factory)


@pytest.fixture(scope="module")
def records(seldom: Path) -> Records:
    return load(seldom)


def test_only_epochs_without_validation_lack_accuracy_and_loss(records: Records) -> None:
    students = records.trials[records.trials["role"] == "student"]
    epochs = records.epochs[records.epochs["trial_id"].isin(students["trial_id"])]
    for name in ("val_accuracy", "val_loss"):
        assert epochs.loc[epochs[name].notna(), "epoch"].value_counts().to_dict() == dict.fromkeys((2, 4, 5), 4)
    assert len(epochs) == 4 * EPOCHS_RUN and epochs["train_loss"].notna().all()
    assert set(students["best_epoch"]) <= {2, 4, 5} and (students["status"] == "completed").all()
    last = epochs[epochs["epoch"] == EPOCHS_RUN].set_index("trial_id")["val_accuracy"]
    assert students.set_index("trial_id")["val_accuracy"].equals(last.reindex(students["trial_id"]))
    assert set(records.decisions["epoch"]) == {2, 4}


def test_the_report_draws_curves_through_the_validated_epochs(records: Records, tmp_path: Path) -> None:
    drawn = {each.name: each.figure for each in figures.draw(records)}
    assert {"curves", "rungs", "rank_correlation", "timeline"} <= set(drawn)
    lines = [line for axes in drawn["curves"].axes for line in axes.lines]
    assert [list(map(float, line.get_xdata())) for line in lines] == [[2.0, 4.0, 5.0]] * 2  # type: ignore[arg-type]
    assert all(0 < height < math.inf for line in lines for height in line.get_ydata())  # type: ignore[union-attr]
    assert reporting.report(records, tmp_path).is_file()
    correlations = early_stopping.rank_correlations(records, everywhere=True)
    assert set(correlations["epoch"]) == {2, 4} and (correlations["n"] == 4).all()


def test_early_stopping_is_not_simulated_on_curves_with_gaps(seldom: Path) -> None:
    with pytest.raises(UserError, match=r"--curves is a run with recipe.validate_every=2, so its curves have"):
        simulate.curves(load(seldom), reopen(seldom).study, None)


@pytest.mark.parametrize(("kept", "known"), [(1, (1, None, None, None)), (3, (3, 2, 2, 2))])
def test_a_rebuilt_ledger_has_the_last_and_best_validated_accuracy(
    seldom: Path, tmp_path: Path, kept: int, known: tuple[Any, ...]
) -> None:
    """`known`: `epochs_run`, then the epochs of `val_accuracy` and `val_accuracy_best`, then `best_epoch`."""
    run = tmp_path / "results" / seldom.name
    shutil.copytree(seldom.parent, run.parent)
    assert verify(run) == []
    with reading(run / LEDGER) as ledger:
        (trial, *_) = (row["trial_id"] for row in ledger.rows(TRIALS) if row["arm"] == "cifar/logit")
    (tmp_path / "earlier").mkdir()
    with closing(Ledger(tmp_path / "earlier" / LEDGER)) as ledger, reading(run / LEDGER) as whole:
        with ledger.transaction():
            for row in whole.rows(TRIALS):
                ledger.put(TRIALS, row)
            for each in whole.rows(EPOCHS):
                if each["trial_id"] != trial or each["epoch"] <= kept:
                    ledger.put(EPOCHS, each)
        ledger.write_tables(run)
    content = bytearray((run / LEDGER).read_bytes())
    content[int(0.6 * len(content))] ^= 1
    (run / LEDGER).write_bytes(content)
    with closing(rebuild.opened(reopen(run), lambda _: None)) as ledger:
        (row,) = [row for row in ledger.rows(TRIALS) if row["trial_id"] == trial]
        accuracy = {each["epoch"]: each["val_accuracy"] for each in ledger.rows(EPOCHS) if each["trial_id"] == trial}
    assert (row["epochs_run"], row["val_accuracy"], row["val_accuracy_best"], row["best_epoch"]) == (
        known[0], accuracy.get(known[1]), accuracy.get(known[2]), known[3]
    )  # fmt: skip

"""Runs extended by seeds and trained: declared seeds count in the contrasts, and seeds added later do not."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from tune_kd.analysis import accuracy, contrasts, provenance
from tune_kd.data import datasets
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records import reader
from tune_kd.records.extension import extended, record_extension
from tune_kd.records.ledger import Ledger
from tune_kd.records.run_folder import Run, create, reopen
from tune_kd.records.schema import LEDGER
from tune_kd.study.discover import Source

SHORT = "replace(tiny(), factors=(Factor('stem', ('cifar',)), *tiny().factors[1:]), moderator=None{more})"
FILE = """
from dataclasses import replace
from conftest import tiny
from tune_kd import Confirm, Factor

def study():
    return {study}
"""


def declare(folder: Path, more: str) -> Source:
    (folder / "mine.py").write_text(FILE.format(study=SHORT.format(more=more)))
    return Source(folder / "mine.py", "test")


def begun(folder: Path, more: str) -> Run:
    source = declare(folder, more)
    digest = datasets.load("digits", train=60, validation=20, test=20).digest
    run = Run("mine", folder / "results" / "mine", source.read(), digest, None, {}, source)
    create(run)
    return train(run)


def train(run: Run) -> Run:
    """Run all remaining trials of the plan, in this process."""
    ledger = Ledger(run.folder / LEDGER)
    place = Workplace(None, None, run.teachers, run.checkpoints, checkpoint_every=1e9)
    before = torch.get_num_threads()
    try:
        run_in_process(Driver(run.plan, run.name, run.folder, ledger, place, cpus=1.0, gpus=0.0), place)
    finally:
        torch.set_num_threads(before)
        ledger.close()
    return run


def extend(folder: Path) -> None:
    more = extended(reopen(folder))
    record_extension(more)
    train(reopen(folder))


@pytest.mark.long
def test_added_seeds_change_no_mean_and_no_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun(tmp_path, "")
    before = reader.load(run.folder)
    declare(tmp_path, ", confirm=Confirm((1, 2, 3))")
    extend(run.folder)
    after = reader.load(run.folder)
    for table in (contrasts.contrasts, accuracy.arms):
        pd.testing.assert_frame_equal(table(before), table(after))
    added = accuracy.exploratory(after).query("what == 'added seeds'")
    assert set(added["arm"]) == {"cifar/none", "cifar/logit/T=4", "cifar/feature"} | set(
        accuracy.arms(after).query("n == 2")["arm"]
    )
    assert any("added without a declared look" in sentence for sentence in provenance.limits(after))
    kept = after.trials[after.trials["trial_id"].isin(before.trials["trial_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before.trials)


@pytest.mark.long
def test_seeds_of_a_declared_look_count_in_the_contrasts(tmp_path: Path) -> None:
    run = begun(tmp_path, ", confirm=Confirm((1, 2), looks=(2, 3))")
    first = contrasts.contrasts(reader.load(run.folder))
    assert first["planned"].unique().tolist() == [2]
    extend(run.folder)
    second = contrasts.contrasts(reader.load(run.folder))
    assert second["planned"].unique().tolist() == [3]
    judged = second[second["n"] > 0]
    assert judged["n"].unique().tolist() == [3]
    assert accuracy.exploratory(reader.load(run.folder))["what"].unique().tolist() == ["screen"]
    assert judged["p"].notna().all() and pytest.approx(1.0) == judged["p_holm"].max()

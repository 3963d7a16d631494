"""Studies with custom losses on Ray: killed, edited, resumed, and with workers on another node."""

import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from test_cluster import cluster

from commands import assert_contiguous_epochs, command, epochs_on_record, wait_for

LOSSES = {
    "at.py": """
from torch import Tensor, nn
from tune_kd.training import Batch, Context
from angles import normed


class AttentionTransfer(nn.Module):
    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, batch: Batch, *, weight: float | Tensor) -> Tensor:
        pairs = zip(batch.student_features, batch.teacher_features, strict=True)
        return weight * sum((normed(one) - normed(other)).pow(2).mean() for one, other in pairs)
""",
    "angles.py": """
import torch.nn.functional as F


def normed(features):
    return F.normalize(features.pow(2).mean(1).flatten(1), dim=1)
""",
    "own/kd.py": """
import torch.nn.functional as F
from torch import nn


class KD(nn.Module):
    def __init__(self, context):
        super().__init__()

    def forward(self, batch, *, temperature):
        ours, theirs = (F.log_softmax(each / temperature, 1) for each in (batch.student_logits, batch.teacher_logits))
        return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
""",
}
STUDY = """
from dataclasses import replace
from search_spaces.ablation import smoke
from tune_kd import Compare, Factor, Method


def study():
    base = smoke()
    return replace(
        base,
        name="own", scale="own", moderator=None, strata=(), reference=(("weight", 1000.0),),
        methods=(
            Method("at", loss="at.py:AttentionTransfer", needs="features", settings={"weight": 1000.0}),
            Method("kd", loss="own/kd.py:KD", settings={"temperature": 4.0}),
        ),
        factors=(Factor("method", ("none", "logit", "at", "kd")), Factor("weight", (100.0, 1000.0))),
        contrasts=(Compare("method", "at", "none"), Compare("method", "kd", "logit"), Compare("weight", 100.0, 1000.0)),
        screen=replace(base.screen, strata=("method",), min_peers=99), recipe=replace(base.recipe, epochs=4),
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "mine"
    for name, text in (LOSSES | {"study.py": STUDY}).items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


def check_records(run: Path) -> None:
    """Check that the arms of the custom KD loss equal those of `logit`, and that custom settings are columns."""
    assert_contiguous_epochs(run)
    trials = pd.read_parquet(run / "trials.parquet")
    assert set(trials["status"]) == {"completed"}, trials["error"].dropna().tolist()
    arms = {name: group.sort_values(["phase", "seed"]) for name, group in trials.groupby("arm")}
    for column in ("weights_digest", "test_accuracy", "kl_t4"):
        assert arms["kd"][column].tolist() == arms["logit"][column].tolist()
    assert arms["at/weight=100"]["weights_digest"].tolist() != arms["at/weight=1000"]["weights_digest"].tolist()
    assert trials["weight"].dtype == "float64"
    assert trials["weight"].dropna().unique().tolist() in ([100.0, 1000.0], [1000.0, 100.0])
    assert sorted(path.name for path in (run / "source").rglob("*.py")) == ["angles.py", "at.py", "kd.py"]


@pytest.mark.long
def test_a_killed_run_with_custom_losses_refuses_an_edited_file_and_resumes(folder: Path) -> None:
    run = folder / "results" / "r"
    killed = command(folder, "run", "study.py", "--name", "r")
    wait_for(lambda: epochs_on_record(run) >= 12)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    original = (folder / "angles.py").read_text()
    (folder / "angles.py").write_text(f"{original}# edited\n")
    refused = command(folder, "resume", "r")
    _, errors = refused.communicate(timeout=200)
    assert refused.returncode == 2
    assert "at.py, or a file that it imports, was changed" in errors
    (folder / "angles.py").write_text(original)

    resumed = command(folder, "resume", "r", "--json")
    answer, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert {each["contrast"] for each in json.loads(answer)["contrasts"]} == {
        "at - none", "kd - logit", "weight=100 - weight=1000"
    }  # fmt: skip
    check_records(run)

    simulated = command(folder, "simulate", "study.py", "--curves", "results/r", "--json")
    answer, errors = simulated.communicate(timeout=200)
    assert simulated.returncode == 0, errors
    assert json.loads(answer)


@pytest.mark.slow
def test_workers_on_other_nodes_have_the_losses_after_their_folder_is_moved(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "results" / "r"
    with cluster(tmp_path) as (_, address):
        started = command(folder, "run", "study.py", "--name", "r", "--out", str(run.parent), "--address", address)
        wait_for(lambda: started.poll() is not None or epochs_on_record(run) >= 1)
        folder.rename(tmp_path / "elsewhere")
        _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors
    check_records(run)


@pytest.mark.long
def test_a_broken_loss_is_reported_before_anything_is_created(folder: Path) -> None:
    text = (folder / "own/kd.py").read_text().replace("ours, theirs, ", "ours, theirs[:, 1:], ")
    (folder / "own/kd.py").write_text(text)
    started = command(folder, "run", "study.py", "--name", "r")
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 2
    assert "own/kd.py:KD of method 'kd' fails in its dry run at own/kd.py, line 12: RuntimeError" in errors
    assert not (folder / "results").exists()

"""The Python API: run, resume, load, report and compare a study; and the shares of a GPU that a run measures."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import tune_kd
from commands import STUDY, assert_contiguous_epochs
from conftest import altered, noise
from tune_kd import UserError
from tune_kd.data.datasets import DataSet
from tune_kd.execute import session
from tune_kd.execute.options import Asked, Options, check_shares, options_of
from tune_kd.execute.resources import Mps, Packing
from tune_kd.records.run_folder import Run, create, reopen
from tune_kd.reporting.terminal import Terminal
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import Study

ROOT = Path(__file__).parents[2]
NOTEBOOK = """
import sys
from dataclasses import replace
from pathlib import Path

import tune_kd
from own import study

out, declared = Path("results"), study()
assert len(tune_kd.plan(declared).arms) == 4
records = tune_kd.run(declared, out=out, name="r", max_concurrent=1)
assert set(records.trials["status"]) == {"completed"}, records.trials["status"]
more = tune_kd.resume("r", out=out)
assert more.trials.equals(records.trials) and more.epochs.equals(records.epochs)
page = tune_kd.report(records, out / "r" / "report", formats=["md"])
assert "none" in page.read_text()
assert tune_kd.compare(records, "method", "logit", "none")["n_treated"].tolist() == [1, 1]
"""


def test_a_notebook_runs_resumes_reads_and_reports_a_study(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STUDY)
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "records in results/r" in done.stdout
    assert_contiguous_epochs(tmp_path / "results" / "r")
    assert len(pd.read_parquet(tmp_path / "results" / "r" / "trials.parquet")) > 0


def test_all_wrong_options_are_reported_before_anything_is_created(tmp_path: Path) -> None:
    from search_spaces.ablation import smoke

    wrong = {"gpus_per_trial": "half", "cpus_per_trial": 0, "max_concurrent": 0, "mps": "yes", "track": ("no",)}
    with pytest.raises(UserError) as found:
        tune_kd.run(smoke(), out=tmp_path / "results", name="../x", **wrong)
    for field in (
        "--gpus-per-trial is half",
        "--name is '../x'",
        "--cpus-per-trial is 0",
        "--max-concurrent is 0",
        "--mps is yes",
        "--track is",
    ):
        assert any(field in problem for problem in found.value.problems), found.value.problems
    assert not (tmp_path / "results").exists()
    with pytest.raises(UserError, match="RUN is 'nowhere'"):
        tune_kd.resume("nowhere", out=tmp_path)


@pytest.mark.parametrize("name", tune_kd.__all__)
def test_each_exported_name_exists_and_has_a_docstring(name: str) -> None:
    assert getattr(tune_kd, name).__doc__
    assert name in dir(tune_kd)


def test_an_unknown_name_raises_attribute_error() -> None:
    name = "runs"
    with pytest.raises(AttributeError, match="has no attribute 'runs'"):
        getattr(tune_kd, name)


def test_control_characters_of_a_record_do_not_reach_the_output_of_a_notebook(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(run: object, options: object, address: object, console: Terminal, **_: object) -> None:
        console.say("[bold]a \x1b[2J")
        raise KeyboardInterrupt

    monkeypatch.setattr("tune_kd.execute.session.go_on", say)
    with pytest.raises(KeyboardInterrupt):
        tune_kd.resume(finished)
    assert "\x1b" not in (output := capsys.readouterr().out) and output.startswith("[bold]a ")


# Shares of a GPU, which are measured before a run


class Probe:
    """A fake probe that records the options of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Packing | None, gpus: int = 1) -> None:
        self.calls: list[Options] = []
        self.found = found
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr("tune_kd.execute.gpu_probe.packed", self.packed)

    def packed(self, planned: Plan, data: DataSet, options: Options, *_: object, gpus: int) -> Packing | None:
        self.calls.append(options)
        return self.found


FOUND = Packing(0.25, 0.5, True, "as measured")


def settings_of(options: Options, study: Study, address: str | None = None) -> dict[str, Any]:
    return session._settings(options, plan(study), noise(), address, Terminal(), ())


def test_shares_are_measured_and_recorded_if_ray_starts_here_on_a_machine_with_a_gpu(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(monkeypatch, FOUND)
    found = settings_of(Options(), study)
    assert found["gpus_per_trial"] == "auto", "so that a run measures again when it resumes on another machine"
    assert found["packing"] == {"light": 0.25, "heavy": 0.5, "mps": True, "why": "as measured"}
    assert settings_of(Options(gpus_per_trial=None), study) == found  # earlier versions recorded None for the default
    probe.found = None
    assert "packing" not in settings_of(Options(), study)
    assert len(probe.calls) == 3


@pytest.mark.parametrize(
    ("requested", "address", "gpus"), [("auto", "10.0.0.1:6379", 1), ("auto", None, 0), (0.5, None, 1), (0.0, None, 1)]
)
def test_nothing_is_measured_on_a_cluster_without_a_gpu_or_with_a_requested_share(
    requested: Asked, address: str | None, gpus: int, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(monkeypatch, FOUND, gpus)
    check_shares(Options(gpus_per_trial=requested), address)
    found = settings_of(Options(gpus_per_trial=requested), study, address)
    assert found["gpus_per_trial"] == requested and "packing" not in found and probe.calls == []


def test_recorded_shares_are_read_and_measured_again_when_the_run_resumes(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Probe(monkeypatch, FOUND)
    create(Run("r", tmp_path / "r", study, "0" * 64, None, settings_of(Options(max_concurrent=3), study)))
    again = reopen(tmp_path / "r")
    assert again.settings["packing"]["heavy"] == 0.5
    assert options_of(again) == Options(max_concurrent=3)
    altered(tmp_path / "r" / "study.json", lambda record: record["settings"]["packing"].update(light=7.0))
    with pytest.raises(UserError, match=r"settings\.packing\.light is 7\.0, which is not a valid value"):
        reopen(tmp_path / "r")


@pytest.mark.parametrize("recorded", [None, 0.25, 0.0, "auto"])
def test_a_run_of_an_earlier_version_resumes_with_its_share(
    recorded: float | str | None, study: Study, tmp_path: Path
) -> None:
    create(Run("r", tmp_path / "r", study, "0" * 64, None, {"gpus_per_trial": recorded, "cpus_per_trial": 1.0}))
    options = options_of(reopen(tmp_path / "r"))
    assert settings_of(options, study)["gpus_per_trial"] == ("auto" if recorded is None else recorded)


@pytest.mark.parametrize(
    ("address", "packing", "served", "words"),
    [
        (None, FOUND, True, "0.25 of a GPU (with feature 0.5 of a GPU, a teacher 0.5 of a GPU), as measured."),
        (None, None, False, "a whole GPU, since MPS does not serve, and without MPS trials would take turns "
                            "on a GPU."),
        ("a:1", None, True, "0.25 of a GPU, since MPS does, so four trials can train on a GPU at the same "
                            "time; shares are not measured on a cluster."),
    ],
)  # fmt: skip
def test_a_run_uses_measured_shares_and_says_so_if_there_are_none(
    address: str | None, packing: Packing | None, served: bool, words: str, study: Study, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"gpus_per_trial": "auto"}
    settings |= {} if packing is None else {"packing": asdict(packing)}
    run = Run("r", tmp_path / "r", study, "0" * 64, None, settings)
    cluster: Any = SimpleNamespace(gpus=1.0)
    mps = Mps(served, "MPS does" if served else "MPS does not serve")
    assert session._shares(run, cluster, mps, address).words == f"Each trial gets {words}"

"""The public interface: a study is run, resumed, read and reported from Python as from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import tune_kd
from commands import STUDY, contiguous
from tune_kd import UserError
from tune_kd.reporting.terminal import Terminal

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
    contiguous(tmp_path / "results" / "r")
    assert len(pd.read_parquet(tmp_path / "results" / "r" / "trials.parquet")) > 0


def test_all_that_is_wrong_is_said_before_anything_is_made(tmp_path: Path) -> None:
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
def test_what_the_package_hands_out_is_there(name: str) -> None:
    assert getattr(tune_kd, name).__doc__
    assert name in dir(tune_kd)


def test_another_name_is_no_attribute() -> None:
    name = "runs"
    with pytest.raises(AttributeError, match="has no attribute 'runs'"):
        getattr(tune_kd, name)


def test_what_a_record_says_cannot_command_the_terminal_of_a_notebook(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(run: object, options: object, address: object, console: Terminal, **_: object) -> None:
        console.say("[bold]a \x1b[2J")
        raise KeyboardInterrupt

    monkeypatch.setattr("tune_kd.execute.session.go_on", say)
    with pytest.raises(KeyboardInterrupt):
        tune_kd.resume(finished)
    assert "\x1b" not in (told := capsys.readouterr().out) and told.startswith("[bold]a ")

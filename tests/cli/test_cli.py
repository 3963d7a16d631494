"""The command line: messages, exit status, and no start after a wrong argument."""

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from commands import call
from conftest import altered
from forms import SECRETS
from tune_kd import cli
from tune_kd.analysis import early_stopping, grace
from tune_kd.execute.driver import Driver
from tune_kd.records import extension, lock, reader, run_folder as runs
from tune_kd.records.ledger import Ledger, reading
from tune_kd.records.schema import DECISIONS, EPOCHS, LEDGER, TRIALS, first_row
from tune_kd.records.sqlite_file import SQLITE_BYTES, too_long
from tune_kd.study import discover
from tune_kd.study.discover import find, from_json, resolve
from tune_kd.study.plan import plan
from tune_kd.study.trial import Decision, digest
from tune_kd.system.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

MISTAKES = [
    (["run", "ablatoin"], ["STUDY", "'ablatoin'", "ablation"]),
    (["run", "nowhere/study.py"], ["STUDY", "nowhere/study.py"]),
    (["run", "ablation", "--scale", "huge"], ["--scale", "'huge'", "paper, brief, laptop, smoke"]),
    (["run", "ablation", "--scale", "smoke", "--data", "mnist"], ["--data", "'mnist'", "digits, cifar10, cifar100"]),
    (["run", "ablation", "--scale", "smoke", "--name", "../x"], ["--name", "'../x'"]),
    (["run", "ablation", "--scale", "smoke", "--name", "teachers"], ["--name", "'teachers'"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.epoch=3"], ["recipe.epoch", "epochs"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.epochs=many"], ["recipe.epochs", "'many'"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.epochs=0"], ["recipe.epochs is 0"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.epochs"], ["field=value"]),
    (["run", "ablation", "--scale", "smoke", "--set", "factors.depth=[1]"], ["factors.stem"]),
    (["run", "ablation", "--scale", "smoke", "--set", "screen.grace=99"], ["screen.grace is 99"]),
    (["run", "tuned", "--scale", "smoke", "--set", "tuning.budget=2"], ["tuning.budget is 2", "at least 3 trials"]),
    (["run", "tuned", "--scale", "smoke", "--set", "recipe.lr=2"], ["lr: its default 2.0 lies outside 0.01 to 1"]),
    (
        ["run", "tuned", "--scale", "smoke", "--set", 'factors.method=["none","logit"]', "--set", "contrasts=[]"],
        ["tuning.ranges has beta for every method, but no such method of the study uses it"],
    ),
    (
        [
            "run",
            "tuned",
            "--scale",
            "smoke",
            "--set",
            'tuning.ranges=[{"name": "lr", "over": {"low": 0.2, "high": 0.2, "kind": "uniform"}}]',
        ],
        ["lr over", "which is not a valid range; allowed: low below high"],
    ),
    (["run", "ablation", "--scale", "smoke", "--gpus-per-trial", "7"], ["--gpus-per-trial is 7", "at most"]),
    (["run", "ablation", "--scale", "smoke", "--gpus-per-trial", "-1"], ["--gpus-per-trial is -1"]),
    (["run", "ablation", "--scale", "smoke", "--cpus-per-trial", "0"], ["--cpus-per-trial is 0"]),
    (["run", "ablation", "--scale", "smoke", "--cpus-per-trial", "999"], ["--cpus-per-trial is 999"]),
    (["run", "ablation", "--scale", "smoke", "--max-concurrent", "0"], ["--max-concurrent is 0"]),
    (["run", "ablation", "--scale", "smoke", "--data", "cifar10", "--data-dir", "nowhere.tar"], ["nowhere.tar"]),
    (["run", "ablation", "--scale", "smoke", "--data", "cifar10", "--data-dir", "nowhere"], ["nowhere", "not exist"]),
    (["run", "ablation", "--scale", "smoke", "--mps", "yes"], ["--mps is yes; allowed: auto, on, off"]),
    (["run", "ablation", "--scale", "smoke", "--mps", "on"], ["--mps is on", "no nvidia-cuda-mps-control", "auto or"]),
    (
        ["run", "ablation", "--scale", "smoke", "--mps", "on", "--gpus-per-trial", "0"],
        ["--gpus-per-trial is 0", "auto"],
    ),
    (["run", "ablation", "--scale", "smoke", "--gpus-per-trial", "inf"], ["--gpus-per-trial is inf"]),
    (["run", "ablation", "--scale", "smoke", "--gpus-per-trial", "some"], ["--gpus-per-trial is some", "auto"]),
    (["run", "ablation", "--scale", "smoke", "--gpus-per-trial", "1.5"], ["--gpus-per-trial is 1.5", "whole"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.precision=half"], ["recipe.precision", "bfloat16"]),
    (["run", "ablation", "--scale", "smoke", "--set", "recipe.compile=3"], ["recipe.compile"]),
    (["run", "ablation", "--scale", "smoke", "--cpus-per-trial", "nan"], ["--cpus-per-trial is nan"]),
    (["resume", "nothing"], ["RUN", "'nothing'"]),
    (["report", "nothing"], ["RUN", "'nothing'"]),
    (["run", "ablation", "--scale", "smoke", "--margin-from", "nowhere"], ["--margin-from is 'nowhere'"]),
    (["plan", "ablation", "--scale", "smoke", "--margin-from", "x", "--set", "screen.margin=0.1"], ["one of them"]),
    (["report", ""], ["RUN is '.'"]),
    (["run", "ablation", "--scale", "smoke", "--set", "screen.margin=[0.1,0.2]"], ["2 margins", "each rung (1: 1)"]),
    (["plan", "ablation", "--scale", "smoke", "--set", "confirm.looks=[1]"], ["confirm.looks is [1]"]),
    (["calibrate", "ablation", "--scale", "smoke", "--studies", "0"], ["--studies is 0", "from 1"]),
    (["status"], ["results", "no run"]),
    (["plan", "ablation", "--scale", "huge"], ["'huge'"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda each: " ".join(each)[:60])
def test_a_mistake_gets_one_clear_message_exit_2_and_starts_nothing(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    elsewhere: Path,
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", started)
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert not (elsewhere / "results").exists()


def test_calibrate_prints_rates_with_their_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "calibrate", "ablation", "--scale", "smoke", "--studies", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    across = [each["name"] for each in found["contrasts"] if each["across_strata"]]
    assert across == ["none: cifar - imagenet"]
    first = found["scenarios"]["equal"]
    assert first["looks"] == [1]
    assert first["any_false_finding"]["primary"] == {"found": 0, "studies": 4, "share": 0.0, "standard_error": 0.0}
    assert first["coverage"]["primary"] is None  # one seed has no interval
    looks = found["scenarios"]["looks_5_10_20"]
    assert set(looks["power_by_points"]["cifar: logit - none"]) == {"0.1", "0.2", "0.3", "0.5"}
    assert looks["coverage"]["across_strata"]["worst"] <= looks["coverage"]["across_strata"]["mean"]
    assert set(found["practices"]) == {"designed", "before_0_7", "until_significant", "plain_asha"}
    assert set(found["plain_asha"]) == {"finished", "bias_in_deviations"}


def test_the_tables_of_calibrate_fit_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "calibrate", "ablation", "--scale", "paper", "--studies", "4") == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "scenario                 primary  secondary  coverage  worst" in shown
    assert "Power: the share of studies that find cifar: logit - none" in shown


def test_a_run_of_another_version_is_not_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    study = resolve(Path(cli.__file__).parents[2] / "search_spaces" / "ablation.py", "smoke")
    old = runs.Run("old", elsewhere / "results" / "old", study, "0" * 64, None, {})
    runs.create(old)
    altered(old.folder / "study.json", lambda record: record["versions"].update(tune_kd="0.0.1"))
    assert call(monkeypatch, "resume", "old") == 2
    error = capsys.readouterr().err
    assert "0.0.1" in error and "finish the run with the version that started it" in " ".join(error.split())


SHARES = {"gpus_per_trial": "auto", "cpus_per_trial": 1.0, "max_concurrent": None, "keep_checkpoints": False,
          "mps": "auto"}  # fmt: skip


def create_run(elsewhere: Path, status: str = "completed") -> Path:
    """Create a run whose trials have this status, with the file of its study, and return its folder."""
    source = discover.Source(elsewhere / "mine.py", "smoke", settings=("recipe.epochs=3",))
    shutil.copy(Path(cli.__file__).parents[2] / "search_spaces" / "ablation.py", source.file)
    # Versions before 0.7 recorded None for the default.
    settings = SHARES | {"gpus_per_trial": None}
    run = runs.Run("mine", elsewhere / "results" / "mine", source.read(), "0" * 64, None, settings, source)
    runs.create(run)
    ledger = Ledger(run.folder / LEDGER)
    for trial in run.plan.trials:
        ledger.put(TRIALS, first_row("mine", trial) | {"status": status, "epochs_run": trial.recipe.epochs})
        for epoch in range(1, trial.recipe.epochs + 1):
            ledger.put(EPOCHS, {"run": "mine", "trial_id": trial.trial_id, "epoch": epoch})
    ledger.close()
    return run.folder


@pytest.mark.parametrize(
    ("edit", "arguments", "words"),
    [
        (("lr=0.2", "lr=0.3"), [], ["has changed since the run started: recipe.lr was 0.2 and is 0.3", "--extend"]),
        (("lr=0.2", "lr=0.3"), ["--extend"], ["--extend allows only", "recipe.lr was 0.2 and is 0.3"]),
        (("lr=0.2", "lr=="), [], ["cannot be read", "SyntaxError"]),
        (("", ""), ["--extend"], ["nothing to add", "mine.py declares the same seeds and levels"]),
        (("", ""), ["--set", "confirm.seeds=[1,2]"], ["--set is given", "only with --extend"]),
        (("", ""), ["--set", "x=1", "--cpus-per-trial", "999"], ["--set is given", "--cpus-per-trial is 999"]),
        (("", ""), ["--gpus-per-trial", "7", "--max-concurrent", "0"], ["per-trial is 7", "--max-concurrent is 0"]),
        (("", ""), ["--extend", "--set", "recipe.lr=1"], ["recipe.lr was 0.2 and is 1.0"]),
        (("", ""), ["--extend", "--set", "confirm.seeds=[0,1]"], ["screen.seed is 0"]),
    ],
)
def test_a_changed_study_or_setting_is_refused_by_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path,
    edit: tuple[str, str], arguments: list[str], words: list[str],
) -> None:  # fmt: skip
    folder = create_run(elsewhere)
    before = (folder / "study.json").read_text()
    file = elsewhere / "mine.py"
    file.write_text(file.read_text().replace(*edit) if edit[0] else file.read_text())
    monkeypatch.setattr("ray.init", lambda *_: pytest.fail("Ray was started"))
    assert call(monkeypatch, "resume", "mine", *arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert (folder / "study.json").read_text() == before


def test_a_run_that_has_not_ended_is_not_extended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    create_run(elsewhere, "running")
    assert call(monkeypatch, "resume", "mine", "--extend", "--set", "confirm.seeds=[1,2]") == 2
    assert "trials have not ended; resume it first, then use --extend" in capsys.readouterr().err


def test_an_extension_changes_nothing_while_another_process_holds_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    folder = create_run(elsewhere)
    before = (folder / "study.json").read_text()
    with lock.held(folder):
        assert call(monkeypatch, "resume", "mine", "--extend", "--set", "confirm.seeds=[1,2]") == 2
    assert "which process" in capsys.readouterr().err
    assert (folder / "study.json").read_text() == before


def test_a_run_is_held_while_its_extension_is_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    folder, held = create_run(elsewhere), []

    def recorded(run: runs.Run) -> None:
        held.append(lock.holder(folder))
        raise KeyboardInterrupt

    digest = json.loads((folder / "study.json").read_text())["data"]["digest"]
    monkeypatch.setattr("tune_kd.execute.session.load_data", lambda *_, **__: SimpleNamespace(digest=digest))
    monkeypatch.setattr(
        "tune_kd.execute.cluster.connect",
        lambda *_: SimpleNamespace(cpus=2.0, gpus=0.0, dashboard=None, ours=False, parts=(), guarded=True),
    )
    monkeypatch.setattr("tune_kd.execute.cluster.check_nodes", lambda _: None)
    monkeypatch.setattr("tune_kd.execute.resources.check_cluster", lambda *_: None)
    monkeypatch.setattr(extension, "record_extension", recorded)
    assert call(monkeypatch, "resume", "mine", "--extend", "--set", "confirm.seeds=[1,2]") == 130
    assert held[0]["pid"] == os.getpid()


def test_a_run_resumes_with_its_recorded_shares_unless_others_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    folder, used = create_run(elsewhere), []
    recorded = (folder / "study.json").read_bytes()

    def executed(run: runs.Run, *_: object) -> None:
        used.append(run.settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("tune_kd.execute.session.load_data", lambda *_, **__: SimpleNamespace(digest="0" * 64))
    monkeypatch.setattr("tune_kd.execute.session.execute", executed)
    assert call(monkeypatch, "resume", "mine") == 130
    given = ("--cpus-per-trial", "0.5", "--gpus-per-trial", "0", "--max-concurrent", "3", "--mps", "off")
    assert call(monkeypatch, "resume", "mine", *given) == 130
    defaults = SHARES | {"track": []}
    changed = {"cpus_per_trial": 0.5, "gpus_per_trial": 0.0, "max_concurrent": 3, "mps": "off"}
    assert used == [defaults, defaults | changed]
    assert (folder / "study.json").read_bytes() == recorded


def test_status_shows_added_trials_and_that_no_driver_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    folder = create_run(elsewhere)
    assert call(monkeypatch, "status", "mine") == 0
    assert "not running" not in capsys.readouterr().out
    more = extension.extended(runs.reopen(folder), ["confirm.seeds=[1,2]"])
    extension.record_extension(more)
    assert call(monkeypatch, "status", "mine") == 0
    assert "not running; continue with: python -m tune_kd resume results/mine" in capsys.readouterr().out
    assert call(monkeypatch, "status", "mine", "--json") == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert {row["trial_id"] for row in trials} == {trial.trial_id for trial in more.plan.trials}
    assert {row["seed"] for row in trials if row["status"] == "pending"} == {2}


def test_status_shows_what_early_stopping_decided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    rows = Ledger(finished / LEDGER, read_only=True).rows(DECISIONS)
    assert rows
    assert call(monkeypatch, "status", str(finished)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"early stopping: {len(rows)} comparisons" in shown
    assert Decision.of(rows[-1]).words in shown
    assert call(monkeypatch, "status", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == rows


def test_status_prints_errors_of_trials_unchanged_and_tolerates_a_closed_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path, elsewhere: Path
) -> None:
    run = elsewhere / "results" / "[laptop]"
    shutil.copytree(finished, run)
    error = "RuntimeError: [/pytorch/gloo/pair.cc:534] closed [enforce fail at alloc.cpp:114] " + 3 * "and so on, "
    ledger = Ledger(run / LEDGER)
    unmeasured = {"test_accuracy": None, "test_accuracy_best": None}
    for row in ledger.rows(TRIALS)[:2]:
        ledger.put(TRIALS, row | unmeasured | {"status": "failed", "error": error})
    ledger.put(TRIALS, ledger.rows(TRIALS)[2] | unmeasured | {"status": "pending"})
    ledger.close()
    assert call(monkeypatch, "status", "[laptop]") == 0
    shown = capsys.readouterr().out
    assert shown.count(f" failed: {error}") == 2
    monkeypatch.setattr("tune_kd.reporting.progress.SHOWN", 1)  # longer lists are cut, with the number of the rest
    assert call(monkeypatch, "status", "[laptop]") == 0
    few = capsys.readouterr().out
    assert few.count(f" failed: {error}") == 1 and "and 1 more; `--json` lists all of them" in few
    assert "continue with: python -m tune_kd resume 'results/[laptop]'\n" in shown
    for form in ([], ["--json"]):
        command = [sys.executable, "-m", "tune_kd", "status", "[laptop]", *form]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait(60)) == (b"", 0)


def test_plan_shows_rungs_margins_looks_and_short_grace_periods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path, elsewhere: Path
) -> None:
    study = resolve(Path(cli.__file__).parents[2] / "search_spaces" / "ablation.py", "laptop")
    rows = [{"stratum": "cifar/logit", "epoch": epoch, "n": 9, "rho": 0.1, "rho_low": -0.5, "rho_high": 0.6}
            for epoch in range(1, 8)]  # fmt: skip
    (elsewhere / "results" / "before").mkdir(parents=True)
    grace.record(elsewhere / "results" / "before", "before", study, pd.DataFrame(rows))
    arguments = ["plan", "ablation", "--scale", "laptop", "--set", "confirm.looks=[3,7]"]
    assert call(monkeypatch, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rungs at epoch 6; an arm stops if it is more than 6.00 points behind" in shown
    assert "warning: screen.grace is 6, shorter than the run before supports: in cifar/logit" in shown
    assert "at a seed-to-seed deviation of 1.00 and a level of 0.02143 and 0.02857:" in shown
    assert "primary contrast 3 seeds 7 seeds 0.10 0.20 0.30 0.50 none: cifar - imagenet " in shown
    assert "7 seeds" in shown
    assert call(monkeypatch, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["warnings"]) == 1
    assert [look["level"] for look in answer["seeds"]["looks"]] == pytest.approx([0.15 / 7, 0.2 / 7])
    assert answer["screen"]["rungs"] == [6]


@pytest.mark.parametrize(("count", "t"), [(1, None), (2, "12.7"), (3, "4.3"), (4, "3.2"), (5, None)])
def test_plan_shows_what_several_teachers_can_detect_and_warns_of_two_to_four(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path, count: int, t: str | None
) -> None:
    arguments = ["plan", "ablation", "--scale", "laptop", "--set", f"teacher_seeds={list(range(7, 7 + count))}"]
    assert call(monkeypatch, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("All students of a context share one teacher: verdicts hold only") == (count == 1)
    assert shown.count(f"With {count} teachers, a gain over a control is found with") == (count > 1)
    assert (f"warning: teacher_seeds has {count} seeds" in shown) == (t is not None)
    assert t is None or f"(t = {t} at {count - 1} degree" in shown
    assert call(monkeypatch, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert {each["teacher_seed"] for each in answer["trials"]} == {None, *(range(7, 7 + count) if count > 1 else ())}
    assert (answer["seeds"]["detectable_over_teachers"] is None) == (count == 1)


def test_margins_from_the_controls_of_an_earlier_run_become_a_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    study = reader.load(finished).study["study"]
    settings = [f"scale={study['scale']}", "recipe.epochs=2", "screen.grace=1"]
    given = [part for setting in settings for part in ("--set", setting)]
    assert (
        call(monkeypatch, "plan", "ablation", "--scale", "smoke", *given, "--margin-from", str(finished), "--json") == 0
    )
    (margin,) = json.loads(capsys.readouterr().out)["screen"]["margin"]
    declared = resolve(Path(cli.__file__).parents[2] / "search_spaces" / "ablation.py", "smoke", None, settings)
    assert [margin] == early_stopping.noise_margins(reader.load(finished), declared)
    assert 0 < margin < 1


def test_compiling_without_a_compiler_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", "--set", "recipe.compile=true") == 2
    assert "C++ compiler" in capsys.readouterr().err
    assert not (elsewhere / "results").exists()
    study = resolve(Path(cli.__file__).parents[2] / "search_spaces" / "ablation.py", "smoke")
    compiled = replace(study, recipe=replace(study.recipe, compile=True))
    runs.create(
        runs.Run("here", Path("results/here"), compiled, "0" * 64, None, SHARES)
    )  # created on a machine with a compiler
    assert call(monkeypatch, "resume", "here") == 2
    assert "C++ compiler" in capsys.readouterr().err


def test_all_mistakes_of_a_call_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--name", "-", "--cpus-per-trial", "-2", "--max-concurrent", "0", "--set", "screen.grace=0"]
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", *wrong) == 2
    error = capsys.readouterr().err
    for field in ("--cpus-per-trial", "--max-concurrent", "screen.grace"):
        assert field in error


def test_a_run_that_exists_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "results" / "mine").mkdir(parents=True)
    (elsewhere / "results" / "mine" / "study.json").touch()
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", "--name", "mine") == 2
    assert "resume" in capsys.readouterr().err


def test_secrets_in_a_refused_argument_are_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    secret = SECRETS["GitHub"][0]
    assert call(monkeypatch, "plan", "ablation", "--scale", "smoke", "--set", f"recipe.lr={secret}") == 2
    error = capsys.readouterr().err
    assert "recipe.lr" in error and "***" in error and secret not in error


def test_an_internal_error_does_not_exit_like_failed_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    assert call(monkeypatch) == 3
    assert "ZeroDivisionError" in (error := capsys.readouterr().err) and "this is a bug in tune_kd" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "locked").mkdir(mode=0o500)
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", "--out", "locked/results") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_results_cannot_be_written_below_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "file").write_text("")
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", "--out", "file/results") == 2
    assert "--out is file/results" in capsys.readouterr().err


def test_the_plan_as_json_has_arms_trials_and_teachers_and_no_other_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "ablation", "--scale", "paper", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["arms"]) == 14
    assert len(planned["teachers"]) == 2
    assert len(planned["trials"]) == 86
    assert planned["raw_cells"] == 30
    assert planned["price"]["flop"] > 1e17
    assert planned["seeds"]["smallest_exact_p"] == 0.0625


def test_the_plan_shows_merged_cells_its_cost_and_what_the_seeds_can_detect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "ablation", "--scale", "laptop") == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in ("14 arms", "114 trials", "including 2 teachers", "assumes", "80 % power", "0.0156"):
        assert words in output
    for contrast in plan(resolve(find("ablation"), "laptop")).contrasts:
        assert f"{contrast.name} {contrast.family} {contrast.kind}" in output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("factors.temperature=4", "factors.temperature is 4; allowed: a list, such as 'factors.temperature=[4]'"),
        ("factors.method=none,logit", "factors.method is 'none,logit'; allowed: a list, such as "
         "'factors.method=[\"none\", \"logit\"]'"),
        ("confirm.seeds=1, 2", "confirm.seeds is '1, 2'; allowed: a list, such as 'confirm.seeds=[1, 2]'"),
        ("confirm.seeds=[1,\"x\"]", "confirm.seeds[1] is 'x'; allowed: a whole number"),
        ("screen.margin=little", "screen.margin is 'little'; allowed: a number or a list\n"),
        ("factors=4", "factors is 4; allowed: a list\n"),
        ("factors=[{\"name\":\"x\"}]", "factors.x is {'name': 'x'}; allowed: its fields, one by one\n"),
        ("factors=[4]", "factors[0] is 4; allowed: its fields, one by one\n"),
        ("factors.temperature=true", "factors.temperature is true; allowed: numbers and text, not true or false"),
        ("factors.temperature=[true, 4.0]", "factors.temperature is [true, 4.0]; allowed: numbers and text, not"),
        ("recipe.epochs=true", "recipe.epochs is true; allowed: numbers and text, not"),
        ("tuning.budget=3", "names 'tuning.budget', but tuning is null; allowed: tuning as a whole, in JSON"),
        ("screen.strata=stem", "screen.strata is 'stem'; allowed: a list or null, such as 'screen.strata=[\"stem\"]'"),
        ("recipe.epochs=4.5", "recipe.epochs is 4.5; allowed: a whole number"),
        ("recipe.compile=often", "recipe.compile is 'often'; allowed: true or false"),
        ("recipe=4", "recipe is 4; allowed: its fields, one by one, such as recipe.epochs=100"),
        ("question=4", "question is 4; allowed: text, such as 'question=\"4\"'"),
        ("contrasts=[{\"factor\": \"stem\", \"treated\": null, \"against\": 1}]",
         "contrasts[0].treated is null; allowed: text or a whole number or a number"),
        ("recipe={\"epoch\": 4}", "names 'recipe.epoch'; allowed here: epochs, batch_size"),
        ("tuning={\"budget\": 4}", "tuning is {'budget': 4}; allowed: its fields, one by one or null"),
    ],
)  # fmt: skip
def test_a_setting_of_the_wrong_type_is_refused_with_a_correct_example(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "ablation", "--scale", "smoke", "--set", "screen.grace=1", "--set", given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tune_kd: --set {message}"), error
    if "such as" in message:
        (suggested,) = shlex.split(message.rpartition("such as ")[2])
        call(monkeypatch, "plan", "ablation", "--scale", "smoke", "--set", suggested)
        assert f"--set {given.partition('=')[0]}" not in capsys.readouterr().err


def test_setting_an_object_keeps_the_fields_that_it_does_not_name() -> None:
    study = resolve(find("ablation"), "smoke", None, ['recipe={"epochs": 3, "lr": 0.25}'])
    assert (study.recipe.epochs, study.recipe.lr, study.recipe.batch_size) == (3, 0.25, 64)


def test_a_custom_study_is_found_by_path_and_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "search_spaces").mkdir()
    mine = elsewhere / "search_spaces" / "mine.py"
    mine.write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import laptop\n"
        "def study():\n    return replace(laptop(), name='mine', scale='own')\n"
    )
    for name in ("mine", str(mine)):
        assert call(monkeypatch, "plan", name, "--scale", "own", "--json") == 0
        assert json.loads(capsys.readouterr().out)["study"] == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def study(:", "SyntaxError"),
        ("x = 1", "no function study()"),
        ("def study(): return 3", "returns int"),
        ("SCALES = {'own': 3}", "SCALES"),
        (
            "from dataclasses import replace\nfrom search_spaces.ablation import laptop\n"
            "from tune_kd import Confirm, Recipe\n"
            "def study(): return replace(laptop(), scale='own', confirm=Confirm(seeds=5), recipe=Recipe(epochs='x'))",
            "confirm.seeds is 5",
        ),
        ("def study(): raise KeyError('lost')", "KeyError"),
    ],
)
def test_a_study_file_that_does_not_work_is_named_with_its_error(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "broken.py").write_text(text)
    assert call(monkeypatch, "plan", "broken.py", "--scale", "own") == 2
    error = capsys.readouterr().err
    assert "broken.py" in error
    assert words in error


def test_auto_means_the_only_scale_of_a_study_and_ints_equal_floats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "search-spaces.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    (elsewhere / "mine.py").write_text(block)
    assert call(monkeypatch, "plan", "mine.py", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["scale"] == "small"
    (elsewhere / "ints.py").write_text(block.replace("temperature=4.0", "temperature=4").replace("lr=0.2", "lr=1"))
    study = resolve(elsewhere / "ints.py", "small")
    assert plan(study) == plan(from_json(json.loads(json.dumps(asdict(study)))))
    assert isinstance(study.teacher_recipe.lr, float)


def test_a_field_can_be_set_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "factors.stem=[\"cifar\"]", "--set", "confirm.seeds=[4,5]",
                "--set", "data.train=100"]  # fmt: skip
    assert call(monkeypatch, "plan", "ablation", "--scale", "laptop", "--json", *settings) == 0
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["arms"]) == 7
    assert planned["seeds"]["confirm"] == [4, 5]
    assert planned["data"]["train"] == 100


def test_list_names_studies_and_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "results" / "mine").mkdir(parents=True)
    (elsewhere / "results" / "mine" / "study.json").write_text("{}")
    assert call(monkeypatch, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert "ablation" in listed["studies"]
    assert listed["runs"] == ["results/mine"]


def test_the_entry_point_is_installed() -> None:
    assert (Path(sys.executable).parent / "tune-kd").exists()


@pytest.mark.long
def test_a_report_of_two_runs_compares_them_and_lists_their_differences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path, finished: Path
) -> None:
    other = elsewhere / "results" / "other"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("checkpoints", "ledger*"))

    def rename(record: dict[str, Any]) -> None:
        record["run"], record["study"]["recipe"]["lr"] = "other", 0.07
        record["study_sha256"] = digest(record["study"])
        record["layout"] = 1  # a layout from before tables had digests

    altered(other / "study.json", rename)
    for name in ("trials", "epochs", "decisions"):
        table = pd.read_parquet(other / f"{name}.parquet")
        table.assign(run=pd.Series("other", index=table.index, dtype="string")).to_parquet(other / f"{name}.parquet")
    assert call(monkeypatch, "report", str(finished), "other", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["runs"] == ["tiny", "other"]
    assert {"what differs": "study.recipe.lr", "tiny": "0.05", "other": "0.07"} in answer["differences"]
    assert answer["report"] == "report-tiny-other/report.html"
    page = (elsewhere / answer["report"]).read_text()
    assert "study.recipe.lr" in page
    assert {path.name for path in (elsewhere / "report-tiny-other" / "figures").glob("effects*.png")} == {
        "effects-tiny.png",
        "effects-other.png",
    }
    compared = pd.read_csv(elsewhere / "report-tiny-other" / "tables" / "between_runs.csv")
    assert compared["estimate"].tolist() == [0.0] * len(compared)
    assert call(monkeypatch, "report", str(finished), "other", "--format", "md") == 0
    output = capsys.readouterr().out
    assert "Differences between the runs" in output
    assert re.search(r"study\.recipe\.lr +0\.05 +0\.07", output)


def test_a_report_is_written_to_the_chosen_folder_and_formats_and_opened(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, finished: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    arguments = ["report", str(finished), "--to", "mine", "--format", "md,csv", "--open"]
    assert call(monkeypatch, *arguments) == 0
    assert opened == [(elsewhere / "mine" / "report.md").as_uri()]
    assert {path.name for path in (elsewhere / "mine").iterdir()} == {"report.md", "tables"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "docx"], ["--format is 'docx'; allowed: html, md, csv, tex, png, svg"]),
        (["--format", ""], ["--format is ''; allowed: html, md"]),
        (["--phase", "select"], ["--phase is 'select'; allowed: THEIRS=OURS"]),
        (["--phase", "x=screen"], ["--phase is given, and RUN is a run of tune_kd"]),
        (["nowhere", "--phase", "x=y"], ["--phase is 'x=y'", "RUN is 'nowhere'; allowed: a run's folder"]),
    ],
)
def test_wrong_options_of_a_report_are_refused_together_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path, finished: Path,
    arguments: list[str], words: list[str],
) -> None:  # fmt: skip
    assert call(monkeypatch, "report", str(finished), "--to", "mine", *arguments) == 2
    error = capsys.readouterr().err
    assert all(each in error for each in words)
    assert "Traceback" not in error
    assert not (elsewhere / "mine").exists()


def test_a_report_cannot_be_written_where_a_file_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path, finished: Path
) -> None:
    (elsewhere / "mine").write_text("")
    assert call(monkeypatch, "report", str(finished), "--to", "mine") == 2
    assert "mine cannot be written to; allowed: a folder that can be created" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "gpus", "message"),
    [
        (
            "ablation", 1,
            "paper, since Ray sees a GPU: about 4.5 h on one GPU as fast as an H100 (--scale brief: about 16.0 min; "
            "--scale laptop for a small one)",
        ),
        (
            "ablation", 8,
            "paper, since Ray sees a GPU: about 33.6 min on 8 GPUs as fast as an H100 (--scale brief: about 2.0 min; "
            "--scale laptop for a small one)",
        ),
        (
            "tuned", 1,
            "paper, since Ray sees a GPU: about 15.5 h on one GPU as fast as an H100 (--scale laptop for a small one)",
        ),
        ("ablation", 0, "laptop, since Ray sees no GPU (--scale paper for the full study)"),
    ],
)  # fmt: skip
def test_auto_estimates_the_time_of_the_scales_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], study: str, gpus: int, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert call(monkeypatch, "plan", study) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith(f"{study} at scale {message}")


def test_a_wrong_setting_is_reported_instead_of_an_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert call(monkeypatch, "plan", "ablation", "--set", "recipe.epochs=0") == 2
    assert "recipe.epochs is 0; allowed: at least 1" in capsys.readouterr().err


LONG = 300 * "y"


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", LONG),
        ("report", LONG),
        ("resume", LONG),
        ("list", "--out", LONG),
        ("plan", "ablation", "--scale", "smoke", "--out", LONG),
        ("run", "ablation", "--scale", "smoke", "--out", f"above/{LONG}"),
        ("run", "ablation", "--scale", "smoke", "--data", "cifar10", "--data-dir", LONG),
        ("run", "ablation", "--scale", "smoke", "--margin-from", LONG),
        ("simulate", "ablation", "--curves", LONG),
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long_is_refused_and_nothing_is_created(
    arguments: tuple[str, ...], elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert LONG in error and error.endswith("is too long; allowed: at most 255 bytes\n")
    assert [path.name for path in elsewhere.iterdir()] in ([], ["cache"])


def test_a_reports_folder_with_too_long_a_name_is_refused_and_no_parent_is_created(
    finished: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", str(finished), "--to", f"above/{LONG}") == 2
    assert "is too long" in capsys.readouterr().err and not (elsewhere / "above").exists()


def test_a_path_that_is_too_long_for_sqlite_is_refused_and_nothing_is_created(
    finished: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = elsewhere / Path(*(95 * each for each in "abcde"))
    named = ("--name", "x", "--out")
    assert call(monkeypatch, "run", "ablation", "--scale", "smoke", *named, str(out)) == 2
    length = len(str(out / "x" / LEDGER))
    why = f"the path of its ledger has {length} bytes, and SQLite opens paths of at most 504"
    assert f"--out is {out}, where {why}; choose a folder with a shorter path" in capsys.readouterr().err
    assert not (elsewhere / ("a" * 95)).exists()

    shutil.copytree(finished, out / "x")  # moved there by a user
    (elsewhere / "short").symlink_to(out)  # SQLite resolves the link
    for arguments in (("status", str(out / "x")), ("status", "--out", str(out)), ("resume", "short/x")):
        assert call(monkeypatch, *arguments) == 2
        assert "bytes, and SQLite opens paths of at most 504; move it to a folder" in capsys.readouterr().err


def test_sqlite_opens_the_longest_path_that_is_allowed_for_a_run(tmp_path: Path) -> None:
    folder = tmp_path / Path(*(95 * each for each in "abcd"))
    folder /= "e" * (SQLITE_BYTES - len(str(folder / LEDGER)) - 1)
    folder.mkdir(parents=True)
    assert too_long(folder / LEDGER) is None and too_long(folder / f"{LEDGER}x") is not None
    with closing(Ledger(folder / LEDGER)), reading(folder / LEDGER) as ledger:
        assert ledger.rows(TRIALS) == []
    with pytest.raises(sqlite3.OperationalError):
        sqlite3.connect(folder / f"{LEDGER}x")


def test_new_writes_a_study_that_can_be_planned_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "new", "mine.py") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "mine_loss.py"]
    assert all(word not in path.read_text() for path in tmp_path.iterdir() for word in ("STUDY_", "LOSS_FILE"))
    capsys.readouterr()
    assert call(monkeypatch, "plan", "mine.py", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in planned["arms"]] == ["none", "logit", "at/weight=10", "at/weight=100"]
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    for name, words in (
        ("mine.py", "mine.py exists"),
        ("a.txt", "name of a Python module"),
        ("x/y.py", "x does not exist"),
    ):
        assert call(monkeypatch, "new", name) == 2
        assert words in capsys.readouterr().err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_python_without_the_dependencies_gets_a_message_and_no_traceback(command: str, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    ended = subprocess.run(
        [sys.executable, "-m", "tune_kd", command, "ablation"],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1 and "has no module typer; use the Python in which tune_kd" in ended.stderr


def test_a_finished_run_is_resumed_without_ray_and_its_lost_table_is_written_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path, elsewhere: Path
) -> None:
    shutil.copytree(finished.parent, elsewhere / "results")
    run = elsewhere / "results" / finished.name
    (run / "trials.parquet").unlink()
    (run / grace.AUDIT).unlink(missing_ok=True)

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    concluded: list[Driver] = []  # a driver that is concluded has sent its last upload
    conclude = Driver.conclude
    monkeypatch.setattr(Driver, "conclude", lambda driver: (concluded.append(driver), conclude(driver)))
    monkeypatch.setattr("ray.init", started)
    assert call(monkeypatch, "resume", finished.name) == 0
    assert len(concluded) == 1
    shown = capsys.readouterr().out
    count = len(pd.read_parquet(run / "trials.parquet"))
    assert f"all {count} trials have ended; no trial is left to train" in shown
    assert "Primary contrasts" in shown
    assert (run / "report" / "report.html").is_file() and (run / grace.AUDIT).is_file()


def test_resume_says_where_a_run_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path, elsewhere: Path
) -> None:
    shutil.copytree(finished.parent, elsewhere / "results")
    with closing(Ledger(elsewhere / "results" / finished.name / LEDGER)) as ledger:
        rows = ledger.rows(TRIALS)
        lost = {"test_accuracy": None, "test_accuracy_best": None, "agreement": None, "kl_t1": None, "kl_t4": None}
        for row in [row for row in rows if row["phase"] == "confirm"][:2]:  # killed before their end was committed
            ledger.put(TRIALS, row | lost | {"status": "pending"})

    def started(*_: object, **__: object) -> None:
        raise UserError("Ray is not started here")

    monkeypatch.setattr("tune_kd.execute.cluster.connect", started)
    assert call(monkeypatch, "resume", finished.name) == 2
    said = f"resuming: {len(rows) - 2} of {len(rows)} trials have ended, 2 continue from their checkpoints"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "stops"), [("screen.min_peers=4", True), ("screen.min_peers=5", False)])
def test_plan_says_if_early_stopping_cannot_stop_any_arm(
    setting: str, stops: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest stratum of the study has five arms."""
    assert call(monkeypatch, "plan", "ablation", "--scale", "laptop", "--set", setting) == 0
    assert ("cannot stop any arm" in " ".join(capsys.readouterr().out.split())) is not stops

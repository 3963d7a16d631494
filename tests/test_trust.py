"""Attacks by whoever made a results folder, a data set or an archive, through the commands that read them.

SECURITY.md says what is promised, and against whom.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conftest import tiny
from forms import SECRETS, SHORT
from tune_kd import cli
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Task, Workplace
from tune_kd.plan import plan
from tune_kd.records import LEDGER, TRIALS, Ledger
from tune_kd.study import Confirm
from tune_kd.trial import Epoch
from tune_kd.view import View

SMOKE = ("ablation", "--scale", "smoke")
CLOSED = "http://127.0.0.1:1"  # where nobody answers


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each attack in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr("sys.argv", ["tune-kd", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# Code: `resume` and the file that a study names

# Where things are sent

# Links

# Secrets

REFUSED = "holds what looks like a secret ("


@pytest.mark.parametrize("form", SECRETS)
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["run", *SMOKE, "--set", "question=Is it {} ?"], "--set[0]"),
        (["run", *SMOKE, "--data-dir", "/data/{}"], "--data-dir"),
        (["resume", "r", "--extend", "--set", "confirm.seeds=[1]", "--set", "question={}"], "--set[1]"),
        (["submit", *SMOKE, "--address", CLOSED, "--set", "question={}"], "--set[0]"),
        (["submit", *SMOKE, "--address", CLOSED, "--data-dir", "/data/{}"], "--data-dir"),
        (["resume", "r", "--address", CLOSED, "--set", "question={}"], "--set[0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_secret_on_the_command_line_is_refused_before_anything_is_written_or_sent(
    form: str,
    arguments: list[str],
    field: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text, hidden = SECRETS[form]
    monkeypatch.setattr("tune_kd.launch.load_data", None)
    assert call(monkeypatch, *(argument.replace("{}", text) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert f"{field} {REFUSED}" in said.err and "at character" in said.err and hidden not in said.err + said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_in_a_studys_file_is_refused_before_data_are_read(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, hidden = SECRETS[form]
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import smoke as base\n"
        f"def study():\n    return replace(base(), scale='own', question={text!r})\n"
    )
    monkeypatch.setattr("tune_kd.launch.load_data", None)
    assert call(monkeypatch, "run", "mine.py") == 2
    said = capsys.readouterr()
    assert f"study.question {REFUSED}" in said.err and hidden not in said.err + said.out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("form", SECRETS)
def test_what_a_trial_says_reaches_neither_ledger_nor_log_nor_terminal_with_its_secret(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, hidden = SECRETS[form]

    def failing(task: Task, place: Workplace) -> Generator[Epoch]:
        raise RuntimeError(f"cannot log in with {text} to epochs")
        yield

    log, place = tmp_path / "log", Workplace(None, None, tmp_path / "teachers", tmp_path / "checkpoints")
    ledger = Ledger(tmp_path / LEDGER)
    with View(Console(width=10_000), "r", log) as view:
        small = replace(tiny(), confirm=Confirm(seeds=(1, 2)))
        driver = Driver(plan(small, "0" * 64), "r", tmp_path, ledger, place, cpus=1.0, gpus=0.0, say=view.say)
        run_in_process(driver, place, failing)
    errors = [row["error"] for row in ledger.rows(TRIALS) if row["status"] == "failed"]
    ledger.close()
    assert errors and all("RuntimeError: cannot log in with" in each and "***" in each for each in errors)
    said = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "cannot log in with" in log.read_text() and "***" in said.out
    for part in hidden.splitlines():
        assert part not in said.out + said.err and part.encode() not in written


@pytest.mark.parametrize("form", SECRETS)
def test_what_a_run_says_is_shown_and_logged_without_its_secret(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, hidden = SECRETS[form]
    log = tmp_path / "log"
    with View(Console(width=10_000), "r", log) as view:
        view.say(f"warning: {text} was not taken")
    shown, logged = capsys.readouterr().out, log.read_text()
    assert "s  warning: " in shown and "***" in shown and "***" in logged
    assert not any(part in shown + logged for part in hidden.splitlines())


@pytest.mark.parametrize(("error", "word"), [(OSError, "OSError"), (RuntimeError, "this is an error in tune_kd")])
def test_an_error_of_a_command_is_told_without_the_secret_in_it(
    error: type[Exception], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error(f"no answer from https://me:{SHORT}@example.org/")

    monkeypatch.setattr("tune_kd.launch.load_data", fail)
    assert call(monkeypatch, "run", *SMOKE) == 3
    said = capsys.readouterr().err
    assert word in said and "https://me:***@example.org/" in said and SHORT not in said


def test_a_store_is_not_named_with_a_token_in_its_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for form in ("access token", "signed URL of Azure", "GitHub"):
        text, hidden = SECRETS[form]
        url = f"s3://bucket/kd?region=eu-west-1&note={text.partition('?')[2] or text}"
        assert call(monkeypatch, "run", *SMOKE, "--out", url) == 2
        said = capsys.readouterr().err
        assert "--out is s3://..., with a secret in it" in said and hidden not in said
    assert not (tmp_path / "data").exists()


# Archives and pictures

# Numbers, depths and sizes

# What other programs make of our output

# Ray's door

# Folders, sockets and logs of a run

# A ledger that is a program

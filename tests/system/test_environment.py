"""The environment of a command: text that is not UTF-8 and folders that are not writable are reported at the start."""

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from tune_kd import cli
from tune_kd.data import cifar
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.system import environment, object_store
from tune_kd.system.errors import UserError

ODD = os.fsdecode(b"d\xe9j")  # Latin-1, as old disks have it
RUN = ("run", "ablation", "--scale", "smoke")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in its own folder, with its own home and temporary folders."""
    home = tmp_path / "home"
    home.mkdir()
    for name in environment.PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # Ray itself sets it
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the user unknown, as in a container. Returns the start of the message about it."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    return "HOME is not set, and the user 54321 has no entry in the password file; set HOME to a writable "


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return the message of a command that is rejected."""
    monkeypatch.setattr("sys.argv", ["tune-kd", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr()
    assert (left.value.code, told.out) == (2, ""), told.err
    return told.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "ablation", "--out", ODD),
        ("list", "--out", ODD),
        (*RUN, "--data", "cifar10", "--data-dir", ODD),
        (*RUN, "--name", ODD),
        (*RUN, "--set", ODD),
        ("run", ODD),
        ("resume", ODD),
        ("status", ODD),
        ("report", ODD),
        ("simulate", "ablation", "--curves", ODD),
        ("dashboard", "--write", ODD),
    ],
    ids=" ".join,
)
def test_an_argument_that_is_not_utf8_is_rejected_with_its_position(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = said(capsys, monkeypatch, *arguments)
    assert told == f"tune_kd: the argument after {arguments[-2]} is 'd\\xe9j'; allowed: text in UTF-8\n"
    assert not list(here.iterdir())


@pytest.mark.parametrize("arguments", [("status", "a\x1b[2Jb"), ("report", "--\x9b2J"), ("run", "x", "\u202ey")])
def test_an_argument_with_control_characters_is_rejected_and_shown_escaped(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = said(capsys, monkeypatch, *arguments)
    place = f"the argument after {arguments[-2]} is {arguments[-1]!r}"
    assert told == f"tune_kd: {place}; allowed: text without control characters\n"


def test_all_names_that_are_not_utf8_are_reported_at_once(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / ODD).mkdir()
    monkeypatch.chdir(here / ODD)
    monkeypatch.setenv("TMPDIR", f"/tmp/{ODD}")
    assert said(capsys, monkeypatch, *RUN, f"--out={ODD}").splitlines() == [
        "tune_kd: the argument after smoke is '--out=d\\xe9j'; allowed: text in UTF-8",
        "tune_kd: TMPDIR is '/tmp/d\\xe9j'; allowed: text in UTF-8",
        f"tune_kd: the working directory is {repr(os.fsencode(here / ODD))[1:]}; allowed: text in UTF-8",
    ]


def test_a_deleted_working_directory_is_reported(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    told = said(capsys, monkeypatch, "list")
    assert told == "tune_kd: the working directory does not exist any more; change to another one\n"


def listed(here: Path, **around: str) -> "subprocess.CompletedProcess[bytes]":
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "tune_kd", "list", "--out", "é"],
        capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": path, **around}, cwd=here,
    )  # fmt: skip


def test_characters_that_the_terminal_cannot_show_are_escaped(here: Path) -> None:
    for around in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}):
        done = listed(here, **around)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"no runs under \\xe9" in done.stdout


def test_a_python_that_does_not_decode_arguments_as_utf8_is_reported(here: Path) -> None:
    done = listed(here, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    remedy = "allowed: text in UTF-8, and Python decodes it as ascii here; set PYTHONUTF8=1"
    told = done.stderr.decode()
    assert (done.returncode, told) == (2, f"tune_kd: the argument after --out is '\\xc3\\xa9'; {remedy}\n")


def test_a_warning_about_a_name_that_is_not_utf8_can_be_logged(here: Path) -> None:
    with ProgressDisplay(Console(stderr=True), "x", here / "log") as view:
        view.say(f"warning: {ODD} cannot be read")
    assert "d\\udce9j cannot be read" in (here / "log").read_text()


def in_the_way(here: Path) -> Path:
    """A path in which no user can create a file, not even root."""
    (here / "file").write_text("in the way")
    return here / "file"


def test_an_unwritable_home_is_reported_with_the_variable_that_moves_rays_token(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home := in_the_way(here)))
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    told = said(capsys, monkeypatch, *RUN, "--max-concurrent", "0").splitlines()
    assert len(told) == 3 and "--max-concurrent is 0" in told[0]
    assert told[1] == (
        f"tune_kd: Ray's token {home}/.ray/auth_token cannot be written and read (Not a directory); set "
        "RAY_AUTH_TOKEN_PATH to a file in a writable folder"
    )
    assert told[2].startswith("tune_kd: RAY_TMPDIR is '/proc', so Ray's folder is /proc/ray-")
    assert "which cannot be written to (No such file or directory); set RAY_TMPDIR" in told[2]
    assert not (here / "results").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "new" / "token"))
    monkeypatch.delenv("RAY_TMPDIR")
    environment.check_places(None)
    assert (here / "new" / "token").is_file()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    environment.check_places("127.0.0.1:6379")  # the token of that cluster is not checked here
    for name, value in (("RAY_AUTH_TOKEN", "0" * 64), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as set_:
            set_.setenv(name, value)
            environment.check_places(None)


def test_rays_token_is_created_once_and_only_its_user_can_read_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = here / "there" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))

    def made(_: int) -> str:
        environment.guard_token()
        return token.read_text()

    def slowly(size: int) -> str:
        time.sleep(0.05)
        return os.urandom(size).hex()

    monkeypatch.setattr("secrets.token_hex", slowly)  # so that all start before the first one ends
    with ThreadPoolExecutor(8) as pool:
        (found,) = set(pool.map(made, range(32)))
    assert len(bytes.fromhex(found)) == 32 and stat.S_IMODE(token.stat().st_mode) == 0o600
    token.write_text("")  # as a run that was killed leaves it
    assert len(made(0)) == 64
    token.write_text("mine")
    assert made(0) == "mine"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("relative", "which is not an absolute path"),
        ("/tmp/" + 60 * "l", "where a socket's path has "),
        ("/proc", "which cannot be written to (No such file or directory)"),
    ],
)
def test_a_temporary_folder_where_ray_cannot_work_is_rejected(
    place: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", place)
    with pytest.raises(UserError) as refused:
        environment.check_places(None)
    (problem,) = refused.value.problems
    assert problem.startswith(f"TMPDIR is '{place}', so Ray's folder is {place}/ray-{os.getuid()}")
    assert f", {why}" in problem
    assert problem.endswith("; set RAY_TMPDIR to a writable folder with a short absolute path")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    environment.check_places(None)


def test_a_missing_home_is_reported_once_by_every_command_that_needs_one(
    here: Path, homeless: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = said(capsys, monkeypatch, *RUN, "--track", "mlflow", "--track", "tensorboard")
    assert told == f"tune_kd: {homeless}folder\n" and not list(here.iterdir())
    for arguments in (("dashboard", "--write", "x"), ("list", "--out", "s3://bucket/kd?region=x"),
                      ("submit", "ablation", "--address", "http://127.0.0.1:1")):  # fmt: skip
        assert said(capsys, monkeypatch, *arguments) == told
    for needs in (cifar.default_cache, lambda: object_store.local("s3://bucket/kd?region=x")):
        with pytest.raises(UserError, match="HOME is not set"):
            needs()


def test_read_only_commands_need_no_home(
    homeless: str, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (("list",), ("plan", "ablation", "--scale", "smoke"), ("status", str(finished)), ("dashboard",)):
        monkeypatch.setattr("sys.argv", ["tune-kd", *arguments])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        assert capsys.readouterr().err == ""


def test_the_home_of_an_unknown_user_is_reported_as_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tune-kd", *RUN, "--data", "cifar10", "--data-dir", "~nobody-here/cifar"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "~nobody-here/cifar: it does not exist" in capsys.readouterr().err

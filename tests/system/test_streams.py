"""Output that cannot be written is dropped. Closed terminals, closed pipes and full disks change no exit status."""

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tune_kd.system.streams import _Unfailing

ROOT = Path(__file__).parents[2]
GOOD = ("plan", "ablation", "--scale", "smoke")
WRONG = ("plan", "ablation", "--scale", "huge")
BROKEN = ("status", "broken", "--verify")


def ended(cwd: Path, arguments: tuple[str, ...], redirected: str = "") -> subprocess.CompletedProcess[str]:
    """A shell command with redirected streams."""
    line = f'"$0" -m tune_kd "$@" {redirected}; exit ${{PIPESTATUS[0]}}'  # the status of a pipe's first command
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments], cwd=cwd, env=here, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A folder with a run whose table was altered."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(finished, folder / "results" / "broken")
    with (folder / "results" / "broken" / "trials.parquet").open("ab") as table:
        table.write(b"x")
    return folder


@pytest.mark.parametrize("redirected", [">&- 2>&- <&-", "2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"])
@pytest.mark.parametrize(("arguments", "status"), [(GOOD, 0), (WRONG, 2), (BROKEN, 3)])
def test_closed_or_full_streams_do_not_change_the_exit_status(
    elsewhere: Path, arguments: tuple[str, ...], status: int, redirected: str
) -> None:
    found = ended(elsewhere, arguments, redirected)
    assert found.returncode == status, found
    assert "Traceback" not in found.stdout + found.stderr and "Exception ignored" not in found.stderr


def test_output_is_complete_when_standard_error_is_closed(elsewhere: Path) -> None:
    """Otherwise Python prints errors to standard output, and an open file gets the number of standard error."""
    found = ended(elsewhere, (*GOOD, "--json"), "2>&-")
    assert json.loads(found.stdout)["study"] == "ablation"
    assert ended(elsewhere, WRONG, "2>&-").stdout == ""


def test_a_child_process_has_standard_streams_even_if_the_command_has_none(tmp_path: Path) -> None:
    code = "import os, subprocess, sys; from tune_kd.system.streams import made_safe; made_safe(); "
    code += "sys.exit(subprocess.run([sys.executable, '-c', 'import os; [os.fstat(n) for n in range(3)]']).returncode)"
    line = '"$0" -c "$1" <&- >&- 2>&-'
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", line, sys.executable, code], cwd=tmp_path, env=here).returncode == 0


def test_stdout_and_stderr_keep_their_order_with_pythonunbuffered(tmp_path: Path) -> None:
    code = "import sys; from tune_kd.system.streams import made_safe; made_safe(); print('a'); "
    code += "sys.stderr.write('partial\\n'); print('b')"
    here = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert found.stdout == "a\npartial\nb\n"


def test_characters_that_the_terminal_cannot_encode_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import smoke as small\n"
        "def study(): return replace(small(), name='caf\\u00e9')\n"
    )
    command = [sys.executable, "-m", "tune_kd", "plan", "mine.py", "--scale", "smoke"]
    here = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(r"caf\xe9 at scale smoke")


def test_a_briefly_full_stream_loses_no_output_and_a_permanently_full_one_does_not_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example, a terminal that another program, such as Node, has made non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text, read = b"0123456789" * 20_000, bytearray()

    def slowly() -> None:
        while len(read) < len(text):
            time.sleep(0.01)
            read.extend(os.read(reader, 8192))

    thread = threading.Thread(target=slowly)
    with _Unfailing(writer, "w") as stream:
        thread.start()
        assert stream.write(text) == len(text)
        thread.join()
        assert bytes(read) == text
        monkeypatch.setattr("tune_kd.system.streams.WAIT", 0.1)
        began = time.monotonic()
        for _ in range(20):
            assert stream.write(b"x" * 8192) > 0
        assert time.monotonic() - began < 5
    os.close(reader)


VIEW = """
import sys
from pathlib import Path
from rich.console import Console
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.system.streams import made_safe

made_safe()
with ProgressDisplay(Console(stderr=True), "r", Path("log")) as view:
    view.say("hello")
    sys.stdin.readline()
    for _ in range(9):
        view.say("anybody?")
        print("anybody?")
"""


def test_a_progress_display_continues_after_its_terminal_is_closed(tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    here = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", VIEW], cwd=tmp_path, env=here, start_new_session=True,
                          stdin=subprocess.PIPE, stdout=inside, stderr=inside) as process:  # fmt: skip
        os.close(inside)
        seen = b""
        while b"hello" not in seen:
            seen += os.read(terminal, 4096)
        os.close(terminal)
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "log").read_text().count("anybody?") == 9


@pytest.mark.slow  # the previous test is the short version
def test_a_run_completes_after_its_terminal_is_closed(tmp_path: Path) -> None:
    """SIGHUP is ignored, as under nohup, and the terminal closes during the run."""
    terminal, inside = pty.openpty()
    line = 'trap "" HUP; exec "$0" -m tune_kd "$@"'
    command = subprocess.Popen(
        ["sh", "-c", line, sys.executable, "run", *GOOD[1:], "--name", "closed"], cwd=tmp_path, start_new_session=True,
        stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(inside)
    seen = b""
    while b"cifar/teacher seed" not in seen:  # the live view shows a running trial
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert command.wait(120) == 0
    trials = json.loads(ended(tmp_path, ("status", "closed", "--json")).stdout)["trials"]
    assert {row["status"] for row in trials} <= {"completed", "stopped"}

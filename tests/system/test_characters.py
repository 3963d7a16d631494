"""Control characters: visible in every message, and never executed by a terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from rich.console import Group
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text

from tune_kd import cli
from tune_kd.cli.options import print_json
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.reporting.terminal import Terminal
from tune_kd.system import signals
from tune_kd.system.characters import CONTROL, visible

OBEYED = "a\x1b[2Jb\x07c\x9b2Jd\u202ee\x7ff\u2028g"
SEEN = "a\u241b[2Jb\u2407c\ufffd2Jd\ufffde\u2421f\ufffdg"
IN_A_PICTURE = SEEN.replace("\u2407", "")  # Rich removes the bell, the backspace and line feeds


def printed(*what: object) -> str:
    console = Terminal()
    console.file = file = io.StringIO()
    console.print(*what)
    return file.getvalue()


def test_control_characters_become_visible_symbols_except_newlines_and_tabs() -> None:
    assert visible(OBEYED) == SEEN
    assert visible("two\nlines\tand é, 中, -, \u200f") == "two\nlines\tand é, 中, -, \u200f"


@given(st.text())
def test_visible_text_has_no_control_characters_and_the_same_length(text: str) -> None:
    assert not CONTROL.search(visible(text).replace("\n", "").replace("\t", ""))
    assert len(visible(text)) == len(text)
    assert CONTROL.sub("", text) == text or visible(text) != text or set("\n\t") & set(text)


def test_printed_text_has_no_control_characters() -> None:
    table = Table(OBEYED, title=OBEYED)
    table.add_row(OBEYED)
    table.add_row(Text(OBEYED, style="red"))
    for what in (OBEYED, Text(OBEYED), table, Group(table, Text(OBEYED))):
        said = printed(what)
        assert not CONTROL.search(said.replace("\n", "")), said
        assert IN_A_PICTURE in "".join(said.split("\n"))


def test_markup_and_emoji_codes_are_printed_literally() -> None:
    assert printed("[red]x[/red] :boom: :x:") == "[red]x[/red] :boom: :x:\n"


def test_colours_and_live_displays_keep_their_control_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert printed(Text(OBEYED, style="bold red")) == f"\x1b[1;31m{IN_A_PICTURE}\x1b[0m\n"
    console = Terminal()
    console.file = file = io.StringIO()
    with Live(Text("one"), console=console, auto_refresh=False, transient=True) as live:
        live.update(Text("two"), refresh=True)
    assert list(track(range(3), "bar", console=console)) == [0, 1, 2]
    moved = file.getvalue()
    for command in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "two", "100%"):  # the cursor, the line, the content
        assert command in moved
    assert "\u241b" not in moved


def test_log_lines_have_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(Terminal(), "r", tmp_path / "log") as view:
        view.say(f"warning: {OBEYED}")
    assert (tmp_path / "log").read_text().endswith(f"warning: {SEEN}\n")
    assert capsys.readouterr().out.endswith(f"warning: {IN_A_PICTURE}\n")


def test_signal_messages_have_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    signals.say(OBEYED)
    assert capfd.readouterr().err == f"tune_kd: {SEEN}\n"


@pytest.mark.parametrize("error", [OSError(OBEYED), RuntimeError(OBEYED)])
def test_error_messages_have_no_control_characters(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["tune_kd"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert SEEN in said
    assert not CONTROL.search(said.replace("\n", ""))


def test_json_output_is_printable_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({OBEYED: ["\\\x7f", "é"]})
    said = capsys.readouterr().out
    assert said.isascii() and said.rstrip("\n").isprintable()
    assert json.loads(said) == {OBEYED: ["\\\x7f", "é"]}

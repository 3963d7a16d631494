"""Who comes second is told so, and two who need the same share it. More of these: `python tests/faults/races.py`."""

from pathlib import Path

import pytest

from faults.races import BEGIN, RESUME, for_a_run, for_a_teacher


@pytest.mark.long
@pytest.mark.parametrize("code", [RESUME] * 5 + [BEGIN], ids=[*map(str, range(5)), "name"])
def test_of_two_drivers_of_one_run_one_wins_and_the_other_is_told_who_holds_it(code: str, tmp_path: Path) -> None:
    assert for_a_run(tmp_path, code) is None


def test_a_race_that_both_win_is_seen(tmp_path: Path) -> None:
    broken = RESUME.replace("run.held(folder)", "contextlib.nullcontext()").replace(
        "import sys", "import contextlib, sys"
    )
    broken = broken.replace("sys.stdin.read()", "pass")
    assert for_a_run(tmp_path, broken) is not None


@pytest.mark.long
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_runs_that_need_one_teacher_train_it_once(number: int, tmp_path: Path) -> None:
    assert for_a_teacher(tmp_path) is None

"""Two drivers of one run, and two runs that need one teacher. More races: `python tests/faults/races.py`."""

from pathlib import Path

import pytest

from faults.races import BEGIN, RESUME, for_a_run, for_a_teacher


@pytest.mark.long
@pytest.mark.parametrize("code", [RESUME] * 5 + [BEGIN], ids=[*map(str, range(5)), "name"])
def test_of_two_drivers_of_one_run_the_second_is_refused_with_the_process_that_holds_it(
    code: str, tmp_path: Path
) -> None:
    assert for_a_run(tmp_path, code) is None


def test_a_race_that_both_drivers_win_is_detected(tmp_path: Path) -> None:
    broken = RESUME.replace("run.held(folder)", "contextlib.nullcontext()").replace(
        "import sys", "import contextlib, sys"
    )
    broken = broken.replace("sys.stdin.read()", "pass")
    assert for_a_run(tmp_path, broken) is not None


@pytest.mark.long
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_runs_that_need_one_teacher_train_it_once(number: int, tmp_path: Path) -> None:
    assert for_a_teacher(tmp_path) is None

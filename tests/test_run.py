"""A run's folder: what is written when it is made, and when it may be opened again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tune_kd.run import Run, create, reopen
from tune_kd.study import Mistake, Study


@pytest.fixture
def made(study: Study, tmp_path: Path) -> Run:
    run = Run("mine", tmp_path / "mine", study, "d" * 64, None, {"cpus_per_trial": 1.0})
    create(run)
    return run


def test_a_run_is_opened_again_as_it_was_made(made: Run) -> None:
    assert reopen(made.folder) == made
    assert reopen(made.folder).plan == made.plan


def another_version(record: dict[str, Any]) -> None:
    record["versions"]["tune_kd"] = "0.0.1"


def another_study(record: dict[str, Any]) -> None:
    record["study"]["recipe"]["lr"] = 0.5


def fewer_contrasts(record: dict[str, Any]) -> None:
    record["contrasts"].pop()


def another_trial(record: dict[str, Any]) -> None:
    record["trials"][0] = "0" * 16


def no_data(record: dict[str, Any]) -> None:
    del record["data"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (another_version, "begun by tune_kd 0.0.1; this is .*finish it with the version that began it"),
        (another_study, "its hash does not fit the study.*restore the file, or start a new run"),
        (fewer_contrasts, "its hash does not fit the contrasts"),
        (another_trial, "plans other trials"),
        (no_data, "KeyError: 'data'"),
    ],
)
def test_a_run_that_is_not_this_versions_or_was_changed_is_refused(
    made: Run, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = made.folder / "study.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(Mistake, match=says):
        reopen(made.folder)

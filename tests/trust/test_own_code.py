"""Code that a record from a stranger names is not executed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import altered, tiny
from tune_kd.records.run_folder import Run, create, reopen, with_codes
from tune_kd.study import brought
from tune_kd.study.methods import Method
from tune_kd.study.source import INSTALLED
from tune_kd.study.spec import Study
from tune_kd.study.trial import digest
from tune_kd.system.errors import UserError

LOSS = "class Loss:\n    pass\n"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function that creates a run of a study declared in code, with the loss of the given name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for place in (tmp_path, tmp_path / "results" / "r"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "a.py").write_text(LOSS)

    def create_run(loss: str) -> Path:
        run = Run("r", tmp_path / "results" / "r", _study(loss, tmp_path), "d" * 64, None, {})
        create(replace(run, codes=brought.codes(run.study, tmp_path)))
        return run.folder

    return create_run


def _study(loss: str, folder: Path) -> Study:
    method = Method("mine", loss=loss, settings={"temperature": 4.0})
    return brought.with_sources(replace(tiny(), methods=(method,)), folder)


def test_code_in_the_working_directory_is_loaded_when_the_run_is_reopened(made: Callable[[str], Path]) -> None:
    assert [code.main for code in with_codes(reopen(made("a.py:Loss"))).codes] == ["a.py"]


@pytest.mark.parametrize("loss", ["results/r/a.py:Loss", "results.r.a:Loss", "./results/../results/r/a.py:Loss"])
def test_code_in_the_results_folder_is_rejected(loss: str, made: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="which is in the results folder"):
        with_codes(reopen(made(loss)))


@pytest.mark.parametrize("loss", ["a.py:Loss", "tune_kd.training.methods.logit:Logit"])
def test_code_outside_the_recorded_folder_is_rejected(loss: str, made: Callable[[str], Path]) -> None:
    folder = made(loss)
    if loss == "a.py:Loss":
        altered(folder / "study.json", lambda record: record.pop("code"))
    with pytest.raises(UserError, match="only code in the working directory is executed"):
        with_codes(reopen(folder))


def test_code_without_a_source_digest_is_rejected(made: Callable[[str], Path]) -> None:
    folder = made("a.py:Loss")

    def remove_source_digest(record: dict[str, Any]) -> None:
        record["study"]["methods"][0]["source"] = None
        record["study_sha256"] = digest(record["study"])

    altered(folder / "study.json", remove_source_digest)
    run = replace(reopen_with_matching_ids(folder), named=True)
    with pytest.raises(UserError, match="does not match the digest in the study"):
        with_codes(run)


def reopen_with_matching_ids(folder: Path) -> Run:
    """Reopen a run whose recorded trial ids are replaced by those of its changed study."""
    altered(folder / "study.json", lambda record: record.update(trials=_ids(folder)))
    return reopen(folder)


def _ids(folder: Path) -> list[str]:
    found = Run("r", folder, _study("a.py:Loss", Path.cwd()), "d" * 64, None, {})
    method = replace(found.study.methods[0], source=None)
    return [trial.trial_id for trial in replace(found, study=replace(found.study, methods=(method,))).plan.trials]


@pytest.mark.parametrize("source", [{"file": "gone.py"}, {"settings": ["methods=[]"]}])
def test_a_missing_study_or_one_with_methods_from_settings_does_not_authorise_code(
    source: dict[str, Any], made: Callable[[str], Path]
) -> None:
    folder = made("a.py:Loss")
    source_record = {"file": str(INSTALLED / source.get("file", "ablation.py")), "scale": "test", "data": None}
    source_record |= {"settings": source.get("settings", []), "digests": None}
    altered(folder / "study.json", lambda record: record.update(source=source_record))
    with pytest.raises(UserError, match="only code in the working directory is executed"):
        with_codes(reopen(folder))


@pytest.mark.parametrize("code", [[1], "x", {"folder": 3}, {"folder": "a"}, {"folder": "/", "packages": [1]}])
def test_an_invalid_code_record_is_rejected(code: Any, made: Callable[[str], Path]) -> None:
    folder = made("a.py:Loss")
    altered(folder / "study.json", lambda record: record.update(code=code))
    with pytest.raises(UserError, match=r"code.* is .*, which is not a valid value"):
        reopen(folder)

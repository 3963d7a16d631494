"""A run's folder: the files that are written when it is created, and when it may be reopened."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import altered, tiny
from forms import SECRETS
from tune_kd.records.extension import changes, extended, record_extension
from tune_kd.records.ledger import Ledger
from tune_kd.records.lock import held, holder
from tune_kd.records.run_folder import Run, begun, check_new, create, find, reopen
from tune_kd.records.schema import LEDGER, TRIALS, first_row
from tune_kd.study.discover import Source
from tune_kd.study.spec import Confirm, Study
from tune_kd.study.trial import digest
from tune_kd.system.errors import UserError


@pytest.fixture
def made(study: Study, tmp_path: Path) -> Run:
    run = Run("mine", tmp_path / "mine", study, "d" * 64, None, {"cpus_per_trial": 1.0})
    create(run)
    return run


def test_a_reopened_run_equals_the_created_one(made: Run) -> None:
    assert reopen(made.folder) == made
    assert reopen(made.folder).plan == made.plan


def test_records_from_before_validate_every_equal_those_written_now(study: Study, tmp_path: Path) -> None:
    looks = replace(study, confirm=Confirm((1, 2), looks=(2, 3)))
    create(Run("r", tmp_path / "r", looks, "d" * 64, None, {}))
    record = json.loads((tmp_path / "r" / "study.json").read_text())
    before = asdict(looks)
    for name in ("recipe", "teacher_recipe"):
        assert before[name].pop("validate_every") == 1
    assert record["study"] == json.loads(json.dumps(before)) and record["study_sha256"] == digest(before)
    record_extension(replace(reopen(tmp_path / "r"), look=1))
    record = json.loads((tmp_path / "r" / "study.json").read_text())
    assert (record["look"], record["extended"]) == (1, None)


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
        (another_version, "started by tune_kd 0.0.1; this is .*finish the run with the version that started it"),
        (another_study, "its hash does not match the study.*restore the file, or start a new run"),
        (fewer_contrasts, "its hash does not match the contrasts"),
        (another_trial, "plans other trials"),
        (no_data, "study.json lacks data; restore the file, or start a new run"),
    ],
)
def test_a_run_of_another_version_or_with_a_changed_record_is_rejected(
    made: Run, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    altered(made.folder / "study.json", change)
    with pytest.raises(UserError, match=says):
        reopen(made.folder)


@pytest.mark.parametrize("form", SECRETS)
def test_a_suspected_secret_is_rejected_and_neither_recorded_nor_repeated(
    form: str, study: Study, tmp_path: Path
) -> None:
    text, hidden = SECRETS[form]
    run = Run("r", tmp_path / "r", replace(study, question=f"Is it {text} ?"), "0" * 64, None, {})
    with pytest.raises(UserError, match=r"study\.question holds what looks like a secret") as caught, begun(run):
        raise AssertionError("it was begun")
    assert hidden not in str(caught.value)
    assert not run.folder.exists()


def test_questions_paths_and_digests_are_not_taken_for_secrets(study: Study, tmp_path: Path) -> None:
    question = (
        "Does sk-learn's T=4 beat sk-learn-baseline-of-the-last-study, eyJ at https://example.org:8080/a@b? " + "f" * 64
    )
    create(Run("r", tmp_path / "r", replace(study, question=question), "0" * 64, tmp_path / "sk-data-of-mine", {}))
    assert reopen(tmp_path / "r").study.question == question


def test_a_user_error_at_the_start_removes_a_new_run_and_an_os_error_keeps_it(study: Study, tmp_path: Path) -> None:
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    seen: list[bool] = []
    with pytest.raises(UserError, match="no room"), begun(run):
        raise UserError("no room", str(seen.append((run.folder / "study.json").is_file())))
    assert seen == [True] and not run.folder.exists()
    with pytest.raises(OSError, match="disk"), begun(run):
        raise OSError("disk")
    assert reopen(run.folder).study == study  # to be continued


def test_a_folder_left_by_a_kill_before_the_plan_was_written_is_reused(study: Study, tmp_path: Path) -> None:
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    run.folder.mkdir()
    (run.folder / ".lock").touch()
    (run.folder / "holder.json").write_text("{}")
    (run.folder / ".study.json.123").write_text("{")
    assert check_new(tmp_path, "r", study) == "r"
    with begun(run):
        assert reopen(run.folder).study == study
    with pytest.raises(UserError, match="exists; resume that run"):
        check_new(tmp_path, "r", study)
    with pytest.raises(UserError, match="cannot be created"), begun(run):
        raise AssertionError("it was begun twice")


def test_a_signal_before_the_plan_is_written_leaves_no_folder(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(_: Run) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("tune_kd.records.run_folder.create", left)
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    with pytest.raises(SystemExit), begun(run):
        raise AssertionError("it was begun")
    assert not run.folder.exists()


def test_a_disk_too_full_for_the_holder_file_leaves_no_folder(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("tune_kd.records.lock.publish", full)
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    with pytest.raises(OSError, match="no space left"), begun(run):
        raise AssertionError("it was begun")
    assert not run.folder.exists()


def test_a_run_created_by_another_driver_before_the_lock_is_acquired_is_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})

    @contextmanager
    def after_another(folder: Path) -> Iterator[None]:
        create(run)
        with held(folder):
            yield

    monkeypatch.setattr("tune_kd.records.run_folder.held", after_another)
    with pytest.raises(UserError, match="was created meanwhile"), begun(run):
        raise AssertionError("it was begun twice")
    assert reopen(run.folder).study == study


def test_a_secret_in_the_settings_of_an_extension_is_not_recorded(study: Study, tmp_path: Path) -> None:
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    create(run)
    source = Source(tmp_path / "x.py", "test", None, (f"question={SECRETS['GitHub'][0]}",))
    before = (run.folder / "study.json").read_bytes()
    with pytest.raises(UserError, match=r"source\.settings\[0\] holds what looks like"):
        record_extension(replace(run, source=source))
    assert (run.folder / "study.json").read_bytes() == before


def test_an_extension_whose_trials_have_not_ended_cannot_be_extended_again(study: Study, tmp_path: Path) -> None:
    """The driver was killed after it recorded the extension: the next look is the recorded one."""
    run = Run("r", tmp_path / "r", replace(study, confirm=Confirm((1, 2), looks=(2, 3, 4))), "0" * 64, None, {})
    create(run)
    end(run)
    record_extension(extended(reopen(run.folder)))
    with pytest.raises(UserError, match="trials have not ended; resume it"):
        extended(reopen(run.folder))
    assert reopen(run.folder).look == 1


def test_a_missing_or_unreadable_holder_file_means_no_holder(tmp_path: Path) -> None:
    with held(tmp_path):
        assert holder(tmp_path) is not None
        (tmp_path / "holder.json").write_text("{")
        assert holder(tmp_path) is None
    assert holder(tmp_path) is None


def test_temporary_files_of_a_killed_writer_are_removed_when_the_run_is_locked(made: Run) -> None:
    left = made.folder / ".epochs.parquet.4711"
    left.write_bytes(b"half a table")
    kept = {path.name for path in made.folder.iterdir()} - {left.name}
    with held(made.folder):
        assert not left.exists()
    assert {path.name for path in made.folder.iterdir()} == kept | {".lock"}


def test_a_changed_plan_on_disk_is_detected(study: Study, tmp_path: Path) -> None:
    run = Run("r", tmp_path / "r", study, "0" * 64, None, {})
    create(run)
    text = (run.folder / "study.json").read_text()
    (run.folder / "study.json").write_text(text.replace('"look": 0', '"look": 1'))
    with pytest.raises(UserError, match=r"was changed after it was written.*restore the file"):
        reopen(run.folder)


FILE = """
from dataclasses import replace
from conftest import tiny
from tune_kd import Confirm, Factor, Recipe

def study():
    return {change}
"""
AS_IT_WAS = "tiny()"


@pytest.fixture
def of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A finished run of a study in a file of the working directory."""
    monkeypatch.chdir(tmp_path)

    def made(declared: str = AS_IT_WAS, ended: bool = True) -> Run:
        declare(tmp_path, declared)
        source = Source(tmp_path / "mine.py", "test")
        run = Run("mine", tmp_path / "results" / "mine", source.read(), "d" * 64, None, {}, source)
        create(run)
        end(run, "completed" if ended else "running")
        return run

    return made


def declare(folder: Path, change: str) -> None:
    (folder / "mine.py").write_text(FILE.format(change=change))


def end(run: Run, status: str = "completed") -> None:
    ledger = Ledger(run.folder / LEDGER)
    for trial in run.plan.trials:
        ledger.put(TRIALS, first_row(run.name, trial) | {"status": status, "epochs_run": trial.recipe.epochs})
    ledger.close()


def test_changes_to_a_study_file_are_reported_field_by_field(of_file: Callable[..., Run], tmp_path: Path) -> None:
    run = of_file()
    assert changes(reopen(run.folder)) == []
    declare(tmp_path, "replace(tiny(), recipe=Recipe(2, 16, lr=0.07), contrasts=tiny().contrasts[1:])")
    recipe, contrasts = sorted(changes(reopen(run.folder)), reverse=True)
    assert recipe == "recipe.lr was 0.05 and is 0.07"
    assert contrasts == "contrasts was changed"  # too long to be shown
    (tmp_path / "mine.py").unlink()
    assert changes(reopen(run.folder)) == []


def test_added_seeds_and_levels_are_recorded_beside_the_original_study(
    of_file: Callable[..., Run], tmp_path: Path
) -> None:
    run = of_file()
    before = json.loads((run.folder / "study.json").read_text())
    factors = "(*tiny().factors[:2], Factor('temperature', (2.0, 4.0, 8.0)))"
    declare(tmp_path, f"replace(tiny(), confirm=Confirm((1, 2, 3)), factors={factors})")
    more = extended(reopen(run.folder))
    record_extension(more)
    again, record = reopen(run.folder), json.loads((run.folder / "study.json").read_text())
    assert again.study == more.study
    assert again.plan == more.plan
    assert set(before["trials"]) < set(record["trials"])
    assert {"name": "cifar/logit/T=8", "role": "compared"} in record["extended"]["arms"]
    for name in ("study", "study_sha256", "contrasts", "contrasts_sha256", "arms"):
        assert record[name] == before[name]
    assert changes(again) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("replace(tiny(), recipe=Recipe(3, 16, 0.05))", "recipe.epochs was 2 and is 3"),
        ("replace(tiny(), confirm=Confirm((2, 1, 3)))", r"confirm.seeds was \[1, 2\] and is \[2, 1, 3\]"),
        ("replace(tiny(), confirm=Confirm((1, 2), looks=(2, 4)))", r"confirm.looks was null and is \[2, 4\]"),
        (
            "replace(tiny(), factors=(Factor('stem', ('cifar',)), *tiny().factors[1:]), moderator=None)",
            "factors.stem was",
        ),
        ("replace(tiny(), contrasts=(), moderator=None)", "contrasts was"),
        (AS_IT_WAS, "nothing to add: .*mine.py declares the same seeds and levels"),
    ],
)
def test_extensions_other_than_added_seeds_and_levels_are_rejected(
    of_file: Callable[..., Run], tmp_path: Path, change: str, says: str
) -> None:
    run = of_file()
    before = (run.folder / "study.json").read_text()
    declare(tmp_path, change)
    with pytest.raises(UserError, match=says):
        extended(reopen(run.folder))
    assert (run.folder / "study.json").read_text() == before


def test_a_run_that_has_not_ended_cannot_be_extended(of_file: Callable[..., Run], tmp_path: Path) -> None:
    run = of_file(ended=False)
    declare(tmp_path, "replace(tiny(), confirm=Confirm((1, 2, 3)))")
    with pytest.raises(UserError, match="trials have not ended; resume it first, then use --extend"):
        extended(reopen(run.folder))


def test_a_run_is_extended_to_each_declared_look_in_turn(of_file: Callable[..., Run], tmp_path: Path) -> None:
    run = of_file("replace(tiny(), confirm=Confirm((1, 2), looks=(2, 3, 5)))")
    seeds = []
    for _ in range(2):
        seeds.append({trial.seed for trial in reopen(run.folder).plan.trials if trial.phase == "confirm"})
        more = extended(reopen(run.folder))
        record_extension(more)
        end(more)
    seeds.append({trial.seed for trial in reopen(run.folder).plan.trials if trial.phase == "confirm"})
    assert seeds == [{1, 2}, {1, 2, 3}, {1, 2, 3, 4, 5}]
    with pytest.raises(UserError, match="nothing to add: its last look is done"):
        extended(reopen(run.folder))
    declare(tmp_path, "replace(tiny(), confirm=Confirm((1, 2, 3, 4, 5, 6), looks=(2, 3, 6)))")
    with pytest.raises(UserError, match=r"confirm\.looks was"):
        extended(reopen(run.folder))


def test_settings_of_an_extension_are_recorded(of_file: Callable[..., Run]) -> None:
    run = of_file()
    record_extension(extended(reopen(run.folder), ["confirm.seeds=[1,2,5]"]))
    again = reopen(run.folder)
    assert again.study.confirm == Confirm((1, 2, 5))
    assert changes(again) == []


def test_a_study_that_this_version_no_longer_allows_is_rejected_with_its_commit(tmp_path: Path) -> None:
    """The run began before versions refused its study: its records are intact, and no results are lost."""
    run = Run("r", tmp_path / "r", tiny(), "d" * 64, None, {})
    create(run)

    def as_before(record: dict[str, Any]) -> None:
        record["study"]["moderator"] = "temperature"
        record |= {"study_sha256": digest(record["study"]), "git_commit": "abc123"}

    altered(run.folder / "study.json", as_before)
    with pytest.raises(
        UserError, match=r"at commit abc123; this version does not allow its study \(moderator is 'temperature', .*; "
    ):
        reopen(run.folder)


def test_a_run_named_from_inside_its_folder_finds_its_teachers(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.folder / "deep").mkdir()
    for here, name in ((made.folder, "."), (made.folder / "deep", "..")):
        monkeypatch.chdir(here)
        assert find(Path("results"), name) == made.folder
        assert reopen(find(Path("results"), name)).teachers == made.teachers

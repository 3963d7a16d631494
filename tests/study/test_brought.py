"""A study's own code: how it is found, which files are part of the ids, and what is rejected."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import tiny
from tune_kd.study import brought
from tune_kd.study.discover import resolve
from tune_kd.study.methods import Method
from tune_kd.study.plan import plan
from tune_kd.study.spec import Factor, Study
from tune_kd.system.errors import UserError

LOSS = """
from torch import nn
from helper import half

class Half(nn.Module):
    def __init__(self, context):
        super().__init__()

    def forward(self, batch, *, weight):
        return half(weight) * (batch.student_logits - batch.teacher_logits).pow(2).mean()
"""
STUDY = """
from dataclasses import replace
from conftest import tiny
from tune_kd import Compare, Factor, Method
{imports}

def study():
    methods = (Method("half", loss={loss}, settings={{"weight": 2.0}}),)
    return replace(tiny(), methods=methods, factors=(Factor("method", ("none", "logit", "half")),), reference=(),
                   contrasts=(Compare("method", "half", "none"),), moderator=None)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "half.py").write_text(LOSS)
    (tmp_path / "helper.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "other.py").write_text("nobody = 'imports it'\n")
    write(tmp_path)
    return tmp_path


def write(folder: Path, loss: str = "'half.py:Half'", imports: str = "") -> Path:
    file = folder / "study.py"
    file.write_text(STUDY.format(loss=loss, imports=imports))
    return file


def study_of(folder: Path) -> Study:
    return resolve(folder / "study.py", "test")


def ids(study: Study) -> dict[tuple[str, str, int], str]:
    return {(each.arm, each.phase, each.seed): each.trial_id for each in plan(study, "0" * 64).trials}


def test_a_loss_is_found_with_the_files_it_imports_from_the_study_folder(folder: Path) -> None:
    (code,) = brought.codes(study_of(folder), folder)
    assert (code.name, code.main, [name for name, _ in code.files]) == ("Half", "half.py", ["half.py", "helper.py"])
    assert [name for name, _ in code.packages] == ["torch"]
    assert study_of(folder).methods[0].source == code.digest


@pytest.mark.parametrize("edited", ["half.py", "helper.py"])
def test_editing_a_loss_or_its_imports_changes_only_the_ids_of_its_arms(folder: Path, edited: str) -> None:
    before = ids(study_of(folder))
    (folder / edited).write_text((folder / edited).read_text() + "# more\n")
    after = ids(study_of(folder))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in before if key[0].endswith("half")}
    assert changed


@pytest.mark.parametrize("change", [{"views": 2}, {"needs": "features"}, {"version": 2}])
def test_views_needs_and_version_of_a_method_are_part_of_the_ids(folder: Path, change: dict[str, Any]) -> None:
    study = study_of(folder)
    other = replace(study, methods=(replace(study.methods[0], **change),))
    before, after = ids(study), ids(other)
    assert {key for key in before if before[key] != after[key]} == {key for key in before if key[0].endswith("half")}


def test_editing_files_that_the_loss_does_not_import_changes_no_id(folder: Path) -> None:
    before = ids(study_of(folder))
    (folder / "other.py").write_text("x = 1\n")
    write(folder, imports="# a comment\n")
    assert ids(study_of(folder)) == before


def test_a_loss_given_as_a_class_or_as_text_yields_the_same_study(folder: Path) -> None:
    as_text = study_of(folder)
    write(folder, loss="Half", imports="from half import Half")
    assert study_of(folder) == as_text


def test_the_source_of_an_installed_loss_is_only_its_module(tmp_path: Path) -> None:
    method = Method("mine", loss="tune_kd.training.methods.logit:Logit", settings={"temperature": 4.0})
    study = brought.with_sources(replace(tiny(), methods=(method,)), tmp_path)
    (code,) = brought.codes(study, tmp_path)
    assert code.is_installed
    assert (code.main, [name for name, _ in code.files]) == (
        "tune_kd.training.methods.logit",
        ["tune_kd/training/methods/logit.py"],
    )


def test_a_study_without_custom_losses_is_unchanged(tmp_path: Path) -> None:
    assert brought.with_sources(tiny(), tmp_path) == tiny()
    assert all(trial.brought is None for trial in plan(tiny()).trials)


def test_code_that_changed_after_the_study_was_resolved_is_rejected(folder: Path) -> None:
    study = study_of(folder)
    (folder / "helper.py").write_text("def half(x):\n    return x / 3\n")
    with pytest.raises(UserError, match=r"half\.py:Half, or a file that it imports, does not match the digest"):
        brought.codes(study, folder)


@pytest.mark.parametrize(
    ("loss", "imports", "words"),
    [
        ("'half.py'", "", "'half.py'; allowed: FILE.py:CLASS"),
        ("'gone.py:Half'", "", "there is no gone.py in"),
        ("'nowhere.at_all:Half'", "", "there is no nowhere.at_all; allowed"),
        ("'../outside.py:Half'", "", "outside of"),
        ("'bad.py:Half'", "", "bad.py, line 1"),
        ("'round.py:Half'", "", "imports the study's own file"),
        ("3", "", "is 3; allowed"),
        ("Own", "class Own: pass", "in the study's own file"),
        ("outer()", "def outer():\n    class Inner: pass\n    return Inner", "a nested class"),
    ],
)
def test_an_invalid_loss_is_rejected_with_its_field_and_the_reason(
    folder: Path, loss: str, imports: str, words: str
) -> None:
    (folder.parent / "outside.py").write_text(LOSS)
    (folder / "bad.py").write_text("def f(:\n")
    (folder / "round.py").write_text("import study\nclass Half: pass\n")
    write(folder, loss, imports)
    with pytest.raises(UserError) as caught:
        study_of(folder)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("methods[0].loss of 'half' ")
    assert words in caught.value.problems[0]


def test_all_invalid_losses_are_reported_at_once(tmp_path: Path) -> None:
    methods = (Method("a", loss="a.py:A"), Method("b", loss="b.py:B"))
    with pytest.raises(UserError) as caught:
        brought.with_sources(replace(tiny(), methods=methods), tmp_path)
    assert len(caught.value.problems) == 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["a.py", "b.py", "c/d.py"]), st.binary(max_size=4)), unique_by=lambda x: x[0])
)
def test_a_code_digest_depends_on_name_and_files_but_not_on_package_versions(files: list[tuple[str, bytes]]) -> None:
    code = brought.Code("A", "a.py", tuple(sorted(files)))
    assert replace(code, packages=(("numpy", "1"),)).digest == code.digest
    assert replace(code, name="B").digest != code.digest
    for place, (name, content) in enumerate(code.files):
        changed = list(code.files)
        changed[place] = (name, content + b" ")
        assert replace(code, files=tuple(changed)).digest != code.digest


def test_a_setting_of_a_custom_loss_as_a_factor_is_part_of_the_ids(folder: Path) -> None:
    study = study_of(folder)
    swept = replace(study, factors=(*study.factors, Factor("weight", (1.0, 2.0))), reference=(("weight", 2.0),))
    one, other = ids(study), ids(swept)
    assert one["half", "confirm", 1] == other["half/weight=2", "confirm", 1] != other["half/weight=1", "confirm", 1]
    assert one["logit", "confirm", 1] == other["logit", "confirm", 1]

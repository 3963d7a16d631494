"""The imports of a loss from the study's folder are found in its source, for any content of the folder."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny
from tune_kd.execute.session import run
from tune_kd.study import brought
from tune_kd.study.brought import Code
from tune_kd.study.discover import resolve
from tune_kd.study.methods import Method
from tune_kd.study.validate import check
from tune_kd.system.errors import UserError
from tune_kd.training import loss as losses

CLASS = "class Loss:\n    pass\n"


def code_of(folder: Path, loss: str | type) -> Code:
    study = brought.with_sources(replace(tiny(), methods=(Method("mine", loss=loss),)), folder)
    return brought.codes(study, folder)[0]


def made(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def found(folder: Path, files: dict[str, str], loss: str = "a.py:Loss") -> list[str]:
    made(folder, files)
    code = code_of(folder, loss)
    with losses.brought([code]):  # workers can import it
        pass
    return [name for name, _ in code.files]


@pytest.mark.parametrize(
    ("files", "loss", "expected"),
    [
        ({"a.py": f"from own.b import x\n{CLASS}", "own/b.py": "x = 1\n"}, "a.py:Loss", ["a.py", "own/b.py"]),
        ({"a.py": f"import numpy\n{CLASS}", "numpy/c.txt": ""}, "a.py:Loss", ["a.py"]),
        ({"a.py": f"import pytest\n{CLASS}", "pytest/c.txt": ""}, "a.py:Loss", ["a.py"]),
        ({"a.py": f"import json\n{CLASS}", "json.py": "x = 1\n"}, "a.py:Loss", ["a.py"]),
        ({"a.py": f"from tune_kd.training import Batch\n{CLASS}", "tune_kd/training.py": ""}, "a.py:Loss", ["a.py"]),
        (
            {"p/a.py": f"from .b import x\n{CLASS}", "p/b.py": "from . import c\nx = 1\n", "p/c.py": ""},
            "p/a.py:Loss",
            ["p/a.py", "p/b.py", "p/c.py"],
        ),
        (
            {"p/a.py": f"from .b import x\n{CLASS}", "p/b.py": "x = 1\n", "p/__init__.py": ""},
            "p.a:Loss",
            ["p/__init__.py", "p/a.py", "p/b.py"],
        ),
        ({"a.py": f"from p import *\n{CLASS}", "p/__init__.py": "", "p/b.py": ""}, "a.py:Loss",
         ["a.py", "p/__init__.py", "p/b.py"]),
        ({"a.py": f"import b\n{CLASS}", "b.py": "import a\n"}, "a.py:Loss", ["a.py", "b.py"]),
    ],
)  # fmt: skip
def test_imports_of_a_loss_are_resolved_as_python_resolves_them(
    tmp_path: Path, files: dict[str, str], loss: str, expected: list[str]
) -> None:
    assert found(tmp_path, files, loss) == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: file.write_bytes(b"x = " + b"-" * 200_000 + b"1\n"), "Python cannot read"),
        (lambda file: file.write_bytes(b"x = a" + b".a" * 200_000 + b"\n"), "Python cannot read"),
        (lambda file: file.write_bytes(b"x = 1\0\n"), "not valid Python"),
        (lambda file: file.write_text("def f(:\n"), "line 1, which is not valid Python: invalid syntax"),
        (lambda file: (file.write_text(""), os.truncate(file, 2**40)), "expected a regular file of at most"),
    ],
)
@pytest.mark.parametrize("name", ["a.py", "b.py"])
def test_an_unreadable_source_file_is_named_in_the_error(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    made(tmp_path, {"a.py": f"def later():\n    import b\n{CLASS}"})
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"^methods\[0\]\.loss of 'mine' is 'a\.py:Loss', and .*{name}") as caught:
        code_of(tmp_path, "a.py:Loss")
    assert words in str(caught.value)


@pytest.mark.parametrize("loss", ["l\0.py:Loss", f"{'l' * 300}.py:Loss", "\ud800.py:Loss", "loop.py:Loss", "a..b:Loss"])
def test_a_loss_whose_file_or_module_does_not_exist_is_rejected(tmp_path: Path, loss: str) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    with pytest.raises(UserError, match=r"methods\[0\]\.loss of 'mine' is .*, but there is no "):
        code_of(tmp_path, loss)


def test_a_package_of_a_venv_inside_the_study_folder_counts_as_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = ".venv/lib/python3/site-packages"
    made(tmp_path, {f"{packages}/lent/__init__.py": "", f"{packages}/lent/a.py": f"from . import b\n{CLASS}"})
    made(tmp_path, {f"{packages}/lent/b.py": ""})
    monkeypatch.syspath_prepend(tmp_path / packages)
    code = code_of(tmp_path, "lent.a:Loss")
    assert (code.main, code.is_installed) == ("lent.a", True)
    from lent.a import Loss  # type: ignore[import-not-found]

    assert code_of(tmp_path, Loss) == code
    for name in [name for name in sys.modules if name.partition(".")[0] == "lent"]:
        del sys.modules[name]


def test_same_named_losses_in_files_that_import_each_other_have_different_digests(tmp_path: Path) -> None:
    made(tmp_path, {"p/__init__.py": "from p import a, b\n"})
    made(tmp_path, {f"p/{name}.py": f"import p\n{CLASS}    name = {name!r}\n" for name in "ab"})
    both = [code_of(tmp_path, f"p/{name}.py:Loss") for name in "ab"]
    assert both[0].files == both[1].files
    assert both[0].digest != both[1].digest


def test_methods_set_on_the_command_line_get_the_digest_of_their_source(tmp_path: Path) -> None:
    made(tmp_path, {"a.py": CLASS, "study.py": "from conftest import tiny as study\n"})
    study = resolve(tmp_path / "study.py", "test", None, ('methods=[{"name": "mine", "loss": "a.py:Loss"}]',))
    assert study.methods[0].source == code_of(tmp_path, "a.py:Loss").digest


@pytest.mark.parametrize("value", ["True", "'3'", "10**400"])
def test_a_setting_that_is_not_a_finite_number_is_rejected(tmp_path: Path, value: str) -> None:
    study = "from conftest import tiny\nfrom dataclasses import replace\nfrom tune_kd import Method\n"
    study += f"def study():\n    method = Method('mine', loss='a.py:Loss', settings={{'weight': {value}}})\n"
    made(tmp_path, {"a.py": CLASS, "study.py": f"{study}    return replace(tiny(), methods=(method,))\n"})
    with pytest.raises(UserError, match=r"methods\[0\]\.settings has weight .*; allowed: a finite number"):
        resolve(tmp_path / "study.py", "test")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method("mine", loss="a.py:Loss", settings=(("weight", 1.0), ("weight", 2.0))), "'weight' more than once"),
        (Method("", loss="a.py:Loss"), "name is ''; allowed: text that is not empty"),
        (Method(" mine", loss="a.py:Loss"), "name is ' mine'; allowed: text that is not empty"),
    ],
)
def test_a_method_with_a_duplicate_setting_or_an_invalid_name_is_rejected(method: Method, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(replace(tiny(), methods=(method,)))


def test_a_loss_defined_in_the_script_that_runs_the_study_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, {"script.py": CLASS})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    study = replace(tiny(), methods=(Method("mine", loss="script.py:Loss"),))
    with pytest.raises(UserError, match="the study's own file"):
        run(study)
    assert [each.name for each in tmp_path.iterdir()] == ["script.py"]

"""A study file is user code: its imports, output and errors, and the cleanup afterwards."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from tune_kd.execute import jobs
from tune_kd.study import discover
from tune_kd.study.source import executed
from tune_kd.system.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = "from search_spaces.ablation import smoke as study\n"
BOTH = {
    "python -m tune_kd": [sys.executable, "-m", "tune_kd"],
    "tune-kd": [str(Path(sys.executable).parent / "tune-kd")],
}


def planned(how: str, study: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`plan --json` of a study, in a separate process as for users."""
    command = [*BOTH[how], "plan", study, "--scale", "smoke", "--json"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\nsys.exit(0)", "which cannot be read: SystemExit: 0 (line 2)"),
        ("raise KeyboardInterrupt", "which cannot be read: KeyboardInterrupt (line 1)"),
        ("def study():\n    exit('done')", "where study() fails: SystemExit: done (line 2)"),
        ("def own():\n    raise KeyboardInterrupt\nSCALES = {'smoke': own}", "where own() fails: KeyboardInterrupt"),
        ("def study():\n    def again(): again()\n    again()", "where study() fails: RecursionError: "),
        ("class E(Exception):\n    def __str__(self): return 1/0\nraise E", "which cannot be read: E (line 3)"),
        ("def __getattr__(name): raise OSError('gone')", "whose SCALES cannot be read: OSError: gone (line 1)"),
        ("raise ValueError('one\\n\\nother')", "which cannot be read: ValueError: one other (line 1)"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name' (line 1)"),
        (
            f"{SMALL}import threading\ndef odd():\n    made = study()\n"
            "    object.__setattr__(made, 'question', threading.Lock())\n    return made\nSCALES = {'smoke': odd}",
            "whose study cannot be read: TypeError: cannot pickle",
        ),
    ],
)
def test_any_exception_of_a_study_file_becomes_a_one_line_error_that_names_the_file(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        discover.resolve(file, "smoke")
    (said,) = refused.value.problems
    assert said.startswith(f"STUDY is {file}, "), said
    assert words in said
    assert "\n" not in said


def test_sigint_while_a_study_file_is_read_exits_with_130(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    ended = planned("tune-kd", "mine.py", tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.parametrize("how", BOTH)
def test_a_study_that_calls_sys_exit_fails_with_status_2_and_a_message(tmp_path: Path, how: str) -> None:
    (tmp_path / "mine.py").write_text("import sys\ndef study(): sys.exit(0)\n")
    ended = planned(how, "mine.py", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"tune_kd: STUDY is {tmp_path}/mine.py, where study() fails: SystemExit: 0 (line 2)\n"


def test_a_user_error_raised_by_a_study_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tune_kd import UserError\nraise UserError('a is b', 'c is d')\n")
    with pytest.raises(UserError) as refused:
        discover.resolve(tmp_path / "mine.py", "smoke")
    assert refused.value.problems == tuple(f"STUDY is {tmp_path}/mine.py: {each}" for each in ("a is b", "c is d"))


@pytest.mark.parametrize("declared", ["{1: study}", "{}", "{'smoke': 3}", "[study]"])
def test_scales_that_are_not_a_dict_of_functions_are_rejected(tmp_path: Path, declared: str) -> None:
    (tmp_path / "mine.py").write_text(f"{SMALL}SCALES = {declared}\n")
    with pytest.raises(UserError, match=r"whose SCALES is .*; allowed: a dict of functions by name"):
        discover.resolve(tmp_path / "mine.py", "smoke")


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.modules['odd'] = type('Odd', (), {'__file__': 3, '__getattr__': lambda *_: 1 / 0})()",
        "import sys, types\nclass Lazy(types.ModuleType):\n    def __getattr__(self, name): raise RuntimeError(name)\n"
        "sys.modules['odd'] = Lazy('odd')",
        "import sys, types\nsys.modules['odd'] = types.ModuleType('odd')\nsys.modules['odd'].__path__ = 3",
        "import sys\nsys.modules['odd'] = object()",
        "import sys\nsys.meta_path.clear()",
        "import os, beside\nos.unlink(beside.__file__)",
        "import os\nos.unlink(__file__)",
        "import sys\nsys.path = None",
    ],
)
def test_a_study_file_that_tampers_with_imports_is_read_and_import_paths_are_restored(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "mine.py").write_text(f"{SMALL}{text}\n")
    before = list(sys.path), list(sys.meta_path)
    for _ in range(2):
        assert discover.resolve(tmp_path / "mine.py", "smoke").name == "ablation"
    sys.modules.pop("odd", None)
    assert (list(sys.path), list(sys.meta_path)) == before


def test_a_package_with_a_c_extension_stays_in_sys_modules(tmp_path: Path) -> None:
    import _json  # a C module without imports

    (tmp_path / "inc").mkdir()
    shutil.copy(_json.__file__, tmp_path / "inc" / Path(_json.__file__).name)
    (tmp_path / "inc" / "__init__.py").write_text("from inc._json import scanstring\n")
    (tmp_path / "mine.py").write_text(f"import inc\n{SMALL}")
    assert discover.resolve(tmp_path / "mine.py", "smoke").name == "ablation"
    assert sys.modules.pop("inc").scanstring and sys.modules.pop("inc._json")


def test_output_of_a_study_file_and_its_subprocesses_goes_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import os, sys\n{SMALL}os.system('echo one')\nos.write(1, b'two\\n')\nsys.__stdout__.write('three\\n')\n"
    )
    ended = planned("tune-kd", "mine.py", tmp_path)
    assert json.loads(ended.stdout)["study"] == "ablation"
    assert ended.stderr.split() == ["one", "two", "three"]


def test_a_symlinked_study_imports_modules_from_its_real_folder(tmp_path: Path) -> None:
    for name in ("real", "link"):
        (tmp_path / name).mkdir()
    (tmp_path / "real" / "beside.py").write_text(SMALL)
    (tmp_path / "real" / "mine.py").write_text("from beside import study\n")
    (tmp_path / "link" / "other.py").symlink_to(tmp_path / "real" / "mine.py")
    assert discover.resolve(tmp_path / "link" / "other.py", "smoke").name == "ablation"
    assert executed(tmp_path / "link" / "other.py").files == {
        "studies/other.py": tmp_path / "link" / "other.py",
        "studies/beside.py": tmp_path / "real" / "beside.py",
    }


@pytest.mark.parametrize("how", BOTH)
def test_modules_are_imported_from_the_working_directory_only_if_the_study_is_there(tmp_path: Path, how: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "only_here.py").write_text("")
    (tmp_path / "sub" / "mine.py").write_text(f"import only_here\n{SMALL}")
    ended = planned(how, "sub/mine.py", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No module named 'only_here' (line 1)" in ended.stderr
    (tmp_path / "mine.py").write_text(f"import only_here\n{SMALL}")
    assert planned(how, "mine.py", tmp_path).returncode == 0


def test_modules_of_a_local_search_spaces_package_are_copied_under_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "common.py").write_text(SMALL)
    (tmp_path / "search_spaces" / "mine.py").write_text("from search_spaces.common import study\n")
    assert discover.resolve(tmp_path / "search_spaces" / "mine.py", "smoke").name == "ablation"
    files = executed(tmp_path / "search_spaces" / "mine.py").files
    assert {"studies/mine.py", "search_spaces/common.py"} <= set(files)
    with jobs._copy(files) as copy:
        here = {**os.environ, "PYTHONPATH": str(copy)}
        command = [sys.executable, "-m", "tune_kd", "plan", "studies/mine.py", "--scale", "smoke", "--json"]
        ended = subprocess.run(command, cwd=copy, env=here, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_study_function_is_called_once_per_data_set(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from search_spaces.ablation import smoke\nCALLS = []\n"
        "def study(data='digits'):\n    CALLS.append(data)\n    return smoke(data)\n"
    )
    for data in (None, "cifar10", None, "cifar10"):
        assert discover.resolve(tmp_path / "mine.py", "smoke", data).data.name == (data or "digits")
    assert executed(tmp_path / "mine.py").module.CALLS == ["digits", "cifar10"]


@pytest.mark.parametrize("how", BOTH)
def test_a_module_beside_the_study_is_imported_from_any_directory_and_prints_go_to_stderr(
    tmp_path: Path, how: str
) -> None:
    """Also a module that is imported when study() is called. The file is executed once."""
    home = tmp_path / "home"
    (home / "parts").mkdir(parents=True)
    (home / "parts" / "names.py").write_text("NAME = 'named'\n")
    (home / "questions.py").write_text("print('asked')\nQUESTION = 'Here?'\n")
    (home / "mine.py").write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import smoke as small\nprint('executed')\n"
        "from parts.names import NAME\ndef study():\n    from questions import QUESTION\n"
        "    return replace(small(), name=NAME, question=QUESTION)\n"
    )
    ended = planned(how, "home/mine.py", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["study"] == "named"
    assert ended.stderr.split() == ["executed", "asked"]
    assert {path.name for path in home.rglob("*")} == {"mine.py", "questions.py", "parts", "names.py"}, "traces"
    assert executed(home / "mine.py").files == {
        "studies/mine.py": home / "mine.py",
        "studies/parts/names.py": home / "parts" / "names.py",
    }


def test_modules_of_a_study_folder_do_not_shadow_other_modules_afterwards(tmp_path: Path) -> None:
    """Two studies each have a module with the same name."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "beside.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "mine.py").write_text(
            "import sys\nfrom dataclasses import replace\nfrom search_spaces.ablation import smoke as small\n"
            "sys.path.append('/of/mine')\n"
            "def study():\n    import beside\n    assert '/of/mine' in sys.path\n"
            "    return replace(small(), name=beside.NAME)\n"
        )
    import search_spaces.ablation  # noqa: F401 - imported before, and must remain

    before = list(sys.path), dict(sys.modules), list(sys.meta_path)
    for name in ("one", "other", "one"):
        assert discover.resolve(tmp_path / name / "mine.py", "smoke").name == name
    assert (list(sys.path), list(sys.meta_path)) == (before[0], before[2])
    assert all(sys.modules.get(name) is module for name, module in before[1].items())
    left = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    assert {name[:11] for name, file in left.items() if file.startswith(str(tmp_path))} == {"study_mine_"}


def test_classes_of_a_study_file_can_be_pickled_and_have_type_hints(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, replace\n"
        "from search_spaces.ablation import smoke as small\n"
        "@dataclass(frozen=True)\nclass Sizes:\n    epochs: int = 3\n    wide: Sizes | None = None\n"
        "SIZES = Sizes()\ndef study():\n    base, sizes = small(), replace(SIZES, epochs=4)\n"
        "    return replace(base, recipe=replace(base.recipe, epochs=sizes.epochs))\n"
    )
    assert discover.resolve(file, "smoke").recipe.epochs == 4
    sizes = executed(file).module.SIZES
    assert get_type_hints(type(sizes))["epochs"] is int
    assert pickle.loads(pickle.dumps(sizes)) == sizes
    assert [field.name for field in fields(replace(sizes, epochs=5))] == ["epochs", "wide"]


def test_a_study_file_is_executed_again_only_after_a_module_it_imports_changed(tmp_path: Path) -> None:
    file, beside, count = tmp_path / "mine.py", tmp_path / "beside.py", tmp_path / "count"
    file.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\nfrom search_spaces.ablation import smoke as small\n"
        f"import beside\nwith Path({str(count)!r}).open('a') as told: told.write('.')\n"
        "def study(): return replace(small(), name=beside.NAME)\n"
    )
    for name, times in (("first", 1), ("first", 1), ("later", 2)):
        beside.write_text(f"NAME = {name!r}\n")
        for _ in range(2):
            assert discover.resolve(file, "smoke").name == name
        assert count.read_text() == "." * times


@pytest.mark.parametrize("how", BOTH)
def test_installed_studies_are_found_for_any_pythonpath_and_local_studies_take_precedence(
    tmp_path: Path, how: str
) -> None:
    """The working directory and PYTHONPATH each have a `search_spaces` package. The one in the working directory has a
    study with the name of an installed study."""
    for folder in (tmp_path / "search_spaces", tmp_path / "path" / "search_spaces"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (tmp_path / "search_spaces" / "ablation.py").write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import smoke as small\n"
        "def study(): return replace(small(), name='of the working directory')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}

    def told(*arguments: str) -> dict[str, object]:
        ended = subprocess.run(
            [*BOTH[how], *arguments, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        found: dict[str, object] = json.loads(ended.stdout)
        return found

    assert told("list")["studies"] == {
        name: str((tmp_path if name == "ablation" else ROOT) / "search_spaces" / f"{name}.py")
        for name in ("ablation", "cifar_stem", "methods", "standard_stem", "tuned")
    }
    assert told("plan", "ablation", "--scale", "smoke")["study"] == "of the working directory"
    assert told("plan", "cifar_stem", "--scale", "smoke")["study"] == "cifar_stem"

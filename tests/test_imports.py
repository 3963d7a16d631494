"""Allowed imports of each folder, checked in its files and in the modules that a command loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("cli", "execute", "reporting", "analysis", "training", "records", "data", "study", "system")
"""The folders of `tune_kd`. Each imports only from itself and from those after it."""
FORBIDDEN = {"reporting": {"training"}, "analysis": {"training"}, "training": {"records"}}
"""Imports that are also forbidden: reading results needs no torch, and training is independent of records."""
ONLY = {
    "ray": {"execute"},
    "sqlite3": {"records/ledger.py"},
    "pyarrow": {"records", "system/object_store.py"},
    "optuna": {"study/sampler.py"},
}
"""The only folders or files that may import a package."""


PACKAGE = ROOT / "tune_kd"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_table_names_all_folders() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES} == set(ORDER)
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert files == ["__init__.py", "__main__.py", "py.typed"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_those_below_it(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("tune_kd.")}
    assert used <= set(ORDER[ORDER.index(folder) :]) - FORBIDDEN.get(folder, set())
    assert not any(name.split(".")[0] == "search_spaces" for name in imports(path)) or path.stem == "discover"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_sqlite_pyarrow_and_optuna_are_imported_in_one_place_each(path: Path) -> None:
    within = path.relative_to(PACKAGE)
    outside = {name.split(".")[0] for name in imports(path)}
    for package, owners in ONLY.items():
        assert package not in outside or {within.parts[0], str(within)} & owners


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.py")), ids=lambda path: path.name)
def test_a_search_space_imports_only_public_names(path: Path) -> None:
    assert {name.rsplit(".", 1)[0] for name in imports(path) if name.startswith("tune_kd")} <= {"tune_kd"}


@pytest.mark.parametrize("arguments", ["['--help']", "['plan', 'ablation', '--scale', 'paper', '--json']", "['list']"])
def test_a_quick_command_imports_neither_torch_nor_ray(arguments: str) -> None:
    code = f"""
import sys
from tune_kd.cli import app
try:
    app({arguments})
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "ray", "pandas", "torchvision"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_report_needs_neither_torch_nor_ray_nor_a_network(finished: Path, tmp_path: Path) -> None:
    code = f"""
import socket, sys
socket.socket.connect = None
from tune_kd.cli import app
try:
    app(["report", {str(finished)!r}, "--to", {str(tmp_path)!r}, "--json"])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "ray", "torchvision", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()

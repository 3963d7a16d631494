"""Which room may know which: read from the files, and from what a command really imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "tuning": set(),
    "characters": set(),
    "environment": {"study", "characters"},
    "study": {"tuning", "characters"},
    "search": {"tuning"},
    "growth": {"study", "trial", "plan", "tuning", "records"},
    "clock": set(),
    "pace": set(),
    "monitoring": {"study", "storage", "environment"},
    "faults": set(),
    "privacy": set(),
    "storage": {"faults"},
    "mirror": {"study", "storage", "environment", "privacy"},
    "sharing": {"mirror", "records", "storage"},
    "memory": set(),
    "losses": set(),
    "stats": set(),
    "trial": {"study", "tuning"},
    "models": {"study", "storage", "environment"},
    "batches": {"study", "storage", "pictures"},
    "pictures": {"study", "storage"},
    "cifar": {"study", "storage", "batches", "pictures", "environment"},
    "data": {"study", "batches", "cifar", "pictures", "characters"},
    "answers": {"faults", "storage"},
    "shares": {"study"},
    "mps": set(),
    "signals": {"characters"},
    "streams": set(),
    "guard": {"signals"},
    "notices": set(),
    "kernels": {"notices"},
    "plan": {"study", "trial", "price", "tuning"},
    "price": {"trial"},
    "schedule": {"study", "trial"},
    "checkpoints": {"clock", "faults", "mirror", "storage"},
    "records": {"clock", "faults", "trial", "storage", "characters", "parquet"},
    "foreign": {"study", "plan"},
    "parquet": set(),
    "tables": {
        "study", "study_record", "storage", "mirror", "sharing", "records", "parquet", "foreign", "characters",
    },
    "results": {"study", "stats", "tables"},
    "measures": {"stats", "tables", "results"},
    "audit": {"study", "studies", "stats", "schedule", "tables"},
    "simulate": {"study", "trial", "plan", "schedule", "stats", "tables"},
    "provenance": {"stats", "tables", "results"},
    "teachers": {"faults", "trial", "data", "models", "answers", "checkpoints", "kernels", "storage", "mirror"},
    "step": {"trial", "data", "models", "losses", "teachers", "kernels"},
    "train": {
        "study", "trial", "data", "models", "losses", "teachers", "checkpoints", "kernels", "memory", "step", "storage",
    },
    "study_file": {"signals", "storage", "study"},
    "studies": {"study", "study_file", "plan"},
    "study_record": {"study", "studies", "plan", "storage", "trial"},
    "run": {
        "faults", "privacy", "mirror", "sharing", "study", "study_file", "study_record", "studies", "plan", "growth",
        "trial", "storage", "records", "signals",
    },
    "rebuild": {"faults", "study", "run", "growth", "storage", "records", "tables"},
    "verify": {
        "study", "price", "run", "growth", "checkpoints", "teachers", "answers", "records", "rebuild", "storage",
        "tables",
    },
    "preflight": {"study", "trial", "growth", "price", "run", "teachers", "storage", "records"},
    "tuned": {"study", "studies", "plan", "growth", "search", "records", "tables"},
    "report": {
        "study", "plan", "growth", "tuning", "tuned", "stats", "storage", "tables", "results", "measures", "audit",
        "provenance",
    },
    "view": {"study", "trial", "tuning", "pace", "privacy", "simulate", "calibrate", "characters"},  # often types
    "calibrate": {"study", "growth", "trial", "plan", "schedule", "records", "stats", "tables", "results", "simulate"},
    "evidence": {"study", "plan", "schedule", "storage"},
    "execute": {
        "study", "trial", "plan", "price", "data", "models", "teachers", "checkpoints", "train", "memory", "kernels",
        "schedule", "records", "faults", "storage", "privacy", "growth", "search", "clock", "pace",
        "monitoring", "environment", "study_file", "mirror", "sharing", "mps", "notices", "signals",
    },
}  # fmt: skip
ONLY = {"ray": {"execute"}, "sqlite3": {"records"}, "pyarrow": {"records", "parquet", "mirror"}, "optuna": {"search"}}


def rooms() -> list[Path]:
    return [path for path in sorted((ROOT / "tune_kd").rglob("*.py")) if not path.name.startswith("__")]


def room(path: Path) -> str:
    return path.relative_to(ROOT / "tune_kd").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_what_it_may_and_nothing_below_it(path: Path) -> None:
    if room(path) in ("cli", "launch"):  # wiring
        return
    inner = {name.split(".")[1] for name in imports(path) if name.startswith("tune_kd.")}
    assert inner - {room(path)} <= MAY_IMPORT[room(path)]
    assert not any(name.split(".")[0] == "search_spaces" for name in imports(path)) or room(path) == "studies"


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_room_alone_knows_ray_and_one_alone_knows_sqlite_and_pyarrow(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)}
    for package, owners in ONLY.items():
        assert package not in outside or room(path) in owners


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.py")), ids=lambda path: path.name)
def test_a_search_space_imports_the_study_room_alone(path: Path) -> None:
    assert {name.rsplit(".", 1)[0] for name in imports(path) if name.startswith("tune_kd")} <= {
        "tune_kd.study.spec",
        "tune_kd.study.tuning",
    }


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

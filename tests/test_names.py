"""Methods are known by name to their own files, and to no others."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tune_kd"
NAMES = {"none", "logit", "feature"}
EXCEPTIONS = {
    "study/spec.py": {"none"},  # the defaults of Cell.method and Study.control, and random initial weights
    "reporting/style.py": NAMES,  # the palette
    "analysis/scenarios.py": NAMES,  # spreads that were measured; and no effect of seeds
    "training/networks.py": {"none"},  # random initial weights
    "training/dry_run.py": {"none"},
    "study/validate.py": {"none"},  # as a word, as in the next one: there is none
    "analysis/simulate.py": {"none"},
    "cli/planning.py": {"none"},  # as a word, and --strata none
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_method_is_named_in_its_own_file_alone(path: Path) -> None:
    within = str(path.relative_to(PACKAGE))
    texts = {node.value for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    allowed = {path.stem} if path.parent.name == "methods" else EXCEPTIONS.get(within, set())
    assert texts & NAMES == allowed & NAMES

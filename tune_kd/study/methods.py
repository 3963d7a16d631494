"""Declaration of distillation methods. Each built-in method has its own file."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from tune_kd.study import rules
from tune_kd.study.rules import at_least, length, most

FOLDER = Path(__file__).parents[1] / "training" / "methods"

_COLUMNS = """
    run trial_id arm phase role teacher_id seed recipe_id dataset data_digest scale device threads status stop_reason
    epochs_planned epochs_run best_epoch val_accuracy val_accuracy_best test_accuracy test_accuracy_best agreement kl_t1
    kl_t4 ece params train_seconds wall_seconds gpu_fraction peak_memory_bytes attempts error teacher_digest
    weights_digest host started fast_paths further n mean sd low high control
"""
COLUMNS = frozenset(_COLUMNS.split())
"""Columns of tables that are not factors. A setting becomes a column, so it must not have one of these names."""


@dataclass(frozen=True)
class Method:
    """A distillation method.

    `loss` names a class, as `FILE.py:CLASS` relative to the study's file or as `package.module:CLASS`. The class is an
    `nn.Module` that is built from a `Context` and maps a `Batch` and the settings to a scalar (see
    `tune_kd.training.loss`).
    """

    name: Annotated[str, rules.ENCODABLE, rules.LINE, rules.NAME, length(100, "characters")]  # the level of method
    loss: Annotated[str | type | None, length(1000, "characters")] = None  # class of the loss; None: labels alone
    # Inputs of the loss besides the student's logits. nothing: no teacher; logits: the teacher's logits; features: also
    # the features of both networks; before_relu: also the features before their last ReLU.
    needs: Literal["nothing", "logits", "features", "before_relu"] = "logits"
    settings: tuple[tuple[str, float], ...] | Mapping[str, float] = ()  # numbers that the loss takes, with defaults
    views: Annotated[int, at_least(1), most(2)] = 1  # views of each image per step
    version: Annotated[int, at_least(1)] = 1  # raise it for a correction that changes results; trials get new ids
    source: str | None = None  # SHA-256 of the source of a study's own loss; set when the study is read

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            object.__setattr__(self, "settings", tuple(self.settings.items()))

    @property
    def defaults(self) -> dict[str, float]:
        """`settings` as a dictionary."""
        return dict(self.settings)

    @property
    def is_taught(self) -> bool:
        """Whether the method has a teacher."""
        return self.needs != "nothing"

    @property
    def uses_cached_logits(self) -> bool:
        """Whether the method needs only the teacher's logits, of views that all students of a seed share."""
        return self.needs == "logits" and self.views == 1

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher runs in each training step of the student."""
        return self.is_taught and not self.uses_cached_logits


@cache
def built_in() -> dict[str, Method]:
    """The built-in methods, by name."""
    found = (_declared(file) for file in sorted(FOLDER.glob("[!_]*.py")))
    return {method.name: method for method in found}


def _declared(file: Path) -> Method:
    """The value of `METHOD` in a file. The rest of the file is not executed, since it imports torch, which is slow."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (statement,) = (each for each in tree.body if isinstance(each, ast.Assign) and _names(each) == ["METHOD"])
    scope: dict[str, Any] = {"Method": Method}
    exec(compile(ast.Module([statement], []), str(file), "exec"), scope)
    found: Method = scope["METHOD"]
    return found


def _names(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]

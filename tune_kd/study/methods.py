"""Distillation methods as a study declares them. Those that come with tune_kd are in a file each."""

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
"""Columns of tables that are no factors, so that a setting, which is a column, too, must not have their names."""


@dataclass(frozen=True)
class Method:
    """A distillation method.

    `loss` names a class as `FILE.py:CLASS`, relative to the study's file, or `package.module:CLASS`: an `nn.Module`
    that is built from a `Context` and maps a `Batch` and the settings to a scalar (see `tune_kd.training.loss`). None
    trains on labels alone.
    """

    name: Annotated[str, rules.ENCODABLE, rules.LINE, rules.NAME, length(100, "characters")]
    loss: Annotated[str | type | None, length(1000, "characters")] = None
    # What the loss is given: of the teacher logits; of both networks also features, or those before their ReLU, too.
    needs: Literal["nothing", "logits", "features", "before_relu"] = "logits"
    settings: tuple[tuple[str, float], ...] | Mapping[str, float] = ()  # numbers that the loss takes, with defaults
    views: Annotated[int, at_least(1), most(2)] = 1  # of each image that the student sees in a step
    version: Annotated[int, at_least(1)] = 1  # counts corrections that change results: they get ids of their own
    source: str | None = None  # SHA-256 of the source that a study brings; found when the study is read

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            object.__setattr__(self, "settings", tuple(self.settings.items()))

    @property
    def defaults(self) -> dict[str, float]:
        """`settings` as a dictionary."""
        return dict(self.settings)

    @property
    def is_taught(self) -> bool:
        """Whether it has a teacher."""
        return self.needs != "nothing"

    @property
    def uses_cached_logits(self) -> bool:
        """Whether all it takes of the teacher are logits of the views that every student of a seed sees."""
        return self.needs == "logits" and self.views == 1

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher runs beside the student in each step."""
        return self.is_taught and not self.uses_cached_logits


@cache
def built_in() -> dict[str, Method]:
    """The methods that come with tune_kd, by name."""
    found = (_declared(file) for file in sorted(FOLDER.glob("[!_]*.py")))
    return {method.name: method for method in found}


def _declared(file: Path) -> Method:
    """The value of `METHOD` in a file. The rest, which imports torch, is not executed: a plan is made in less time."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (statement,) = (each for each in tree.body if isinstance(each, ast.Assign) and _names(each) == ["METHOD"])
    scope: dict[str, Any] = {"Method": Method}
    exec(compile(ast.Module([statement], []), str(file), "exec"), scope)
    found: Method = scope["METHOD"]
    return found


def _names(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]

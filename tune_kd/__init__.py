"""Controlled ablation studies of knowledge distillation.

    from tune_kd import Compare, Factor, Study     what a study declares
    plan(study)                                     what it would run
    run(study, out="results")                       train it, and return its records; `resume` continues a run
    load("results/RUN")                             the tables of a run, or of somebody else's
    report(records, "report")                       tables, figures and a page of them
    compare(records, "stem", "cifar", "imagenet")   two levels of a factor

Names are imported when they are first used: most commands need neither pandas nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_kd.analysis.contrasts import compare
    from tune_kd.execute.session import resume, run
    from tune_kd.records.importer import Adapter
    from tune_kd.records.reader import Records, load
    from tune_kd.reporting.report import report
    from tune_kd.study.plan import Plan, plan
    from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
    from tune_kd.study.tuning import Choice, Integer, LogUniform, Range, Tuning, Uniform
    from tune_kd.system.errors import CorruptFile, UserError

_HOMES = {
    "analysis.contrasts": ("compare",),
    "execute.session": ("resume", "run"),
    "records.importer": ("Adapter",),
    "records.reader": ("Records", "load"),
    "reporting.report": ("report",),
    "study.plan": ("Plan", "plan"),
    "study.spec": ("Cell", "Compare", "Confirm", "Data", "Factor", "Recipe", "Screen", "Study"),
    "study.tuning": ("Choice", "Integer", "LogUniform", "Range", "Tuning", "Uniform"),
    "system.errors": ("CorruptFile", "UserError"),
}

__all__ = [
    "Adapter",
    "Cell",
    "Choice",
    "Compare",
    "Confirm",
    "CorruptFile",
    "Data",
    "Factor",
    "Integer",
    "LogUniform",
    "Plan",
    "Range",
    "Recipe",
    "Records",
    "Screen",
    "Study",
    "Tuning",
    "Uniform",
    "UserError",
    "compare",
    "load",
    "plan",
    "report",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"tune_kd.{module}"), name)
    raise AttributeError(f"module 'tune_kd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

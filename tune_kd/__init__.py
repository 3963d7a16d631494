"""Controlled ablation studies of knowledge distillation.

    from tune_kd import Compare, Factor, Study     declare a study
    plan(study)                                     list its trials
    run(study, out="results")                       train it and return its records; `resume` continues a run
    load("results/RUN")                             load the tables of a run, or imported tables
    report(records, "report")                       write tables, figures and an HTML page
    compare(records, "stem", "cifar", "imagenet")   compare two levels of a factor

Names are imported on first use: most commands need neither pandas nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_kd.analysis.contrasts import compare as compare
    from tune_kd.execute.session import resume as resume, run as run
    from tune_kd.records.importer import Adapter as Adapter
    from tune_kd.records.reader import Records as Records, load as load
    from tune_kd.reporting.report import report as report
    from tune_kd.study import *  # noqa: F403
    from tune_kd.study.plan import Plan as Plan, plan as plan
    from tune_kd.system.errors import CorruptFile as CorruptFile, UserError as UserError

_HOMES = {
    "analysis.contrasts": "compare",
    "execute.session": "resume run",
    "records.importer": "Adapter",
    "records.reader": "Records load",
    "reporting.report": "report",
    "study": "Cell Choice Compare Confirm Data Factor Integer LogUniform Range Recipe Screen Study Tuning Uniform",
    "study.methods": "Method",
    "study.plan": "Plan plan",
    "system.errors": "CorruptFile UserError",
}
_HOME = {name: f"tune_kd.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = list(_HOME)


if not TYPE_CHECKING:  # a type checker would accept misspelt names

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'tune_kd' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

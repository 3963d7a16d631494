"""A study that is real and tiny: a teacher, a control, logit and feature students; seconds on two cores.

Nothing in it is stopped early, since that depends on who arrives first and no two runs would be the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path

TEXT = """
from dataclasses import replace

from search_spaces.ablation import smoke
from tune_kd import Compare, Factor


def study():
    base = smoke()
    return replace(
        base,
        scale="faults",
        moderator=None,
        screen=replace(base.screen, min_peers=99),
        factors=(Factor("stem", ("cifar",)), *base.factors[1:]),
        contrasts=base.contrasts[1:],
    )
"""


def write(folder: Path) -> Path:
    """The study's file, in a folder."""
    path = folder / "tiny.py"
    path.write_text(TEXT)
    return path


def settings(seeds: int, epochs: int) -> tuple[str, ...]:
    """So many confirmation seeds, and so many epochs of a student and of a teacher. 4 (seeds + 1) + 1 trials."""
    confirmed = json.dumps([*range(1, seeds + 1)])
    return (f"confirm.seeds={confirmed}", f"recipe.epochs={epochs}", f"teacher_recipe.epochs={epochs}")


def arguments(path: Path, out: Path, name: str, settings: Sequence[str]) -> list[str]:
    """Of `tune_kd run`. No GPU: only the CPU computes the same bits again."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    return ["run", str(path), "--name", name, "--out", str(out), "--gpus-per-trial", "0", *chosen]


def reference(path: Path, folder: Path, settings: Sequence[str]) -> Path:
    """The folder of the study, run in this process and never interrupted."""
    from faults.here import go_on
    from tune_kd.data import datasets
    from tune_kd.records.run_folder import Run, begun
    from tune_kd.study import discover

    declared = discover.resolve(path, "faults", None, settings)
    digest = datasets.load_declared(declared.data, None, say=lambda _: None, progress=False).digest
    run = Run("reference", folder / "reference", declared, digest, None, {})
    with begun(run):
        go_on(run)
    return run.folder

"""A tiny study with real training: a teacher, a control, logit and feature students; seconds on two cores.

No trial is stopped early, since stops depend on the order of arrival, and two runs would differ.
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
    """Write the study's file to a folder."""
    path = folder / "tiny.py"
    path.write_text(TEXT)
    return path


def settings(seeds: int, epochs: int) -> tuple[str, ...]:
    """Return settings for this number of confirmation seeds and epochs per trial: 4 (seeds + 1) + 1 trials."""
    confirmed = json.dumps([*range(1, seeds + 1)])
    return (f"confirm.seeds={confirmed}", f"recipe.epochs={epochs}", f"teacher_recipe.epochs={epochs}")


def arguments(path: Path, out: Path, name: str, settings: Sequence[str]) -> list[str]:
    """Return the arguments of `tune_kd run`. No GPU: only the CPU repeats results bit for bit."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    return ["run", str(path), "--name", name, "--out", str(out), "--gpus-per-trial", "0", *chosen]


def reference(path: Path, folder: Path, settings: Sequence[str]) -> Path:
    """Run the study in this process without interruption. Returns the run's folder."""
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

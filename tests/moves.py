"""Remove each move to a device, one at a time, and check that the simulated GPU notices: `python tests/moves.py`.

A move is a call of `.to(DEVICE)`, `.cpu()`, `to_device` or `on_device`, or the argument `device=` of a new tensor. Each
move in code for a GPU is removed in a new process, which then runs all methods with both stems, a probe and the
benchmark.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
MODULES = (
    "tune_kd.data.augment",
    "tune_kd.data.datasets",
    *(f"tune_kd.training.{module}" for module in (
        "teachers", "logit_cache", "step", "loop", "loss", "metrics", "networks", "device", "checkpoints")),
    *(f"tune_kd.training.methods.{file.stem}" for file in sorted(ROOT.glob("tune_kd/training/methods/[!_]*.py"))),
    "tune_kd.execute.probe_processes",
    "tune_kd.execute.worker",
    "benchmarks.gpu",
    "benchmarks.plain",
    "benchmarks.steps",
)  # fmt: skip
MAKERS = ("tensor", "zeros", "ones", "empty", "arange", "randn", "randint", "randperm", "full")


@dataclass(frozen=True)
class Move:
    """A place in the source that moves a tensor to a device or creates it there."""

    module: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.text}"


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def moves() -> list[Move]:
    """Return all moves in `MODULES`."""
    return [
        Move(module, node.lineno, node.col_offset, ast.unparse(node))
        for module in MODULES
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if _without(node) is not None
    ]


def _without(node: ast.AST) -> ast.expr | None:
    """Return a call without its move; None if the node is not a move."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        name, arguments = node.func.attr, [ast.unparse(each) for each in node.args]
        if name == "cpu" or (name == "to" and any("device" in each or "'cpu'" in each for each in arguments)):
            return node.func.value
        if name == "to_device":
            return node.args[0]
        made_there = [each for each in node.keywords if each.arg == "device" and "cpu" not in ast.unparse(each.value)]
        if name in MAKERS and made_there:
            kept = [each for each in node.keywords if each not in made_there]
            return ast.Call(node.func, node.args, kept)
    if isinstance(node.func, ast.Name) and node.func.id == "on_device":
        return node.args[0]
    return None


class _Remover(ast.NodeTransformer):
    """Removes a move from a syntax tree, and counts how often."""

    def __init__(self, move: Move) -> None:
        self.move, self.removed = move, 0

    def visit_Call(self, node: ast.Call) -> ast.expr:
        left = _without(node)
        here = (node.lineno, node.col_offset, ast.unparse(node)) == (self.move.line, self.move.column, self.move.text)
        self.generic_visit(node)
        if left is None or not here:
            return node
        self.removed += 1
        return left


class _Loader(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports the module of a move without the move."""

    def __init__(self, move: Move) -> None:
        super().__init__(move.module, str(path_of(move.module)))
        self.move = move

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.move.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        remover = _Remover(self.move)
        tree = remover.visit(ast.parse(Path(self.path).read_text()))
        assert remover.removed == 1, self.move
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


def everything() -> None:
    """Run all GPU code on a simulated GPU. Raises if a tensor is on the wrong device."""
    import warnings

    import torch

    from conftest import noise
    from placement import BENCHMARKED, METHODS, RATES, benchmarked, distil, numbers_of_a_step, probe_one, through_pickle
    from second_device import busy, simulated_gpu
    from trials import as_teacher, trial
    from tune_kd.training import networks

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, simulated_gpu() as device:
        for method, stem in (
            *((method, "cifar") for method in METHODS),
            *((method, "imagenet") for method in BENCHMARKED),
        ):
            distil(device, noise(), method, stem, Path(name, stem, method))
        with patch.object(networks, "folded", side_effect=RuntimeError("not here")):
            distil(device, noise(), "feature", "cifar", Path(name, "unfolded"))
        taught = as_teacher(trial("none"))
        probe_one(device, noise(), trial("feature", teacher_id=taught.trial_id), taught)
        for method in BENCHMARKED:
            benchmarked(device, method, "cifar")
        through_pickle(device, noise())
        numbers = numbers_of_a_step(device, noise(), Path(name, "numbers"))
        assert {each.device.type for each in numbers} == {"cuda"}, "a value that a step reads is on the CPU"
        for rate in RATES:
            before = busy[0]
            rate(device)
            assert busy[0] - before >= 3, "the benchmark measured the CPU"


def noticed(move: Move | None) -> str | None:
    """Return the error that is raised without a move, or None. Runs in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        message = ""
        try:
            if move is not None:
                sys.meta_path.insert(0, _Loader(move))
            everything()
        except BaseException as error:
            message = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as sent:
        message = sent.read()
    os.waitpid(child, 0)
    return message or None


def results() -> Iterator[tuple[Move, str | None]]:
    """Yield each move with the error that is raised without it."""
    for move in moves():
        yield move, noticed(move)


def main() -> None:
    import torch  # imported once, before the forks
    import torchvision

    assert torch and torchvision
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    unchanged = noticed(None)
    print(f"with all moves: {unchanged or 'no error'}")
    unnoticed = 0
    for move, error in results():
        unnoticed += error is None
        print(f"{'NOT NOTICED' if error is None else 'noticed'}  {move}\n    {error or ''}", flush=True)
    sys.exit(1 if unnoticed or unchanged else 0)


if __name__ == "__main__":
    main()

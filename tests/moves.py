"""Take each move to the device out, one at a time, and see that the played GPU notices: `python tests/moves.py`.

A move is a call of `.to(DEVICE)`, `.cpu()`, `to_device` or `on_device`, or a `device=` of a tensor that is made. Every
place in the code that a GPU runs is tried in a process of its own, on all methods with both stems, a probe and the
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
    """A place in the source where something is moved to a device, or made there."""

    module: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.text}"


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def moves() -> list[Move]:
    """All of them."""
    return [
        Move(module, node.lineno, node.col_offset, ast.unparse(node))
        for module in MODULES
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if _without(node) is not None
    ]


def _without(node: ast.AST) -> ast.expr | None:
    """What is left of a call when its move is taken out; null where it has none."""
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


class _Taking(ast.NodeTransformer):
    def __init__(self, move: Move) -> None:
        self.move, self.taken = move, 0

    def visit_Call(self, node: ast.Call) -> ast.expr:
        left = _without(node)
        here = (node.lineno, node.col_offset, ast.unparse(node)) == (self.move.line, self.move.column, self.move.text)
        self.generic_visit(node)
        if left is None or not here:
            return node
        self.taken += 1
        return left


class _Loader(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Loads the module of a move without the move."""

    def __init__(self, move: Move) -> None:
        super().__init__(move.module, str(path_of(move.module)))
        self.move = move

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.move.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        taking = _Taking(self.move)
        tree = taking.visit(ast.parse(Path(self.path).read_text()))
        assert taking.taken == 1, self.move
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


def everything() -> None:
    """All that a GPU does, on a played one. Raises where something is in the wrong place."""
    import warnings

    import torch

    from conftest import noise
    from placement import BENCHMARKED, METHODS, RATES, benchmarked, carried, distil, numbers_of_a_step, probe_one
    from second_device import busy, played
    from trials import as_teacher, trial
    from tune_kd.training import networks

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, played() as device:
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
        carried(device, noise())
        numbers = numbers_of_a_step(device, noise(), Path(name, "numbers"))
        assert {each.device.type for each in numbers} == {"cuda"}, "a number is on the CPU"
        for rate in RATES:
            before = busy[0]
            rate(device)
            assert busy[0] - before >= 3, "the rate of the CPU was measured"


def noticed(move: Move | None) -> str | None:
    """What is raised without a move; null where nothing is. In a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = ""
        try:
            if move is not None:
                sys.meta_path.insert(0, _Loader(move))
            everything()
        except BaseException as error:
            said = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as sent:
        said = sent.read()
    os.waitpid(child, 0)
    return said or None


def tried() -> Iterator[tuple[Move, str | None]]:
    """Each move with what is raised without it."""
    for move in moves():
        yield move, noticed(move)


def main() -> None:
    import torch  # once, for all the processes that are forked
    import torchvision

    assert torch and torchvision
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    whole = noticed(None)
    print(f"with every move: {whole or 'nothing is raised'}")
    unnoticed = 0
    for move, said in tried():
        unnoticed += said is None
        print(f"{'NOT NOTICED' if said is None else 'noticed'}  {move}\n    {said or ''}", flush=True)
    sys.exit(1 if unnoticed or whole else 0)


if __name__ == "__main__":
    main()

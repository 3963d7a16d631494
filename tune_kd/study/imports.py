"""Find the modules that a Python file imports from a folder, from its source, without executing it."""

import ast
import os
import sys
from collections.abc import Iterator
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES
from pathlib import Path

from tune_kd.system.errors import UserError
from tune_kd.system.files import read

MOST_SOURCE_BYTES = 2**22  # limit for a file
_OURS = ("tune_kd", "search_spaces", "torch", "torchvision", "ray", "numpy", "pandas", "pyarrow", "scipy", "pydantic")
ELSEWHERE = frozenset((*sys.stdlib_module_names, *_OURS))
"""Packages that a worker imports before any code of a study. Modules of a study cannot shadow these names."""


def sources(path: Path, folder: Path) -> tuple[dict[Path, bytes], set[str]]:
    """The source of a file and of everything that it imports from a folder, and the names of its other imports.

    Raises `UserError` for a file that cannot be read or is not valid Python. Its message follows the words "the loss".
    """
    found: dict[Path, bytes] = {}
    elsewhere: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = source(file)
        for name in _names(parsed(file, found[file]), file, folder):
            files = modules(name, folder)
            waiting += files
            if not files:
                elsewhere.add(name.partition(".")[0])
    return found, elsewhere


def source(path: Path) -> bytes:
    """The content of a Python file. Raises `UserError`."""
    if path.suffix != ".py":
        raise UserError(f"imports {path}, which is compiled; allowed: Python files, or an installed package")
    try:
        return read(path, MOST_SOURCE_BYTES)
    except OSError as error:
        raise UserError(f"is in {path}, which cannot be read ({error})") from error


def parsed(path: Path, content: bytes) -> ast.Module:
    """The syntax tree of a file. Raises `UserError`."""
    try:
        return ast.parse(content, str(path))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"is in {path}{line}, which is not valid Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"is in {path}, which Python cannot read ({str(error) or 'it is nested too deeply'})"
        ) from error


def modules(name: str, folder: Path) -> list[Path]:
    """The files of a module and of its parent packages, below a folder. Empty if the module is not there."""
    found: list[Path] = []
    parts = name.split(".")
    if parts[0] in ELSEWHERE:
        return found
    for place, part in enumerate(parts):
        package = folder / part / "__init__.py"
        if os.path.isfile(package):
            found.append(package)
        elif (file := _file(folder / part)) is not None:
            return [*found, file] if place == len(parts) - 1 else found
        elif not os.path.isdir(folder / part):
            return found
        folder = folder / part
    return found


def _file(stem: Path) -> Path | None:
    """The file that Python would import for a module, or None."""
    names = (stem.with_name(stem.name + suffix) for suffix in (*EXTENSION_SUFFIXES, ".py", *BYTECODE_SUFFIXES))
    return next((each for each in names if os.path.isfile(each)), None)


def _names(tree: ast.Module, file: Path, folder: Path) -> Iterator[str]:
    """The names of modules that a file imports, anywhere in it. `from a import b` gives `a` and `a.b`, which may not be
    a module."""
    package = file.relative_to(folder).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            yield from (".".join((*base, *more)) for more in ((), *_inside(node, folder.joinpath(*base))))


def _inside(node: ast.ImportFrom, package: Path) -> Iterator[tuple[str]]:
    """The names that a statement imports from a package; for `*`, all modules of the package."""
    for each in node.names:
        if each.name == "*":
            yield from ((file.stem,) for file in sorted(package.glob("[!_]*.py")))
        else:
            yield (each.name,)

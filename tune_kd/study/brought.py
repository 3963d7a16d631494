"""A study's own code (losses): find its source without executing it. Its digest is part of the trial ids."""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tune_kd.study.imports import ELSEWHERE, modules, source, sources
from tune_kd.study.methods import Method
from tune_kd.study.spec import Study
from tune_kd.system.errors import UserError, raise_problems

MOST_SETTING = 2**53  # largest integer that a float represents exactly, as do all smaller ones
ALLOWED = "FILE.py:CLASS below the study's folder, package.module:CLASS, or the class itself"


@dataclass(frozen=True)
class Code:
    """The source of a study's own class: its module, and the imports of that module from the study's folder."""

    name: str  # name of the class
    main: str  # path of the module below the folder; for an installed module, its name
    files: tuple[tuple[str, bytes], ...]  # contents by path below the folder
    packages: tuple[tuple[str, str], ...] = ()  # versions of the imported distributions, by name

    @property
    def is_installed(self) -> bool:
        return not self.main.endswith(".py")

    @property
    def digest(self) -> str:
        """SHA-256 of the source and of the location of the class in it."""
        files = [(path, hashlib.sha256(content).hexdigest()) for path, content in self.files]
        return hashlib.sha256(json.dumps([self.name, self.main, files]).encode()).hexdigest()


def with_names(study: Study, folder: Path, file: Path | None = None) -> Study:
    """The study, with the loss of each method as text. Raises `UserError` for a loss that cannot be named.

    `folder` is the study's folder, to which paths are relative; `file` is the study's file.
    """
    raise_problems(_untyped(study))
    return _with(study, lambda method: replace(method, loss=_as_text(method.loss, folder, file)))


def _untyped(study: Study) -> Iterator[str]:
    """Messages for settings that are not numbers. Pydantic would convert them to numbers."""
    for position, method in enumerate(study.methods):
        settings = method.settings if isinstance(method.settings, tuple) else ()
        for name, value in (each for each in settings if isinstance(each, tuple | list) and len(each) == 2):
            if isinstance(value, bool | str) or (isinstance(value, int) and abs(value) > MOST_SETTING):
                yield f"methods[{position}].settings has {name} {value!r:.60}; allowed: a finite number"


def with_sources(study: Study, folder: Path, file: Path | None = None) -> Study:
    """Like `with_names`, and with the digest of the source of each loss. Executes nothing."""
    named = with_names(study, folder, file)
    return _with(named, lambda method: replace(method, source=_code(str(method.loss), folder, file).digest))


def _with(study: Study, found: Callable[[Method], Method]) -> Study:
    problems: list[str] = []
    methods = []
    for position, method in enumerate(study.methods):
        try:
            methods.append(found(method))
        except UserError as mistake:
            problems += [f"methods[{position}].loss of {method.name!r} {each}" for each in mistake.problems]
    raise_problems(problems)
    return replace(study, methods=tuple(methods)) if methods else study


def codes(study: Study, folder: Path, file: Path | None = None, but: Path | None = None) -> tuple[Code, ...]:
    """The code of each own method of a study. Raises `UserError` if it does not match the digest in the study, or is
    below the folder `but`."""
    found = []
    for method in study.methods:
        try:
            code = _code(str(method.loss), folder, file, but)
        except UserError as mistake:
            raise UserError(*(f"the loss of {method.name!r} {each}" for each in mistake.problems)) from mistake
        if method.source != code.digest:
            raise UserError(
                f"the loss of {method.name!r} has changed: {method.loss}, or a file that it imports, does not match "
                "the digest in the study"
            )
        found.append(code)
    return tuple(found)


def _as_text(loss: Any, folder: Path, file: Path | None) -> str:
    """A loss as `FILE.py:CLASS` or `package.module:CLASS`. Raises `UserError`."""
    if isinstance(loss, str):
        return loss
    if not isinstance(loss, type):
        raise UserError(f"is {loss!r:.60}; allowed: {ALLOWED}")
    if loss.__qualname__ != loss.__name__:
        raise UserError(f"is {loss.__qualname__}, a nested class; allowed: a class at the top level of a module")
    try:
        home = Path(inspect.getfile(loss)).resolve()
    except (TypeError, OSError) as error:
        raise UserError(f"is {loss.__qualname__}, which is not defined in a file; allowed: {ALLOWED}") from error
    if file is not None and home == file.resolve():
        raise UserError(
            f"is {loss.__name__}, which is in the study's own file; allowed: a separate file, since otherwise every "
            "edit of the study would change its trial ids"
        )
    if home.is_relative_to(folder.resolve()) and not _is_installed(loss, home):
        return f"{home.relative_to(folder.resolve()).as_posix()}:{loss.__name__}"
    return f"{loss.__module__}:{loss.__name__}"


def _is_installed(loss: type, home: Path) -> bool:
    """Whether a class is in an installed package. A virtual environment may be below the study's folder."""
    return loss.__module__.partition(".")[0] in ELSEWHERE or bool({"site-packages", "dist-packages"} & {*home.parts})


def _code(text: str, folder: Path, file: Path | None, but: Path | None = None) -> Code:
    """The code that a text names. Raises `UserError`, also if it is below the folder `but`."""
    where, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"is {text!r}; allowed: {ALLOWED}")
    folder = folder.resolve()
    path = _path(where, folder)
    if path is None:
        place = f" in {folder}" if where.endswith(".py") else ""
        raise UserError(f"is {text!r}, but there is no {where}{place}; allowed: {ALLOWED}")
    if but is not None and path.resolve().is_relative_to(but.resolve()):
        raise UserError(f"is {text!r}, which is in the results folder; allowed: code outside of it")
    is_file = where.endswith(".py") or path in modules(where, folder)
    if not is_file:
        return Code(
            name, where, ((f"{where.replace('.', '/')}.py", source(path)),), _versions([where.partition(".")[0]])
        )
    if not path.is_relative_to(folder):
        raise UserError(f"is {text!r}, outside of {folder}; allowed: {ALLOWED}")
    try:
        found, elsewhere = sources(path, folder)
    except UserError as mistake:
        raise UserError(f"is {text!r}, and {mistake}") from mistake
    if file is not None and file.resolve() in found:
        raise UserError(
            f"is {text!r}, which imports the study's own file; allowed: shared code in a separate file, since "
            "otherwise every edit of the study would change its trial ids"
        )
    files = sorted((each.relative_to(folder).as_posix(), content) for each, content in found.items())
    return Code(name, path.relative_to(folder).as_posix(), tuple(files), _versions(elsewhere))


def _path(where: str, folder: Path) -> Path | None:
    """The file of a loss: a path below the folder, a module in the folder, or an installed module. None if there is
    none."""
    try:
        if where.endswith(".py"):
            path = (folder / where).resolve()
            return path if path.is_file() else None
        if not all(part.isidentifier() for part in where.split(".")):
            return None
        stem = folder.joinpath(*where.split("."))
        here = [each for each in modules(where, folder)[-1:] if stem in (each.parent, each.with_suffix(""))]
        return here[0] if here else _installed(where)
    except (OSError, RuntimeError, ValueError):  # an invalid file name, or a loop of links
        return None


def _installed(name: str) -> Path | None:
    """The file of an installed module, or None. Executes nothing."""
    places: Iterable[str] | None = sys.path
    spec = None
    for part in name.split("."):
        spec = None if places is None else PathFinder.find_spec(part, list(places))
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def _versions(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The versions of the distributions that contain these packages."""
    from importlib.metadata import packages_distributions, version  # here, since most studies have no own code

    known = packages_distributions()
    found = {each for name in names for each in known.get(name, ()) if each != "tune_kd"}
    return tuple(sorted((each, version(each)) for each in found))


def packages(brought: Iterable[Code]) -> dict[str, str]:
    """The versions of all distributions that the code imports."""
    return dict(each for code in brought for each in code.packages)

"""Finding studies: a name in `search_spaces/` or a path, its scales, and single fields that a command sets."""

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tune_kd.study import DATA_SETS, Data, Mistake, Study

FOLDER = "search_spaces"


def available() -> dict[str, Path]:
    """Studies by name: those of the working directory, then those that were installed with tune_kd."""
    found: dict[str, Path] = {}
    for folder in (Path.cwd() / FOLDER, installed()):
        for path in sorted(folder.glob("[!_]*.py")):
            found.setdefault(path.stem, path)
    return found


def installed() -> Path:
    """The folder of the studies that came with tune_kd."""
    import search_spaces

    return Path(search_spaces.__file__).parent


def find(study: str) -> Path:
    """The file of a study that is named or given as a path. Raises `Mistake` where there is none."""
    known = available()
    path = Path(study) if study.endswith(".py") or "/" in study else known.get(study)
    if path is None or path.suffix != ".py" or not os.path.isfile(path):
        raise Mistake(f"STUDY is {study!r}; allowed: {', '.join(known)}, or the path of a Python file with study()")
    return path


def scales(path: Path) -> dict[str, Callable[..., Study]]:
    """The scales that a study's file declares: its `SCALES`, or `study` alone under its own scale's name."""
    module = _load(path)
    declared = getattr(module, "SCALES", None)
    if declared is not None:
        if not isinstance(declared, Mapping) or not all(map(callable, declared.values())):
            raise Mistake(f"STUDY is {path}, whose SCALES is {declared!r:.60}; allowed: names with functions")
        return dict(declared)
    if not callable(getattr(module, "study", None)):
        raise Mistake(f"STUDY is {path}, which has no function study(); allowed: a file with `study() -> Study`")
    return {_call(path, module.study).scale: module.study}


def resolve(path: Path, scale: str, data: str | None = None, settings: Sequence[str] = ()) -> Study:
    """One study, whole and checked. `settings` are `field=value`, with JSON for lists and numbers.

    A scale whose function takes the name of the data set says itself what it does on another one; with any other
    scale, `data` is taken whole.
    """
    declared = scales(path)
    if scale not in declared:
        raise Mistake(f"--scale is {scale!r}; allowed: auto, {', '.join(declared)}")
    if data is not None and data not in DATA_SETS:
        raise Mistake(f"--data is {data!r}; allowed: {', '.join(DATA_SETS)}")
    make = declared[scale]
    if data is not None and "data" in inspect.signature(make).parameters:
        make = partial(make, data=data)
    study = _call(path, make)
    if data is not None and data != study.data.name:
        study = replace(study, data=Data(data))
    return _with_settings(path, study, settings).check()


def from_json(value: Any) -> Study:
    """The inverse of `dataclasses.asdict`, for `study.json`."""
    return TypeAdapter(Study).validate_python(value)


class _AsItIsNow(SourceFileLoader):
    """Python takes a file's compiled form of before for its present one where size and second of both are the same."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=_AsItIsNow(path.stem, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise Mistake(f"STUDY is {path}, which cannot be read: {type(error).__name__}: {error}") from error
    return module


def _call(path: Path, make: Callable[..., Study]) -> Study:
    name = getattr(getattr(make, "func", make), "__name__", "study")
    try:
        study = make()
    except Mistake:
        raise
    except Exception as error:  # whatever the user's file raises
        raise Mistake(f"STUDY is {path}, where {name}() fails: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise Mistake(f"STUDY is {path}, where {name}() returns {type(study).__name__}; allowed: a Study")
    return study


def _with_settings(path: Path, study: Study, settings: Sequence[str]) -> Study:
    """Apply `field=value`; fields may be nested (`recipe.epochs`), and `factors.NAME` is a factor's levels.

    Every study passes through here, with settings or without, so that its types are those of `study.json`: 1 and
    1.0 in a study's file are one value with one identity.
    """
    value: dict[str, Any] = asdict(study)
    problems = []
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"--set is {setting!r}; allowed: field=value, such as recipe.epochs=4")
            continue
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = text
        problem = _assign(value, field.split("."), parsed, field)
        problems += [problem] if problem else []
    if problems:
        raise Mistake(*problems)
    try:
        return from_json(value)
    except ValidationError as error:
        source = "--set" if settings else f"STUDY is {path}:"
        raise Mistake(
            *(
                f"{source} {'.'.join(str(part) for part in each['loc'])} is {each['input']!r}; {each['msg']}"
                for each in error.errors()
            )
        ) from error


def _assign(value: dict[str, Any], path: list[str], new: Any, whole: str) -> str | None:
    """Set one nested field in place; returns what is wrong with its name, or null."""
    head, *rest = path
    if head not in value:
        return f"--set names {whole!r}; allowed here: {', '.join(value)}"
    if not rest:
        value[head] = new
        return None
    if head == "factors":
        by_name = {factor["name"]: factor for factor in value[head]}
        if rest[0] not in by_name or len(rest) > 1:
            return f"--set names {whole!r}; allowed here: {', '.join(f'factors.{name}' for name in by_name)}"
        by_name[rest[0]]["levels"] = new
        return None
    if not isinstance(value[head], dict):
        return f"--set names {whole!r}; {head} has no fields of its own"
    return _assign(value[head], rest, new, whole)

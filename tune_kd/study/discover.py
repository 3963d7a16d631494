"""Find a study by its name in `search_spaces/` or by its path, select its scale, and set single fields."""

import hashlib
import inspect
import json
import os
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from tune_kd.study import brought
from tune_kd.study.plan import checked
from tune_kd.study.source import StudyFile, executed, folders
from tune_kd.study.spec import DATA_SETS, Data, Factor, Study
from tune_kd.study.trial import hashed
from tune_kd.system.adapters import adapter
from tune_kd.system.errors import UserError, raise_problems
from tune_kd.system.files import read

SETTINGS = "cell.settings."  # prefix of a method's setting in `--set`


def available() -> dict[str, Path]:
    """Studies by name. Those of the working directory hide those installed with tune_kd."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!_]*.py")):
            found.setdefault(path.stem, path)
    return found


def find(study: str) -> Path:
    """The file of a study, given by name or path. Raises `UserError` if there is none."""
    known = available()
    path = Path(study) if study.endswith(".py") or "/" in study else known.get(study)
    if path is None or path.suffix != ".py" or not os.path.isfile(path):
        why = ", but there is no such file" if path is not None and not os.path.lexists(path) else ""
        raise UserError(
            f"STUDY is {study!r}{why}; allowed: {', '.join(known)}, or the path of a Python file with study()"
        )
    return path


def scales(path: Path) -> dict[str, Callable[..., Study]]:
    """The scales that a study's file declares: its `SCALES`, or only `study`, under the name of its scale."""
    return _scales(executed(path))


def _scales(file: StudyFile) -> dict[str, Callable[..., Study]]:
    with file.running("whose SCALES cannot be read"):
        declared, make = (getattr(file.module, name, None) for name in ("SCALES", "study"))
        if declared is not None:
            names = dict(declared) if isinstance(declared, Mapping) else {}
            if not names or not all(isinstance(name, str) and callable(each) for name, each in names.items()):
                raise UserError(
                    f"STUDY is {file.path}, whose SCALES is {declared!r:.60}; allowed: a dict of functions by name"
                )
            return names
    if not callable(make):
        raise UserError(f"STUDY is {file.path}, which has no function study(); allowed: a file with `study() -> Study`")
    return {_made(file, make, None).scale: make}


def resolve(path: Path, scale: str, data: str | None = None, settings: Sequence[str] = ()) -> Study:
    """A study, checked. `settings` are `field=value`, where lists and numbers are JSON.

    If the scale's function takes the name of the data set, it chooses how much of `data` to use. Otherwise the study
    uses all of it.
    """
    file = executed(path)
    declared = _scales(file)
    if scale not in declared:
        raise UserError(f"--scale is {scale!r}; allowed: auto, {', '.join(declared)}")
    if data is not None and data not in DATA_SETS:
        raise UserError(f"--data is {data!r}; allowed: {', '.join(DATA_SETS)}")
    study = _made(file, declared[scale], data)
    if data is not None and data != study.data.name:
        study = replace(study, data=Data(data))
    with file.running("whose study cannot be read"):
        study = _with_settings(file.path, study, settings)
    study = brought.with_sources(study, path.parent, path)
    with file.running("whose study cannot be read"):
        return checked(study)


def _made(file: StudyFile, make: Callable[..., Study], data: str | None) -> Study:
    """The study that a function of the file returns, for a data set if it takes one. Each call is made once."""
    name = getattr(make, "__name__", "study")
    with file.running(f"where {name}() fails"):
        takes_data = data is not None and "data" in inspect.signature(make).parameters
        key = (make if isinstance(make, Hashable) else id(make), data if takes_data else None)
        if key not in file.made:
            made = make(data=data) if takes_data else make()
            if not isinstance(made, Study):
                raise UserError(f"STUDY is {file.path}, where {name}() returns {type(made).__name__}; allowed: a Study")
            file.made[key] = brought.with_names(made, file.path.parent, file.path)
        return file.made[key]


def from_json(value: Any) -> Study:
    """The study in `study.json`: the inverse of `to_json` and of `dataclasses.asdict`."""
    return adapter(Study).validate_python(value)


def to_json(study: Study) -> dict[str, Any]:
    """The study for `study.json`. Its recipes are `hashed`, so that the hash of an old study does not change."""
    value = asdict(study)
    return value | {name: hashed(value[name]) for name in ("recipe", "teacher_recipe")}


def _with_settings(path: Path, study: Study, settings: Sequence[str]) -> Study:
    """Apply `field=value`. Fields may be nested (`recipe.epochs`); `factors.NAME` means a factor's levels.

    Every study passes through here, even without settings, to get the types of `study.json`: 1 and 1.0 in a study's
    file are then the same value with the same id.
    """
    value: dict[str, Any] = asdict(study)
    problems = []
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"--set is {setting!r}; allowed: field=value, such as recipe.epochs=4")
            continue
        if field.startswith(SETTINGS):
            problem = _assign_setting(value, field.removeprefix(SETTINGS), _parsed(text))
        else:
            problem = _assign(value, field.split("."), _parsed(text), field)
        problems += [problem] if problem else []
        if not problem and field.startswith("factors."):
            _narrow(study, value, field.removeprefix("factors."))
    raise_problems([*problems, *_ineffective(settings, value["factors"])])
    try:
        return from_json(value)
    except ValidationError as error:
        raise UserError(*_type_problems(path, value, settings, error)) from error


def _ineffective(settings: Sequence[str], factors: Any) -> Iterator[str]:
    """Messages for settings without effect, because a factor sets the same field in each arm."""
    named = factors if isinstance(factors, list | tuple) else ()
    varied = [each.get("name") for each in named if isinstance(each, dict)]
    for field, new in ((field, _parsed(text)) for field, _, text in (each.partition("=") for each in settings)):
        given = {f"{field}.{each}": new[each] for each in new} if isinstance(new, dict) else {field: new}
        for each, value in given.items():
            where, _, name = each.rpartition(".")
            if where in ("cell", "recipe", SETTINGS[:-1]) and name in varied:
                yield f"--set {each} is {_shown(value)}, but {name} is a factor; allowed: --set factors.{name}=[...]"


def _narrow(study: Study, value: dict[str, Any], factor: str) -> None:
    """Drop the contrasts of levels that a setting removed from a factor, and a moderator that has only one level
    left."""
    left = next(each["levels"] for each in value["factors"] if each["name"] == factor)
    gone = [level for level in study.levels(factor) if isinstance(left, list) and level not in left]
    value["contrasts"] = [
        each
        for each in value["contrasts"]
        if not (each["factor"] == factor and {each["treated"], each["against"]} & set(gone))
        and dict(each["where"]).get(factor) not in gone
    ]
    if gone and len(left) == 1 and value["moderator"] == factor:
        value["moderator"] = None


def _type_problems(path: Path, value: dict[str, Any], settings: Sequence[str], error: ValidationError) -> list[str]:
    """A message for each field whose value has the wrong type: the allowed types, and for `--set` an example."""
    given = tuple(setting.partition("=")[0] for setting in settings)
    found = {name: (kind, got) for name, kind, got in (_field(each["loc"], value) for each in error.errors())}
    problems = []
    for name, (kind, got) in found.items():
        allowed = " or ".join(dict.fromkeys(_words(each) for each in _members(kind)))
        typed = any(f"{name}.".startswith((f"{each}.", f"{each}[")) for each in given)
        source, example = ("--set", _example(name, kind, got)) if typed else (f"STUDY is {path}:", "")
        problems.append(f"{source} {name} is {_shown(got)}; allowed: {allowed}{example}")
    return problems


def _field(loc: Sequence[int | str], value: Any) -> tuple[str, Any, Any]:
    """The name (as in `--set`), the type and the value of the field in which pydantic found an error."""
    name, kind = "", Study  # type: str, Any
    for step in loc:
        inner = _inner(kind, step)
        if inner is None or not (step in value if isinstance(value, dict) else isinstance(step, int)):
            break  # the remaining names are members of a union
        kind, value = inner, value[step]
        if kind is Factor and isinstance(value, dict) and "name" in value:
            name = f"{name}.{value['name']}"
        elif step != "levels":
            name += f"[{step}]" if isinstance(step, int) else f".{step}"
    return name.removeprefix("."), kind, value


def _inner(kind: Any, step: int | str) -> Any:
    """The type of a field of a dataclass, or of an item of a list. None if there is no such field or item."""
    for each in _members(kind):
        if is_dataclass(each) and step in (hints := get_type_hints(each)):
            return hints[str(step)]
        if get_origin(each) is tuple and isinstance(step, int):
            items = get_args(each)
            return items[0] if items[-1] is ... else items[step]
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _words(kind: Any) -> str:
    """The allowed values of a type, in words."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    known = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return known.get(kind, "a list" if get_origin(kind) is tuple else "its fields, one by one")


def _example(name: str, kind: Any, got: Any) -> str:
    """An example for `--set`, or an empty text if the value does not suggest one."""
    if is_dataclass(kind) and isinstance(kind, type):
        first = fields(kind)[0]
        known = first.default is not MISSING and "[" not in name
        return f", such as {name}.{first.name}={first.default}" if known else ""
    if isinstance(got, dict | list | NoneType):
        return ""
    right: Any = json.dumps(got)
    if any(get_origin(each) is tuple for each in _members(kind)):
        right = [_parsed(text.strip()) for text in str(got).split(",")]
    try:
        adapter(kind).validate_python(right)
    except ValidationError:
        return ""
    return f", such as {shlex.quote(f'{name}={json.dumps(right)}')}"


def _shown(value: Any) -> str:
    """A value as text: None, True and False as in JSON, all others as in Python."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _parsed(text: str) -> Any:
    """The value of a JSON text. Any other text is returned unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _assign(value: dict[str, Any], path: list[str], new: Any, whole: str) -> str | None:
    """Set a nested field in place. Returns a message if that is not possible, or None."""
    head, *rest = path
    if head not in value:
        return f"--set names {whole!r}; allowed here: {', '.join(value)}"
    if not rest:
        if isinstance(new, dict) and isinstance(value[head], dict):  # pydantic would ignore unknown fields
            return next(
                (found for name in new if (found := _assign(value[head], [name], new[name], f"{whole}.{name}"))), None
            )
        if _holds_truth(new) and not isinstance(value[head], bool):  # pydantic would take it as 1 or 0
            return f"--set {whole} is {json.dumps(new)}; allowed: numbers and text, not true or false"
        value[head] = new
        return None
    if head == "factors" and isinstance(value[head], list | tuple):
        by_name = {factor["name"]: factor for factor in value[head]}
        if rest[0] not in by_name or len(rest) > 1:
            return f"--set names {whole!r}; allowed here: {', '.join(f'factors.{name}' for name in by_name)}"
        return _assign(by_name[rest[0]], ["levels"], new, whole)
    if value[head] is None:
        return f"--set names {whole!r}, but {head} is null; allowed: {head} as a whole, in JSON"
    if not isinstance(value[head], dict):
        return f"--set names {whole!r}; {head} has no fields of its own"
    return _assign(value[head], rest, new, whole)


def _assign_setting(value: dict[str, Any], name: str, new: Any) -> str | None:
    """Set a setting of methods. Returns a message for a value that is not a number, or None. The check of the study
    reports unknown names."""
    if isinstance(new, bool) or not isinstance(new, int | float):
        return f"--set {SETTINGS}{name} is {_shown(new)}; allowed: a number"
    value["cell"]["settings"] = dict(value["cell"]["settings"]) | {name: new}
    return None


def _holds_truth(value: Any) -> bool:
    return any(map(_holds_truth, value)) if isinstance(value, list) else isinstance(value, bool)


MOST_SOURCE_BYTES = 2**22  # limit for a study's file that is compared without executing it


@dataclass(frozen=True)
class Source:
    """The origin of a study, with which later changes are detected."""

    file: Path
    scale: str
    data: str | None = None
    settings: tuple[str, ...] = ()  # values of `--set`
    digests: dict[str, str] | None = None  # SHA-256 of the file and of its imports from its folder, by path

    def read(self) -> Study:
        """The study as its file declares it now. Executes the file. Raises `UserError`."""
        return resolve(self.file, self.scale, self.data, self.settings)

    @property
    def is_unchanged(self) -> bool:
        """Whether the study's files are unchanged since the run began. Executes nothing."""
        try:
            return bool(self.digests) and all(
                hashlib.sha256(read(Path(path), MOST_SOURCE_BYTES)).hexdigest() == digest
                for path, digest in (self.digests or {}).items()
            )
        except (OSError, ValueError):
            return False

    def may_be_executed(self, results: Path) -> bool:
        """Whether the file is in a trusted folder: that of the installed studies, the working directory or its
        `search_spaces`. A file among the results is not: the results, and the record that names the file, may come from
        others."""
        place = self.file.resolve().parent
        near = {folder.resolve() for folder in (*folders(), Path.cwd())}
        return place in near and not place.is_relative_to(results.resolve())

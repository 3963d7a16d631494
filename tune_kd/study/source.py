"""Execute a study's file: once for what it holds, so that what it imports, prints and raises stays its own affair."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tune_kd.study.spec import Study
from tune_kd.system import signals
from tune_kd.system.errors import UserError
from tune_kd.system.files import MOST_RECORD_BYTES, read

FOLDER = "search_spaces"
INSTALLED = Path(__file__).parents[2] / FOLDER
"""Where the studies that came with tune_kd are: beside it, whatever else has this name where Python looks."""


def folders() -> tuple[Path, ...]:
    """Where studies are found by name: first in the working directory, then among those that were installed."""
    return Path.cwd() / FOLDER, INSTALLED


class StudyFile:
    """A study's file that was executed. Whatever else is asked of it is asked while `running`."""

    module: ModuleType

    def __init__(self, path: Path) -> None:
        """Execute it. Raises `UserError`, also for what it raises."""
        self.path = path
        self.made: dict[Hashable, Study] = {}  # what its functions made
        # A name that nothing else has, under which the module stays known, so that its classes can be found by it.
        self._name = f"study_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
        self._folder = path.resolve().parent  # of a link, the folder of what it links to, as for any of Python's
        self._beside: dict[str, ModuleType] = {}  # what it imported from there, which only it sees
        # `python -m tune_kd` puts the working directory first, and `tune-kd` does not: here neither does.
        here = 1 if sys.path[:1] in ([""], [os.getcwd()]) else 0
        self._python_path = [str(self._folder), *sys.path[here:]]
        self._finder = _SearchSpaces()
        self._texts: dict[Path, bytes] = {}  # of it, and of what it imported so
        with self.running("which cannot be read"):
            self._texts[path] = read(path, MOST_RECORD_BYTES)
            self.module = self._executed()

    @property
    def files(self) -> dict[str, Path]:
        """It and what it imported so far, by where a copy of tune_kd has to have them: `studies/NAME`, and
        `search_spaces/NAME` of what it imported as that and did not come with tune_kd."""
        found = {f"studies/{self.path.name}": self.path}
        for path in self._texts:
            if path.is_relative_to(INSTALLED):
                continue
            if path.is_relative_to(self._folder):
                found.setdefault(f"studies/{path.relative_to(self._folder)}", path)
            if path.is_relative_to(own := folders()[0]):
                found[f"{FOLDER}/{path.relative_to(own)}"] = path
        return found

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of it, and of what it imported from its folder so far, by path."""
        return {str(path): hashlib.sha256(text).hexdigest() for path, text in self._texts.items()}

    @property
    def is_as_executed(self) -> bool:
        """Whether it, and what it imported from its folder, holds what it did then, as far as it is there."""
        for path, text in self._texts.items():
            with suppress(OSError):
                if read(path, MOST_RECORD_BYTES) != text:
                    return False
        return True

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Run code of this file. Modules of its folder can be imported, and `search_spaces` means the folders where
        studies are found; what it prints goes to standard error. Nothing of that stays.

        Raises `UserError`, `doing` in its words, for whatever it raises: SystemExit and KeyboardInterrupt, too.
        """
        modules, python_path, bytecode = dict(sys.modules), sys.path, sys.dont_write_bytecode
        for name in modules:
            if _top(name) == FOLDER:
                del sys.modules[name]
        sys.modules.update(self._beside)
        sys.path, sys.dont_write_bytecode = self._python_path, True  # no traces in a user's folder
        finders = list(sys.meta_path)
        sys.meta_path.insert(0, self._finder)
        try:
            with _to_standard_error():
                yield
        except BaseException as error:
            signals.check()  # what it raises may be what asked this command to leave
            line = self._line(error)
            if isinstance(error, UserError) and error.problems:
                if line is None:  # ours
                    raise
                raise UserError(*(f"STUDY is {self.path}: {problem}" for problem in error.problems)) from error
            at = "" if line is None else f" (line {line})"
            raise UserError(f"STUDY is {self.path}, {doing}: {_words(error)}{at}") from error
        finally:
            more = [finder for finder in sys.meta_path if finder not in (self._finder, *finders)]  # of libraries
            sys.meta_path[:] = [*finders, *more]
            self._python_path, sys.path, sys.dont_write_bytecode = sys.path, python_path, bytecode
            self._set_aside(modules)

    def _executed(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            self._name, self.path, loader=_AsItIsNow(self._name, str(self.path))
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[self._name] = module
        spec.loader.exec_module(module)
        return module

    def _set_aside(self, before: dict[str, ModuleType]) -> None:
        """Have modules of its folder, or called `search_spaces`, be for this file alone; put back what they hid."""
        new = {name: file for name, module in list(sys.modules.items())
               if name not in before and name != self._name and (file := _file(module)) is not None}  # fmt: skip
        # What is not all Python, such as numpy in a folder to which it was installed, cannot be imported again.
        compiled = {_top(name) for name, file in new.items() if file.suffix != ".py"}
        own = {FOLDER} | {name for name, file in new.items() if self._holds(file) and name not in compiled}
        for name in [name for name in sys.modules if _top(name) in own]:
            self._beside[name] = sys.modules.pop(name)
            if (file := _file(self._beside[name])) is not None and file not in self._texts:
                with suppress(OSError):
                    self._texts[file] = read(file, MOST_RECORD_BYTES)
        sys.modules.update({name: module for name, module in before.items() if _top(name) in own})

    def _holds(self, file: Path) -> bool:
        """Whether a module's file, or the folder of a package's, stands directly in the folder of this one."""
        return self._folder == (file.parent.parent if file.stem == "__init__" else file.parent)

    def _line(self, error: BaseException) -> int | None:
        """The last line of the file that led to an error; null where none did."""
        trace, line = error.__traceback__, None
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(self.path) else line
            trace = trace.tb_next
        return line


_files: dict[Path, StudyFile] = {}


def executed(path: Path) -> StudyFile:
    """A study's file, executed when it is first asked for, and again only where it was changed. Raises `UserError`."""
    path = path.absolute()
    known = _files.get(path)
    if known is None or not known.is_as_executed:
        known = _files[path] = StudyFile(path)
    return known


def digests(path: Path) -> dict[str, str] | None:
    """The SHA-256 of a study's file, and of what it imported from its folder, by path; null where this process has not
    executed it."""
    known = _files.get(path.absolute())
    return None if known is None else known.digests


class _AsItIsNow(SourceFileLoader):
    """Python takes a file's compiled form of before for its present one where size and second of both are the same."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(read(Path(self.path), MOST_RECORD_BYTES), self.path)


class _SearchSpaces(MetaPathFinder):
    """Finds the package `search_spaces` in the folders of studies, the installed ones first, so that a user's study may
    refine one whose name it has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != FOLDER:
            return None
        there = [str(folder) for folder in reversed(folders())]
        return importlib.util.spec_from_file_location(name, INSTALLED / "__init__.py", submodule_search_locations=there)


@contextmanager
def _to_standard_error() -> Iterator[None]:
    """Have what is written to standard output, also by programs that are started, go to standard error."""
    with redirect_stdout(sys.stderr):
        try:
            aside = os.dup(1)
        except OSError:  # there is none
            yield
            return
        try:
            _flush()
            with suppress(OSError):
                os.dup2(2, 1)
            yield
        finally:
            _flush()
            os.dup2(aside, 1)
            os.close(aside)


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):  # closed, or none
        sys.__stdout__.flush()  # type: ignore[union-attr]


def _file(module: object) -> Path | None:
    """The file of a module, or of a package without `__init__.py` the one that it would have; null where it has none.
    What stands in `sys.modules` may be anything, and is not asked."""
    there = vars(module) if isinstance(module, ModuleType) else {}
    file, paths = there.get("__file__"), there.get("__path__")
    if isinstance(file, str):
        return Path(file)
    with suppress(Exception):  # of a package that computes them
        return next((Path(str(each), "__init__.py") for each in paths or ()), None)
    return None


def _words(error: BaseException) -> str:
    """An error as one line."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    except Exception:  # of its own class, whose words fail
        return type(error).__name__


def _top(name: str) -> str:
    return name.partition(".")[0]

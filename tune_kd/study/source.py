"""Execute a study's file once, and isolate its imports, output and errors."""

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
"""The folder of the studies that come with tune_kd, even if Python's path has another folder of this name."""


def folders() -> tuple[Path, ...]:
    """The folders in which studies are found by name: `search_spaces` in the working directory, then the installed
    one."""
    return Path.cwd() / FOLDER, INSTALLED


class StudyFile:
    """An executed file of a study. Call its functions inside `running`."""

    module: ModuleType

    def __init__(self, path: Path) -> None:
        """Execute the file. Raises `UserError`, also for errors in the file."""
        self.path = path
        self.made: dict[Hashable, Study] = {}  # studies by the function that made them
        # A unique name, under which the module stays in `sys.modules` so that its classes can be found.
        self._name = f"study_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
        self._folder = path.resolve().parent  # Python resolves links in the same way
        self._beside: dict[str, ModuleType] = {}  # imports from that folder, visible only to this file
        # `python -m tune_kd` puts the working directory first, `tune-kd` does not. Remove it, so that both are equal.
        here = 1 if sys.path[:1] in ([""], [os.getcwd()]) else 0
        self._python_path = [str(self._folder), *sys.path[here:]]
        self._finder = _SearchSpaces()
        self._texts: dict[Path, bytes] = {}  # content of the file and of its imports
        with self.running("which cannot be read"):
            self._texts[path] = read(path, MOST_RECORD_BYTES)
            self.module = self._executed()

    @property
    def files(self) -> dict[str, Path]:
        """The file and its imports so far, by their path in a copy of tune_kd: `studies/NAME`, or `search_spaces/NAME`
        for files of the working directory's `search_spaces`."""
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
        """SHA-256 of the file and of its imports from its folder so far, by path."""
        return {str(path): hashlib.sha256(text).hexdigest() for path, text in self._texts.items()}

    @property
    def is_as_executed(self) -> bool:
        """Whether the file and its imports are unchanged since they were executed. Missing files count as unchanged."""
        for path, text in self._texts.items():
            with suppress(OSError):
                if read(path, MOST_RECORD_BYTES) != text:
                    return False
        return True

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Within this context, run code of this file. It can import modules from its folder, and `search_spaces` from
        the folders of studies. Its output goes to standard error. All of this is undone at the end.

        Raises `UserError`, which quotes `doing`, for any error of the code, including SystemExit and KeyboardInterrupt.
        """
        modules, python_path, bytecode = dict(sys.modules), sys.path, sys.dont_write_bytecode
        for name in modules:
            if _top(name) == FOLDER:
                del sys.modules[name]
        sys.modules.update(self._beside)
        sys.path, sys.dont_write_bytecode = self._python_path, True  # leave no files in a user's folder
        finders = list(sys.meta_path)
        sys.meta_path.insert(0, self._finder)
        try:
            with to_standard_error():
                yield
        except BaseException as error:
            signals.check()  # the error may come from a signal to this command
            line = self._line(error)
            if isinstance(error, UserError) and error.problems:
                if line is None:  # an error of tune_kd itself
                    raise
                raise UserError(*(f"STUDY is {self.path}: {problem}" for problem in error.problems)) from error
            at = "" if line is None else f" (line {line})"
            raise UserError(f"STUDY is {self.path}, {doing}: {_words(error)}{at}") from error
        finally:
            more = [finder for finder in sys.meta_path if finder not in (self._finder, *finders)]  # added by libraries
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
        """Hide the modules of this file's folder, and `search_spaces`, from other code. Restore the modules that they
        shadowed."""
        new = {name: file for name, module in list(sys.modules.items())
               if name not in before and name != self._name and (file := _file(module)) is not None}  # fmt: skip
        # Compiled packages, such as numpy installed into that folder, stay: they cannot be imported twice.
        compiled = {_top(name) for name, file in new.items() if file.suffix != ".py"}
        own = {FOLDER} | {name for name, file in new.items() if self._holds(file) and name not in compiled}
        for name in [name for name in sys.modules if _top(name) in own]:
            self._beside[name] = sys.modules.pop(name)
            if (file := _file(self._beside[name])) is not None and file not in self._texts:
                with suppress(OSError):
                    self._texts[file] = read(file, MOST_RECORD_BYTES)
        sys.modules.update({name: module for name, module in before.items() if _top(name) in own})

    def _holds(self, file: Path) -> bool:
        """Whether a module's file, or a package's folder, is directly in the folder of this file."""
        return self._folder == (file.parent.parent if file.stem == "__init__" else file.parent)

    def _line(self, error: BaseException) -> int | None:
        """The last line of the file in the traceback of an error, or None."""
        trace, line = error.__traceback__, None
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(self.path) else line
            trace = trace.tb_next
        return line


_files: dict[Path, StudyFile] = {}


def executed(path: Path) -> StudyFile:
    """A study's file, executed at the first call and again after each change. Raises `UserError`."""
    path = path.absolute()
    known = _files.get(path)
    if known is None or not known.is_as_executed:
        known = _files[path] = StudyFile(path)
    return known


def digests(path: Path) -> dict[str, str] | None:
    """SHA-256 of a study's file and of its imports from its folder, by path. None if this process has not executed the
    file."""
    known = _files.get(path.absolute())
    return None if known is None else known.digests


class _AsItIsNow(SourceFileLoader):
    """Ignores bytecode files: Python would use an old one if the source has the same size and was changed within the
    same second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(read(Path(self.path), MOST_RECORD_BYTES), self.path)


class _SearchSpaces(MetaPathFinder):
    """Finds the package `search_spaces` in the folders of studies. The installed folder comes first, so that a user's
    study can refine the installed one of the same name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != FOLDER:
            return None
        there = [str(folder) for folder in reversed(folders())]
        return importlib.util.spec_from_file_location(name, INSTALLED / "__init__.py", submodule_search_locations=there)


@contextmanager
def to_standard_error() -> Iterator[None]:
    """Redirect standard output to standard error, including that of child processes."""
    with redirect_stdout(sys.stderr):
        try:
            aside = os.dup(1)
        except OSError:  # no standard output
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
    with suppress(OSError, ValueError, AttributeError):  # closed or missing
        sys.__stdout__.flush()  # type: ignore[union-attr]


def _file(module: object) -> Path | None:
    """The file of a module, or None. For a package without `__init__.py`, the path where that file would be.

    Entries of `sys.modules` can be any object, so none of their code is called.
    """
    there = vars(module) if isinstance(module, ModuleType) else {}
    file, paths = there.get("__file__"), there.get("__path__")
    if isinstance(file, str):
        return Path(file)
    with suppress(Exception):  # a package may compute its paths, which can fail
        return next((Path(str(each), "__init__.py") for each in paths or ()), None)
    return None


def _words(error: BaseException) -> str:
    """An error as one line."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    except Exception:  # an exception class of the study may fail here
        return type(error).__name__


def _top(name: str) -> str:
    return name.partition(".")[0]

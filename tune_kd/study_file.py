"""Execute a study's file: once for what it holds, so that what it imports, prints and raises stays its own affair."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tune_kd import signals
from tune_kd.storage import MOST_RECORD_BYTES, read
from tune_kd.study import Mistake

FOLDER = "search_spaces"
INSTALLED = Path(__file__).parents[1] / FOLDER
"""Where the studies that came with tune_kd are: beside it, whatever else has this name where Python looks."""


def folders() -> tuple[Path, ...]:
    """Where studies are found by name: first in the working directory, then among those that were installed."""
    return Path.cwd() / FOLDER, INSTALLED


class StudyFile:
    """A study's file that was executed. Whatever else is asked of it is asked while `running`."""

    module: ModuleType

    def __init__(self, path: Path) -> None:
        """Execute it. Raises `Mistake`, also for what it raises."""
        self.path = path
        # A name that nothing else has, under which the module stays known, so that its classes can be found by it.
        self._name = f"study_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
        self._beside: dict[str, ModuleType] = {}  # what it imported from its folder, which only it sees
        self._python_path = [str(path.parent), *sys.path]
        self._finder = _SearchSpaces()
        self._texts: dict[Path, bytes] = {}  # of it, and of what it imported so
        with self.running("which cannot be read"):
            self._texts[path] = read(path, MOST_RECORD_BYTES)
            self.module = self._executed()

    @property
    def files(self) -> list[Path]:
        """The file, and what it imported so far from its folder."""
        return [path for path in self._texts if path.is_relative_to(self.path.parent)]

    @property
    def is_as_executed(self) -> bool:
        """Whether it, and what it imported from its folder, holds what it did then."""
        with suppress(OSError):
            return all(read(path, MOST_RECORD_BYTES) == text for path, text in self._texts.items())
        return False

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Run code of this file. Modules of its folder can be imported, and `search_spaces` means the folders where
        studies are found; what it prints goes to standard error. Nothing of that stays.

        Raises `Mistake`, `doing` in its words, for whatever it raises: SystemExit and KeyboardInterrupt, too.
        """
        modules, python_path, bytecode = dict(sys.modules), sys.path, sys.dont_write_bytecode
        for name in modules:
            if _top(name) == FOLDER:
                del sys.modules[name]
        sys.modules.update(self._beside)
        sys.path, sys.dont_write_bytecode = self._python_path, True  # no traces in a user's folder
        sys.meta_path.insert(0, self._finder)
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Mistake:
            raise
        except BaseException as error:
            signals.check()  # what it raises may be what asked this command to leave
            raise Mistake(f"STUDY is {self.path}, {doing}: {self._words(error)}") from error
        finally:
            sys.meta_path.remove(self._finder)
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
        new = {name: module for name, module in sys.modules.items() if name not in before and name != self._name}
        own = {FOLDER} | {name for name, module in new.items() if self._holds(module)}
        for name in [name for name in sys.modules if _top(name) in own]:
            self._beside[name] = sys.modules.pop(name)
            if source := getattr(self._beside[name], "__file__", None):
                self._texts.setdefault(Path(source), read(Path(source), MOST_RECORD_BYTES))
        sys.modules.update({name: module for name, module in before.items() if _top(name) in own})

    def _holds(self, module: ModuleType) -> bool:
        """Whether a module is a file or a folder directly in the folder of this one."""
        file = getattr(module, "__file__", None)
        places = [Path(file)] if file else [Path(each) / "__init__.py" for each in getattr(module, "__path__", ())]
        return any(self.path.parent == (at.parent.parent if at.stem == "__init__" else at.parent) for at in places)

    def _words(self, error: BaseException) -> str:
        """An error as one line, with the last line of the file that led to it."""
        try:
            text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
        except Exception:  # of its own class, whose words fail
            text = type(error).__name__
        trace, line = error.__traceback__, None
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(self.path) else line
            trace = trace.tb_next
        return text if line is None else f"{text} (line {line})"


_files: dict[Path, StudyFile] = {}


def executed(path: Path) -> StudyFile:
    """A study's file, executed when it is first asked for, and again only where it was changed. Raises `Mistake`."""
    path = path.absolute()
    known = _files.get(path)
    if known is None or not known.is_as_executed:
        known = _files[path] = StudyFile(path)
    return known


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


def _top(name: str) -> str:
    return name.partition(".")[0]

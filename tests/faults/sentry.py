"""Record the forbidden actions of a process that reads a stranger's files, by Python's audit events.

Forbidden are code from the stranger's files or from a pickle, changes of files outside the writable folders,
connections, and other programs. An audit hook cannot be removed, so it belongs in a process that soon ends.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = str(Path(__file__).parents[2] / "tune_kd")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")
HARMLESS = (os.devnull, "/proc/self/clear_refs")  # the second resets the peak of this process's memory
# For each event, the positions of the changed paths in its arguments, and whether a link is followed.
CHANGES = {
    "os.remove": ((0, False),),
    "os.rmdir": ((0, False),),
    "os.mkdir": ((0, False),),
    "os.mkfifo": ((0, False),),
    "os.rename": ((0, False), (1, False)),
    "os.link": ((1, False),),
    "os.symlink": ((1, False),),
    "os.chmod": ((0, True),),
    "os.chown": ((0, True),),
    "os.truncate": ((0, True),),
    "os.utime": ((0, True),),
    "os.setxattr": ((0, True),),
    "shutil.rmtree": ((0, False),),
}
FOLDERS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2, "os.link": 2, "os.symlink": 2}
"""For each event, the position of the descriptor of the folder to which its first path is relative."""


@dataclass(frozen=True)
class Sight:
    """A forbidden action. `kind` is code, outside or connection."""

    kind: str
    what: str
    place: str  # the line of tune_kd that led to it: FILE:LINE FUNCTION
    stack: str = ""


@dataclass
class Sentry:
    """Records the forbidden actions of its process after `watch` is called."""

    strangers: Path  # code below this folder must not run
    writable: tuple[Path, ...]  # files below these folders may be changed
    seen: dict[tuple[str, str], Sight] = field(default_factory=dict)
    _busy: bool = False

    def watch(self) -> None:
        sys.addaudithook(self._hook)

    def taken(self) -> list[dict[str, str]]:
        """Return the actions since the last call."""
        found = [asdict(each) for each in self.seen.values()]
        self.seen.clear()
        return found

    def _hook(self, event: str, values: tuple[Any, ...]) -> None:
        if self._busy or event not in JUDGES:
            return
        self._busy = True
        try:
            found = JUDGES[event](self, event, values)
            if found is not None:
                sight = Sight(*found, *where(sys._getframe(1)))
                self.seen.setdefault((sight.kind, sight.place), sight)  # one per line of tune_kd is enough
        finally:
            self._busy = False

    def _code(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        if event == "pickle.find_class":
            return "code", f"unpickles {values[0]}.{values[1]}"
        file = values[0] if event in ("exec", "ctypes.dlopen") else values[1]
        file = file.co_filename if isinstance(file, CodeType) else file
        text = os.fsdecode(file) if isinstance(file, str | bytes) else ""
        theirs = "/" in text and self._below(os.path.realpath(text), self.strangers)
        return ("code", f"{event} of {text}") if theirs else None

    def _program(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        return "code", f"{event} of {values[:2]!r:.200}"

    def _connection(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        if event.startswith("socket.get"):
            return "connection", f"{event} of {values[0]!r}"
        return "connection", f"{event} to {values[1]!r}"

    def _opened(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        path, mode, flags = values
        if isinstance(path, int) or not (flags & WRITING or set(mode or "") & set("wax+")):
            return None
        return self._changed(f"opens to write (flags {flags:#x})", path, follow=not flags & os.O_NOFOLLOW)

    def _database(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        place = os.fsdecode(values[0])
        if place in ("", ":memory:"):
            return None
        if place.startswith("file:"):
            from urllib.parse import unquote, urlsplit

            place = unquote(urlsplit(place).path)
        return self._changed("opens as a database", place, follow=True)

    def _change(self, event: str, values: tuple[Any, ...]) -> tuple[str, str] | None:
        for place, follow in CHANGES[event]:
            path = values[place]
            folder = values[FOLDERS[event]] if event in FOLDERS and len(values) > FOLDERS[event] else -1
            if isinstance(path, int):
                continue
            if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
            if (found := self._changed(event, path, follow)) is not None:
                return found
        return None

    def _changed(self, how: str, path: Any, follow: bool) -> tuple[str, str] | None:
        text = os.fsdecode(path)
        if text in HARMLESS:
            return None
        whole = os.path.realpath(text) if follow else os.path.join(
            os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text)
        )  # fmt: skip
        if any(self._below(whole, each) for each in self.writable):
            return None
        return "outside", f"{how}: {text} ({whole})"

    @staticmethod
    def _below(path: str, folder: Path) -> bool:
        return path == str(folder) or path.startswith(f"{folder}/")


Judge = Callable[[Sentry, str, tuple[Any, ...]], tuple[str, str] | None]
JUDGES: dict[str, Judge] = {
    **dict.fromkeys(("exec", "compile", "import", "ctypes.dlopen", "pickle.find_class"), Sentry._code),
    **dict.fromkeys(PROGRAMS, Sentry._program),
    **dict.fromkeys(CONNECTIONS, Sentry._connection),
    **dict.fromkeys(CHANGES, Sentry._change),
    "open": Sentry._opened,
    "sqlite3.connect": Sentry._database,
}


def where(frame: FrameType | None) -> tuple[str, str]:
    """Return the innermost line of tune_kd that led to a frame, and up to eight of its lines on the stack."""
    lines = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            file = os.path.relpath(frame.f_code.co_filename, PACKAGE)
            lines.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return (lines[0] if lines else "elsewhere"), " < ".join(lines[:8])

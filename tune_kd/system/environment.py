"""What a command finds around it: text that it can read, and places outside of the results that it has to write to."""

import fcntl
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tune_kd.system.characters import visible
from tune_kd.system.errors import UserError

PLACES = (
    *("HOME", "TMPDIR", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH", "XDG_CACHE_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"),
    "TORCH_HOME",
)
"""Variables that say where something is written outside of the results."""
SOCKET_BYTES = 107  # of the path of a socket, as Linux has it


def check_text(arguments: Sequence[str]) -> None:
    """Raise `UserError` for what a command is given that is no UTF-8, as which SQLite, Parquet, JSON and Ray need it,
    and for arguments that a terminal would obey."""
    before = ("tune_kd", *arguments)
    named = [(f"the argument after {before[number]}", text) for number, text in enumerate(arguments)]
    named += [(name, os.environ.get(name, "")) for name in PLACES]
    try:
        named.append(("the working directory", os.getcwd()))
    except FileNotFoundError:
        raise UserError("the working directory is not there any more; change to another one") from None
    as_what = sys.getfilesystemencoding()
    remedy = "" if as_what == "utf-8" else f", and Python takes it for {as_what} here; set PYTHONUTF8=1"
    problems = [
        f"{name} is {repr(os.fsencode(text))[1:]}; allowed: text in UTF-8{remedy}"
        for name, text in named
        if not _is_text(text)
    ]
    problems += [
        f"the argument after {before[number]} is {text!r}; allowed: text without control characters"
        for number, text in enumerate(arguments)
        if _is_text(text) and visible(text) != text  # which the parser of arguments would repeat as it is
    ]
    if problems:
        raise UserError(*problems)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no text, as Python keeps them
        return False
    return True


def check_places(address: str | None) -> None:
    """Raise `UserError` for places outside of the results that a run has to write to, and cannot. It joins the Ray at
    `address`, or starts one."""
    home()  # Ray cannot even be imported without
    problems: list[str] = []
    if address is None:
        for check in (guard_token, ray_folder):
            try:
                check()
            except UserError as mistake:
                problems += mistake.problems
    if problems:
        raise UserError(*problems)


def home() -> Path:
    """The user's home. Raises `UserError` where nobody says where that is."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            f"HOME is not set, and the user {os.getuid()} has no entry in the password file; set HOME to a folder that "
            "can be written to"
        ) from None


def token_file() -> Path:
    """Where Ray has its token, which its dashboard asks for. Raises `UserError` where there is no home for it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home() / ".ray" / "auth_token")


def guard_token() -> None:
    """Whoever reads Ray's token can run code as this user, and Ray writes it for all to read, and into the home alone:
    make it, where Ray asks for one, and keep it from others.

    Raises `UserError` where that cannot be done.
    """
    asks = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN")
    token = token_file()
    try:
        if asks:
            _fill(token)
    except OSError as error:
        raise UserError(
            f"Ray's token is to be in {token}, which cannot be written and read there ({error.strerror}); set "
            "RAY_AUTH_TOKEN_PATH to a file in a folder where it can"
        ) from error
    with suppress(OSError):  # a file that is not ours
        token.chmod(0o600)
    if token.is_file() and (mode := token.stat().st_mode & 0o777) & 0o077:
        raise UserError(f"{token}, Ray's token, has the mode {mode:04o}, so that others can read it; allowed: 0600")


def _fill(token: Path) -> None:
    """Have a token in a file, once, however many runs begin at a time. Raises OSError."""
    if token.is_file() and token.read_bytes():
        return
    make_private(token.parent)
    file = os.open(token, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not os.fstat(file).st_size:
            os.write(file, secrets.token_hex(32).encode())
    finally:
        os.close(file)


def umask() -> int:
    """Which permissions files of this process lack."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def private() -> Iterator[None]:
    """Have files and folders that are made meanwhile, also by processes that start now, be this user's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(folder: Path) -> None:
    """Make a folder, with the missing ones above it, for this user alone. One that is there stays as it is."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def own_folder() -> Path:
    """A folder of this user's alone for what is temporary: `ray-UID` in RAY_TMPDIR, TMPDIR or /tmp.

    Raises `UserError` where it cannot be made, or others may look into it: it has the same name each time, so that
    another user may have made it before.
    """
    folder = _temporary() / f"ray-{os.getuid()}"
    try:
        make_private(folder)
        found = os.lstat(folder)
    except OSError as error:
        raise _unusable(folder, f"which cannot be written to ({error.strerror})") from error
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(folder, "which is no folder")
    if found.st_uid != os.getuid():
        raise _unusable(folder, f"which belongs to the user {found.st_uid}")
    if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
        raise _unusable(folder, f"which has the mode {mode:04o}, so that others can use it, where 0700 is allowed")
    return folder


def guard_code() -> None:
    """Have PyTorch keep what it compiles in a folder that is closed to others, unless the user names one. It would make
    one in /tmp whose name anybody can guess, with the first network, and run the code that it finds there."""
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder() / "torchinductor")


def ray_folder() -> Path:
    """Where the Ray that a run starts has its sockets and logs: in a folder that is closed to others, since Ray opens
    to all what it makes there. Raises `UserError` where Ray cannot work."""
    folder = _temporary() / f"ray-{os.getuid()}" / "ray"
    longest = folder / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "dash_MetricsHead"
    if not folder.is_absolute():
        raise _unusable(folder, "which is not an absolute path")
    if (length := len(os.fsencode(longest))) > SOCKET_BYTES:
        raise _unusable(folder, f"where the paths of its sockets have {length} bytes, and Linux allows {SOCKET_BYTES}")
    own_folder()
    try:
        make_private(folder)
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        raise _unusable(folder, f"which cannot be written to ({error.strerror})") from error
    return folder


def _variable() -> str | None:
    """The variable that says where temporary things are, also one that is empty; null where none does."""
    return next((each for each in ("RAY_TMPDIR", "TMPDIR") if each in os.environ), None)


def _temporary() -> Path:
    name = _variable()
    return Path(os.environ[name] if name else "/tmp")


def _unusable(folder: Path, why: str) -> UserError:
    name = _variable()
    where = f"{name} is {os.environ[name]!r}" if name else "RAY_TMPDIR is not set"
    return UserError(
        f"{where}, and Ray works in {folder}, {why}; set RAY_TMPDIR to a folder with a short absolute path that can be "
        "written to"
    )

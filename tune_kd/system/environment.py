"""The environment of a command: encoding of its arguments, home, temporary folders, and Ray's token."""

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
from tune_kd.system.errors import UserError, collect, raise_problems

PLACES = (
    *("HOME", "TMPDIR", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH", "XDG_CACHE_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"),
    "TORCH_HOME",
)
"""Environment variables that name folders and files outside the results folder to which a command writes."""
SOCKET_BYTES = 107  # limit for the path of a socket on Linux


def check_text(arguments: Sequence[str]) -> None:
    """Raise `UserError` for arguments, variables and a working directory that are not UTF-8, and for arguments with
    control characters. SQLite, Parquet, JSON and Ray need UTF-8."""
    before = ("tune_kd", *arguments)
    named = [(f"the argument after {before[number]}", text) for number, text in enumerate(arguments)]
    named += [(name, os.environ.get(name, "")) for name in PLACES]
    try:
        named.append(("the working directory", os.getcwd()))
    except FileNotFoundError:
        raise UserError("the working directory does not exist any more; change to another one") from None
    as_what = sys.getfilesystemencoding()
    remedy = "" if as_what == "utf-8" else f", and Python decodes it as {as_what} here; set PYTHONUTF8=1"
    problems = [
        f"{name} is {repr(os.fsencode(text))[1:]}; allowed: text in UTF-8{remedy}"
        for name, text in named
        if not _is_text(text)
    ]
    problems += [
        f"the argument after {before[number]} is {text!r}; allowed: text without control characters"
        for number, text in enumerate(arguments)
        if _is_text(text) and visible(text) != text  # typer's own errors would print the characters raw
    ]
    raise_problems(problems)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates, with which Python represents bytes that it could not decode
        return False
    return True


def check_places(address: str | None) -> None:
    """Raise `UserError` for folders outside the results folder that a run needs and cannot write to.

    `address` is the Ray cluster to join. With None the run starts Ray on this machine, which needs more folders.
    """
    home()  # Ray cannot be imported without a home
    problems: list[str] = []
    if address is None:
        for check in (guard_token, ray_folder):
            collect(problems, check)
    raise_problems(problems)


def home() -> Path:
    """Return the user's home folder. Raises `UserError` if it is unknown."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            f"HOME is not set, and the user {os.getuid()} has no entry in the password file; set HOME to a writable "
            "folder"
        ) from None


def token_file() -> Path:
    """Return the path of Ray's token, which Ray's dashboard asks for. Raises `UserError` if there is no home folder."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home() / ".ray" / "auth_token")


def guard_token() -> None:
    """Create Ray's token if Ray uses one, and make it readable only by this user.

    Anyone who can read the token can run code as this user. Ray itself would make it world-readable, and could write it
    only to the home folder. Raises `UserError` if the file cannot be written or protected.
    """
    asks = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN")
    token = token_file()
    try:
        if asks:
            _fill(token)
    except OSError as error:
        raise UserError(
            f"Ray's token {token} cannot be written and read ({error.strerror}); set RAY_AUTH_TOKEN_PATH to a file in "
            "a writable folder"
        ) from error
    with suppress(OSError):  # the file belongs to another user
        token.chmod(0o600)
    if token.is_file() and (mode := token.stat().st_mode & 0o777) & 0o077:
        raise UserError(f"Ray's token {token} has the mode {mode:04o}, so that others can read it; allowed: 0600")


def _fill(token: Path) -> None:
    """Write a token into an empty or missing file, once, even if several runs start at once. Raises OSError."""
    if token.is_file() and token.read_bytes():
        return
    make_private(token.parent)
    file = os.open(token, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not os.fstat(file).st_size:
            os.write(file, secrets.token_hex(32).encode())
    finally:
        os.close(file)


def umask() -> int:
    """Return the umask of this process."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def private() -> Iterator[None]:
    """Within this context, new files and folders are accessible only to this user, including those of new
    processes."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700. Existing folders keep their mode."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def own_folder() -> Path:
    """Create and return this user's private temporary folder: `ray-UID` in RAY_TMPDIR, TMPDIR or /tmp.

    Raises `UserError` if it cannot be created, or if others have access: the name is predictable, so another user may
    have created it first.
    """
    folder = _temporary() / f"ray-{os.getuid()}"
    try:
        make_private(folder)
        why = intruded(folder)
    except OSError as error:
        raise _unusable(folder, f"which cannot be written to ({error.strerror})") from error
    if why is not None:
        raise _unusable(folder, f"which {why}")
    return folder


def intruded(folder: Path) -> str | None:
    """Return why a folder is not private to this user, or None if it is private. Raises OSError if it is missing.

    For folders with a predictable name, which another user may have created first.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.getuid():
        return f"belongs to the user {found.st_uid}"
    if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
        return f"has the mode {mode:04o} (0700 is allowed), so that others can use it"
    return None


def python_path() -> dict[str, str]:
    """The environment variable with which a Python process started with `-P` imports from the same folders as this
    one."""
    return {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}


def guard_code() -> None:
    """Make PyTorch cache compiled code in a private folder, unless the user names one. PyTorch's default is a folder in
    /tmp with a predictable name, and PyTorch runs any code that it finds there."""
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder() / "torchinductor")


def ray_folder() -> Path:
    """Create and return the private folder for sockets and logs of a Ray that this run starts. Ray makes its files in
    it world-accessible. Raises `UserError` if Ray cannot use the folder."""
    folder = _temporary() / f"ray-{os.getuid()}" / "ray"
    longest = folder / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "dash_MetricsHead"
    if not folder.is_absolute():
        raise _unusable(folder, "which is not an absolute path")
    if (length := len(os.fsencode(longest))) > SOCKET_BYTES:
        raise _unusable(folder, f"where a socket's path has {length} bytes, and Linux allows {SOCKET_BYTES}")
    own_folder()
    try:
        make_private(folder)
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        raise _unusable(folder, f"which cannot be written to ({error.strerror})") from error
    return folder


def _variable() -> str | None:
    """Return the name of the variable that sets the temporary folder (perhaps to an empty text), or None."""
    return next((each for each in ("RAY_TMPDIR", "TMPDIR") if each in os.environ), None)


def _temporary() -> Path:
    name = _variable()
    return Path(os.environ[name] if name else "/tmp")


def _unusable(folder: Path, why: str) -> UserError:
    name = _variable()
    where = f"{name} is {os.environ[name]!r}" if name else "RAY_TMPDIR is not set"
    return UserError(
        f"{where}, so Ray's folder is {folder}, {why}; set RAY_TMPDIR to a writable folder with a short absolute path"
    )

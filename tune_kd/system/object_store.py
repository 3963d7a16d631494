"""Results in an object store (s3://, gs://), mirrored in a local folder.

Code works on the local folder. Files that other machines need are sent to the store and fetched from it. An object in
the store is either complete or absent. A store has no locks, appends or renames, so files that need them stay on the
local disk.

XDG_DATA_HOME/tune_kd/KEY/url.json   the URL of the folder in the store
XDG_DATA_HOME/tune_kd/KEY/results/   its local mirror

Only `url.json` decides where files are sent. Results may come from others, so nothing in them can change the URL.
"""

import errno
import hashlib
import json
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tune_kd.system import environment
from tune_kd.system.errors import CorruptFile, UnexpectedFile, UserError
from tune_kd.system.files import MOST_RECORD_BYTES, parsed, patiently, publish, read
from tune_kd.system.secrets import secrets

SCHEMES = ("s3", "gs")
MARK, RESULTS = "url.json", "results"  # in the folder of a mirror
REQUEST_SECONDS = 15  # seconds for one request to Google's store with its retries
MOST_SENT_BYTES = 2**34  # limit for a file, which is read into memory; a network and its optimizer state are smaller
READS = 5  # attempts to read an object that changes during the read


@dataclass(frozen=True)
class Mirror:
    """A local folder and the URL that it mirrors. If the URL is None, there is no store and nothing is sent.

    All methods retry, then raise OSError if the store does not respond.
    """

    root: Path
    url: str | None = None

    @classmethod
    def of(cls, path: Path) -> "Mirror":
        """Return the mirror that contains a path. Raises `CorruptFile` if its URL cannot be read."""
        here = Path(os.path.abspath(path))
        try:
            home = _home()
        except UserError:  # without a home there are no mirrors
            return cls(here)
        if not here.is_relative_to(home):
            return cls(here)
        key, *inside = here.relative_to(home).parts or ("",)
        if inside[:1] != [RESULTS] or not _is_ours(home) or not _is_ours(mark := home / key / MARK):
            return cls(here)
        try:
            return cls(home / key / RESULTS, str(parsed(read(mark, MOST_RECORD_BYTES))["url"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{mark} cannot be read ({error}); pass the store's URL to write it again") from error

    def place(self, path: Path) -> str:
        """Return a path as shown to users: its URL in the store, or the path itself."""
        if self.url is None:
            return str(path)
        base, _, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{self._under(path)}{'?' if query else ''}{query}"

    def send(self, path: Path, data: bytes | None = None) -> None:
        """Send a file to the store, or `data` under its name."""
        if self.url is not None:
            data = read(path, MOST_SENT_BYTES) if data is None else data
            patiently(lambda: self._put(path, data))

    def publish(self, path: Path, data: bytes) -> None:
        """Write a local file atomically and send it to the store."""
        publish(path, data)
        self.send(path, data)

    def fetch(self, path: Path, most: int) -> bool:
        """Fetch a file of at most `most` bytes from the store. Returns whether the store has it; without a store,
        whether this disk has it."""
        if self.url is None:
            return path.is_file()
        data = self.read(path, most)
        if data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, data)
        return data is not None

    def read(self, path: Path, most: int) -> bytes | None:
        """Return the content of a file in the store; None if the file or the store does not exist. Raises
        `UnexpectedFile` if the file has more than `most` bytes."""
        return None if self.url is None else patiently(lambda: self._get(path, most))

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names of files and folders in a folder of the store."""
        if self.url is None:
            return []
        from pyarrow.fs import FileSelector

        store, key = self._at(folder)
        found = patiently(lambda: store.get_file_info(FileSelector(key, allow_not_found=True)))
        return sorted(each.base_name for each in found)

    def forget(self, path: Path) -> None:
        """Remove a file or a folder from the store, if it exists."""
        if self.url is None:
            return
        from pyarrow.fs import FileType

        store, key = self._at(path)
        kind = patiently(lambda: store.get_file_info(key)).type
        with suppress(FileNotFoundError):  # another process removed it
            if kind == FileType.File:
                patiently(lambda: store.delete_file(key))
            elif kind == FileType.Directory:
                patiently(lambda: store.delete_dir(key))

    def _under(self, path: Path) -> str:
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()

    def _at(self, path: Path) -> tuple[Any, str]:
        """Return the store and the key of a path in it."""
        assert self.url is not None
        store, base = _store(self.url)
        return store, f"{base}/{self._under(path)}".removesuffix("/.")

    def _put(self, path: Path, data: bytes) -> None:
        store, key = self._at(path)
        stream = store.open_output_stream(key)  # no `with`: that would complete an object even after an error
        stream.write(data)
        stream.close()

    def _get(self, path: Path, most: int) -> bytes | None:
        from pyarrow.fs import FileType

        store, key = self._at(path)
        before = store.get_file_info(key)
        for _ in range(READS):
            if before.type != FileType.File:
                return None
            if before.size > most:
                what = f"has {before.size:,} bytes; expected at most {most:,}"
                raise UnexpectedFile(errno.EFBIG, what, self.place(path))
            with store.open_input_stream(key) as stream:
                data: bytes = stream.read()
            after = store.get_file_info(key)
            if (after.size, after.mtime_ns) == (before.size, before.mtime_ns) and len(data) == after.size:
                return data  # unchanged during the read, which fetches an object in parts
            before = after
        raise OSError(f"{self.place(path)} changed during each of {READS} reads")


def local(place: str) -> Path:
    """Return the local folder for results, given as a path or a URL: the path itself, or the URL's mirror.

    Raises `UserError`.
    """
    if "://" not in place:
        return Path(place)
    parts = urlsplit(place)
    base, _, query = place.partition("?")
    names = (parts.netloc, *parts.path.split("/"))
    # pyarrow does not recognise an upper-case scheme, ignores everything after a '#', and does not resolve '..'.
    if base.partition("://")[0] not in SCHEMES or not parts.netloc or "#" in place or {".", ".."} & {*names}:
        urls = " or ".join(f"{each}://BUCKET/PATH" for each in SCHEMES)
        raise UserError(f"--out is {base}; allowed: a folder, or {urls}, where PATH has no '#' and no folder . or ..")
    who = parts.netloc.rpartition("@")[0]
    if who not in ("", "anonymous") or "secret" in query.lower() or any(secrets(place)):
        raise UserError(
            f"--out is {parts.scheme}://..., with a secret in it; allowed: a URL without one, since it is recorded; "
            "put the secret in the store's own environment variables (AWS_ACCESS_KEY_ID, ...) or files"
        )
    try:
        _store(place)
    except (OSError, ValueError) as error:
        raise UserError(f"--out is {place}, which cannot be reached ({_first(error)})") from error
    home = _home()
    what = json.dumps([parts.scheme, parts.netloc, parts.path.strip("/"), parse_qs(query).get("endpoint_override")])
    readable = re.sub("[^A-Za-z0-9]+", "-", f"{parts.scheme} {parts.netloc} {parts.path}").strip("-")[:60]
    root = home / f"{readable}-{hashlib.sha256(what.encode()).hexdigest()[:16]}" / RESULTS
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(home):
            raise PermissionError(errno.EPERM, "it belongs to another user, or others may write to it")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        publish(root.with_name(MARK), json.dumps({"url": place}).encode())
        root.with_name(MARK).chmod(0o600)
    except OSError as error:
        raise UserError(f"--out is {place}, whose local copy {root} cannot be written ({error.strerror}); set "
                        "XDG_DATA_HOME to a writable folder") from error  # fmt: skip
    return root


def _home() -> Path:
    """Return the folder of all mirrors. Raises `UserError` if this user has no home."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else environment.home() / ".local" / "share") / "tune_kd"


def _is_ours(path: Path) -> bool:
    """Whether this user owns a file or folder, and no other user may write to it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def path_of(place: str) -> Path:
    """Return the local path for something in a results folder, given as a path or a URL. Raises `UserError`."""
    if "://" not in place:
        return Path(place)
    base, mark, query = place.partition("?")
    above, _, last = base.rstrip("/").rpartition("/")
    return local(f"{above}{mark}{query}") / last


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@lru_cache(maxsize=4)
def _store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    from pyarrow.fs import FileSystem

    # S3: with this option, a small object takes one request, not three. Google's client retries for 15 minutes by
    # default.
    option = {"s3": "allow_delayed_open=true", "gs": f"retry_limit_seconds={REQUEST_SECONDS}"}[url.partition(":")[0]]
    if option.partition("=")[0] not in url:
        url = f"{url}{'&' if '?' in url else '?'}{option}"
    store, base = FileSystem.from_uri(url)
    return store, base.rstrip("/")

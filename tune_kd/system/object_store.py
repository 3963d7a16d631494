"""A results folder in an object store (s3://, gs://): a folder on this disk stands for it, everything works on that,
and what others need of it is sent to the store, and fetched from there.

An object is there whole or not at all. The store has no locks, no appending and no renaming: what needs these stays on
the disk of the machine that needs it.

XDG_DATA_HOME/tune_kd/KEY/url.json   the URL of a store's folder: what alone says where things are sent
XDG_DATA_HOME/tune_kd/KEY/results/   what stands for it

Results may be anybody's, so nothing in them, beside them or above them is asked where they are to be sent.
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
REQUEST_SECONDS = 15  # seconds that one request may take with all its repetitions
MOST_SENT_BYTES = 2**34  # of a file, which is read whole: more than any network and its state has
READS = 5  # of an object, until it did not change meanwhile


@dataclass(frozen=True)
class Mirror:
    """A folder and the URL that it stands for. Without a URL the folder is all there is, and nothing is sent.

    Everything raises OSError where the store does not answer, after some tries.
    """

    root: Path
    url: str | None = None

    @classmethod
    def of(cls, path: Path) -> "Mirror":
        """The mirror that a path is in. Raises `CorruptFile` where the URL of that cannot be read."""
        here = Path(os.path.abspath(path))
        try:
            home = _home()
        except UserError:  # without a home nobody has a mirror
            return cls(here)
        if not here.is_relative_to(home):
            return cls(here)
        key, *inside = here.relative_to(home).parts or ("",)
        if inside[:1] != [RESULTS] or not _is_ours(home) or not _is_ours(mark := home / key / MARK):
            return cls(here)
        try:
            return cls(home / key / RESULTS, str(parsed(read(mark, MOST_RECORD_BYTES))["url"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{mark} cannot be read ({error}); name the store by its URL to write it anew") from error

    def place(self, path: Path) -> str:
        """What people are to see of a path."""
        if self.url is None:
            return str(path)
        base, _, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{self._under(path)}{'?' if query else ''}{query}"

    def send(self, path: Path, data: bytes | None = None) -> None:
        """Have the store hold a file as it is here now, or with these bytes."""
        if self.url is not None:
            data = read(path, MOST_SENT_BYTES) if data is None else data
            patiently(lambda: self._put(path, data))

    def publish(self, path: Path, data: bytes) -> None:
        """Write a file here, whole or not at all, and have the store hold it."""
        publish(path, data)
        self.send(path, data)

    def fetch(self, path: Path, most: int) -> bool:
        """Have a file of at most so many bytes here as the store holds it. Returns whether it is here then."""
        if self.url is None:
            return path.is_file()
        data = self.read(path, most)
        if data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, data)
        return data is not None

    def read(self, path: Path, most: int) -> bytes | None:
        """What the store holds of a file; null where it has none, or there is no store. Raises `UnexpectedFile` for one
        of more bytes than that."""
        return None if self.url is None else patiently(lambda: self._get(path, most))

    def names(self, folder: Path) -> list[str]:
        """The names of files and folders that the store has in a folder, sorted."""
        if self.url is None:
            return []
        from pyarrow.fs import FileSelector

        store, key = _store(self.url), self._key(folder)
        found = patiently(lambda: store.get_file_info(FileSelector(key, allow_not_found=True)))
        return sorted(each.base_name for each in found)

    def forget(self, path: Path) -> None:
        """Remove a file or a folder from the store, if it is there."""
        if self.url is None:
            return
        from pyarrow.fs import FileType

        store, key = _store(self.url), self._key(path)
        kind = patiently(lambda: store.get_file_info(key)).type
        with suppress(FileNotFoundError):  # it went meanwhile
            if kind == FileType.File:
                patiently(lambda: store.delete_file(key))
            elif kind == FileType.Directory:
                patiently(lambda: store.delete_dir(key))

    def _under(self, path: Path) -> str:
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()

    def _key(self, path: Path) -> str:
        assert self.url is not None
        return f"{_base(self.url)}/{self._under(path)}".removesuffix("/.")

    def _put(self, path: Path, data: bytes) -> None:
        assert self.url is not None
        # Not in a `with`, which would end an object that is there by half as if it were whole.
        stream = _store(self.url).open_output_stream(self._key(path))
        stream.write(data)
        stream.close()

    def _get(self, path: Path, most: int) -> bytes | None:
        from pyarrow.fs import FileType

        assert self.url is not None
        store, key = _store(self.url), self._key(path)
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
                return data  # it is read in parts, between which another may have come
            before = after
        raise OSError(f"{self.place(path)} changes all the time")


def local(place: str) -> Path:
    """The folder on this disk for a place of results: that place itself, or the mirror of a URL. Raises `UserError`."""
    if "://" not in place:
        return Path(place)
    parts = urlsplit(place)
    base, _, query = place.partition("?")
    names = (parts.netloc, *parts.path.split("/"))
    # pyarrow takes capitals for another scheme, leaves out what comes after a #, and has no folder above another.
    if base.partition("://")[0] not in SCHEMES or not parts.netloc or "#" in place or {".", ".."} & {*names}:
        urls = " or ".join(f"{each}://BUCKET/PATH" for each in SCHEMES)
        raise UserError(f"--out is {base}; allowed: a folder, or {urls}, where PATH has no '#' and no folder . or ..")
    who = parts.netloc.rpartition("@")[0]
    if who not in ("", "anonymous") or "secret" in query.lower() or any(secrets(place)):
        raise UserError(
            f"--out is {parts.scheme}://..., with a secret in it; allowed: without, since it goes on record; the "
            "store's own environment variables (AWS_ACCESS_KEY_ID, ...) or files hold it"
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
            raise PermissionError(errno.EPERM, "it belongs to somebody else, or others may write to it")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        publish(root.with_name(MARK), json.dumps({"url": place}).encode())
        root.with_name(MARK).chmod(0o600)
    except OSError as error:
        raise UserError(f"--out is {place}, of which {root} is to hold a copy, and cannot be written to "
                        f"({error.strerror}); set XDG_DATA_HOME to a folder that can") from error  # fmt: skip
    return root


def _home() -> Path:
    """The folder of all mirrors. Raises `UserError` where this user has no home to have it in."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else environment.home() / ".local" / "share") / "tune_kd"


def _is_ours(path: Path) -> bool:
    """Whether a file or a folder is this user's, who alone may write to it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def path_of(place: str) -> Path:
    """The path on this disk of something that is in a folder of results: a path, or a URL. Raises `UserError`."""
    if "://" not in place:
        return Path(place)
    base, mark, query = place.partition("?")
    above, _, last = base.rstrip("/").rpartition("/")
    return local(f"{above}{mark}{query}") / last


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@lru_cache(maxsize=4)
def _store(url: str) -> Any:
    from pyarrow.fs import FileSystem

    # A small object is then one request, and not three; and Google's client would try for a quarter of an hour.
    option = {"s3": "allow_delayed_open=true", "gs": f"retry_limit_seconds={REQUEST_SECONDS}"}[url.partition(":")[0]]
    if option.partition("=")[0] not in url:
        url = f"{url}{'&' if '?' in url else '?'}{option}"
    return FileSystem.from_uri(url)[0]


@lru_cache(maxsize=4)
def _base(url: str) -> str:
    from pyarrow.fs import FileSystem

    return str(FileSystem.from_uri(url)[1]).rstrip("/")

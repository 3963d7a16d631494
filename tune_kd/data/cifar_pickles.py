"""CIFAR-10 and CIFAR-100 as published: download, verify the digests, and unpickle the batches.

torchvision provides the address, the file names and the digests. Its code for the rest is not used:
`CIFAR10(download=True)` writes under the final name, waits for a stalled server without a timeout, reads an endless
response, falls back from https to http, and unpickles without restrictions. Here, only bytes with the published digest
are unpickled, by an unpickler that allows only arrays of bytes and builtin containers.
"""

import hashlib
import http.client
import io
import pickle
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_kd.data.image_folder import Pixels, bar
from tune_kd.system.errors import UserError
from tune_kd.system.files import opened, publish, read

MOST_DOWNLOAD_BYTES = 2**29  # limit for an archive or a file in it; the archives have 170,498,071 and 169,001,437
LEAST_BYTES_PER_SECOND = 1024  # a slower download, for `stall_seconds`, counts as stalled


@dataclass(frozen=True)
class Form:
    """The names that one of the two data sets uses."""

    title: str  # without the hyphen, the name of torchvision's class
    folder: str  # name of the folder in the archive
    archive: str  # file name of the archive
    labels: str  # key of the labels in a batch
    classes: tuple[str, ...] = ()  # names of the classes; empty if a file in the archive has them


CIFAR10 = Form(
    "CIFAR-10",
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    "labels",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = Form("CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", "fine_labels")
FORMS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass(frozen=True)
class Origin:
    """The address of a published archive, and the digests of its files."""

    url: str
    archive_md5: str
    train: tuple[tuple[str, str], ...]  # (file name in the archive's folder, MD5)
    test: tuple[tuple[str, str], ...]
    stall_seconds: float = 30.0
    form: Form = CIFAR10
    meta: tuple[str, str, str] | None = None  # the file with the class names: (file name, MD5, key)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for name, *_ in (*self.train, *self.test, *([self.meta] if self.meta else ())))


def published(form: Form = CIFAR10) -> Origin:
    """The address and digests from torchvision. Only MD5 digests were published; the connection uses TLS."""
    from torchvision import datasets  # imported here because it takes a second

    source = getattr(datasets, form.title.replace("-", ""))
    train, test = (tuple((name, md5) for name, md5 in each) for each in (source.train_list, source.test_list))
    meta = None if form.classes else (source.meta["filename"], source.meta["md5"], source.meta["key"])
    return Origin(source.url, source.tgz_md5, train, test, form=form, meta=meta)


def download(origin: Origin, archive: Path, say: Callable[[str], None], *, progress: bool) -> None:
    """Download the archive, verify its digest, and publish it as `archive`.

    Raises `UserError`, and leaves no file, if the download fails, stalls, or differs from the published archive.
    """
    title = origin.form.title
    say(f"Downloading {title} from {origin.url} to {archive}.")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=archive.parent).close()
    except OSError as error:
        raise UserError(
            f"{archive}: there is no {title} here, and the folder is not writable ({error.strerror}); give --data-dir "
            "PATH with existing data or a writable folder, or set XDG_CACHE_HOME"
        ) from error
    try:
        publish(archive, _fetch(origin, progress))
    except (OSError, http.client.HTTPException, ValueError) as error:
        why: object = error
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is also the response, which holds the connection
        elif isinstance(error, urllib.error.URLError):
            why = error.reason
        if isinstance(why, TimeoutError):
            why = f"no data for {origin.stall_seconds:g} s"
        raise UserError(
            f"{archive}: there is no {title} here, and the download from {origin.url} failed ({why}); put the file "
            "there yourself, or give --data-dir PATH with existing data"
        ) from error


class _Broken(OSError):
    """The download differs from the published archive."""


def _fetch(origin: Origin, progress: bool) -> bytes:
    """Download the archive into memory. Raises OSError unless it is exactly the published one."""
    content = bytearray()
    with urllib.request.urlopen(origin.url, timeout=origin.stall_seconds) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with bar(f"Downloading {origin.form.title}", total or None, progress, in_bytes=True) as move:
            # A socket's timeout detects only silence. Windows of the same length detect a very slow download.
            window, before = time.monotonic(), 0
            while chunk := response.read1(2**16):
                content += chunk
                move(len(content))
                if max(len(content), total) > MOST_DOWNLOAD_BYTES:
                    raise _Broken(f"it is larger than {MOST_DOWNLOAD_BYTES} bytes")
                seconds = time.monotonic() - window
                if seconds > origin.stall_seconds:
                    came = len(content) - before
                    if came < LEAST_BYTES_PER_SECOND * seconds:
                        raise _Broken(f"only {came} bytes arrived in {seconds:.0f} s")
                    window, before = time.monotonic(), len(content)
    if total and len(content) != total:
        raise _Broken(f"it ended after {len(content)} of {total} bytes")
    if (found := _md5(content)) != origin.archive_md5:
        raise _Broken(f"its MD5 is {found}, expected {origin.archive_md5}")
    return bytes(content)


def _md5(content: bytes | bytearray) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def read_folder(folder: Path, origin: Origin) -> Pixels:
    """Read the images of the unpacked archive. Raises `UserError` for a file that differs from the published one."""
    return _pixels({name: read(folder / name, MOST_DOWNLOAD_BYTES) for name in origin.files}, folder, origin)


def read_archive(archive: Path, origin: Origin) -> Pixels:
    """Read the images of the archive without unpacking it to disk. Raises `UserError` if it differs from the published
    one."""
    with opened(archive, MOST_DOWNLOAD_BYTES) as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != origin.archive_md5:
            raise UserError(_damaged(archive, "it", found, origin.archive_md5, origin.form))
        file.seek(0)
        contents: dict[str, bytes] = {}
        with tarfile.open(fileobj=file, mode="r|gz") as members:
            for member in members:
                folder, _, name = member.name.rpartition("/")
                if folder == origin.form.folder and name in origin.files:
                    content = members.extractfile(member)
                    contents[name] = content.read() if content else b""
    return _pixels(contents, archive, origin)


def _damaged(where: Path, what: str, found: str, expected: str, form: Form) -> str:
    return (
        f"--data-dir {where}: {what} is truncated or damaged (MD5 {found}, expected {expected}); "
        f"remove {where} to download {form.title} again"
    )


def _pixels(contents: dict[str, bytes], where: Path, origin: Origin) -> Pixels:
    """Images and labels of files. The digest of each file is verified before it is unpickled."""

    def load(name: str, expected: str, read: Callable[[Any], Any]) -> Any:
        content = contents.get(name, b"")
        if (found := _md5(content)) != expected:
            raise UserError(_damaged(where, name, found, expected, origin.form))
        try:
            return read(_BatchUnpickler(io.BytesIO(content), encoding="latin1").load())
        except Exception as error:  # a pickle can fail in any way
            raise UserError(f"--data-dir {where}: {name} is not a {origin.form.title} batch ({error})") from error

    def batch(found: Any) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(found[origin.form.labels], dtype=torch.int64)
        images = np.ascontiguousarray(found["data"].reshape(len(labels), 3, 32, 32))
        return torch.from_numpy(images), labels

    tensors = []
    for files in (origin.train, origin.test):
        images, labels = zip(*(load(name, expected, batch) for name, expected in files), strict=True)
        tensors += [torch.cat(images), torch.cat(labels)]
    classes = origin.form.classes
    if origin.meta is not None:
        name, expected, key = origin.meta
        classes = load(name, expected, lambda found: tuple(map(str, found[key])))
    return Pixels(classes, *tensors)


class _BatchUnpickler(pickle.Unpickler):
    """An unpickler that allows only the names in a pickled array of bytes (of NumPy 1 and 2)."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed in a batch")


def _empty_array(kind: type, shape: tuple[int, ...], typecode: object) -> Any:
    return np.empty(0, np.uint8)  # its shape and content follow in the pickle, as its state


def _uint8(code: str, align: object, copy: object) -> Any:
    # Only bytes are allowed: an array of objects could contain anything.
    if code != "u1":
        raise pickle.UnpicklingError(f"it contains numbers of type {code!r}, not bytes")
    return np.dtype(np.uint8, copy=True)

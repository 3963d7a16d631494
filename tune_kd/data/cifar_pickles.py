"""CIFAR-10 and CIFAR-100 as they were published: download, digests, and the batches, which are pickles.

Only bytes with the published digest are loaded, and those through an unpickler that knows arrays of bytes
and builtin containers and nothing else.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tune_kd.data.image_folder import Pixels, bar
from tune_kd.system.errors import UserError
from tune_kd.system.files import opened, read

T = TypeVar("T")
MOST_BYTES = 2**29  # the real archives have 170,498,071 and 169,001,437, and their files less
LEAST_BYTES_PER_SECOND = 1024  # slower than this for `stall_seconds` is a stall


@dataclass(frozen=True)
class Form:
    """The names in one of the two."""

    title: str
    folder: str  # of the unpacked archive
    archive: str
    labels: str  # the key of the labels in a batch
    classes: tuple[str, ...] = ()  # empty where a file of the archive names them
    source: str = "CIFAR10"  # torchvision's class


CIFAR10 = Form(
    "CIFAR-10",
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    "labels",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = Form("CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", "fine_labels", source="CIFAR100")
FORMS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass(frozen=True)
class Origin:
    """Where a published archive lies, and what it must contain."""

    url: str
    archive_md5: str
    train: tuple[tuple[str, str], ...]  # file name in the archive's folder and its MD5
    test: tuple[tuple[str, str], ...]
    stall_seconds: float = 30.0
    form: Form = CIFAR10
    meta: tuple[str, str, str] | None = None  # of the file that names the classes: file name, MD5, key

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for name, *_ in (*self.train, *self.test, *([self.meta] if self.meta else ())))


def published(form: Form = CIFAR10) -> Origin:
    """torchvision's address and digests. MD5 is all that was published; the connection is TLS."""
    from torchvision import datasets  # here: it takes a second

    source = getattr(datasets, form.source)
    train, test = (tuple((name, md5) for name, md5 in each) for each in (source.train_list, source.test_list))
    meta = None if form.classes else (source.meta["filename"], source.meta["md5"], source.meta["key"])
    return Origin(source.url, source.tgz_md5, train, test, form=form, meta=meta)


def download(origin: Origin, archive: Path, say: Callable[[str], None], *, progress: bool) -> None:
    """Fetch the archive aside, compare its digest, and only then give it the name `archive`.

    Raises `UserError`, and leaves no file, where it cannot be fetched whole or stalls.
    """
    say(f"Downloading {origin.form.title} from {origin.url} to {archive}.")
    part = None
    try:
        try:
            archive.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(prefix=f".{origin.form.archive}.", dir=archive.parent)
        except OSError as error:
            raise UserError(
                f"{archive}: there is no {origin.form.title} here, and it cannot be written ({error.strerror}); give "
                "--data-dir PATH with data that you have or a folder for them, or set XDG_CACHE_HOME"
            ) from error
        with open(number, "wb") as file:
            _fetch(origin, file.write, progress)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # mkstemp's 0600 would keep a shared folder's other users out
        os.replace(part, archive)
    except (OSError, http.client.HTTPException, ValueError) as error:
        why: object = error
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response, too, and holds the connection
        elif isinstance(error, urllib.error.URLError):
            why = error.reason
        if isinstance(why, TimeoutError):
            why = f"nothing came for {origin.stall_seconds:g} s"
        raise UserError(
            f"{archive}: there is no {origin.form.title} here, and its download from {origin.url} failed ({why}); "
            "put the file there by hand, or give --data-dir PATH with data that you have"
        ) from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


class _Broken(OSError):
    """A download that came, and is not what was published."""


def _fetch(origin: Origin, write: Callable[[bytes], object], progress: bool) -> None:
    """Stream the archive to `write`, and raise if it was not all of it and nothing else."""
    digest, count = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(origin.url, timeout=origin.stall_seconds) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with bar(f"Downloading {origin.form.title}", total or None, progress, in_bytes=True) as move:
            # A socket's timeout sees silence only. A trickle is judged over windows of the same length.
            window, before = time.monotonic(), 0
            while chunk := response.read1(2**16):
                write(chunk)
                digest.update(chunk)
                count += len(chunk)
                move(count)
                if max(count, total) > MOST_BYTES:
                    raise _Broken(f"it is larger than {MOST_BYTES} bytes")
                seconds = time.monotonic() - window
                if seconds > origin.stall_seconds:
                    if count - before < LEAST_BYTES_PER_SECOND * seconds:
                        raise _Broken(f"only {count - before} bytes came in {seconds:.0f} s")
                    window, before = time.monotonic(), count
    if total and count != total:
        raise _Broken(f"it ended after {count} of {total} bytes")
    if digest.hexdigest() != origin.archive_md5:
        raise _Broken(f"its MD5 is {digest.hexdigest()} and not {origin.archive_md5}")


def read_folder(folder: Path, origin: Origin) -> Pixels:
    """Images of the unpacked archive. Raises `UserError` for a batch that is not the published one."""
    return _pixels({name: read(folder / name, MOST_BYTES) for name in origin.files}, folder, origin)


def read_archive(archive: Path, origin: Origin) -> Pixels:
    """Images of the archive, without unpacking it. Raises `UserError` if it is not the published one."""
    with opened(archive, MOST_BYTES) as file:
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
        f"--data-dir {where}: {what} is cut or damaged (MD5 {found}, expected {expected}); "
        f"remove {where} to have {form.title} downloaded again"
    )


def _pixels(contents: dict[str, bytes], where: Path, origin: Origin) -> Pixels:
    """Images and labels, after each file has been compared with its digest."""

    def load(name: str, expected: str, read: Callable[[Any], T]) -> T:
        content = contents.get(name, b"")
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:
            raise UserError(_damaged(where, name, found, expected, origin.form))
        try:
            return read(_BatchUnpickler(io.BytesIO(content), encoding="latin1").load())
        except Exception as error:  # a pickle can fail in any way
            raise UserError(f"--data-dir {where}: {name} is not a {origin.form.title} batch ({error})") from error

    def batch(found: Any) -> tuple[np.ndarray[Any, Any], list[int]]:
        labels = found[origin.form.labels]
        return found["data"].reshape(len(labels), 3, 32, 32), labels

    tensors = []
    for files in (origin.train, origin.test):
        images: list[np.ndarray[Any, Any]] = []
        labels: list[int] = []
        for name, expected in files:
            of_file, its_labels = load(name, expected, batch)
            images.append(of_file)
            labels.extend(its_labels)
        tensors += [
            torch.from_numpy(np.ascontiguousarray(np.concatenate(images))),
            torch.tensor(labels, dtype=torch.int64),
        ]
    classes = origin.form.classes
    if origin.meta is not None:
        name, expected, key = origin.meta
        classes = load(name, expected, lambda found: tuple(map(str, found[key])))
    return Pixels(classes, *tensors)


class _BatchUnpickler(pickle.Unpickler):
    """Knows the names in a pickled array of bytes, under the modules of NumPy 1 and 2, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs")


def _empty_array(kind: type, shape: tuple[int, ...], typecode: object) -> Any:
    return np.empty(0, np.uint8)  # its state follows in the pickle, and gives it shape and content


def _uint8(code: str, align: object, copy: object) -> Any:
    # Bytes only: an array of objects could hold anything.
    if code != "u1":
        raise pickle.UnpicklingError(f"it holds numbers of type {code!r} and not bytes")
    return np.dtype(np.uint8, copy=True)

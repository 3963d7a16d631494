"""In which form CIFAR-10 or CIFAR-100 lies where the user says, and a cache so that each is decoded once."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_kd.data import cifar_pickles, image_folder
from tune_kd.data.image_folder import Pixels
from tune_kd.system.environment import home, make_private
from tune_kd.system.errors import UserError
from tune_kd.system.files import check_regular

LOCK_SECONDS = 600.0
MOST_CACHE_BYTES = 2**34  # of decoded images: five million

Say = Callable[[str], None]
Read = Callable[[], Pixels]


def default_cache() -> Path:
    """`tune_kd` in XDG_CACHE_HOME, or in ~/.cache where that is not set to an absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else home() / ".cache") / "tune_kd"


def load_pixels(
    folder: Path | None,
    *,
    form: cifar_pickles.Form = cifar_pickles.CIFAR10,
    cache: Path | None = None,
    say: Say,
    progress: bool,
    download: bool = True,
    origin: cifar_pickles.Origin | None = None,
) -> Pixels:
    """All images of a form from `folder`, decoded, or from the cache if the same source was decoded before.

    `folder` exists and is one of: a folder with torchvision's files (the form's folder or its archive), downloaded to
    it from `origin` if it holds neither and `download` allows it; a folder of pictures, or a .tar, .tar.gz or .tar.xz
    of one (see `tune_kd.data.image_folder`); None for the cache folder. `cache` is by default `default_cache()`. A
    source is the same while path, sizes and modification times are.

    Raises `UserError` for data that are missing, incomplete, damaged or hostile, and for a failed download.
    """
    cache = default_cache() if cache is None else cache
    where = Path(os.path.abspath(os.path.expanduser(cache if folder is None else folder)))
    if folder is not None and not where.exists() and not image_folder.is_archive(where):
        raise UserError(f"--data-dir {where}: it does not exist; make the folder to have {form.title} downloaded to it")
    for other in cifar_pickles.FORMS.values():
        if other is not form and where.name in (other.folder, other.archive):
            raise UserError(
                f"--data-dir {where}: this is {other.title}, and {form.title} is asked for; name its place, or change "
                "--data"
            )
    name = form.title.lower().replace("-", "")
    stored = cache / f"{name}-{hashlib.sha256(str(where).encode()).hexdigest()[:16]}.safetensors"
    try:
        with _alone(stored.with_suffix(".lock"), say) as writable:
            identity, read = _source(where, form, origin, say, progress, download)
            pixels = _cached(stored, identity, say)
            if pixels is None:
                pixels = read()
                if writable:
                    _keep(stored, identity, pixels, say)
            return pixels
    except OSError as error:
        raise UserError(f"--data-dir {where}: it cannot be read ({error})") from error


@contextmanager
def _alone(lock: Path, say: Say) -> Iterator[bool]:
    """Let one process at a time download and decode; yields whether the cache folder can be written.

    The lock only spares work: all files are written aside and renamed, so going on without it is safe.
    """
    import filelock

    held = filelock.FileLock(lock)
    writable = True
    try:
        make_private(lock.parent)
        held.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        say(f"Another process has been reading these data for {LOCK_SECONDS:g} s: going on without waiting.")
    except (OSError, NotImplementedError) as error:
        say(f"The cache folder {lock.parent} cannot be written ({error}): images are decoded every time.")
        writable = False
    try:
        yield writable
    finally:
        held.release()


def _source(
    where: Path, form: cifar_pickles.Form, origin: cifar_pickles.Origin | None, say: Say, progress: bool, download: bool
) -> tuple[str, Read]:
    """What lies at `where`: a text that changes when its content does, and a function that decodes it."""
    if where.name != form.archive and image_folder.is_archive(where):
        if not where.exists() or where.is_dir():
            raise UserError(f"--data-dir {where}: there is no such archive; give the path of one that exists")
        return _stamp(where), lambda: image_folder.read_archive(where, progress=progress)
    if any((where / part).is_dir() for part in image_folder.PARTS):
        files = image_folder.listing(where)
        identity = f"{where} {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"
        return identity, lambda: image_folder.read_folder(where, files, progress=progress)
    if where.exists() and not where.is_dir() and where.name != form.archive:
        raise UserError(
            f"--data-dir {where}: this is neither a folder nor a .tar, .tar.gz or .tar.xz archive; "
            f"give one with {image_folder.LAYOUT}"
        )

    known = origin or cifar_pickles.published(form)
    folder = where if (where / known.files[0]).exists() else where / form.folder
    if folder.is_dir():
        missing = [name for name in known.files if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"--data-dir {folder}: {', '.join(missing)} missing; "
                f"complete the folder, or remove it to have {form.title} downloaded"
            )
        identity = " ".join(_stamp(folder / name) for name in known.files)
        return identity, lambda: cifar_pickles.read_folder(folder, known)
    archive = where if where.name == form.archive else where / form.archive
    if not archive.exists():
        if not download:
            raise UserError(f"--data-dir {where}: {form.title} is not there any more, and nothing is downloaded to a "
                            "folder that a record names; put the data back there")  # fmt: skip
        cifar_pickles.download(known, archive, say, progress=progress)
    return _stamp(archive), lambda: cifar_pickles.read_archive(archive, known)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def _digest(pixels: Pixels, identity: str) -> str:
    tensors = (pixels.train_images, pixels.train_labels, pixels.test_images, pixels.test_labels)
    shapes = [list(tensor.shape) for tensor in tensors]
    digest = hashlib.sha256(json.dumps([identity, pixels.classes, shapes]).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().reshape(-1).data)
    return digest.hexdigest()


def _cached(stored: Path, identity: str, say: Say) -> Pixels | None:
    """What was decoded from the same source before; None if nothing was, or if it has been damaged since."""
    from safetensors import SafetensorError, safe_open

    if not stored.is_file():
        return None
    try:
        check_regular(stored, MOST_CACHE_BYTES, through_links=True)
        with safe_open(stored, framework="pt") as file:
            about = file.metadata()
            if about["identity"] != identity:
                return None
            names = ("train_images", "train_labels", "test_images", "test_labels")
            pixels = Pixels(tuple(json.loads(about["classes"])), *(file.get_tensor(name) for name in names))
        if _digest(pixels, identity) == about["digest"]:
            return pixels
        why = "its digest is wrong"
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        why = str(error)
    say(f"The cached images in {stored} are damaged ({why}): decoding again.")
    return None


def _keep(stored: Path, identity: str, pixels: Pixels, say: Say) -> None:
    """Write the cache file aside and rename it. One that cannot be written costs time later, nothing now."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"identity": identity, "classes": json.dumps(pixels.classes), "digest": _digest(pixels, identity)}
    tensors = {name: value for name, value in vars(pixels).items() if name != "classes"}
    part = None
    try:
        number, part = tempfile.mkstemp(prefix=f".{stored.name}.", dir=stored.parent)
        os.close(number)
        save_file(tensors, part, metadata=about)
        _sync(part)
        os.replace(part, stored)
        _sync(stored.parent)
    except (OSError, SafetensorError) as error:
        say(f"Decoded images cannot be kept in {stored.parent} ({error}): they are decoded again next time.")
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

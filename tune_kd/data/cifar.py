"""Load CIFAR-10 or CIFAR-100 from torchvision's files, image folders or archives, and cache the decoded images."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tune_kd.data import cifar_pickles, image_folder
from tune_kd.data.cifar_pickles import CIFAR10, FORMS, Form, Origin
from tune_kd.data.image_folder import Pixels
from tune_kd.system.environment import home, make_private
from tune_kd.system.errors import UserError
from tune_kd.system.files import check_regular, publish

LOCK_SECONDS = 600.0
MOST_CACHE_BYTES = 2**34  # limit for a cache file: five million images
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR_CLASSES = {"cifar10": CIFAR10.classes, "cifar100": tuple(_CIFAR100.split())}
"""Names and order of the classes in the published archives and in torchvision."""
SPELLINGS = {
    "plane": "airplane",
    "aeroplane": "airplane",
    "car": "automobile",
    "auto": "automobile",
    "computerkeyboard": "keyboard",
    "cra": "crab",
    "racoon": "raccoon",
    **{tree: f"{tree}_tree" for tree in ("maple", "oak", "palm", "pine", "willow")},
}
"""Other names of the classes, as in common image folders."""
CIFAR_SIZES = (50_000, 10_000)

Say = Callable[[str], None]
Read = Callable[[], Pixels]


def default_cache() -> Path:
    """`tune_kd` in XDG_CACHE_HOME if that is an absolute path, otherwise in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else home() / ".cache") / "tune_kd"


def load_pixels(
    folder: Path | None,
    *,
    form: Form = CIFAR10,
    cache: Path | None = None,
    say: Say,
    progress: bool,
    download: bool = True,
    origin: Origin | None = None,
) -> Pixels:
    """Load all images of `form` from `folder`, or from the cache if the same source was decoded before.

    `folder` must exist. It is one of:

    - a folder with torchvision's files (the form's folder or its archive). If it has neither, the archive is
      downloaded to it from `origin`, unless `download` is False.
    - a folder of images, or a .tar, .tar.gz or .tar.xz of one (see `tune_kd.data.image_folder`).
    - None, for the cache folder.

    `cache` defaults to `default_cache()`. A source counts as the same if its path, sizes and modification times are
    unchanged.

    Raises `UserError` for data that are missing, incomplete, damaged or hostile, and for a failed download.
    """
    cache = default_cache() if cache is None else cache
    where = Path(os.path.abspath(os.path.expanduser(cache if folder is None else folder)))
    if folder is not None and not where.exists() and not image_folder.is_archive(where):
        raise UserError(f"--data-dir {where}: it does not exist; create the folder to download {form.title} to it")
    for other in FORMS.values():
        if other is not form and where.name in (other.folder, other.archive):
            raise UserError(
                f"--data-dir {where}: this is {other.title}, but the study uses {form.title}; give the path of "
                f"{form.title}, or change --data"
            )
    name = form.title.lower().replace("-", "")
    stored = cache / f"{name}-{hashlib.sha256(str(where).encode()).hexdigest()[:16]}.safetensors"
    try:
        with _locked(stored.with_suffix(".lock"), say) as writable:
            identity, read = _source(where, form, origin, say, progress, download)
            pixels = _cached(stored, identity, say)
            if pixels is None:
                pixels = read()
                if writable:
                    _store(stored, identity, pixels, say)
            return pixels
    except OSError as error:
        raise UserError(f"--data-dir {where}: it cannot be read ({error})") from error


def recognised(pixels: Pixels, name: str) -> Pixels:
    """Give the classes their published names and numbers, for any common spelling of their folders.

    Raises `UserError` if images are missing, since results on a part would be mistaken for results on the whole data
    set. Also raises it for other classes, since their images would be normalised with CIFAR's statistics.
    """
    found, known = (len(pixels.train_labels), len(pixels.test_labels)), CIFAR_CLASSES[name]
    if found != CIFAR_SIZES or len(pixels.classes) != len(known):
        raise UserError(
            f"--data-dir: found {found[0]} training and {found[1]} test images of {len(pixels.classes)} classes, but "
            f"{FORMS[name].title} has {CIFAR_SIZES[0]} and {CIFAR_SIZES[1]} of {len(known)}; add the missing images, "
            "or give another path"
        )
    spelled = [_spelling(each) for each in pixels.classes]
    if lacking := [each for each in known if each not in spelled]:
        strange = [
            each
            for each, meant in zip(pixels.classes, spelled, strict=True)
            if meant not in known or spelled.count(meant) > 1
        ]
        raise UserError(
            f"--data-dir: these are not the images of {FORMS[name].title}, although their number is right: it has no "
            f"class {_first(strange)}, and its class {_first(lacking)} is missing; name each folder after its class, "
            "or give another path"
        )
    number = torch.tensor([known.index(each) for each in spelled])
    return replace(
        pixels, classes=known, train_labels=number[pixels.train_labels], test_labels=number[pixels.test_labels]
    )


def _spelling(name: str) -> str:
    """The published name of a class, or a normalised form of `name` if there is none.

    Spaces, hyphens, capitals and a leading number are ignored: `AquariumFish` and `00_aquarium-fish` are
    `aquarium_fish`.
    """
    plain = re.sub(r"[\W_]+", "", re.sub(r"^\W*\d+[\W_]+", "", name.strip())).lower()
    published = {each.replace("_", ""): each for classes in CIFAR_CLASSES.values() for each in classes}
    return published.get(plain) or SPELLINGS.get(plain, plain)


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(repr(name[:60]) for name in names[:most]) + (" ..." if len(names) > most else "")


@contextmanager
def _locked(lock: Path, say: Say) -> Iterator[bool]:
    """Let one process at a time download and decode. Yields whether the cache folder is writable.

    The lock only avoids duplicate work. Files are published by renaming, so it is safe to continue without the lock.
    """
    import filelock

    held = filelock.FileLock(lock)
    writable = True
    try:
        make_private(lock.parent)
        held.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        say(f"Another process has been reading these data for {LOCK_SECONDS:g} s: continuing without the lock.")
    except (OSError, NotImplementedError) as error:
        say(f"The cache folder {lock.parent} is not writable ({error}): images are decoded every time.")
        writable = False
    try:
        yield writable
    finally:
        held.release()


def _source(
    where: Path, form: Form, origin: Origin | None, say: Say, progress: bool, download: bool
) -> tuple[str, Read]:
    """Find the data at `where`. Returns a text that changes with the data, and a function that decodes them."""
    if where.name != form.archive and image_folder.is_archive(where):
        if not where.exists() or where.is_dir():
            raise UserError(f"--data-dir {where}: there is no such archive; give the path of an existing one")
        return _stamp(where), lambda: image_folder.read_archive(where, progress=progress)
    if any((where / part).is_dir() for part in image_folder.PARTS):
        files = image_folder.listing(where)
        identity = f"{where} {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"
        return identity, lambda: image_folder.read_folder(where, files, progress=progress)
    if where.exists() and not where.is_dir() and where.name != form.archive:
        raise UserError(
            f"--data-dir {where}: this is neither a folder nor a .tar, .tar.gz or .tar.xz archive; "
            f"give one with {image_folder.FOLDER_LAYOUT}"
        )

    known = origin or cifar_pickles.published(form)
    folder = where if (where / known.files[0]).exists() else where / form.folder
    if folder.is_dir():
        missing = [name for name in known.files if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"--data-dir {folder}: {', '.join(missing)} missing; "
                f"add the missing files, or remove the folder to download {form.title}"
            )
        identity = " ".join(_stamp(folder / name) for name in known.files)
        return identity, lambda: cifar_pickles.read_folder(folder, known)
    archive = where if where.name == form.archive else where / form.archive
    if not archive.exists():
        if not download:
            raise UserError(f"--data-dir {where}: {form.title} is missing, and nothing is downloaded to a folder that "
                            "a record names; restore the data there")  # fmt: skip
        cifar_pickles.download(known, archive, say, progress=progress)
    return _stamp(archive), lambda: cifar_pickles.read_archive(archive, known)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def _digest(pixels: Pixels, identity: str) -> str:
    tensors = [getattr(pixels, name) for name in TENSORS]
    shapes = [list(tensor.shape) for tensor in tensors]
    digest = hashlib.sha256(json.dumps([identity, pixels.classes, shapes]).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().reshape(-1).data)
    return digest.hexdigest()


def _cached(stored: Path, identity: str, say: Say) -> Pixels | None:
    """The cached images of this source. Returns None if they are missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not stored.is_file():
        return None
    try:
        check_regular(stored, MOST_CACHE_BYTES, through_links=True)
        with safe_open(stored, framework="pt") as file:
            about = file.metadata()
            if about["identity"] != identity:
                return None
            pixels = Pixels(tuple(json.loads(about["classes"])), *map(file.get_tensor, TENSORS))
        if _digest(pixels, identity) == about["digest"]:
            return pixels
        why = "its digest is wrong"
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        why = str(error)
    say(f"The cached images in {stored} are damaged ({why}): decoding again.")
    return None


def _store(stored: Path, identity: str, pixels: Pixels, say: Say) -> None:
    """Write the cache file. A failure is only reported: the images are then decoded again next time."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    about = {"identity": identity, "classes": json.dumps(pixels.classes), "digest": _digest(pixels, identity)}
    try:
        publish(stored, save({name: getattr(pixels, name) for name in TENSORS}, metadata=about))
    except (OSError, SafetensorError) as error:
        say(f"Decoded images cannot be cached in {stored.parent} ({error}): they are decoded again next time.")

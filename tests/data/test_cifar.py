"""The source that each --data-dir selects, and the cache of decoded images."""

import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tune_kd.data import cifar, cifar_pickles, datasets as rooms, image_folder
from tune_kd.data.cifar import default_cache, load_pixels
from tune_kd.data.cifar_pickles import CIFAR10, CIFAR100, Origin
from tune_kd.data.datasets import load
from tune_kd.data.image_folder import Pixels
from tune_kd.system import files
from tune_kd.system.errors import UserError

NOWHERE = Origin("http://127.0.0.1:1/", "0" * 32, (("data_batch_1", "0"),), (("test_batch", "0"),), 0.5)


@pytest.fixture(autouse=True)
def small_ones_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow small stand-ins for CIFAR-10. tests/data/test_datasets.py tests that the real check rejects them."""
    monkeypatch.setattr(rooms, "recognised", lambda pixels, _: pixels)


def picture_folder(folder: Path, shade: int = 0) -> Path:
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                pixels = np.full((32, 32, 3), shade + 10 * label + i, np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def picture_archive(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        archive.add(folder, ".")
    return path


class Count:
    """Counts calls and passes them on."""

    def __init__(self, function: Callable[..., Pixels]) -> None:
        self.function, self.calls, self.guard = function, 0, threading.Lock()

    def __call__(self, *arguments: object, **named: object) -> Pixels:
        with self.guard:
            self.calls += 1
        return self.function(*arguments, **named)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Count:
    count = Count(image_folder.read_archive)
    monkeypatch.setattr(image_folder, "read_archive", count)
    return count


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return picture_archive(tmp_path / "images.tar.xz", picture_folder(tmp_path / "images"))


def read(where: Path | None, cache: Path, say: Callable[[str], None] = pytest.fail) -> Pixels:
    return load_pixels(where, cache=cache, say=say, progress=False, origin=NOWHERE)


def same(one: Pixels, other: Pixels) -> bool:
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return one.classes == other.classes and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def stored(cache: Path) -> Path:
    (file,) = cache.glob("*.safetensors")
    return file


# The cache


def test_a_source_is_decoded_once(tmp_path: Path, archive: Path, decoded: Count) -> None:
    first = read(archive, tmp_path / "cache")
    assert same(read(archive, tmp_path / "cache"), first)
    assert decoded.calls == 1


def test_a_changed_source_is_decoded_again_and_replaces_the_cached_file(
    tmp_path: Path, archive: Path, decoded: Count
) -> None:
    before = read(archive, tmp_path / "cache")
    stamp = archive.stat().st_mtime_ns
    picture_archive(archive, picture_folder(tmp_path / "images", shade=100))
    os.utime(archive, ns=(stamp, stamp + 1))
    after = read(archive, tmp_path / "cache")
    assert decoded.calls == 2 and not same(before, after)
    stored(tmp_path / "cache")  # one file per path, so that no 180 MB files accumulate


def test_one_changed_image_in_a_folder_is_detected(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "images")
    before = read(folder, tmp_path / "cache")
    newest = max(file.stat().st_mtime_ns for file in folder.rglob("*.png"))
    changed = folder / "train" / "cat" / "0.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(changed)
    os.utime(changed, ns=(newest, newest - 10**9))  # older than the newest file, as after cp -p
    after = read(folder, tmp_path / "cache")
    assert int(before.train_images[0, 0, 0, 0]) == 0
    assert int(after.train_images[0, 0, 0, 0]) == 200


@pytest.mark.parametrize("damage", ["pixel", "cut", "empty", "header", "classes"])
def test_a_damaged_cache_is_reported_and_rebuilt(tmp_path: Path, archive: Path, decoded: Count, damage: str) -> None:
    cache, said = tmp_path / "cache", list[str]()
    first = read(archive, cache)
    content = bytearray(stored(cache).read_bytes())
    if damage == "pixel":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-1000:]
    elif damage == "empty":
        content.clear()
    elif damage == "header":
        content[0] ^= 0xFF
    else:
        content[content.index(b"cat")] ^= 1
    stored(cache).write_bytes(content)
    assert same(read(archive, cache, said.append), first)
    assert decoded.calls == 2
    assert len(said) == 1 and "damaged" in said[0] and str(stored(cache)) in said[0]
    assert same(read(archive, cache), first)
    assert decoded.calls == 2, "the cache was not mended"


def test_an_unwritable_cache_only_causes_a_warning(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    pixels = read(archive, tmp_path / "file" / "cache", said.append)
    assert len(pixels.train_labels) == 4
    assert len(said) == 1 and "is not writable" in said[0] and "file/cache" in said[0]


def test_a_full_disk_causes_a_warning_and_leaves_no_partial_file(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "PAUSES", ())
    monkeypatch.setattr(files.os, "pwrite", full)
    said: list[str] = []
    read(archive, tmp_path / "cache", said.append)
    assert len(said) == 1 and "No space left" in said[0]
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


def load_at_once(count: int, archive: Path, cache: Path, say: Callable[[str], None]) -> list[Pixels]:
    # Threads take the file lock like processes: each has its own lock object, and so its own file handle.
    start, results = threading.Barrier(count), list[Pixels]()

    def work() -> None:
        start.wait()
        results.append(read(archive, cache, say))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def test_two_concurrent_loads_decode_once(tmp_path: Path, archive: Path, decoded: Count) -> None:
    first, second = load_at_once(2, archive, tmp_path / "cache", pytest.fail)
    assert same(first, second)
    assert decoded.calls == 1


def test_concurrent_loads_without_the_lock_never_read_a_partial_file(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "LOCK_SECONDS", 0)
    # Threads stand in for processes, which name their temporary files after their id.
    monkeypatch.setattr(files, "os", SimpleNamespace(**(vars(os) | {"getpid": threading.get_native_id})))
    said: list[str] = []
    results = load_at_once(6, archive, tmp_path / "cache", said.append)
    assert all(same(result, results[0]) for result in results)
    assert not [sentence for sentence in said if "damaged" in sentence]


def test_the_default_cache_is_under_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tune_kd"
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache() == Path.home() / ".cache" / "tune_kd"


# Which source is read


def published_files(folder: Path) -> Origin:
    """Pack two tiny batches in the published form as the form's archive. Returns their origin."""
    import hashlib
    import pickle

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    shades = {"data_batch_1": 7, "test_batch": 9}
    files = {
        name: pickle.dumps({"data": np.full((20, 3072), shade, np.uint8), "labels": [*range(10)] * 2}, 4)
        for name, shade in shades.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / CIFAR10.archive, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.folder}/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    train, test = ((name, md5(content)) for name, content in files.items())
    return Origin("http://127.0.0.1:1/", md5((folder / CIFAR10.archive).read_bytes()), (train,), (test,), 0.5)


@pytest.mark.parametrize("form", ["archive", "folder of the archive", "unpacked", "folder of the unpacked"])
def test_torchvisions_files_are_found_packed_and_unpacked(tmp_path: Path, form: str) -> None:
    data = tmp_path / "data"
    origin = published_files(data)
    if "unpacked" in form:
        with tarfile.open(data / CIFAR10.archive) as packed:
            packed.extractall(data, filter="data")
        (data / CIFAR10.archive).unlink()
    where = {"archive": data / CIFAR10.archive, "unpacked": data / CIFAR10.folder}.get(form, data)
    for _ in range(2):
        pixels = load_pixels(where, cache=tmp_path / "cache", say=pytest.fail, progress=False, origin=origin)
        assert set(pixels.train_images.flatten().tolist()) == {7}
        assert set(pixels.test_images.flatten().tolist()) == {9}


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_cifar10_is_rejected_for_a_cifar100_study(tmp_path: Path, where: str) -> None:
    published_files(tmp_path)
    path = tmp_path / (CIFAR10.folder if where == "folder" else CIFAR10.archive)
    path.mkdir(exist_ok=True) if where == "folder" else None
    with pytest.raises(
        UserError, match="this is CIFAR-10, but the study uses CIFAR-100; give the path of CIFAR-100, or change --d"
    ):
        load_pixels(path, form=CIFAR100, cache=tmp_path / "cache", say=pytest.fail, progress=False)


def test_cifar10_and_cifar100_in_one_folder_are_not_confused(tmp_path: Path) -> None:
    """torchvision stores both there."""
    origin = published_files(tmp_path)
    (tmp_path / CIFAR100.folder).mkdir()
    nowhere = Origin("http://127.0.0.1:1/", "", (("train", ""),), (("test", ""),), 0.5, CIFAR100)
    cache = tmp_path / "cache"
    load_pixels(tmp_path, cache=cache, say=pytest.fail, progress=False, origin=origin)
    with pytest.raises(UserError, match="train, test missing; add the missing files, or remove the folder to download"):
        load_pixels(tmp_path, form=CIFAR100, cache=cache, say=pytest.fail, progress=False, origin=nowhere)
    pictures_of = picture_folder(tmp_path / "pictures")
    for form in (CIFAR10, CIFAR100):
        load_pixels(pictures_of, form=form, cache=cache, say=pytest.fail, progress=False)
    assert len(list(cache.glob("cifar100-*.safetensors"))) == 1 and len(list(cache.glob("cifar10-*.safetensors"))) == 2


def test_a_missing_archive_is_downloaded_once_by_two_concurrent_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = published_files(tmp_path / "origin")
    calls: list[Path] = []

    def download(known: Origin, path: Path, say: object, *, progress: bool) -> None:
        calls.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "origin" / CIFAR10.archive).read_bytes())

    monkeypatch.setattr(cifar_pickles, "download", download)
    monkeypatch.setattr(cifar_pickles, "published", lambda _: origin)
    cache, where = tmp_path / "cache", tmp_path / "data"
    where.mkdir()

    def work() -> None:
        load("cifar10", where, cache=cache, say=lambda _: None, progress=False)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [where / CIFAR10.archive]


def test_without_a_data_folder_the_archive_in_the_cache_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = published_files(tmp_path / "cache")
    monkeypatch.setattr(cifar_pickles, "published", lambda _: origin)
    data = load("cifar10", cache=tmp_path / "cache", say=lambda _: None, progress=False)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [10, 10, 20]


def refused(where: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(where, tmp_path / "cache", lambda _: None)
    (sentence,) = caught.value.problems
    assert "\n" not in sentence and str(where) in sentence
    return sentence


def test_a_missing_archive_is_reported(tmp_path: Path) -> None:
    assert "no such archive" in refused(tmp_path / "none.tar.xz", tmp_path)


def test_an_unsupported_file_type_is_rejected_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert ".tar.xz" in refused(tmp_path / "images.zip", tmp_path)


def test_a_folder_named_like_an_archive_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "images.tar").mkdir()
    assert "no such archive" in refused(tmp_path / "images.tar", tmp_path)


def test_an_image_folder_without_test_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    assert "'test'" in refused(tmp_path / "images", tmp_path)


def test_an_empty_folder_without_a_network_suggests_data_dir(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "--data-dir PATH" in refused(tmp_path / "empty", tmp_path)


def test_a_folder_that_does_not_exist_is_reported_and_not_created(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "typo", tmp_path)
    assert not (tmp_path / "typo").exists()


def test_missing_batch_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "data" / CIFAR10.folder).mkdir(parents=True)
    (tmp_path / "data" / CIFAR10.folder / "data_batch_1").write_bytes(b"x")
    assert "test_batch missing" in refused(tmp_path / "data" / CIFAR10.folder, tmp_path)


def test_a_rejected_source_is_not_cached(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not a tar at all")
    for _ in range(2):
        assert "truncated or damaged" in refused(tmp_path / "bad.tar", tmp_path)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_permission_error_while_reading_becomes_a_user_error(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> Pixels:
        raise PermissionError(13, "Permission denied", str(archive))

    monkeypatch.setattr(image_folder, "read_archive", denied)
    assert "Permission denied" in refused(archive, tmp_path)

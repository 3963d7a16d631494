"""CIFAR as published: a download from a real local server, digests, and malicious pickles."""

import http.server
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from archives import images_of, md5, python2_batch, small_archive, small_files, small_origin
from tune_kd.data import cifar_pickles
from tune_kd.data.cifar_pickles import CIFAR10, CIFAR100, Origin, download, published, read_archive, read_folder
from tune_kd.system.errors import UserError


def problem(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    return sentence


# Reading


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_python_2_batches_are_read_without_warnings(tmp_path: Path) -> None:
    files = small_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy 1's module names and flags are deprecated
        pixels = read_folder(unpacked(tmp_path / CIFAR10.folder, files), small_origin(files))
    assert pixels.train_images.shape == (40, 3, 32, 32) and pixels.train_images.dtype == torch.uint8
    expected = np.concatenate([images_of(0), images_of(1)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(pixels.train_images.numpy(), expected)
    assert np.array_equal(pixels.test_images.numpy(), images_of(2).reshape(-1, 3, 32, 32))
    assert pixels.train_labels.tolist() == [j % 10 for j in range(20)] + [(j + 1) % 10 for j in range(20)]
    assert pixels.classes == tuple(sorted(pixels.classes))


def test_an_archive_reads_the_same_as_its_folder(tmp_path: Path) -> None:
    files = small_files()
    content = small_archive(files)
    (tmp_path / CIFAR10.archive).write_bytes(content)
    packed = read_archive(tmp_path / CIFAR10.archive, small_origin(files, content))
    loose = read_folder(unpacked(tmp_path / CIFAR10.folder, files), small_origin(files))
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(packed, name), getattr(loose, name))
    assert sorted(os.listdir(tmp_path)) == sorted([CIFAR10.archive, CIFAR10.folder])


def hundred_files() -> dict[str, bytes]:
    """Two batches in the form of CIFAR-100, and the file that names its classes."""
    batch = {"filenames": ["a.png"] * 20, "batch_label": "training batch 1 of 1", "coarse_labels": [0] * 20}
    files = {
        name: pickle.dumps(batch | {"data": images_of(seed), "fine_labels": [seed + 5 * j % 90 for j in range(20)]}, 4)
        for seed, name in enumerate(("train", "test"))
    }
    names = {"fine_label_names": [f"class {number}" for number in range(100)], "coarse_label_names": ["all"]}
    return files | {"meta": pickle.dumps(names, 4)}


def hundred_origin(files: dict[str, bytes], archive: bytes = b"") -> Origin:
    train, test, meta = ((name, md5(content)) for name, content in files.items())
    url = "http://127.0.0.1:1/"
    return Origin(url, md5(archive), (train,), (test,), form=CIFAR100, meta=(*meta, "fine_label_names"))


def test_cifar100_is_read_with_fine_labels_and_class_names_from_folder_and_archive(tmp_path: Path) -> None:
    files = hundred_files()
    content = small_archive(files, CIFAR100)
    (tmp_path / CIFAR100.archive).write_bytes(content)
    packed = read_archive(tmp_path / CIFAR100.archive, hundred_origin(files, content))
    loose = read_folder(unpacked(tmp_path / CIFAR100.folder, files), hundred_origin(files))
    for pixels in (packed, loose):
        assert pixels.classes == tuple(f"class {number}" for number in range(100))
        assert pixels.train_labels.tolist() == [5 * j % 90 for j in range(20)]
        assert np.array_equal(pixels.test_images.numpy(), images_of(1).reshape(-1, 3, 32, 32))


def test_images_pickled_in_column_major_order_are_read_correctly(tmp_path: Path) -> None:
    files = hundred_files()
    batch = {"data": np.asfortranarray(images_of(0)), "fine_labels": list(range(20))}
    files["train"] = pickle.dumps(batch, 4)
    pixels = read_folder(unpacked(tmp_path / CIFAR100.folder, files), hundred_origin(files))
    assert pixels.train_images.is_contiguous()
    assert np.array_equal(pixels.train_images.numpy(), images_of(0).reshape(-1, 3, 32, 32))


def test_a_truncated_file_of_class_names_is_rejected(tmp_path: Path) -> None:
    files = hundred_files()
    folder = unpacked(tmp_path / CIFAR100.folder, files)
    (folder / "meta").write_bytes(files["meta"][:-1])
    sentence = problem(lambda: read_folder(folder, hundred_origin(files)))
    assert "meta is truncated or damaged" in sentence and "to download CIFAR-100 again" in sentence


def test_the_archive_digest_of_cifar100_is_that_of_torchvision() -> None:
    origin = published(CIFAR100)
    assert origin.url.startswith("https://") and origin.url.endswith(CIFAR100.archive)
    assert origin.archive_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert origin.files == ("train", "test", "meta")
    assert origin.meta is not None and origin.meta[2] == "fine_label_names"


def test_the_archive_digest_of_cifar10_is_that_of_torchvision() -> None:
    origin = published()
    assert origin.url.startswith("https://") and origin.url.endswith(CIFAR10.archive)
    assert origin.archive_md5 == "c58f30108f718f92721af3b95e74349a"
    assert [len(origin.train), len(origin.test)] == [5, 1]
    assert origin.files[0] == "data_batch_1" and origin.files[-1] == "test_batch"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_batch_is_reported_with_a_remedy(tmp_path: Path, damage: str) -> None:
    files = small_files()
    folder = unpacked(tmp_path / CIFAR10.folder, files)
    content = bytearray(files["data_batch_2"])
    content[5000] ^= 1
    (folder / "data_batch_2").write_bytes(content if damage == "flipped" else content[:5000])
    sentence = problem(lambda: read_folder(folder, small_origin(files)))
    assert "data_batch_2" in sentence and str(folder) in sentence and "remove" in sentence


def test_a_truncated_archive_is_reported_with_a_remedy_and_not_deleted(tmp_path: Path) -> None:
    files = small_files()
    content = small_archive(files)
    path = tmp_path / CIFAR10.archive
    path.write_bytes(content[:-7])
    sentence = problem(lambda: read_archive(path, small_origin(files, content)))
    assert str(path) in sentence and "truncated or damaged" in sentence and "remove" in sentence
    assert path.exists(), "the user's file is not ours to remove"


# Pickles


class Bite:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_batch_with_a_wrong_digest_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_files()
    folder = unpacked(tmp_path / CIFAR10.folder, files)
    (folder / "data_batch_1").write_bytes(pickle.dumps(Bite(tmp_path / "bitten")))

    class Untouched:
        def __init__(self, *_: object, **__: object) -> None:
            pytest.fail("unpickled before its digest was compared")

    monkeypatch.setattr(cifar_pickles, "_BatchUnpickler", Untouched)
    assert "MD5" in problem(lambda: read_folder(folder, small_origin(files)))


def test_even_a_trusted_batch_cannot_call_functions(tmp_path: Path) -> None:
    files = small_files() | {"data_batch_1": pickle.dumps(Bite(tmp_path / "bitten"), protocol=2)}
    folder = unpacked(tmp_path / CIFAR10.folder, files)
    sentence = problem(lambda: read_folder(folder, small_origin(files)))
    assert "not a CIFAR-10 batch" in sentence and "mkdir" in sentence
    assert not (tmp_path / "bitten").exists()


def test_a_trusted_batch_with_an_object_array_is_rejected(tmp_path: Path) -> None:
    files = small_files() | {"data_batch_1": python2_batch(images_of(0), [0] * 20, number=b"O8")}
    folder = unpacked(tmp_path / CIFAR10.folder, files)
    assert "'O8', not bytes" in problem(lambda: read_folder(folder, small_origin(files)))


@pytest.mark.parametrize(
    "content",
    [
        python2_batch(images_of(0), [0] * 19),
        pickle.dumps({"data": 3, "labels": [1]}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
        b"",
        b"not a pickle",
    ],
    ids=["labels", "number", "list", "empty", "text"],
)
def test_a_trusted_file_that_is_not_a_batch_is_rejected(tmp_path: Path, content: bytes) -> None:
    files = small_files() | {"data_batch_1": content}
    folder = unpacked(tmp_path / CIFAR10.folder, files)
    assert "not a CIFAR-10 batch" in problem(lambda: read_folder(folder, small_origin(files)))


# Downloading


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` in the way that the path names."""

    daemon_threads = True
    content = b""
    served = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.served += 1
        content, way = self.server.content, self.path.strip("/")
        if way == "absent":
            self.send_error(404)
            return
        self.send_response(200)
        if way != "unsized":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if way in ("good", "unsized"):
            self.wfile.write(content)
        elif way == "short":
            self.wfile.write(content[: len(content) // 2])
        elif way == "wrong":
            self.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))
        elif way == "stall":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.closing.wait(30)
        elif way == "trickle":
            for byte in content:
                if self.server.closing.wait(0.02):
                    break
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    break

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield serving
        serving.closing.set()
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize("way", ["good", "unsized"])
def test_a_download_is_complete_and_announced(tmp_path: Path, server: Server, way: str) -> None:
    files = small_files()
    server.content = small_archive(files)
    said: list[str] = []
    path = tmp_path / "new" / "folder" / CIFAR10.archive
    download(small_origin(files, server.content, server.url(way)), path, said.append, progress=True)
    assert path.read_bytes() == server.content
    assert os.listdir(path.parent) == [CIFAR10.archive]
    assert len(said) == 1 and server.url(way) in said[0] and str(path) in said[0]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("short", "ended after"),
        ("wrong", "its MD5 is"),
        ("stall", "no data for 0.4 s"),
        ("trickle", "bytes arrived in"),
        ("absent", "404"),
    ],
)
def test_a_failed_download_is_explained_and_leaves_no_file(
    tmp_path: Path, server: Server, way: str, words: str
) -> None:
    files = small_files()
    server.content = small_archive(files)
    stall = 0.4 if way in ("stall", "trickle") else 20.0
    origin = small_origin(files, server.content, server.url(way), stall)
    sentence = problem(lambda: download(origin, tmp_path / CIFAR10.archive, lambda _: None, progress=False))
    assert words in sentence and str(tmp_path / CIFAR10.archive) in sentence and "--data-dir PATH" in sentence
    assert os.listdir(tmp_path) == []


def test_a_short_download_without_content_length_is_detected_by_its_digest(tmp_path: Path, server: Server) -> None:
    files = small_files()
    server.content = small_archive(files)[:-100]
    origin = small_origin(files, small_archive(files), server.url("unsized"))
    sentence = problem(lambda: download(origin, tmp_path / CIFAR10.archive, lambda _: None, progress=False))
    assert "its MD5 is" in sentence
    assert os.listdir(tmp_path) == []


def test_a_download_over_the_size_limit_is_stopped(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_pickles, "MOST_DOWNLOAD_BYTES", 1000)
    server.content = bytes(5000)
    origin = small_origin(small_files(), server.content, server.url("unsized"))
    sentence = problem(lambda: download(origin, tmp_path / CIFAR10.archive, lambda _: None, progress=False))
    assert "larger than 1000 bytes" in sentence
    assert os.listdir(tmp_path) == []


def test_without_a_network_the_error_suggests_data_dir(tmp_path: Path, server: Server) -> None:
    closed = server.url("good")
    server.shutdown()
    server.server_close()
    origin = small_origin(small_files(), b"", closed)
    sentence = problem(lambda: download(origin, tmp_path / CIFAR10.archive, lambda _: None, progress=False))
    assert "refused" in sentence and "--data-dir PATH" in sentence


def test_an_unwritable_download_folder_is_reported_before_the_download(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / CIFAR10.archive
    origin = small_origin(small_files(), b"", server.url("good"))
    sentence = problem(lambda: download(origin, path, lambda _: None, progress=False))
    assert str(path) in sentence and "set XDG_CACHE_HOME" in sentence
    assert server.served == 0, "downloaded before there was a place for it"

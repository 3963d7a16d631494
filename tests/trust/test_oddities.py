"""Files may come from others. An irregular file in place of an expected one never makes a reader wait or fill memory.

Irregular files are the kinds in `oddities.ODDITIES`: FIFOs, sockets, folders, devices, and files of a terabyte.
"""

import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from archives import small_archive, small_files, small_origin
from oddities import ODDITIES, UNFOLLOWED, at_once, put
from tune_kd.analysis import grace
from tune_kd.data import cifar_pickles
from tune_kd.data.cifar import load_pixels
from tune_kd.execute.verify import verify
from tune_kd.records import lock, reader, rebuild, run_folder
from tune_kd.records.ledger import Ledger, commits, digests, reading
from tune_kd.records.schema import COMMITS, DIGESTS, LEDGER, TRIALS
from tune_kd.records.sync import HOLDER, STUDY
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.system import files as storage, object_store
from tune_kd.system.errors import CorruptFile, UnexpectedFile, UserError
from tune_kd.system.files import appended, check_regular, links, opened, publish, read, write_at
from tune_kd.system.object_store import Mirror
from tune_kd.training import logit_cache, networks, teachers
from tune_kd.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
each_oddity = pytest.mark.parametrize("kind", ODDITIES)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Limit memory, so that an endless read fails in its test and does not bring the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy of a trained run, with its teachers."""
    shutil.copytree(finished.parent, tmp_path / "results")
    return tmp_path / "results" / finished.name


def error_of(do: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        at_once(do)
    return str(caught.value)


@each_oddity
@pytest.mark.parametrize("use", [lambda path: read(path, 100), lambda path: opened(path, 100),
                                 lambda path: check_regular(path, 100, through_links=True)],
                         ids=["read", "opened", "check"])  # fmt: skip
def test_irregular_and_oversized_files_are_rejected_with_a_clear_message(
    kind: str, use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (1e9,))  # a retry would hang, but this error is not retried
    path = put(kind, tmp_path / "file")
    with pytest.raises(UnexpectedFile) as caught:
        at_once(lambda: use(path), within=10)
    assert str(caught.value) == f"{path} {ODDITIES[kind]} 100 bytes"
    assert isinstance(caught.value, OSError) and isinstance(caught.value, CorruptFile)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as if it came from a worker


def test_a_file_is_read_up_to_its_size_limit_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read(tmp_path / "file", 10) == read(tmp_path / "link", 10) == b"0123456789"
    with pytest.raises(UnexpectedFile, match=r"link has 10 bytes; expected a regular file of at most 9 bytes"):
        read(tmp_path / "link", 9)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing", 9)


def test_a_file_that_reports_size_0_is_read_in_full_or_rejected() -> None:
    path = Path("/proc/self/environ")
    assert path.stat().st_size == 0
    assert read(path, 2**20) == path.read_bytes()
    with pytest.raises(UnexpectedFile):
        read(path, 2)


def test_a_huge_file_that_reports_size_0_is_rejected_whatever_the_limit() -> None:
    path = Path("/proc/self/pagemap")  # 256 GB
    assert path.stat().st_size == 0
    with pytest.raises(UnexpectedFile, match="pagemap has 0 bytes"):
        read(path, 2**40)


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "endless"])
def test_writing_into_an_irregular_file_is_rejected(kind: str, tmp_path: Path) -> None:
    path = put(kind, tmp_path / "file")
    for use in (lambda: write_at(path, 0, b"data"), lambda: appended(path)):
        with pytest.raises(UnexpectedFile, match=UNFOLLOWED[kind].partition(" of at most")[0]):
            at_once(use, within=10)


@pytest.mark.parametrize("kind", ["fifo", "socket", "endless", "huge"])
def test_publish_replaces_an_irregular_file(kind: str, tmp_path: Path) -> None:
    path = put(kind, tmp_path / "file")
    at_once(lambda: publish(path, b"data"))
    assert path.read_bytes() == b"data" and not path.is_symlink()


@each_oddity
def test_an_irregular_holder_or_lock_file_reads_as_no_holder(kind: str, results: Path) -> None:
    put(kind, results / HOLDER)
    assert at_once(lambda: lock.holder(results)) is None
    put("folder", results / HOLDER).rmdir()  # leaves no holder file
    (results / HOLDER).write_text("{}")
    put(kind, results / ".lock")
    assert at_once(lambda: lock.holder(results)) is None


@each_oddity
def test_an_irregular_study_file_is_rejected_and_the_run_is_still_listed(kind: str, results: Path) -> None:
    path = put(kind, results / STUDY)
    assert f"{path} {ODDITIES[kind]}" in error_of(lambda: reader.load(results))
    assert f"{path} {ODDITIES[kind]}" in error_of(
        lambda: run_folder.reopen(run_folder.find(results.parent, results.name))
    )
    assert at_once(lambda: run_folder.existing(results.parent)) == [results]
    assert at_once(lambda: verify(results))[0].part == "plan"


@each_oddity
@pytest.mark.parametrize("name", ["trials", "epochs", "decisions"])
def test_an_irregular_table_is_rejected(kind: str, name: str, results: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for each in results.glob("*.parquet"):
        shutil.copy(each, others / f"p_{each.name}")
    for prefix, path in ((results, results / f"{name}.parquet"), (others / "p", others / f"p_{name}.parquet")):
        put(kind, path)
        assert f"{path} {ODDITIES[kind]} 1,073,741,824 bytes" in error_of(lambda prefix=prefix: reader.load(prefix))


@pytest.mark.parametrize("kind", [each for each in ODDITIES if each != "folder"])  # a file cannot replace a folder
def test_irregular_tables_are_replaced_when_tables_are_written(kind: str, results: Path) -> None:
    for name in ("trials.parquet", "epochs.parquet", DIGESTS):
        put(kind, results / name)

    def write_tables() -> None:
        with closing(Ledger(results / LEDGER)) as ledger:
            ledger.write_tables(results)

    at_once(write_tables)
    assert verify(results) == []


@each_oddity
def test_irregular_commit_counts_and_digests_read_as_none(kind: str, results: Path) -> None:
    for name in (COMMITS, DIGESTS):
        put(kind, results / name)
    assert at_once(lambda: commits(results)) is None
    assert at_once(lambda: digests(results)) is None


@each_oddity
@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
def test_an_irregular_ledger_file_is_rejected_before_sqlite_opens_it_and_is_rebuilt(
    kind: str, end: str, results: Path
) -> None:
    """SQLite waits for a FIFO that has the name of a rollback journal."""
    with reading(results / LEDGER) as ledger:
        rows = ledger.rows(TRIALS)
    path = put(kind, results / f"{LEDGER}{end}")
    for options in ({}, {"read_only": True}):
        with pytest.raises(UnexpectedFile, match=f"{path.name} {UNFOLLOWED[kind]}"):
            at_once(lambda options=options: Ledger(results / LEDGER, **options))
    assert any(f"{path} {UNFOLLOWED[kind]}" in finding.what for finding in at_once(lambda: verify(results)))
    at_once(lambda: rebuild.opened(run_folder.reopen(results), lambda _: None).close())
    for aside in links(results):
        aside.unlink()
    assert verify(results) == []
    with reading(results / LEDGER) as again:
        assert again.rows(TRIALS) == rows


@each_oddity
def test_an_irregular_audit_of_another_run_is_ignored(kind: str, results: Path, study: Study) -> None:
    put(kind, results.parent / "other" / grace.AUDIT)
    (results.parent / "gone").mkdir()
    (results.parent / "gone" / grace.AUDIT).symlink_to("nowhere")
    assert at_once(lambda: grace.warnings(plan(study), results.parent)) == []


@each_oddity
def test_an_irregular_checkpoint_is_set_aside_and_the_previous_one_is_loaded(kind: str, tmp_path: Path) -> None:
    states = Checkpoints(tmp_path)
    states.save(1, {"a": torch.ones(2)}, {"epoch": 1})
    path = put(kind, tmp_path / f"000002-{'0' * 64}.safetensors")
    assert at_once(states.damaged) == [path]
    found = at_once(states.load)
    assert found is not None and found[1] == {"epoch": 1}
    assert path.with_suffix(".damaged").exists() and not path.exists()


@each_oddity
@pytest.mark.parametrize("name", ["card.json", "weights.safetensors"])
def test_an_irregular_teacher_file_is_reported_as_damaged_and_not_loaded(
    kind: str, name: str, results: Path, pixels: object
) -> None:
    card = next(results.parent.glob("teachers/*/card.json"))
    folder, teacher = card.parents[1], card.parent.name
    path = put(kind, card.with_name(name))
    (finding,) = (each for each in at_once(lambda: verify(results)) if each.part == "teachers")
    assert str(path) in finding.what and "missing" not in finding.what
    assert at_once(lambda: teachers.published_epochs(folder, teacher)) is None
    with pytest.raises((teachers.TeacherChanged, UnexpectedFile), match=teacher):
        at_once(lambda: teachers.load_teacher(folder, teacher, pixels, torch.device("cpu")))  # type: ignore[arg-type]


@each_oddity
@pytest.mark.parametrize("name", ["digests.sha256", "logits.f32"])
def test_irregular_files_of_cached_logits_are_reported(kind: str, name: str, results: Path) -> None:
    path = put(kind, next(results.parent.glob(f"teachers/*/answers/*/*/{name}")))
    findings = [each for each in at_once(lambda: verify(results)) if each.part == "answers"]
    assert [each.what.split(" of at most")[0] for each in findings] == [f"{path} {ODDITIES[kind]}".split(" of at")[0]]
    assert str(path.parent) in findings[0].remedy
    if kind != "huge":  # a huge file is truncated
        with pytest.raises(UnexpectedFile):
            at_once(lambda: logit_cache.LogitCache(path.parent, 1, 1, lambda _: torch.zeros(1, 1)))


@each_oddity
def test_an_irregular_image_is_named_in_the_error(kind: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (32, 32)).save(tmp_path / "data" / part / name / f"{number}.png")
    path = put(kind, tmp_path / "data" / "train" / "cat" / "2.png")
    error = error_of(lambda: load_pixels(tmp_path / "data", cache=tmp_path, say=pytest.fail, progress=False))
    assert str(path) in error and ("too many for a 32x32 image" if kind == "huge" else ODDITIES[kind]) in error


@each_oddity
@pytest.mark.parametrize("name", ["images.tar", "images.tgz", "cifar-10-python.tar.gz", "something"])
def test_an_irregular_archive_is_named_in_the_error(kind: str, name: str, tmp_path: Path) -> None:
    path = put(kind, tmp_path / name)
    origin = small_origin(small_files(), b"")
    error = error_of(
        lambda: load_pixels(path, cache=tmp_path / "cache", say=lambda _: None, progress=False, origin=origin)
    )
    assert str(path) in error
    if kind not in ("folder", "huge") and name != "something":
        assert ODDITIES[kind] in error


@each_oddity
def test_an_irregular_cifar_batch_is_named_in_the_error_and_nothing_is_downloaded(kind: str, tmp_path: Path) -> None:
    files = small_files()
    origin = small_origin(files, small_archive(files))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = put(kind, tmp_path / origin.files[0])
    said: list[str] = []
    error = error_of(
        lambda: load_pixels(tmp_path, cache=tmp_path / "c", say=said.append, progress=False, origin=origin)
    )
    assert f"{path} {ODDITIES[kind]} {cifar_pickles.MOST_DOWNLOAD_BYTES:,} bytes" in error and said == []


@each_oddity
def test_an_irregular_torchvision_weights_file_is_named_in_the_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    path = put(kind, networks.imagenet_file("resnet18"))
    error = error_of(lambda: networks.fetch_imagenet("resnet18"))
    assert f"{path} {ODDITIES[kind]} 1,073,741,824 bytes; remove it" in error


@each_oddity
def test_an_irregular_store_mark_is_rejected_and_a_linked_one_is_ignored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "tune_kd" / "s3-store").mkdir(parents=True)
    put(kind, tmp_path / "tune_kd" / "s3-store" / object_store.MARK)
    run = tmp_path / "tune_kd" / "s3-store" / object_store.RESULTS / "run"
    if kind == "endless":  # a link, which anybody may have created
        assert at_once(lambda: Mirror.of(run)).url is None
    else:
        with pytest.raises(UnexpectedFile):
            at_once(lambda: Mirror.of(run))


@each_oddity
def test_an_irregular_token_file_is_treated_as_no_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune_kd.execute.jobs import client

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(put(kind, tmp_path / "token")))
    assert "where no Ray dashboard responds" in error_of(lambda: client("http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("name", "command", "status", "says"),
    [
        (HOLDER, ["status", "tiny"], 0, "not running|confirm"),
        (STUDY, ["status"], 0, "confirm"),
        (STUDY, ["report", "tiny"], 2, "study.json is a FIFO"),
        (grace.AUDIT, ["plan", "ablation", "--scale", "smoke"], 0, "18 trials"),
        (f"{LEDGER}-journal", ["status", "tiny"], 3, "journal is a FIFO"),
        ("epochs.parquet", ["report", "tiny"], 2, "epochs.parquet is a FIFO"),
    ],
)
def test_no_command_hangs_on_a_fifo(name: str, command: list[str], status: int, says: str, results: Path) -> None:
    put("fifo", results / name)
    done = subprocess.run([sys.executable, "-m", "tune_kd", *command, "--out", str(results.parent)], timeout=120,
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == status, done.stderr
    assert re.search(says, done.stdout + done.stderr)

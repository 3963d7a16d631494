"""Shared by all tests: a tiny study, a tiny data set, and one Ray per test session."""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from trials import CPU, as_teacher, trial
from tune_kd.data import datasets
from tune_kd.data.datasets import DataSet, Split
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records import ledger as records
from tune_kd.records.ledger import Ledger
from tune_kd.records.run_folder import Run, create
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import Answering
from tune_kd.study.tuning import LogUniform, Range, Tuning, Uniform
from tune_kd.system import environment
from tune_kd.system.files import sealed, unsealed
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import best_weights, train
from tune_kd.training.teachers import Teacher, load_teacher, publish_teacher

RAY = (
    "test_ray_tune",
    "test_cluster",
    "test_monitoring",
    "test_mps",
    "test_submit",
    "test_trackers",
    "test_faults",
    "test_gpu",
    "test_resources",
    "test_session",
    "test_streams",
    "test_trust_ray",
)
"""Test files that use the shared Ray or start their own."""


OPTIONAL = {"moto": ("records/test_sync.py", "execute/test_cluster.py"), "selenium": ("execute/test_monitoring.py",)}
"""Test files that import an optional package, by package. Without it, only these files are left out."""
collect_ignore = [file for package, files in OPTIONAL.items() if find_spec(package) is None for file in files]


def pytest_report_header() -> list[str]:
    return [f"left out, since a package is not installed: {', '.join(collect_ignore)}"] if collect_ignore else []


class RayInOneProcess(LoadFileScheduling):
    """With several processes (`-n 2`), run each file in one process, and all files that use Ray in the same one: two
    concurrent tests could connect to each other's Ray. (Groups of pytest-xdist 3.8 have no effect under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(super()._split_scope(nodeid)).stem
        return "ray" if file in RAY else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU; test_placement.py simulates one"))
    items.sort(key=lambda item: item.path.stem not in RAY)  # files with Ray first: together they take longest


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayInOneProcess:
    return RayInOneProcess(config, log)


settings.register_profile("untimed", deadline=None)  # the time of an example depends on the load of the machine
settings.load_profile("untimed")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs from the commands that a test starts, except in GPU tests: only the CPU reproduces results
    bit by bit."""
    if "gpu" not in request.keywords:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def _without_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the address that MLflow leaves in the environment: commands would inherit it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def _without_pause_between_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between two writes of the tables. It is for concurrent readers, which few tests have."""
    monkeypatch.setattr(records, "TABLES_APART", 0.0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new, empty working directory and cache for a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


ODD_NAMES = (
    "a%2Fb",
    "100 %",
    "what?mode=ro#1",
    "R&D; é",
    "\"x\" 'y'",
    "back\\slash",
    "two\nlines",
    "{x}",
    "..a",
    ":memory:",
)
"""Unusual folder names. Pasted unescaped into a URL, each would change its meaning."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def tiny() -> Study:
    """Two stems, three methods, two temperatures: 12 raw cells, 8 arms; networks of 4 channels."""
    return Study(
        name="tiny",
        question="Does it work?",
        factors=(
            Factor("stem", ("imagenet", "cifar")),
            Factor("method", ("none", "logit", "feature")),
            Factor("temperature", (2.0, 4.0)),
        ),
        contrasts=(
            Compare("method", "logit", "none"),
            Compare("method", "feature", "none"),
            Compare("temperature", 2.0, 4.0),
        ),
        moderator="stem",
        cell=Cell(width=0.0625),
        scale="test",
        data=Data("digits", train=60, validation=20, test=20),
        recipe=Recipe(epochs=2, batch_size=16, lr=0.05),
        teacher_recipe=Recipe(epochs=2, batch_size=16, lr=0.05),
        screen=Screen(seed=0, grace=1, reduction=2, margin=0.0, min_peers=1),
        confirm=Confirm(seeds=(1, 2)),
    )


def contested(study: Study) -> Study:
    """The study with five temperatures and early stopping at epochs 2 and 4 of 8, so that arms are stopped."""
    return replace(
        study,
        factors=(*study.factors[:2], Factor("temperature", (1.0, 2.0, 4.0, 8.0, 16.0))),
        recipe=replace(study.recipe, epochs=8),
        screen=Screen(seed=0, grace=2, reduction=2, margin=0.02, min_peers=1),
    )


def altered(path: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Change a sealed record, seal it again and return it: readers accept the seal and validate the content."""
    record = unsealed(path.read_bytes(), path)
    change(record)
    path.write_bytes(sealed(record))
    return record


@pytest.fixture
def study() -> Study:
    """The tiny study: see `tiny`."""
    return tiny()


def tunable(tuning: Tuning) -> Study:
    """The tiny study with one stem, tuned."""
    base = tiny()
    return replace(
        base,
        factors=(Factor("method", ("none", "logit", "feature")),),
        contrasts=(Compare("method", "logit", "none"), Compare("method", "feature", "none")),
        moderator=None,
        recipe=replace(base.recipe, epochs=4),
        tuning=tuning,
    )


def trained(study: Study, folder: Path) -> Path:
    """Train a run in this process and return its folder."""
    digits = datasets.load("digits", train=60, validation=20, test=20)
    run = Run(folder.name, folder, study, digits.digest, None, {})
    create(run)
    ledger = Ledger(folder / "ledger.sqlite")
    place = Workplace(None, None, run.teachers, run.checkpoints, checkpoint_every=1e9)
    before = torch.get_num_threads()
    try:
        run_in_process(Driver(run.plan, run.name, folder, ledger, place, cpus=1.0, gpus=0.0), place)
    finally:
        torch.set_num_threads(before)
        ledger.close()
    return folder


def trained_once(study: Study, name: str, folders: pytest.TempPathFactory) -> Path:
    """Return a copy of a run that is trained once per test session, for all pytest processes."""
    base = folders.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"trained-{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            trained(study, shared.with_suffix(".part") / name)
            shared.with_suffix(".part").rename(shared)
    return Path(shutil.copytree(shared, folders.mktemp("results"), dirs_exist_ok=True)) / name


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run."""
    return trained_once(replace(tiny(), confirm=Confirm(seeds=(1, 2, 3))), "tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, tuned and confirmed."""
    ranges = (Range("lr", LogUniform(0.01, 0.5)), Range("alpha", Uniform(0.1, 0.9)))
    return trained_once(tunable(Tuning(ranges, budget=5, startup=3)), "fair", tmp_path_factory)


@pytest.fixture
def one_stem(study: Study) -> Study:
    """The tiny study with only the cifar stem: 4 arms."""
    return replace(study, factors=(Factor("stem", ("cifar",)), *study.factors[1:]), moderator=None)


def noise() -> DataSet:
    """Return 40 training images of 8 x 8 pixels in two classes: noise with a brightness that depends on the class."""

    def split(count: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        noise = torch.randint(0, 100, (count, 3, 8, 8), generator=generator)
        return Split((noise + 120 * labels[:, None, None, None]).to(torch.uint8), labels)

    return DataSet(
        name="pixels",
        classes=("dark", "bright"),
        train=split(40, 0),
        validation=split(20, 1),
        test=split(20, 2),
        mean=(0.4, 0.4, 0.4),
        std=(0.3, 0.3, 0.3),
        pad=1,
        flip=True,
        upsample=1,
        digest=hashlib.sha256(b"pixels").hexdigest(),
    )


@pytest.fixture
def pixels() -> DataSet:
    """The tiny data set: see `noise`."""
    return noise()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def teacher(pixels: DataSet, tmp_path: Path) -> Teacher:
    """A published teacher, trained for two epochs."""
    taught, checkpoints = as_teacher(trial("none")), Checkpoints(tmp_path / "teacher")
    epochs = list(train(taught, pixels, None, device=CPU, checkpoints=checkpoints))
    publish_teacher(tmp_path / "teachers", taught, best_weights(checkpoints), epochs)
    return load_teacher(tmp_path / "teachers", taught.trial_id, pixels, CPU, Answering(True, ()))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One Ray with its dashboard for all tests that need it. Without real GPUs, it has two logical ones. Yields the
    dashboard's URL."""
    from tune_kd.execute.cluster import on_this_machine

    import ray  # isort: skip  # the module above sets variables that Ray reads on import

    with on_this_machine():
        context = ray.init(
            "local",
            num_cpus=2,
            num_gpus=torch.cuda.device_count() or 2,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            _temp_dir=str(environment.ray_folder()),
            _system_config={"metrics_report_interval_ms": 1000},
        )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    from selenium import webdriver

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Debian's packages chromium and chromium-driver")

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, profile):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()

"""All inputs of a GPU's computations are on that GPU. Simulated on a CPU, with the failures of a real GPU."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import gpu as benchmark, levers
from benchmarks.measure import attempted
from benchmarks.workers import Budget
from placement import (
    BENCHMARKED,
    METHODS,
    RATES,
    WIDTH,
    benchmarked,
    distil,
    numbers_of_a_step,
    probe_one,
    processes_here,
    pupil,
    taught_on,
    through_pickle,
)
from second_device import busy, on_simulated_gpu, simulated_gpu
from trials import CPU, as_teacher, exact, run, trial
from tune_kd.data.augment import draw_views, prepare, show
from tune_kd.data.datasets import DataSet, load, on_device
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records.ledger import Ledger
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import Answering, Epoch
from tune_kd.training import networks, notices, step as stepping, teachers
from tune_kd.training.compilation import Compiled
from tune_kd.training.device import Captured, autocast
from tune_kd.training.logit_cache import CHUNK
from tune_kd.training.teachers import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A simulated GPU. Nothing of it is kept afterwards."""
    monkeypatch.setattr(Captured, "given_up", set())
    on_device.cache_clear()
    stepping._idle.clear()
    with simulated_gpu() as device:
        yield device
    on_device.cache_clear()
    stepping._idle.clear()


def check_judged(method: str, whole: list[Epoch], resumed: list[Epoch]) -> None:
    """A trial's epochs, uninterrupted and resumed: equal, finite, and compared with the teacher."""
    assert [exact(row) for row in resumed] == [exact(row) for row in whole]
    outcome = whole[-1].outcome
    assert outcome is not None and outcome.peak_memory_bytes
    assert outcome.fast_paths == (None if method == "none" else "folded")  # no graph on a simulated device
    compared = [outcome.agreement, outcome.kl_t1, outcome.kl_t4]
    assert [each is None for each in compared] == [method == "none"] * 3
    assert all(math.isfinite(row.train_loss) for row in whole)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_each_method_has_the_same_losses_on_the_gpu_as_on_the_cpu(
    method: str, gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    """Up to rounding: a step on a GPU keeps its numbers in float32 tensors. At this width the layout is the same."""
    whole, resumed = distil(gpu, pixels, method, "cifar", tmp_path / "there", width=0.125)
    check_judged(method, whole, resumed)
    stepping._idle.clear()
    teacher = taught_on(CPU, pixels, "cifar", tmp_path / "here", 0.125) if method != "none" else None
    here = run(pupil(method, "cifar", teacher, 0.125), pixels, teacher, tmp_path / "here" / "student")
    assert [row.train_loss for row in whole] == pytest.approx([row.train_loss for row in here], rel=1e-3)


@pytest.mark.parametrize("method", BENCHMARKED)
def test_a_student_with_the_imagenet_stem_trains_and_is_evaluated_on_the_gpu(
    method: str, gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    check_judged(method, *distil(gpu, pixels, method, "imagenet", tmp_path))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_reduced_precisions_train_on_the_gpu(
    precision: str, gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    whole, _ = distil(gpu, pixels, "feature", "cifar", tmp_path, precision=precision)
    assert all(math.isfinite(row.train_loss) for row in whole)


def test_views_are_cropped_on_the_device_of_images_that_student_and_teacher_share(
    gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    teacher = taught_on(gpu, pixels, "cifar", tmp_path)
    views = draw_views(1, 1, len(pixels.train.labels), pad=pixels.pad, flip=pixels.flip)
    assert on_simulated_gpu(show(views.to(gpu), teacher.data))
    assert not on_simulated_gpu(show(views, pixels))
    with stepping.stepping(pupil("logit", "cifar", teacher), pixels, teacher, gpu) as step:
        assert step.data.train.images is teacher.data.train.images
    logits, _ = teacher.logits(views)
    assert not on_simulated_gpu(logits), "a table of answers is on disk, and so is what is taken of it"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_on_the_gpu_folds_batch_norms_and_has_a_separate_logit_cache(
    precision: str, gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    teacher = taught_on(gpu, pixels, "cifar", tmp_path)
    there = answering_in(teacher, precision)
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {each.dtype for each in there.frozen(precision).parameters()} == {kind}
    assert there.frozen(precision) is there.frozen(precision) and there.is_folded and not teacher.is_folded
    with patch.object(networks, "folded", side_effect=RuntimeError("not here")):
        expected = answering_in(teacher, precision).test_logits()
    found = there.test_logits()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if precision == "bfloat16" else 1e-4)
    assert len(list((teacher.home / "answers").iterdir())) == 2


def untrained(device: torch.device, data: DataSet, folder: Path) -> Teacher:
    """A small teacher with random weights, which serves as well as a trained one."""
    taught = as_teacher(trial("none"))
    taught = replace(taught, cell=replace(taught.cell, teacher="resnet18"))
    net = networks.build("resnet18", stem="cifar", classes=len(data.classes), width=taught.cell.width, seed=3)
    teachers.publish_teacher(folder, taught, net.state_dict(), [])
    return teachers.load_teacher(folder, taught.trial_id, data, device, Answering(True, ()))


def answering_in(teacher: Teacher, precision: str) -> Teacher:
    """The teacher, as if it had been trained in a precision."""
    taught = teacher.card.trial
    other = replace(taught, recipe=replace(taught.recipe, precision=precision))
    return replace(teacher, card=replace(teacher.card, trial=other))


@pytest.mark.parametrize(("precision", "file"), [("tf32", "logits.f32"), ("bfloat16", "logits.bf16")])
def test_cached_logits_equal_the_teachers_live_output_bit_for_bit(
    precision: str, file: str, gpu: torch.device, pixels: DataSet, tmp_path: Path
) -> None:
    teacher = answering_in(untrained(gpu, pixels, tmp_path), precision)
    with torch.no_grad(), autocast(precision, gpu):
        live = teacher.frozen(precision)(prepare(teacher.data.test.images, teacher.data))
    found = teacher.test_logits()
    assert found.dtype == torch.float32 and not on_simulated_gpu(found)
    assert torch.equal(found, live.float().cpu())
    (table,) = (teacher.home / "answers").glob("*/test")
    assert [each.name for each in table.glob("logits.*")] == [file]


@pytest.mark.parametrize(("precision", "sizes"), [("float32", [300, 300, 120]), ("bfloat16", [600, 120])])
def test_a_teacher_on_the_gpu_uses_batches_twice_as_large_in_bfloat16(
    precision: str,
    sizes: list[int],
    gpu: torch.device,
    pixels: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {kind: CHUNK % size for kind, size in teachers.GPU_BATCH.items()} == {torch.float32: 0, torch.bfloat16: 0}
    assert teachers.GPU_BATCH[torch.bfloat16] == 2 * teachers.GPU_BATCH[torch.float32] >= 2 * teachers.BATCH
    monkeypatch.setattr(teachers, "GPU_BATCH", {torch.float32: 300, torch.bfloat16: 600})
    teacher = answering_in(untrained(gpu, pixels, tmp_path), precision)
    seen: list[int] = []
    teacher.frozen(precision).register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    views = draw_views(1, 1, len(pixels.train.labels), pad=pixels.pad, flip=pixels.flip)
    assert teacher.logits(views)[1] == sum(sizes)
    assert seen == sizes


@pytest.mark.parametrize("fails", [False, True])
def test_a_teacher_that_computes_many_logits_is_compiled_with_a_separate_cache(
    fails: bool, gpu: torch.device, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compile_(function: Any, **_: Any) -> Any:
        def compiled(images: torch.Tensor) -> Any:
            calls.append(len(images))
            if fails:
                raise RuntimeError("no compiler")
            return function(images)

        return compiled

    teacher = answering_in(untrained(gpu, pixels, tmp_path), "bfloat16")
    expected = teacher.test_logits()
    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(Compiled, "given_up", set())
    monkeypatch.setattr("tune_kd.training.compilation.COMPILING_PAYS", len(expected))
    monkeypatch.setattr(torch, "compile", compile_)
    notices.take()
    assert torch.equal(teacher.test_logits(), expected)
    told = ["a teacher's answers cannot be compiled here (no compiler); falling back to a slower path"]
    assert notices.take() == (told if fails else [])
    assert calls == [len(expected)] * (1 if fails else 2)  # tried once
    assert len(list((teacher.home / "answers").iterdir())) == 2


def test_each_setting_that_changes_logits_has_a_separate_cache(
    gpu: torch.device, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = untrained(gpu, pixels, tmp_path)
    for precision in ("float32", "tf32", "bfloat16"):
        answering_in(one, precision).test_logits()
    monkeypatch.setattr(teachers, "GPU_BATCH", {torch.float32: 8})
    replace(one).test_logits()
    with patch.object(networks, "folded", side_effect=RuntimeError("not here")):
        replace(one).test_logits()
    replace(one, device=CPU, data=pixels).test_logits()
    assert len(list((one.home / "answers").iterdir())) == 6


def test_a_teacher_that_cannot_be_folded_is_used_unfolded_and_reported_once(
    gpu: torch.device, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(net: torch.nn.Module) -> None:
        raise RuntimeError("bn1 does not follow a convolution")

    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(networks, "folded", refuses)
    notices.take()
    for method in ("logit", "feature"):
        whole, _ = distil(gpu, pixels, method, "cifar", tmp_path / method)
        assert whole[-1].outcome is not None and whole[-1].outcome.fast_paths is None
    told = [each for each in notices.take() if "folded" in each]
    assert told == ["a teacher's batch norms cannot be folded into its convolutions here (bn1 does not follow a "
                    "convolution); falling back to the unfolded teacher, which is slower"]  # fmt: skip


def test_a_student_that_cannot_be_compiled_trains_uncompiled_and_is_reported_once(
    gpu: torch.device, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(function: Any, **_: Any) -> Any:
        def compiled(*_: Any) -> None:
            raise RuntimeError("no compiler\nand more")

        return compiled

    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(Compiled, "given_up", set())
    monkeypatch.setattr("tune_kd.training.compilation.COMPILING_PAYS", 1)
    monkeypatch.setattr(torch, "compile", refuses)
    notices.take()
    for name in ("one", "other"):
        whole, _ = distil(gpu, pixels, "none", "cifar", tmp_path / name, precision="bfloat16")
        assert whole[-1].outcome is not None and whole[-1].outcome.fast_paths is None
    told = [each for each in notices.take() if "compiled" in each]
    assert told == ["a student cannot be compiled here (no compiler); falling back to a slower path"]


@pytest.mark.parametrize("method", ["feature", "logit"])
def test_a_probe_of_a_gpu_share_measures_speed_and_peak_memory(method: str, gpu: torch.device, pixels: DataSet) -> None:
    taught = as_teacher(trial("none"))
    speed, peak = probe_one(gpu, pixels, trial(method, teacher_id=taught.trial_id), taught)
    assert speed > 0 and peak > 0


def test_a_step_that_cannot_be_captured_is_launched_and_reported_once(
    gpu: torch.device, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_told", set())
    notices.take()
    for name in ("one", "other"):
        distil(gpu, pixels, "none", "cifar", tmp_path / name)
    for what, told in zip(("a training step", "an evaluation"), notices.take(), strict=True):
        assert told.startswith(f"{what} cannot be captured as a CUDA graph here") and "launched kernel by" in told
    assert asdict(distil(gpu, pixels, "none", "cifar", tmp_path / "third")[0][0])["train_loss"] > 0
    assert notices.take() == []


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_plain_loop_of_the_benchmark_trains_on_the_gpu(gpu: torch.device) -> None:
    assert all(each > 0 for each in benchmarked(gpu, "feature", "cifar"))


@pytest.fixture
def small(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """GPU benchmarks with few images and small networks, on the simulated GPU. Nothing is compiled."""
    benchmark.dataset.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("torch.compiler.reset", lambda: None)
    monkeypatch.setattr("gc.collect", lambda: 0)  # slow after the imports of earlier tests
    for module in (benchmark, levers):
        monkeypatch.setattr(module, "WIDTH", WIDTH)
    for name, value in {"IMAGES": 8, "VALIDATION": 4, "matrix_rate": RATES[0], "bandwidth": RATES[1]}.items():
        monkeypatch.setattr(benchmark, name, value)
    for name, value in {"WARM_UP": 0, "STEPS": 1, "REPEATS": 1}.items():
        monkeypatch.setattr(levers, name, value)
    yield
    levers.release()
    benchmark.dataset.cache_clear()


def briefly(lever: levers.Lever) -> levers.Lever:
    """The same with at most two steps and students."""
    return replace(lever, steps=min(2, lever.steps), students=min(2, lever.students))


@pytest.mark.parametrize(
    "tried",
    [
        [*dict.fromkeys(briefly(each) for each in levers.LEVERS if not each.compiled), levers.Lever(compiled=True)],
        pytest.param(levers.LEVERS, marks=pytest.mark.slow),
    ],
    ids=["in short", "all"],
)
def test_every_lever_of_the_benchmark_is_measured_on_the_gpu(
    tried: Sequence[levers.Lever], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled or captured. The kernels are tested separately."""
    kernels: list[torch.nn.Module] = []
    monkeypatch.setitem(sys.modules, "benchmarks.triton_norm", SimpleNamespace(replace_norms=kernels.append))
    monkeypatch.setattr(levers, "LEVERS", tried)
    monkeypatch.setattr(levers, "BESIDE", ())
    monkeypatch.setattr(benchmark, "IMAGES", max(8, 2 * max(each.steps for each in tried)))  # two per batch
    budget = Budget(1e9)
    found = list(attempted(levers.rows(budget, processes_here), budget))
    assert [each.error for each in found] == [""] * len(tried)
    assert all(each.figure > 0 and "ready in" in each.detail for each in found)
    assert len(kernels) == sum(each.students for each in tried if each.triton) > 0


def test_the_gpu_benchmark_measures_its_table_without_errors(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "plain_epochs", partial(benchmark.plain_epochs, workers=0))
    alone = {each: bar for each, bar in benchmark.ALONE.items() if each.stem == "cifar"}
    monkeypatch.setattr(benchmark, "ALONE", alone)
    monkeypatch.setattr(benchmark, "AMORTISED", ((benchmark.Training("none", "imagenet"), 2, ""),))
    budget = Budget(1e9)
    found = {each.name: each for each in attempted(benchmark.rows(1, budget, processes_here), budget)}
    assert [each.error for each in found.values()] == [""] * (2 + 4 + 4 + 1 + 1 + 1 + 1)
    assert found[benchmark.ANSWERS].figure > 0, "a table of answers had all of them"
    assert all(each.figure > 0 for name, each in found.items() if name != benchmark.LATER)


@pytest.mark.parametrize("rate", RATES)
def test_benchmark_rates_are_measured_on_the_gpu(rate: Callable[..., float], gpu: torch.device) -> None:
    before = busy[0]
    assert rate(gpu) > 0
    assert busy[0] - before >= 3  # one warm-up, and at least two that are timed or made like others


def test_numbers_that_change_between_steps_are_on_the_gpu(gpu: torch.device, pixels: DataSet, tmp_path: Path) -> None:
    assert [each.device.type for each in numbers_of_a_step(gpu, pixels, tmp_path)] == ["cuda"] * 5


def test_data_on_the_gpu_are_pickled_as_data_on_the_cpu(gpu: torch.device, pixels: DataSet) -> None:
    there = through_pickle(gpu, pixels)
    assert torch.equal(there.test.images, pixels.test.images) and torch.equal(there.test.labels, pixels.test.labels)


def test_a_study_completes_on_a_share_of_the_gpu_and_reports_a_failed_capture_once(
    gpu: torch.device, one_stem: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_told", set())
    notices.take()
    said: list[str] = []
    spec = one_stem.data
    digits = load(spec.name, train=spec.train, validation=spec.validation, test=spec.test)
    place = Workplace(None, None, tmp_path / "teachers", tmp_path / "checkpoints")
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        made = Driver(plan(one_stem, digits.digest), "r", tmp_path, ledger, place, cpus=1.0, gpus=0.25, say=said.append)
        run_in_process(made, place)
    rows = made.rows.values()
    assert [row["error"] for row in rows if row["status"] not in ("completed", "stopped")] == []
    assert {(row["device"], row["gpu_fraction"]) for row in rows if row["attempts"]} == {("simulated device", 0.25)}
    assert len([sentence for sentence in said if sentence.startswith("warning: a training step cannot be")]) == 1


@pytest.mark.slow
def test_removing_any_move_to_the_device_is_detected() -> None:
    """Tries about 40 moves, each in a separate process. This takes eight minutes."""
    done = subprocess.run([sys.executable, str(Path(__file__).parents[1] / "moves.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\nnoticed  ") >= 30

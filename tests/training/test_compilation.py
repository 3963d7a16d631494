"""Compiled parts of a step: equal up to rounding, tried before use, and dropped if they fail."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout

from placement import METHODS, pupil
from trials import CPU, distilling, exact, run, trial
from tune_kd.data.datasets import DataSet
from tune_kd.training import compilation, notices, step as stepping
from tune_kd.training.compilation import Compiled, Function, compiling_pays
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = ("views",)  # with two views, dropout and a memory; the others take as long


@pytest.fixture(autouse=True)
def _nothing_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "given_up", set())
    monkeypatch.setattr(notices, "_told", set())
    notices.take()


class Compiler:
    """Returns functions uncompiled, and counts the calls by batch size. Fails for functions whose name matches
    `refuses`."""

    def __init__(self, refuses: str | None = None, error: Exception | None = None) -> None:
        self.sizes: list[int] = []
        self.refused = 0
        self.refuses, self.error = refuses, error or RuntimeError("no compiler\nand more")

    def __call__(self, function: Function, **options: Any) -> Function:
        name = getattr(getattr(function, "func", function), "__name__", "")

        def compiled(*inputs: Any) -> Any:
            if self.refuses is not None and self.refuses in name:
                self.refused += 1
                raise self.error
            images = next(each for each in inputs if isinstance(each, torch.Tensor | list))
            self.sizes.append(len(images[0] if isinstance(images, list) else images))
            return function(*inputs)

        return compiled


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make compilation pay on the CPU, too, and keep the numbers of a step in tensors as on a GPU."""
    monkeypatch.setattr(stepping, "compiling_pays", lambda *_: True)
    monkeypatch.setattr(Step, "_number", lambda self, value: torch.tensor(value))


def trained(method: str, pixels: DataSet, teacher: Teacher, folder: Path) -> tuple[list[float], str | None]:
    """Losses and fast paths of a short trial."""
    stepping._idle.clear()
    taught = None if method == "none" else teacher
    rows = run(pupil(method, "cifar", taught), pixels, taught, folder)
    assert rows[-1].outcome is not None
    return [row.train_loss for row in rows], rows[-1].outcome.fast_paths


def paths(method: str) -> str:
    """The fast paths of a method's trial on the CPU if all of them work."""
    runs_teacher = method not in ("none", "logit", "dkd", "ctkd")
    return ", ".join(["compiled", *["compiled loss"] * (method != "none"), *["compiled teacher"] * runs_teacher])


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(
    "method", [*MIXED, *(pytest.param(each, marks=pytest.mark.slow) for each in METHODS if each not in MIXED)]
)
def test_forward_pass_and_loss_of_each_method_trace_to_one_graph_with_the_same_losses(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trace function and gradients as for a GPU, then run them with PyTorch's own kernels."""
    traced = lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")  # noqa: E731
    monkeypatch.setattr(stepping, "compiled", traced)
    found, used = trained(method, pixels, teacher, tmp_path / "compiled")
    assert (used, notices.take()) == (paths(method), [])
    monkeypatch.setattr(stepping, "compiling_pays", lambda *_: False)
    expected, _ = trained(method, pixels, teacher, tmp_path / "plain")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("pays")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("method", ["feature", "crd"])
def test_compiled_code_gives_the_same_losses_up_to_rounding(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, used = trained(method, pixels, teacher, tmp_path / "compiled")
    assert (used, notices.take()) == (paths(method), [])
    monkeypatch.setattr(stepping, "compiling_pays", lambda *_: False)
    expected, _ = trained(method, pixels, teacher, tmp_path / "plain")
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_trial_has_the_same_losses_and_the_next_trial_does_not_compile_again(
    pixels: DataSet, tmp_path: Path
) -> None:
    compiled = replace(trial("none"), recipe=replace(trial("none").recipe, compile=True))
    plain, fast = run(trial("none"), pixels, None, tmp_path / "a"), run(compiled, pixels, None, tmp_path / "b")
    assert [row.train_loss for row in fast] == pytest.approx([row.train_loss for row in plain], rel=1e-3)
    assert fast[0].seconds > 10 * plain[0].seconds
    again = run(replace(compiled, seed=2), pixels, None, tmp_path / "c")
    assert again[0].seconds < 0.1 * fast[0].seconds  # it reused the compiled step


@pytest.mark.parametrize("method", ["none", "feature"])
def test_trying_compiled_code_changes_no_result_and_only_full_batches_are_compiled(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = teacher if method == "feature" else None
    plain = distilling(method, teacher) if taught else trial(method)
    expected = run(plain, pixels, taught, tmp_path / "plain")
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    asked = replace(plain, recipe=replace(plain.recipe, compile=True))
    found = run(asked, pixels, taught, tmp_path / "compiled")
    assert [exact(row, "fast_paths") for row in found] == [exact(row, "fast_paths") for row in expected]
    assert found[-1].outcome is not None and found[-1].outcome.fast_paths == "compiled"
    # 40 images make batches of 16, 16 and 8. If the recipe asks for compilation, only the student is compiled.
    assert compiler.sizes == [16] * (1 + 2 * plain.recipe.epochs)


@pytest.mark.usefixtures("pays")
def test_trying_compiled_code_does_not_change_the_random_numbers(
    pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", Compiler())
    found, used = trained("views", pixels, teacher, tmp_path / "tried")
    monkeypatch.setattr(stepping, "compiling_pays", lambda *_: False)
    assert (found, used) == (trained("views", pixels, teacher, tmp_path / "plain")[0], paths("views"))


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(
    ("refuses", "used", "told"),
    [
        ("_pass", "compiled, compiled teacher", ["a student with the loss feature"]),
        ("passed", "compiled, compiled loss", ["a teacher"]),
        ("", None, ["a teacher", "a student with the loss feature", "a student"]),
    ],
)
def test_a_part_that_cannot_be_compiled_is_reported_once_and_the_rest_is_compiled(
    refuses: str, used: str | None, told: list[str], pixels: DataSet, teacher: Teacher, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compiler = Compiler(refuses)
    monkeypatch.setattr(torch, "compile", compiler)
    first = trained("feature", pixels, teacher, tmp_path / "one")
    assert first[1] == used
    assert notices.take() == [
        f"{what} cannot be compiled here (no compiler); falling back to a slower path" for what in told
    ]
    assert trained("feature", pixels, teacher, tmp_path / "other") == first
    assert compiler.refused == len(told), "what failed is not tried again"
    assert notices.take() == []
    if told == ["a student with the loss feature"]:
        monkeypatch.setattr(torch, "compile", Compiler())
        assert trained("logit", pixels, teacher, tmp_path / "logit")[1] == "compiled, compiled loss"


@pytest.mark.usefixtures("pays")
def test_a_compiler_that_runs_out_of_memory_raises_so_that_the_trial_gets_a_larger_share(
    pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", Compiler("", torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trained("none", pixels, teacher, tmp_path)
    assert notices.take() == []


def test_a_recipe_that_requests_compilation_raises_without_a_compiler(
    pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", Compiler(""))
    asked = replace(trial("none"), recipe=replace(trial("none").recipe, compile=True))
    with pytest.raises(RuntimeError, match="no compiler"):
        run(asked, pixels, None, tmp_path)


def test_a_process_that_trains_many_networks_compiles_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile leaves a function uncompiled once it has compiled too many forms of it."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, dynamic=False, backend=backend))
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    for name, limit in zip(("recompile_limit", "accumulated_recompile_limit"), limits, strict=True):
        monkeypatch.setattr(torch._dynamo.config, name, limit)
    for size in range(1, 13):
        compilation.compiled(torch.nn.Linear(size, 1).forward)(torch.ones(1, size))
    assert len(graphs) == 12


@pytest.mark.parametrize(
    ("device", "precision", "images", "pays"),
    [("cuda", "bfloat16", 10**6, True), ("cuda", "tf32", 10**6, True), ("cuda", "float32", 10**6, False),
     ("cuda", "bfloat16", 10**6 - 1, False), ("cpu", "bfloat16", 10**6, False)],
)  # fmt: skip
def test_compilation_pays_on_a_gpu_in_reduced_precision_from_a_million_images(
    device: str, precision: str, images: int, pays: bool
) -> None:
    assert compiling_pays(images, precision, torch.device(device)) == pays


def test_only_one_process_at_a_time_compiles_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with compilation._first("one network"):
        (lock,) = (tmp_path / "cache").iterdir()
        with pytest.raises(Timeout), FileLock(lock, timeout=0):
            pass
        with compilation._first("another"):
            assert len(list((tmp_path / "cache").iterdir())) == 2


def test_trying_compiled_code_restores_buffers_parameters_and_the_random_state() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(1)
    with compilation._unchanged([net], CPU):
        compilation._pass(net, (torch.randn(4, 2),))
        torch.nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(each.grad is None for each in net.parameters())

"""The benchmarks: baselines, paired measurements, failures, time limits and processes."""

import json
import operator
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench import epoch
from benchmarks import __main__ as command, gpu, levers
from benchmarks.gpu import floor
from benchmarks.measure import NOT_MEASURED, Measure, Result, Side, attempted, pairs, result
from benchmarks.plain import train_plain
from benchmarks.runs import clocked
from benchmarks.steps import cell, digits_as_cifar, ours
from benchmarks.workers import Budget, Failed, Pool, pool
from placement import Here, processes_here
from trials import trial
from tune_kd.data import datasets
from tune_kd.data.augment import draw_views
from tune_kd.data.datasets import DataSet
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.trial import Epoch, Trial
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

CPU = torch.device("cpu")


def test_the_plain_loop_trains_to_the_same_accuracy() -> None:
    """Same network and recipe, other random numbers: the two differ in speed, not in what they learn."""
    digits, recipe = datasets.load("digits", train=500), Recipe(epochs=8, batch_size=32, lr=0.1)
    each = Cell(method="none", stem="cifar", width=0.125, teacher=None, temperature=None, alpha=None, beta=None)
    plain = [row.val_accuracy for row in train_plain("resnet18", each, recipe, digits, seed=1, device=CPU)]
    trial = Trial("none", "confirm", each, recipe, 1, Data("digits"), None, "test")
    rows = train(trial, digits, None, device=CPU, checkpoints=Checkpoints(Path("unused")), checkpoint_every=1e9)
    mine = [next(rows).val_accuracy for _ in range(7)]
    assert max(plain) > 0.85
    assert max(plain) == pytest.approx(max(mine), abs=0.08)


@pytest.mark.parametrize("method", ["logit", "feature"])
def test_the_plain_loop_runs_its_teacher_in_every_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import plain

    digits = datasets.load("digits", train=60, validation=20)
    teacher = plain.networks.build("resnet50", stem="cifar", classes=10, width=0.0625, seed=0).eval()
    passes = []
    teacher.conv1.register_forward_hook(lambda *_: passes.append(1))
    rows = train_plain(
        "resnet18", cell(method, "cifar", 0.0625), Recipe(epochs=2, batch_size=16), digits,
        seed=1, device=CPU, teacher=teacher,
    )  # fmt: skip
    assert [row.train_loss > 0 for row in rows] == [True, True]
    assert len(passes) == 2 * 4


def test_a_live_teacher_and_cached_logits_give_the_same_losses_up_to_rounding() -> None:
    recipe = Recipe(epochs=10, batch_size=16)
    some = partial(ours, "logit", "cifar", 0.0625, images=32, recipe=recipe, device=CPU)
    ready, live = some(answered=2), some(live=True)
    for _ in range(2):
        cached, computed = next(ready), next(live)
        assert cached.views_answered == 0
        assert computed.views_answered is None
        assert cached.loss_kd == pytest.approx(computed.loss_kd, rel=1e-3)


def test_digits_are_enlarged_to_the_shape_of_cifar() -> None:
    enlarged, digits = digits_as_cifar(20), datasets.load("digits")
    assert enlarged.train.images.shape == (20, 3, 32, 32)
    assert torch.equal(enlarged.train.images[:, :, ::4, ::4], digits.train.images[:20])
    assert enlarged.views_per_image == 162


def sleeper(seconds: float) -> Measure:
    def measure() -> float:
        time.sleep(seconds)
        return seconds

    return measure


def process_id() -> Measure:
    return lambda: float(os.getpid())


def failing() -> Measure:
    raise ValueError("no such thing")


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_a_ratio_of_seconds_is_the_median_over_pairs(together: bool) -> None:
    sides = Side("a", sleeper, (0.02,)), Side("b", sleeper, (0.01,))
    found = pairs("r", *sides, 3, unit="s", bar=">= 1.9", together=together)
    assert (found.figure, found.n, found.met) == (2.0, 3, True)
    assert "a 0.02, b 0.01 s" in found.detail


def test_a_ratio_is_the_median_and_is_compared_with_its_bar() -> None:
    assert result("r", [1.0, 3.0, 2.0]).figure == 2.0
    assert result("r", [1.0, 3.0, 2.0], bar="<= 1.5").met is False
    assert result("r", [1.0]).met is None


@pytest.mark.slow  # each process imports torch
def test_two_sides_run_in_one_process_or_in_one_each() -> None:
    side = Side("pid", process_id)
    found = pairs("r", side, side, 3, unit="", bar="<= 1", together=True)
    assert (found.figure, found.n, found.met) == (1.0, 3, True)
    assert pairs("r", side, side, 1, unit="", bar="").figure != 1.0


def test_calls_are_timed_only_within_the_context() -> None:
    class Work:
        def do(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    with clocked((Work, "do")) as spent:
        assert Work().do(0.01) == 0.01
        Work().do(0.02)
    Work().do(0.0)
    assert len(spent) == 2
    assert spent[0] >= 0.01
    assert spent[1] >= 0.02


def test_a_side_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="no such thing"):
        pairs("r", Side("a", failing), Side("b", sleeper, (0.01,)), 1, unit="s", bar="")


def test_the_floor_of_a_control_is_150_tflop_an_epoch() -> None:
    assert floor("none", "cifar", 1e12) == pytest.approx(150, rel=0.01)
    assert floor("feature", "cifar", 1e12) - floor("none", "cifar", 1e12) == pytest.approx(
        2 * 1.3e9 * 45e3 / 1e12, rel=0.01
    )


def test_a_row_that_fails_is_reported_and_the_next_one_is_measured() -> None:
    def broken() -> Result:
        raise ValueError("no kernel image\nis available")

    first, second, third = attempted([("a", broken), ("b", lambda: result("b", [1.0])), ("c", broken)])
    assert (first.error, first.met, first.name) == ("ValueError: no kernel image", False, "a")
    assert (second.figure, second.error, third.name) == (1.0, "", "c")


def test_rows_that_failed_are_named_at_the_end_and_in_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Result:
        raise RuntimeError("out of luck")

    rows = [("first", broken), ("second", lambda: result("second", [2.0], unit="s"))]
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda count: attempted(rows))
    app = typer.Typer()
    app.command()(command.main)
    outcome = CliRunner().invoke(app, ["gpu", "--json"])
    assert outcome.exit_code == 1
    first, second = map(json.loads, outcome.stdout.splitlines())
    assert (first["figure"], first["error"], second["figure"]) == (None, "RuntimeError: out of luck", 2.0)
    assert outcome.stderr.rstrip().endswith("1 of 2 rows failed:\n  first: RuntimeError: out of luck")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rows_that_a_budget_has_no_time_for_are_named_and_not_measured() -> None:
    clock = Clock()
    budget = Budget(10.0, clock)

    def taking(name: str, seconds: float) -> Result:
        clock.now += seconds
        return result(name, [seconds])

    def hanging() -> Result:
        clock.now += budget.left
        raise TimeoutError("no answer within 2 s")

    rows = [("a", lambda: taking("a", 8.0)), ("b", hanging), ("c", lambda: taking("c", 1.0))]
    a, b, c = attempted(rows, budget)
    assert (a.figure, a.error) == (8.0, "")
    assert [(each.name, each.error, each.n) for each in (b, c)] == [("b", NOT_MEASURED, 0), ("c", NOT_MEASURED, 0)]
    assert clock.now == 110.0, "nothing was measured after the time limit"


def test_rows_that_were_not_measured_are_named_at_the_end_and_are_no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("first", lambda: result("first", [2.0], unit="s")), ("second", lambda: result("second", [2.0], unit="s"))]
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda count: attempted(rows, Budget(-1.0)))
    app = typer.Typer()
    app.command()(command.main)
    outcome = CliRunner().invoke(app, ["gpu"])
    assert outcome.exit_code == 1 and "failed" not in outcome.output
    assert outcome.output.rstrip().endswith(
        "2 of 2 rows were not measured, since the time limit was reached:\n  first\n  second"
    )


def test_a_process_that_hangs_dies_or_raises_is_replaced_and_the_others_answer() -> None:
    """None of these functions imports torch, which takes seconds."""
    with pool(Budget(60.0)) as processes:
        assert processes.ask(operator.add, {0: (1, 2), 1: (3, 4)}, 30.0) == {0: 3, 1: 7}
        first = processes.ask(os.getpid, {0: (), 1: (), 2: ()}, 30.0)
        slept = processes.ask(time.sleep, {0: (60.0,), 1: (0.0,)}, 0.5)
        assert isinstance(slept[0], TimeoutError) and slept[1] is None
        (raised,) = processes.ask(operator.truediv, {1: (1, 0)}, 30.0).values()
        assert isinstance(raised, Failed) and str(raised) == "ZeroDivisionError: division by zero"
        (died,) = processes.ask(os._exit, {2: (3,)}, 30.0).values()
        assert isinstance(died, Failed) and str(died) == "its process died with exit status 3"
        second = processes.ask(os.getpid, {0: (), 1: (), 2: ()}, 30.0)
        assert not set(first.values()) & set(second.values()) and os.getpid() not in first.values()
        assert processes.ask(os.getpid, {0: (), 1: (), 2: ()}, 30.0) == second
    assert not any(map(psutil.pid_exists, [*first.values(), *second.values()]))


def test_no_process_is_waited_for_longer_than_the_budget() -> None:
    """Several processes share that time."""
    clock, waits = Clock(), []

    class Slow(Here):
        def answer(self, seconds: float) -> None:
            waits.append(seconds)
            clock.now += 2.0

    for seconds, most in ((30.0, 7.0), (2.5, 2.5)):
        Pool(Budget(7.0, clock), Slow).ask(os.getpid, {0: (), 1: ()}, seconds)
        assert waits[-2:] == [most, most - 2.0]


def test_temporary_files_of_a_process_are_removed_with_its_pool() -> None:
    with pool(Budget(60.0)) as processes:
        folder = processes.ask(tempfile.mkdtemp, {0: ()}, 30.0)[0]
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


def test_a_process_is_prepared_once_and_again_after_a_failure() -> None:
    asked: list[int] = []

    def ready(number: int) -> int:
        asked.append(number)
        if number == 3:
            raise ValueError("out of memory")
        return 10 * number

    with processes_here(Budget(60.0)) as processes:
        assert processes.prepare(ready, {0: (1,), 1: (2,)}, 1.0) == {0: 10, 1: 20}
        assert processes.prepare(ready, {0: (1,), 1: (2,), 2: (1,)}, 1.0) == {0: 10, 1: 20, 2: 10}
        assert asked == [1, 2, 1]
        found = processes.prepare(ready, {0: (1,), 1: (3,)}, 1.0)
        assert found[0] == 10 and str(found[1]) == "ValueError: out of memory"
        assert processes.prepare(ready, {1: (2,)}, 1.0) == {1: 20} and asked[-1] == 2, "a new process is not prepared"


@pytest.fixture
def fake_levers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Replace the training of levers by fakes, and return the list of their calls."""
    done: list[tuple[str, object]] = []

    def prepare(lever: levers.Lever) -> levers.Ready:
        done.append(("prepare", lever.name))
        if lever.triton:
            raise RuntimeError("an illegal memory access was encountered")
        return levers.Ready(128 * lever.students * lever.steps, "one graph")

    def timed(calls: int, repeats: int) -> list[float]:
        done.append(("timed", calls))
        return [0.002 * calls] * repeats

    @contextmanager
    def under_mps(wanted: bool) -> Iterator[None]:
        done.append(("mps", wanted))
        yield

    for each in (prepare, timed, under_mps):
        monkeypatch.setattr(levers, each.__name__, each)
    monkeypatch.setattr(levers, "serves", lambda: ("mps", True) in done)
    return done


def test_a_lever_that_fails_is_reported_and_all_are_prepared_before_one_is_timed(
    fake_levers: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = (levers.Lever(), levers.Lever(triton=True), levers.Lever(students=4, compiled=True))
    monkeypatch.setattr(levers, "LEVERS", tried)
    monkeypatch.setattr(levers, "BESIDE", ())
    budget = Budget(60.0)
    control, triton, four = attempted(levers.rows(budget, processes_here), budget)
    assert control.figure == pytest.approx(0.002 * 45_000 / 128) and (control.n, control.unit) == (3, "s")
    assert (triton.name, triton.error) == ("alone: control, Triton norm",
                                           "RuntimeError: an illegal memory access was encountered")  # fmt: skip
    assert four.figure == pytest.approx(0.002 * 45_000 / (128 * 4))
    assert four.name == "together: control, compiled, 4 students in one graph"
    ready = [("prepare", each.name) for each in tried]
    assert fake_levers[:5] == [*ready, ("timed", 60), ("timed", 15)]


def test_concurrent_processes_are_measured_with_and_without_mps_and_a_row_says_what_failed(
    fake_levers: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levers, "LEVERS", ())
    budget = Budget(60.0)
    found = list(attempted(levers.rows(budget, processes_here), budget))
    counts = [int(each.name.partition(" ")[0]) for each in found]
    assert counts == [8, 4, 2, 1, 4, 2, 1] * 4 and len({each.name for each in found}) == 28
    assert {each.name.partition(":")[0].partition(", ")[2] for each in found} == {"MPS", "no MPS"}
    assert [each.error for each in found] == [""] * 14 + ["RuntimeError: an MPS already serves the GPU"] * 14
    assert [name for name, _ in fake_levers].count("prepare") == 8 + 4 + 8 + 4, (
        "each lever is prepared once in a process"
    )


def test_the_table_of_a_gpu_has_the_bars_of_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_epoch(number: int, seconds: float = 1.0) -> Epoch:
        return replace(epoch(number), seconds=seconds, images_per_second=45_000 / 0.5, answer_seconds=0.25)

    monkeypatch.setattr(gpu, "begin", lambda training: gpu.First(2.5, 9.0, ["a step cannot be captured"]))
    monkeypatch.setattr(gpu, "go_on", lambda count: [fake_epoch(number) for number in range(count)])
    monkeypatch.setattr(gpu, "rates", lambda: (8e14, 3e12))
    monkeypatch.setattr(gpu, "serves", lambda: True)
    monkeypatch.setattr(gpu, "plain_control", lambda: 4.0)
    budget = Budget(60.0)
    found = {each.name: each for each in attempted(gpu.rows(7, budget, processes_here), budget)}
    assert [each.error for each in found.values() if each.error] == []
    assert {name: (each.bar, each.figure) for name, each in found.items() if each.bar} == {
        "epoch, control, CIFAR stem": ("<= 0.95", 0.5),
        "epoch, feature, CIFAR stem": ("<= 1.8", 0.5),
        "epoch, ResNet-50 teacher in training, CIFAR stem": ("<= 2.8", 0.5),
        "epoch amortised over 4 concurrent trials, control, CIFAR stem": ("<= 0.8", 0.125),
        "epoch amortised over 8 concurrent trials, control, ImageNet stem": ("<= 0.2", 0.0625),
        gpu.ANSWERS: ("<= 0.5", 0.25),
        gpu.LATER: ("<= 2", 1.5),
    }
    assert found["first epoch of a first process, control, CIFAR stem"].figure == 2.5
    assert "cannot be captured" in found["first epoch of a first process, control, CIFAR stem"].detail
    assert found["matrix rate, bfloat16"].figure == 800.0
    assert "floor of the training 0.19 s" in found["epoch, control, CIFAR stem"].detail


def test_without_a_gpu_a_line_says_so_and_levers_are_only_allowed_with_gpu() -> None:
    app = typer.Typer()
    app.command()(command.main)
    none = CliRunner().invoke(app, ["gpu", "--levers"])
    assert "gpu: no GPU found; run on a machine with one: python -m benchmarks gpu --levers" in none.stderr
    other = CliRunner().invoke(app, ["report", "--levers"])
    assert (
        other.exit_code == 2
        and other.stderr == "benchmarks: --levers is given with NAME report; allowed: only with gpu\n"
    )


def test_a_scaled_loss_trains_as_a_plain_one_and_products_are_in_float16(pixels: DataSet) -> None:
    """A scale that is a power of two changes no bit of float32. Clipping gets the gradients without the scale."""
    one = Trial("none", "confirm", cell("none", "cifar", 0.0625), Recipe(epochs=1, batch_size=16, clip=0.5), 1,
                Data("digits"), None, "test")  # fmt: skip
    views = draw_views(1, 1, 16, pad=1, flip=True)
    trained = []
    for around in (nullcontext(), levers.in_float16(1024.0)):
        step = Step(one, pixels, None, CPU)
        step.train()
        with around:
            step(views, None)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                product = torch.ones(2, 2) @ torch.ones(2, 2)
        trained.append([*step.student.state_dict().values(), step.sums])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    assert float(trained[0][-1][4]) > 0.5 and product.dtype == torch.float16


def weights_of(
    method: str, teacher: Teacher, data: DataSet, groups: int, monkeypatch: pytest.MonkeyPatch, shared: bool = False
) -> list[Tensor]:
    """Return the weights of two students after two steps, in `groups` calls of the function that a graph captures."""
    monkeypatch.setattr(levers.Branches, "run", lambda self, tasks: [each() for each in tasks])
    views = draw_views(1, 1, 40, pad=data.pad, flip=data.flip)
    parts = [(each.order, each.top, each.left, each.flip) for each in (views[:16], views[16:32])]
    taught = teacher if method != "none" else None
    one = trial(method, teacher_id=taught.teacher_id if taught else None)
    one = replace(one, recipe=replace(one.recipe, precision="bfloat16"))
    students = [Step(replace(one, seed=seed), data, taught, CPU) for seed in (1, 2)]
    sharing = levers.Sharing(teacher, False) if shared else None
    for each in students:
        each._taught = sharing or each._taught
        each.train()
    for group in range(groups):
        inputs = [part for each in parts[group * 2 // groups : (group + 1) * 2 // groups] for part in each]
        levers._trained(students, sharing, levers.Branches(CPU), *inputs)
    return [tensor for each in students for tensor in each.student.state_dict().values()]


def test_several_steps_in_a_graph_train_as_one_after_another(
    pixels: DataSet, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = (weights_of("none", teacher, pixels, groups, monkeypatch) for groups in (1, 2))
    assert all(map(torch.equal, found, expected))


def test_students_that_share_their_teachers_pass_train_as_those_that_do_not(
    pixels: DataSet, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = (weights_of("feature", teacher, pixels, 2, monkeypatch, shared) for shared in (True, False))
    assert all(map(torch.equal, found, expected))


def test_students_on_branches_wait_for_what_came_before_and_not_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "main" if name == "main" else f"branch {len(made)}"
            made.append(self)

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

    made: list[Stream] = []
    main = Stream("main")
    monkeypatch.setattr(levers.Captured, "given_up", set())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    branches = levers.Branches(torch.device("cuda"))
    for _ in range(2):
        branches.run([lambda: events.append("one trains"), lambda: events.append("two trains")])
    assert events == 2 * [
        "branch 1 waits for main", "branch 2 waits for main", "one trains", "two trains",
        "main waits for branch 1", "main waits for branch 2",
    ]  # fmt: skip
    assert len(made) == 3, "the same streams each time"

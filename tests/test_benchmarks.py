"""The benchmarks measure what they say: a fair yardstick, honest pairs, real work on both sides."""

import json
import os
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import __main__ as command, gpu
from benchmarks.gpu import floor
from benchmarks.measure import Measure, Result, Side, attempted, pairs, result
from benchmarks.plain import train_plain
from benchmarks.runs import clocked
from benchmarks.steps import cell, digits_as_cifar, ours
from tune_kd.data import datasets
from tune_kd.study.spec import Cell, Data, Recipe
from tune_kd.study.trial import Trial
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train

CPU = torch.device("cpu")


def test_the_plain_loop_trains_to_the_same_accuracy() -> None:
    """Same network, same recipe, other draws: what separates the two is speed and not what is learned."""
    digits, recipe = datasets.load("digits", train=500), Recipe(epochs=8, batch_size=32, lr=0.1)
    each = Cell(method="none", stem="cifar", width=0.125, teacher=None, temperature=None, alpha=None, beta=None)
    plain = [row.val_accuracy for row in train_plain("resnet18", each, recipe, digits, seed=1, device=CPU)]
    trial = Trial("none", "confirm", each, recipe, 1, Data("digits"), None, "test")
    rows = train(trial, digits, None, device=CPU, checkpoints=Checkpoints(Path("unused")), checkpoint_every=1e9)
    mine = [next(rows).val_accuracy for _ in range(7)]
    assert max(plain) > 0.85
    assert max(plain) == pytest.approx(max(mine), abs=0.08)


@pytest.mark.parametrize("method", ["logit", "feature"])
def test_the_plain_loop_asks_its_teacher_in_every_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import plain

    digits = datasets.load("digits", train=60, validation=20)
    teacher = plain.networks.build("resnet50", stem="cifar", classes=10, width=0.0625, seed=0).eval()
    asked = []
    teacher.conv1.register_forward_hook(lambda *_: asked.append(1))
    rows = train_plain(
        "resnet18", cell(method, "cifar", 0.0625), Recipe(epochs=2, batch_size=16), digits,
        seed=1, device=CPU, teacher=teacher,
    )  # fmt: skip
    assert [row.train_loss > 0 for row in rows] == [True, True]
    assert len(asked) == 2 * 4


def test_a_live_teacher_and_ready_answers_give_the_same_losses_to_rounding() -> None:
    recipe = Recipe(epochs=10, batch_size=16)
    some = partial(ours, "logit", "cifar", 0.0625, images=32, recipe=recipe, device=CPU)
    ready, live = some(answered=2), some(live=True)
    for _ in range(2):
        one, other = next(ready), next(live)
        assert one.views_answered == 0
        assert other.views_answered is None
        assert one.loss_kd == pytest.approx(other.loss_kd, rel=1e-3)


def test_digits_take_the_form_of_cifar() -> None:
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


def test_a_ratio_is_the_median_and_is_held_against_its_bar() -> None:
    assert result("r", [1.0, 3.0, 2.0]).figure == 2.0
    assert result("r", [1.0, 3.0, 2.0], bar="<= 1.5").met is False
    assert result("r", [1.0]).met is None


@pytest.mark.slow  # each process imports torch
def test_sides_have_a_process_each_or_one_together() -> None:
    side = Side("pid", process_id)
    found = pairs("r", side, side, 3, unit="", bar="<= 1", together=True)
    assert (found.figure, found.n, found.met) == (1.0, 3, True)
    assert pairs("r", side, side, 1, unit="", bar="").figure != 1.0


def test_calls_are_clocked_while_asked_for_and_not_after() -> None:
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


def test_a_row_that_fails_is_a_row_and_the_next_one_is_measured() -> None:
    def broken() -> Result:
        raise ValueError("no kernel image\nis available")

    one, other, third = attempted([("a", broken), ("b", lambda: result("b", [1.0])), ("c", broken)])
    assert (one.error, one.met, one.name) == ("ValueError: no kernel image", False, "a")
    assert (other.figure, other.error, third.name) == (1.0, "", "c")


def test_rows_that_failed_are_named_at_the_end_and_in_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Result:
        raise RuntimeError("out of luck")

    rows = [("first", broken), ("second", lambda: result("second", [2.0], unit="s"))]
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda count: attempted(rows))
    app = typer.Typer()
    app.command()(command.main)
    ended = CliRunner().invoke(app, ["gpu", "--json"])
    assert ended.exit_code == 1
    first, second = map(json.loads, ended.stdout.splitlines())
    assert (first["figure"], first["error"], second["figure"]) == (None, "RuntimeError: out of luck", 2.0)
    assert ended.stderr.rstrip().endswith("1 of 2 rows failed:\n  first: RuntimeError: out of luck")


@pytest.mark.long
def test_a_trial_that_dies_beside_others_is_an_error_and_no_endless_wait() -> None:
    with pytest.raises(RuntimeError, match="one of 2 trials at a time died"):
        gpu._together(2, 0, _dies)


def _dies(share: float, epochs: int, connection: Connection) -> None:
    """Without a word."""

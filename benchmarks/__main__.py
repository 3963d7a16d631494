"""`python -m benchmarks NAME ...`: run benchmarks by name. By default, run all that this machine supports."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import NOT_MEASURED, Result, attempted, machine
from benchmarks.workers import Budget


def step(count: int) -> Iterable[Result]:
    """Compare our training step with the plain loop."""
    from benchmarks import steps

    yield steps.against_plain("imagenet", count)
    yield steps.against_plain("cifar", count)


def answers(count: int) -> Iterable[Result]:
    """Compare logit distillation with its control, and with a teacher that runs in every step."""
    from benchmarks import steps

    yield steps.logit_against_control(0.125, count)
    yield steps.logit_against_control(1.0, count)
    yield steps.live_against_answers(count)


def runs(count: int) -> Iterable[Result]:
    """Measure empty trials, the cost of records, and the whole laptop ablation."""
    from benchmarks import runs

    yield from runs.empty_trials(count)
    yield runs.share_of_records(count)
    yield from runs.laptop_ablation(count)


def large(count: int) -> Iterable[Result]:
    """Measure planning, running, `status` and `report` for 10,000 empty trials."""
    from benchmarks import runs

    yield from runs.large_study(count)


def watching(count: int) -> Iterable[Result]:
    """Compare the laptop ablation with and without metrics and trackers."""
    from benchmarks import runs

    yield from runs.watching(count)


def report(count: int) -> Iterable[Result]:
    """Measure reading and reporting a study of a million epochs."""
    from benchmarks import tables

    yield from tables.large(count)


def gpu(count: int, levers: bool = False) -> Iterable[Result]:
    """Measure seconds per epoch at paper scale on a GPU, for one trial and for several at a time; or measure levers."""
    began = time.monotonic()
    import torch

    from benchmarks import gpu, levers as levers_of_gpu

    if not torch.cuda.is_available():
        again = f"python -m benchmarks gpu{' --levers' if levers else ''}"
        Console(stderr=True).print(f"gpu: no GPU found; run on a machine with one: {again}", highlight=False)
        return
    seconds = levers_of_gpu.SECONDS if levers else gpu.SECONDS
    budget = Budget(seconds - (time.monotonic() - began))
    yield from attempted(levers_of_gpu.rows(budget) if levers else gpu.rows(count, budget), budget)


BENCHMARKS: dict[str, Callable[[int], Iterable[Result]]] = {
    each.__name__: each for each in (step, answers, runs, large, watching, report, gpu)
}


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Benchmarks: {', '.join(BENCHMARKS)}. Default: all.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Measured pairs per ratio. Results are medians.")] = 7,
    levers: Annotated[
        bool,
        typer.Option("--levers", help="With gpu: measure possible speed-ups, alone and combined, instead of its rows."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on standard output, one line per result.")
    ] = False,
) -> None:
    """Run the benchmarks of docs/performance.md on this machine."""
    console = Console(stderr=as_json)
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        _refuse(f"NAME is {', '.join(unknown)}; allowed: {', '.join(BENCHMARKS)}")
    chosen = {name: BENCHMARKS[name] for name in names or BENCHMARKS}
    if levers and "gpu" not in chosen:
        _refuse(f"--levers is given with NAME {', '.join(chosen)}; allowed: only with gpu")
    if levers:
        chosen["gpu"] = partial(gpu, levers=True)
    here = machine(gpu="gpu" in chosen)
    console.print(here, highlight=False, soft_wrap=True)
    results = []
    for measure in chosen.values():
        for result in measure(pairs):
            results.append(result)
            if as_json:
                typer.echo(json.dumps(as_plain(result) | {"met": result.met, "machine": here}))
            console.print(line(result), highlight=False, soft_wrap=True)
    console.print(table(results))
    if failed := [result for result in results if result.error and result.error != NOT_MEASURED]:
        console.print(f"{len(failed)} of {len(results)} rows failed:", highlight=False)
        for result in failed:
            console.print(f"  {result.name}: {result.error}", highlight=False, soft_wrap=True)
    if left := [result.name for result in results if result.error == NOT_MEASURED]:
        console.print(
            f"{len(left)} of {len(results)} rows were not measured, since the time limit was reached:", highlight=False
        )
        for name in left:
            console.print(f"  {name}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(result.met is not False for result in results) else 1)


def _refuse(why: str) -> NoReturn:
    Console(stderr=True).print(f"benchmarks: {why}", highlight=False)
    raise typer.Exit(2)


def as_plain(result: Result) -> dict[str, Any]:
    """Return a result as a dict for JSON, with None in place of NaN."""
    return {name: None if value != value else value for name, value in asdict(result).items()}


def line(result: Result) -> str:
    if result.error:
        return f"{result.name}: {result.error if result.error == NOT_MEASURED else f'failed ({result.error})'}"
    return f"{result.name}: {result.figure:.3g} ({result.low:.3g} to {result.high:.3g}, n {result.n}); {result.detail}"


def table(results: list[Result]) -> Table:
    """Return a table of all results and their bars."""
    shown = Table(box=None, header_style="bold")
    for title in ("measure", "median", "lowest", "highest", "n", "bar", ""):
        shown.add_column(title, justify="left" if title in ("measure", "bar", "") else "right")
    for each in results:
        if each.error:
            shown.add_row(each.name, "", "", "", "0", each.bar, "" if each.error == NOT_MEASURED else "failed")
            continue
        verdict = {True: "met", False: "not met", None: ""}[each.met]
        figures = (f"{value:.3g}{' ' + each.unit if each.unit else ''}" for value in (each.figure, each.low, each.high))
        shown.add_row(each.name, *figures, str(each.n), each.bar, verdict)
    return shown


if __name__ == "__main__":
    typer.run(main)

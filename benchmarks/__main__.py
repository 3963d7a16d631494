"""`python -m benchmarks NAME ...`: run benchmarks by name, or all that this machine can run."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result, attempted, machine


def step(count: int) -> Iterable[Result]:
    """Our training step against the plain loop."""
    from benchmarks import steps

    yield steps.against_plain("imagenet", count)
    yield steps.against_plain("cifar", count)


def answers(count: int) -> Iterable[Result]:
    """Logit distillation against its control, and against a teacher that is asked in every step."""
    from benchmarks import steps

    yield steps.logit_against_control(0.125, count)
    yield steps.logit_against_control(1.0, count)
    yield steps.live_against_answers(count)


def runs(count: int) -> Iterable[Result]:
    """Empty trials, the cost of records, and the whole laptop ablation."""
    from benchmarks import runs

    yield from runs.empty_trials(count)
    yield runs.share_of_records(count)
    yield from runs.laptop_ablation(count)


def large(count: int) -> Iterable[Result]:
    """Plan, run, look at and report 10,000 empty trials."""
    from benchmarks import runs

    yield from runs.large_study(count)


def watching(count: int) -> Iterable[Result]:
    """The laptop ablation with metrics and trackers, and without."""
    from benchmarks import runs

    yield from runs.watching(count)


def report(count: int) -> Iterable[Result]:
    """Reading and reporting a study of a million epochs."""
    from benchmarks import tables

    yield from tables.large(count)


def gpu(count: int) -> Iterable[Result]:
    """Seconds an epoch at paper scale on a GPU, against the plain loop and the floor, alone and packed."""
    import torch

    from benchmarks import gpu

    if not torch.cuda.is_available():
        Console(stderr=True).print("gpu: no GPU here; on a machine with one: python -m benchmarks gpu", highlight=False)
        return
    yield from attempted(gpu.rows(count))


def levers(count: int) -> Iterable[Result]:
    """What might make training on a GPU faster, and is not in tune_kd before a GPU has shown it."""
    import torch

    from benchmarks import levers

    if not torch.cuda.is_available():
        Console(stderr=True).print("levers: no GPU here; with one: python -m benchmarks levers", highlight=False)
        return
    yield from attempted(levers.rows())


BENCHMARKS: dict[str, Callable[[int], Iterable[Result]]] = {
    each.__name__: each for each in (step, answers, runs, large, watching, report, gpu, levers)
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(BENCHMARKS)}; all by default.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs a ratio; figures are medians.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a figure, on standard output.")] = False,
) -> None:
    """Measure on this machine what docs/performance.md tells of."""
    console = Console(stderr=as_json)
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        Console(stderr=True).print(
            f"benchmarks: NAME is {', '.join(unknown)}; allowed: {', '.join(BENCHMARKS)}", highlight=False
        )
        raise typer.Exit(2)
    console.print(machine(), highlight=False, soft_wrap=True)
    results = []
    for name in names or BENCHMARKS:
        for result in BENCHMARKS[name](pairs):
            results.append(result)
            if as_json:
                typer.echo(json.dumps(as_plain(result) | {"met": result.met, "machine": machine()}))
            console.print(line(result), highlight=False, soft_wrap=True)
    console.print(table(results))
    if failed := [result for result in results if result.error]:
        console.print(f"{len(failed)} of {len(results)} rows failed:", highlight=False)
        for result in failed:
            console.print(f"  {result.name}: {result.error}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(result.met is not False for result in results) else 1)


def as_plain(result: Result) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return {name: None if value != value else value for name, value in asdict(result).items()}


def line(result: Result) -> str:
    if result.error:
        return f"{result.name}: failed ({result.error})"
    return f"{result.name}: {result.figure:.3g} ({result.low:.3g} to {result.high:.3g}, n {result.n}); {result.detail}"


def table(results: list[Result]) -> Table:
    """All figures with their bars."""
    shown = Table(box=None, header_style="bold")
    for title in ("measure", "median", "lowest", "highest", "n", "bar", ""):
        shown.add_column(title, justify="left" if title in ("measure", "bar", "") else "right")
    for each in results:
        if each.error:
            shown.add_row(each.name, "", "", "", "0", each.bar, "failed")
            continue
        verdict = {True: "met", False: "not met", None: ""}[each.met]
        figures = (f"{value:.3g}{' ' + each.unit if each.unit else ''}" for value in (each.figure, each.low, each.high))
        shown.add_row(each.name, *figures, str(each.n), each.bar, verdict)
    return shown


if __name__ == "__main__":
    typer.run(main)

"""Records of a large study: time to read them and to make every table, memory, and size of the page."""

import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.measure import Result, result
from search_spaces.ablation import study
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS
from tune_kd.records.tables import arrow, frame, to_parquet
from tune_kd.study.plan import plan

TRIALS_COUNT, EPOCHS_EACH = 10_000, 100


def write_large(folder: Path) -> None:
    """Write a run's folder with 10,000 confirmed trials over the 14 arms of the ablation, and a million epochs."""
    planned, chance = plan(study(), "0" * 64), np.random.default_rng(0)
    seeds = -(-TRIALS_COUNT // len(planned.arms))
    rows: list[dict[str, Any]] = []
    for number in range(TRIALS_COUNT):
        arm, seed = planned.arms[number % len(planned.arms)], 1 + number // len(planned.arms)
        accuracy = float(0.95 + chance.normal(0, 0.0015))
        rows.append(
            dict.fromkeys(TRIALS.columns)
            | {name: value for name, value in asdict(arm.cell).items() if name in TRIALS.columns}
            | {
                "run": "large", "trial_id": f"{number:016x}", "arm": arm.name, "phase": "confirm", "role": "student",
                "seed": seed, "status": "completed", "epochs_planned": EPOCHS_EACH, "epochs_run": EPOCHS_EACH,
                "test_accuracy_best": accuracy, "test_accuracy": accuracy, "val_accuracy_best": accuracy,
                "val_accuracy": accuracy, "train_seconds": 50.0, "wall_seconds": 55.0, "started": 10.0 * number,
                "gpu_fraction": 0.25, "threads": 1, "host": "one", "agreement": 0.9, "ece": 0.02, "teacher_id": "t",
            }
        )  # fmt: skip
    count = TRIALS_COUNT * EPOCHS_EACH
    epochs = frame(EPOCHS, [])
    columns: dict[str, Any] = {name: pd.Series([None] * count, dtype=kind) for name, kind in epochs.dtypes.items()}
    curve = 0.95 * (1 - np.exp(-np.arange(1, EPOCHS_EACH + 1) / 15))
    columns |= {
        "run": pd.Series(["large"], dtype="string").repeat(count),
        "trial_id": pd.Series([row["trial_id"] for row in rows], dtype="string").repeat(EPOCHS_EACH),
        "epoch": pd.Series(np.tile(np.arange(1, EPOCHS_EACH + 1), TRIALS_COUNT), dtype="Int64"),
        "attempt": pd.Series(np.ones(count), dtype="Int64"),
    }
    for name in ("val_accuracy", "train_accuracy"):
        columns[name] = pd.Series(np.clip(np.tile(curve, TRIALS_COUNT) + chance.normal(0, 0.01, count), 0, 1))
    for name in ("val_loss", "train_loss", "loss_ce", "lr", "grad_norm", "seconds", "images_per_second"):
        columns[name] = pd.Series(chance.random(count))
    large = pd.DataFrame({name: column.reset_index(drop=True) for name, column in columns.items()})[
        list(epochs.columns)
    ]
    wide = pa.Table.from_pandas(large, schema=arrow(EPOCHS, []).schema, preserve_index=False)
    for schema, table in ((TRIALS, arrow(TRIALS, rows)), (EPOCHS, wide), (DECISIONS, arrow(DECISIONS, []))):
        (folder / f"{schema.name}.parquet").write_bytes(to_parquet(table))
    resolved = asdict(study()) | {"confirm": {"seeds": list(range(1, seeds + 1))}}
    record = {
        "run": "large", "study": resolved, "data": {"name": "noise"},
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(record))


def _report(folder: str, pipe: Any) -> None:
    """Read and report. Runs in its own process, so that its peak memory is that of the report alone."""
    from tune_kd import load
    from tune_kd.reporting import report as reporting

    started = time.perf_counter()
    records = load(folder)
    read = time.perf_counter()
    reporting.tables(records)
    tabled = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    page = reporting.report(records, Path(folder, "report"), ["html"])
    pipe.send((read - started, tabled - read, time.perf_counter() - tabled, peak, page.stat().st_size / 1e6))


def large(count: int) -> list[Result]:
    """Measure seconds, memory and the size of the page for a study of 10,000 trials with 100 epochs each."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        write_large(Path(name))
        for _ in range(count):
            here, there = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_report, args=(name, there))
            process.start()
            there.close()
            found.append(here.recv())
            process.join()
    read, tables, page, memory, size = map(list, zip(*found, strict=True))
    both = [one + other for one, other in zip(read, tables, strict=True)]
    first = f"reading {read[0]:.1f} s, tables {tables[0]:.1f} s"
    return [
        result("load and all tables, 10,000 trials x 100 epochs", both, unit="s", bar="<= 5", detail=first),
        result("memory to load and make all tables", memory, unit="GiB", bar="<= 2"),
        result("size of the HTML page", size, unit="MB", bar="<= 5", detail=f"made in {page[0]:.1f} s"),
    ]

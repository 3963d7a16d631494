"""`python -m docs.results [ablation] [tuned] [published=PREFIX]`: reproduce the finished studies in docs/gallery.

The first two train at the scale `laptop`, in a few minutes each, and are the default. `published` reports the tables
PREFIX_trials.parquet and PREFIX_epochs.parquet, which are not in the repository. The summaries go into docs/results.md,
and that of `ablation` also into the README.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import pandas as pd

from docs.blocks import put, table
from tune_kd import load, report
from tune_kd.analysis import contrasts
from tune_kd.analysis.summary import summary
from tune_kd.records.reader import Records
from tune_kd.records.schema import DIGESTS
from tune_kd.system.files import MOST_RECORD_BYTES, read, sealed, unsealed

ROOT = Path(__file__).parents[1]
GALLERY, PAGE = ROOT / "docs" / "gallery", ROOT / "docs" / "results.md"
TABLES = ("trials", "epochs", "decisions")
FIGURES = {"ablation": "effects", "tuned": "effects", "published": "curves"}
PHASES = ("select=screen", "stem_ablation=confirm", "teachers=teacher")  # of the published tables
HOST = "laptop"  # replaces the machine's name


def train(name: str) -> None:
    """Run a study at the scale `laptop`, and store its records without the names of machine and folders."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tune_kd", "run", name, "--scale", "laptop", "--name", name, "--out", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        keep(Path(folder, name), GALLERY / name)


def keep(run: Path, to: Path) -> None:
    """Copy the tables and `study.json` of a run."""
    rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for each in TABLES:
        copyfile(run / f"{each}.parquet", to / f"{each}.parquet")
    trials = pd.read_parquet(to / "trials.parquet")
    trials["host"] = trials["host"].where(trials["host"].isna(), HOST)
    trials.to_parquet(to / "trials.parquet", index=False)
    digests = {
        f"{each}.parquet": [hashlib.sha256((to / f"{each}.parquet").read_bytes()).hexdigest()] for each in TABLES
    }
    (to / DIGESTS).write_bytes(sealed(digests))
    record = unsealed(read(run / "study.json", MOST_RECORD_BYTES), run / "study.json")
    record["machine"]["host"] = HOST
    record["source"] = _renamed(record["source"])
    (to / "study.json").write_bytes(sealed(record))


def _renamed(source: dict[str, Any]) -> dict[str, Any]:
    """The source of a study, with another name for the project's folder."""
    renamed: dict[str, Any] = json.loads(json.dumps(source).replace(f"{ROOT}/", "/tune_kd/"))
    return renamed


def show(name: str, records: Records) -> str:
    """Report a study into the gallery, and return its part of the page."""
    with tempfile.TemporaryDirectory() as folder:
        report(records, folder, ["html", "png"])
        copyfile(Path(folder, "report.html"), GALLERY / name / "report.html")
        copyfile(Path(folder, "figures", f"{FIGURES[name]}.png"), GALLERY / name / "figure.png")
    sentences = summary(records).sentences
    lines = [f"> - {each}" for each in sentences] + [
        *[""] * bool(sentences), f"![The figure of the study {name}](gallery/{name}/figure.png)", "",
        *verdicts(records), f"[The whole report](gallery/{name}/report.html)",
    ]  # fmt: skip
    if name == "ablation":
        put(ROOT / "README.md", "summary", "\n".join(lines[: len(sentences)]) + "\n")
    return "\n".join(lines) + "\n"


def verdicts(records: Records) -> list[str]:
    """The lines of a table of primary contrasts; empty if no study declared any."""
    found = contrasts.contrasts(records)
    primary = found[(found["n"] > 0) & (found["family"] == "primary")].to_dict("records")
    if not primary:
        return []
    rows = [
        [
            str(row["contrast"]), f"{100 * row['estimate']:+.2f}", f"{100 * row['low']:.2f} to {100 * row['high']:.2f}",
            str(row["n"]), "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}",
            f"{row['verdict']}: rules out {row['rules_out']}" if row["rules_out"] else row["verdict"],
        ]
        for row in primary
    ]  # fmt: skip
    return [table(["primary contrast", "difference (points)", "95 % interval", "seeds", "p (Holm)", "verdict"], rows)]


def published(prefix: str) -> Records:
    from tune_kd import Adapter

    (GALLERY / "published").mkdir(parents=True, exist_ok=True)
    return load(prefix, adapt=Adapter(phases=dict(each.split("=") for each in PHASES)))


def main(wanted: list[str]) -> None:
    asked = [each.partition("=")[::2] for each in wanted or ["ablation", "tuned"]]
    if wrong := [name for name, prefix in asked if name not in FIGURES or bool(prefix) != (name == "published")]:
        sys.stderr.write(f"docs.results: NAME is {', '.join(wrong)}; allowed: ablation, tuned, published=PREFIX\n")
        sys.exit(2)
    for name, prefix in asked:
        if not prefix:
            train(name)
        put(PAGE, name, show(name, published(prefix) if prefix else load(GALLERY / name)))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`python -m docs.results [RUN]`: put a laptop run's summary into the README, with its figure and verdicts into
docs/results.md.

It makes a run if none is named.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from docs.blocks import put
from tune_kd import load, report
from tune_kd.analysis import contrasts as results
from tune_kd.analysis.summary import summary

ROOT = Path(__file__).parents[1]
FIGURE = Path("docs/effects.png")


def blocks(run: Path) -> tuple[str, str]:
    """The summary of a run, and the same with its figure, which is put into docs/, and the primary verdicts."""
    records = load(run)
    with tempfile.TemporaryDirectory() as name:
        report(records, name, ["png"])
        (ROOT / FIGURE).write_bytes(Path(name, "figures", "effects.png").read_bytes())
    contrasts = results.contrasts(records)
    judged = contrasts[contrasts["n"] > 0]
    said = "\n".join(f"> - {sentence}" for sentence in summary(records).sentences)
    lines = [
        f"![Effects with 95 % intervals of the laptop run]({FIGURE.name})", "",
        "| primary contrast | difference (points) | 95 % interval | seeds | p (Holm) | verdict |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in judged[judged["family"] == "primary"].to_dict("records"):
        p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
        verdict = row["rules_out"] or row["verdict"]
        lines.append(f"| {row['contrast']} | {100 * row['estimate']:+.2f} | {100 * row['low']:.2f} to "
                     f"{100 * row['high']:.2f} | {row['n']} | {p} | {verdict} |")  # fmt: skip
    return f"{said}\n", "\n".join([said, "", *lines]) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name, "laptop")
        if len(sys.argv) == 1:
            command = [sys.executable, "-m", "tune_kd", "run", "ablation", "--scale", "laptop", "--name", "laptop"]
            subprocess.run([*command, "--out", name], check=True)
        said, shown = blocks(run)
        put(ROOT / "README.md", "summary", said)
        put(ROOT / "docs" / "results.md", "effects", shown)


if __name__ == "__main__":
    main()

"""`python -m docs.readme [RUN]`: put a laptop run's summary, figure and verdicts into the README.

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


def section(run: Path) -> str:
    """The README's lines about a run, whose figure is put into docs/."""
    records = load(run)
    with tempfile.TemporaryDirectory() as name:
        report(records, name, ["png"])
        (ROOT / FIGURE).write_bytes(Path(name, "figures", "effects.png").read_bytes())
    contrasts = results.contrasts(records)
    judged = contrasts[contrasts["n"] > 0]
    lines = [*(f"> - {sentence}" for sentence in summary(records).sentences), ""]
    lines += [f"![Effects with 95 % intervals of the laptop run]({FIGURE})", ""]
    lines += [
        "| primary contrast | difference (points) | 95 % interval | seeds | p (Holm) | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in judged[judged["family"] == "primary"].to_dict("records"):
        p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
        verdict = row["rules_out"] or row["verdict"]
        lines.append(f"| {row['contrast']} | {100 * row['estimate']:+.2f} | {100 * row['low']:.2f} to "
                     f"{100 * row['high']:.2f} | {row['n']} | {p} | {verdict} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name, "laptop")
        if len(sys.argv) == 1:
            command = [sys.executable, "-m", "tune_kd", "run", "ablation", "--scale", "laptop", "--name", "laptop"]
            subprocess.run([*command, "--out", name], check=True)
        put(ROOT / "README.md", "effects", section(run))


if __name__ == "__main__":
    main()

"""`python -m docs.readme [RUN]`: put a laptop run's figure and verdicts into the README; makes one if none is named."""

import subprocess
import sys
import tempfile
from pathlib import Path

from docs.blocks import put
from tune_kd import load, report
from tune_kd.analysis import contrasts as results

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
    lines = [f"![Effects with 95 % intervals of the laptop run]({FIGURE})", ""]
    lines += [
        "| contrast | difference (points) | 95 % interval | seeds | p (Holm) | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in judged.to_dict("records"):
        low, high = 100 * row["low"], 100 * row["high"]
        p = f"{row['p_holm']:.3f}" if row["p_holm"] == row["p_holm"] else ""
        lines.append(f"| {row['contrast']} | {100 * row['estimate']:+.2f} | {low:.2f} to {high:.2f} | {row['n']} "
                     f"| {p} | {row['verdict']} |")  # fmt: skip
    stopped = contrasts.loc[contrasts["n"] == 0, "contrast"].tolist()
    if stopped:
        lines += ["", f"Not judged, since the screen stopped an arm: {'; '.join(stopped)}."]
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

"""Let two processes compete for one run, one name or one teacher.

python tests/faults/races.py          100 races for a run, 20 for a name, 20 for a teacher, 3 of the command `resume`
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command

ROOT = Path(__file__).parents[2]
AT_ONCE = """
import sys
from pathlib import Path
from tune_kd.records import run_folder as run
from tune_kd import UserError
folder, name = Path(sys.argv[1]), sys.argv[2]
{before}
print("ready", flush=True)
sys.stdin.readline()
try:
    with {lock}:
        print("won", flush=True)
        sys.stdin.read()
except UserError as mistake:
    sys.exit("; ".join(mistake.problems))
"""
RESUME = AT_ONCE.format(before="", lock="run.held(folder)")  # what `resume` does first
BEGIN = AT_ONCE.format(
    before="from conftest import tiny\nrun.check_new(folder, name, tiny())",
    lock="run.begun(run.Run(name, folder / name, tiny(), 'd' * 64, None, {}))",
)
SENTENCE = re.compile(r"which process (\d+) on (\S+) has held since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4})")


def at_once(code: str, folder: Path, *names: str) -> list["subprocess.Popen[str]"]:
    """Start the same code in a process per name, and release all of them at the same time."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), name], env=environment, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in names
    ]  # fmt: skip
    for each in both:
        assert each.stdout is not None
        each.stdout.readline()
    for each in both:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    return both


def for_a_run(folder: Path, code: str = RESUME) -> str | None:
    """Race two drivers for one folder. Returns what went wrong; None if one won and the other named the winner."""
    both = at_once(code, folder, "same", "same")
    began = time.monotonic()
    while all(each.poll() is None for each in both) and time.monotonic() < began + 60:
        time.sleep(0.02)
    left = time.monotonic() - began
    losers = [each for each in both if each.poll() is not None]
    ends = {each: each.communicate(timeout=60) for each in both}  # closes the winner's input, so that it exits
    if len(losers) != 1:
        return f"{len(losers)} of two processes exited: {list(ends.values())}"
    (winner,) = (each for each in both if each not in losers)
    if ends[winner] != ("won\n", "") or winner.returncode != 0:
        return f"the winner says {ends[winner]}"
    refused = ends[losers[0]][1]
    if left > 10:
        return f"the other exited after {left:.1f} s"
    if code == BEGIN and re.search(r"exists|cannot be created", refused):
        return None  # a second run with a name may also learn only that the name exists
    found = SENTENCE.search(refused)
    if found is None or (int(found[1]), found[2]) != (winner.pid, platform.node()):
        return f"the other says {refused.strip()!r}, and {winner.pid} holds it"
    return None


def for_a_name(out: Path) -> str | None:
    """Race two new runs for one name. Returns like `for_a_run`."""
    return for_a_run(out, BEGIN)


TEACH = """
import sys
from pathlib import Path
from faults.races import train
train(Path(sys.argv[1]), sys.argv[2])
"""


def train(out: Path, name: str) -> None:
    """Train a run under `out`, in this process. All such runs need the same teacher."""
    import torch

    from conftest import tiny
    from faults.here import go_on
    from tune_kd.data import datasets
    from tune_kd.execute.driver import Driver
    from tune_kd.records.run_folder import Run, begun
    from tune_kd.study.spec import Confirm, Factor

    def wait(_: Driver) -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    torch.set_num_threads(1)
    factors = (Factor("stem", ("cifar",)), Factor("method", ("none", "logit")), Factor("temperature", (4.0,)))
    study = replace(tiny(), factors=factors, moderator=None, contrasts=tiny().contrasts[:1], confirm=Confirm((1,)))
    digest = datasets.load("digits", train=60, validation=20, test=20).digest
    shares = {"gpus_per_trial": 0.0, "cpus_per_trial": 1.0, "max_concurrent": None, "keep_checkpoints": False}
    run = Run(name, out / name, study, digest, None, shares)
    with begun(run):
        go_on(run, wait)


def for_a_teacher(out: Path) -> str | None:
    """Race two runs for one teacher. Returns what went wrong; None if it was trained once and both used it."""
    from tune_kd.execute.verify import verify
    from tune_kd.records import reader
    from tune_kd.system.files import unsealed

    both = at_once(TEACH, out, "one", "other")
    ends = [each.communicate(timeout=300) for each in both]
    if any(each.returncode for each in both):
        return "; ".join(wrong[-300:] for _, wrong in ends)
    cards = list(out.glob("teachers/*/card.json"))
    if len(cards) != 1:
        return f"{len(cards)} teachers are published"
    card = unsealed(cards[0].read_bytes(), cards[0])
    runs = [reader.load(out / name) for name in ("one", "other")]
    epochs = [one.epochs.merge(one.trials[one.trials["role"] == "teacher"][["trial_id"]]) for one in runs]
    seconds = [list(each["seconds"]) for each in epochs]
    if seconds[0] != seconds[1]:
        return f"the teacher was trained twice, in {seconds}"
    for one in runs:
        if set(one.trials["status"]) != {"completed"}:
            return f"{one.runs}: {one.trials[['arm', 'status', 'error']].to_dict('records')}"
        digests = set(one.trials.loc[one.trials["teacher_digest"].notna(), "teacher_digest"])
        if digests != {card["weights_sha256"]}:
            return f"{one.runs}: students learned from {digests}, the card says {card['weights_sha256']}"
    found = [finding for name in ("one", "other") for finding in verify(out / name)]
    answers = list(cards[0].parent.glob("answers/*/*/logits.f32"))
    return str(found) if found or not answers else None


def for_a_run_by_command(out: Path) -> str | None:
    """Race two `resume` commands of a run that has completed. Returns like `for_a_run`."""
    folder = out / "one"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tune_kd", "resume", str(folder)]
    both = [subprocess.Popen(command, cwd=out, env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for _ in range(2)]  # fmt: skip
    ends = {each: each.communicate(timeout=300) for each in both}
    statuses = sorted(each.returncode for each in both)
    if statuses == [0, 0]:
        return None  # the second started after the first had exited
    if statuses != [0, 2]:
        return f"they exit with {statuses}: {[wrong[-300:] for _, wrong in ends.values()]}"
    (refused,) = (wrong for each, (_, wrong) in ends.items() if each.returncode == 2)
    winner = next(each for each in both if each.returncode == 0)
    found = SENTENCE.search(refused)
    return None if found is not None and int(found[1]) == winner.pid else f"the other says {refused!r}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--locks", type=int, default=100)
    options.add_argument("--names", type=int, default=20)
    options.add_argument("--teachers", type=int, default=20)
    options.add_argument("--commands", type=int, default=3)
    given = options.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        races: dict[str, list[Callable[[Path], str | None]]] = {
            "one run": [for_a_run] * given.locks,
            "one name": [for_a_name] * given.names,
            "one teacher": [for_a_teacher] * given.teachers,
        }
        for what, each in races.items():
            found = []
            for number, race in enumerate(each):
                out = Path(folder) / what.replace(" ", "-") / str(number)
                out.mkdir(parents=True)
                found.append(race(out))
            trained = Path(folder) / "one-teacher" / "0"
            if what == "one teacher" and given.commands and trained.is_dir():
                found += [for_a_run_by_command(trained) for _ in range(given.commands)]
            wrong = [words for words in found if words is not None]
            lost += len(wrong)
            print(f"{what}: {len(found)} races, {len(wrong)} went wrong", *wrong[:5], sep="\n  ", flush=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()

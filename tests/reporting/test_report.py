"""Results from tables, and the texts of reports."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from tune_kd.analysis import accuracy, contrasts as results
from tune_kd.records.eta import time_left
from tune_kd.records.ledger import Ledger
from tune_kd.records.reader import Records, load
from tune_kd.records.schema import TRIALS, first_row
from tune_kd.reporting import progress, report as reporting, terminal, texts
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import Decision
from tune_kd.system.characters import visible
from tune_kd.system.errors import UserError

ACCURACY = {"none": 0.90, "logit": 0.92, "feature": 0.89}


@pytest.fixture
def run(study: Study, tmp_path: Path) -> Path:
    """A run's folder. All confirm trials completed, except T=2, which the screen stopped, and one missing seed."""
    from dataclasses import asdict, replace

    study = replace(study, confirm=replace(study.confirm, seeds=(1, 2, 3)))
    planned = plan(study, "0" * 64)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for trial in planned.trials:
        row = first_row("r", trial)
        if trial.cell.temperature == 2:
            row |= {"status": "stopped", "stop_reason": "asha"}
        elif trial.arm == "imagenet/feature" and trial.seed == 3:
            row |= {"status": "failed", "stop_reason": "diverged"}
        else:
            accuracy = (
                ACCURACY[trial.cell.method] + (0.05 if trial.cell.stem == "cifar" else 0) + trial.seed % 1000 / 1000
            )
            if trial.cell.method == "feature":
                accuracy += trial.seed**2 / 1000 - (14 / 3000 if trial.cell.stem == "cifar" else 5 / 2000)
            row |= {"status": "completed", "test_accuracy_best": accuracy, "epochs_run": 2, "train_seconds": 3.0}
        ledger.put(TRIALS, row)
    ledger.write_tables(tmp_path)
    record = {
        "run": "r",
        "study": asdict(study),
        "contrasts": [asdict(contrast) for contrast in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
        "data": {"name": "digits"},
    }
    (tmp_path / "study.json").write_text(json.dumps(record))
    return tmp_path


@pytest.fixture
def records(run: Path) -> Records:
    return load(run)


def contrast(table: pd.DataFrame, name: str) -> dict[str, Any]:
    (row,) = table[table["contrast"] == name].to_dict("records")
    return {str(key): value for key, value in row.items()}


def test_a_stopped_arm_has_no_mean_and_a_failed_seed_makes_an_arm_incomplete(records: Records) -> None:
    arms = accuracy.arms(records).set_index("arm")
    assert arms.loc["cifar/none", ["n", "planned", "note"]].tolist() == [3, 3, ""]
    assert arms.loc["cifar/none", "mean"] == pytest.approx(0.952)
    assert arms.loc["cifar/logit/T=2", "note"] == "stopped in the screen"
    assert pd.isna(arms.loc["cifar/logit/T=2", "mean"])
    assert arms.loc["imagenet/feature", ["n", "note"]].tolist() == [2, "incomplete"]


def test_contrasts_are_paired_by_seed_over_the_seeds_that_both_arms_have(records: Records) -> None:
    contrasts = results.contrasts(records)
    assert contrast(contrasts, "cifar: logit - none")["estimate"] == pytest.approx(0.02)
    assert contrast(contrasts, "cifar: logit - none")["n"] == 3
    short = contrast(contrasts, "imagenet: feature - none")
    assert (short["n"], short["estimate"]) == (2, pytest.approx(-0.01))
    assert contrast(contrasts, "(logit - none): cifar - imagenet")["estimate"] == pytest.approx(0.0, abs=1e-12)


def test_a_contrast_with_a_stopped_arm_is_not_judged_but_stays_in_holms_family(records: Records) -> None:
    contrasts = results.contrasts(records)
    row = contrast(contrasts, "cifar: T=2 - T=4")
    assert (row["n"], row["verdict"]) == (0, "not judged")
    assert pd.isna(row["p_holm"])
    family = contrasts[contrasts["family"] == "primary"]
    assert family["p"].isna().any()
    assert family["p_holm"].min() == pytest.approx(min(1.0, family["p"].min() * len(family)))


def test_a_study_without_contrasts_has_a_report(run: Path) -> None:
    record = json.loads((run / "study.json").read_text()) | {"contrasts": []}
    (run / "study.json").write_text(json.dumps(record))
    records = load(run)
    assert len(results.contrasts(records)) == 0
    reporting.report(records, run / "report")
    assert "Not judged" not in screen(terminal.effects(results.contrasts(records)))


def test_screen_seeds_are_excluded_from_confirmed_accuracies(records: Records) -> None:
    assert accuracy.confirmed(records).index.tolist() == [("r", 1), ("r", 2), ("r", 3)]


def test_the_report_is_written_in_every_format(run: Path, records: Records) -> None:
    first = reporting.report(records, run / "report")
    folder = run / "report"
    assert first == folder / "report.html"
    assert "| primary | cifar: logit - none | better | +2.00 " in (folder / "report.md").read_text()
    read = pd.read_csv(folder / "tables" / "contrasts.csv")
    assert read["contrast"].tolist() == results.contrasts(records)["contrast"].tolist()
    for name in ("effects.png", "effects.svg", "cost.png"):
        assert (folder / "figures" / name).stat().st_size > 1000
    assert "\\toprule" in (folder / "tables" / "arms.tex").read_text()


COMPUTED = ("=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", "\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201")


@pytest.mark.parametrize("text", COMPUTED, ids=ascii)
def test_no_text_in_a_csv_is_a_formula(text: str) -> None:
    table = pd.DataFrame({text: [-0.5], "arm": [text], "note": [f"x;{text}"]})
    head, row = csv.reader(io.StringIO(texts.csv(table), newline=""))
    assert head[0][0] == row[1][0] == "'"
    assert row[2].startswith("x;'")
    assert (row[0], row[1].replace("'", "")) == ("-0.5", text)


def test_ordinary_names_and_numbers_round_trip_through_csv(records: Records) -> None:
    for name, table in reporting.tables(records).items():
        read = pd.read_csv(io.StringIO(texts.csv(table)))
        for column in table.columns:
            known = [each for each in table[column].dropna() if each != ""]
            number = pd.api.types.is_numeric_dtype(table[column])
            assert read[column].dropna().tolist() == (pytest.approx(known) if number else known), (name, column)


HOSTILE = (
    "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "![x](http://x/y.png)", "<javascript:alert(1)>", "a|b",
    "a\\|b", "\\", "`a`", "# a", "- a", "+ a", "1. a", "1) a", "***", "---", "===", "&lt;b&gt;", "&#60;", "__a__",
    "*a*", "~~a~~", "[a]: http://x", "|---|", "> a", "    a", "a  \n# b", "```", "~~~", "<!--", "http://x www.x.org",
)  # fmt: skip
BUILT = ("heading", "paragraph", "bullet_list", "list_item", "strong", "table", "thead", "tbody", "tr", "th", "td")


def rendered(text: str) -> tuple[str, set[str]]:
    """The text of a Markdown document as CommonMark with GitHub's tables renders it, and the kinds of its tokens."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = [each for token in parser.parse(text) for each in (token, *(token.children or ()))]
    kinds = {each.type.removesuffix("_open").removesuffix("_close") for each in found}
    return "|".join(each.content for each in found if each.type == "text"), kinds


@given(st.text() | st.sampled_from(HOSTILE) | st.text(st.sampled_from("<>&[]()!|\\`*_~#-+=1. $:/aw")))
def test_any_text_renders_literally_in_markdown(text: str) -> None:
    text = visible(text)  # like all text from records
    plain = " ".join(text.split())
    once = [plain] if plain else []
    for lines, expected in (
        (f"{texts._line(text)}\n\n- {texts._line(text)}\n", once * 2),
        (f"# {texts._inline(f'x {text}')}\n\n- **x{texts._inline(text)}**: {texts._inline(text)}\n", None),
        (f"| a |\n| --- |\n| {texts._inline(text)} |\n| b |\n", ["a", *once, "b"]),
    ):
        said, kinds = rendered(lines)
        assert kinds <= {*BUILT, "inline", "text"}, (lines, kinds)
        assert expected is None or said == "|".join(expected), lines


@pytest.mark.parametrize("text", ["resnet18_x", "a - b", "cifar: T=2 - T=4", "95 % (of 3), 0.5", "x_1-y.z"])
def test_ordinary_names_are_not_escaped_in_markdown(text: str) -> None:
    assert texts._line(text) == texts._inline(text) == text


def test_addresses_are_escaped_so_that_github_does_not_link_them() -> None:
    """GitHub turns such addresses into links."""
    assert texts._inline("http://x.org www.x.org WWW.x.org") == "http\\://x.org www\\.x.org WWW\\.x.org"


@pytest.mark.parametrize("text", ["*", "[x]", "\\input{/etc/passwd}", "^^5cinput", "a & b % c", "$x$ #1 _ {} ~"])
def test_text_in_latex_is_no_command_and_no_argument_of_the_previous_row(text: str) -> None:
    body = texts._tabular(pd.DataFrame({"arm": ["a", text]})).split("\\midrule\n")[1].splitlines()[1]
    left = re.sub(r"\\text(backslash|asciicircum|asciitilde)\{\}|\\[&%$#_{}]|\{[*[]\}", "", body.removesuffix(r" \\"))
    assert not set(left) & set("\\{}$&#^_%~[*"), body


@pytest.mark.parametrize(("formats", "first", "made"), [
    (["md"], "report.md", {"report.md"}), (["csv"], "tables", {"tables"}), (["svg"], "figures", {"figures"}),
])  # fmt: skip
def test_only_the_requested_formats_are_written(
    records: Records, tmp_path: Path, formats: list[str], first: str, made: set[str]
) -> None:
    folder = tmp_path / "elsewhere"
    assert reporting.report(records, folder, formats) == folder / first
    assert {path.name for path in folder.iterdir()} == made


def test_an_unknown_format_is_rejected_and_nothing_is_written(records: Records, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format is 'docx'; allowed: html, md"):
        reporting.report(records, tmp_path / "elsewhere", ["html", "docx"])
    assert not (tmp_path / "elsewhere").exists()


def screen(what: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_long_arm_names_are_shown_in_full_within_80_columns(records: Records) -> None:
    arms = accuracy.arms(records).head(2)
    name = "dist/epochs=3/batch_size=64/kd_weight=1/ce_weight="
    shown = screen(terminal.arms(arms.assign(arm=[f"{name}0", f"{name}1"], note="stopped in the screen")))
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "".join(line.split(" ")[0] for line in shown.splitlines()[2:]) == f"{name}0{name}1"


def test_effects_fit_in_80_columns_with_estimate_and_n(records: Records) -> None:
    shown = screen(terminal.effects(results.contrasts(records)))
    (line,) = [line for line in shown.splitlines() if line.startswith("imagenet: logit - none")]
    assert "+2.00" in line
    assert " 3 " in line
    assert "Secondary contrasts (points of test accuracy; p by Holm over 3)" in shown
    assert "Not judged" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_a_p_value_below_a_thousandth_is_not_rounded_up(records: Records) -> None:
    shown = screen(terminal.effects(results.contrasts(records).assign(p_holm=0.0006)))
    assert "<0.001" in shown
    assert "0.001" not in shown.replace("<0.001", "")


def test_the_live_display_counts_each_phase_and_names_the_running_trials(records: Records) -> None:
    rows = records.trials.astype(object).where(records.trials.notna(), None).to_dict("records")
    rows[3] |= {"status": "running", "epochs_run": 1, "val_accuracy": 0.5, "train_seconds": 2.0}
    shown = screen(progress.progress("r", rows, [], 61.0))
    assert f"{rows[3]['arm']} seed {rows[3]['seed']}" in shown
    assert "1/2" in shown
    assert "50.00" in shown
    assert "left" in shown


def test_the_live_display_counts_comparisons_by_reason_and_shows_the_latest(records: Records) -> None:
    made = Decision("id", "cifar/logit/T=2", "screen", "cifar/logit", 2, 0, 0.7, 0.8, 3, 2, "stop", "behind")
    rows = records.trials.astype(object).where(records.trials.notna(), None).to_dict("records")
    ties = [replace(made, arm=f"arm {number}", action="continue", reason="near_tie") for number in range(6)]
    shown = screen(progress.progress("r", rows, [*ties, made], None))
    assert "early stopping: 7 comparisons, 1 stopped (6 within the margin, 1 behind)" in " ".join(shown.split())
    assert "cifar/logit/T=2 at epoch 2: stopped (behind), 70.00 %, cutoff 80.00 %" in shown
    assert "arm 5" in shown and "arm 1 " not in shown
    strange = replace(made, reason="a stranger's_reason")  # records may come from somebody else
    shown = screen(progress.progress("r", rows, [strange], None))
    assert "(1 a stranger's reason)" in shown and "stopped (a stranger's reason)" in shown
    live, wrapped = (screen(progress._decisions([*ties, made], live=live)).splitlines() for live in (True, False))
    assert len(live) == 1 + 5 < len(wrapped) and max(map(len, live)) <= 80


@pytest.mark.parametrize(("seconds", "words"), [(12, "12 s"), (89, "89 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_durations_are_shown_in_a_suitable_unit(seconds: float, words: str) -> None:
    assert terminal.duration(seconds) == words


def test_time_left_uses_the_pace_of_comparable_trials_and_the_slots_in_use() -> None:
    base = {"role": "student", "stem": "cifar", "method": "none", "epochs_planned": 4}
    done = base | {"status": "completed", "epochs_run": 4, "train_seconds": 8.0}
    waiting = base | {"status": "pending", "epochs_run": 0, "train_seconds": None}
    running = base | {"status": "running", "epochs_run": 2, "train_seconds": 4.0}
    assert time_left([done, waiting, running, running]) == pytest.approx((4 + 2 + 2) * 2 / 2)
    assert time_left([waiting]) is None


@pytest.mark.parametrize(("took", "pictures"), [(0.001, 19), (0.1, 2)])
def test_a_slow_live_display_is_refreshed_less_often(
    monkeypatch: pytest.MonkeyPatch, took: float, pictures: int
) -> None:
    """Refreshes within ten seconds: two per second, or one after fifty times the duration of the last."""
    now, drawn = 0.0, 0

    def picture(*_: object) -> str:
        nonlocal now, drawn
        drawn += 1
        now += took
        return ""

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "progress", picture)
    live = progress.ProgressDisplay(Console(file=io.StringIO(), force_terminal=True), "r")
    while now < 9.99:
        now += 0.01
        live.show([], [])
    assert drawn == pictures


def test_headings_say_at_which_epoch_a_test_accuracy_is() -> None:
    assert texts.heading("test_accuracy_best") == "test accuracy at best epoch (points)"
    assert texts.heading("test_accuracy_sd") == "test accuracy at last epoch sd (points)"
    assert texts.heading("val_accuracy_best") == "val accuracy best (points)"

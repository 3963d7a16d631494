"""Figures: each is drawn if there is data, has a caption and alternative text, and can be read without colour."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given, strategies as st
from matplotlib import colors, rc_context
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from tune_kd.analysis import accuracy, contrasts
from tune_kd.records.reader import Records, load
from tune_kd.reporting import accuracy_figures, figures, report as reporting, style, terminal
from tune_kd.reporting.texts import cell


@pytest.fixture(scope="module")
def records(finished: Path) -> Records:
    return load(finished)


@pytest.fixture(scope="module")
def pictures(records: Records) -> dict[str, figures.Picture]:
    return {picture.name: picture for picture in figures.draw(records)}


def test_a_real_run_has_every_figure_except_those_that_do_not_apply(pictures: dict[str, figures.Picture]) -> None:
    assert set(pictures) == set(figures.PICTURES) - {"alpha", "tuning"}


def test_every_figure_has_a_caption_and_alternative_text(pictures: dict[str, figures.Picture]) -> None:
    for picture in pictures.values():
        assert len(picture.caption) > 20
        assert len(picture.alternative) > 20
        assert "nan" not in picture.alternative


def test_figures_are_one_column_wide_and_reproducible(records: Records, pictures: dict[str, figures.Picture]) -> None:
    for picture in pictures.values():
        assert picture.figure.get_figwidth() == pytest.approx(3.4)
    for one, other in zip(figures.draw(records), figures.draw(records), strict=True):
        svg = figures.rendered(one.figure, "svg")
        assert svg == figures.rendered(other.figure, "svg")
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_axes_and_their_text_stay_within_the_figure(pictures: dict[str, figures.Picture]) -> None:
    for picture in pictures.values():
        figures.rendered(picture.figure, "png")
        inside = picture.figure.bbox.padded(1)
        for axes in picture.figure.axes:
            box = axes.get_tightbbox()
            assert box is not None
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1, picture.name
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1, picture.name


def test_a_legend_with_long_names_covers_no_panel(records: Records) -> None:
    """Long names, as in a study that also varies its recipe. Matplotlib would warn if a legend left a panel no room."""
    (study,) = (json.loads(json.dumps(each)) for each in records.studies.values())
    for arm in study["arms"]:
        arm["name"] += "/lr=0.1/kd_weight=1"
    trials = records.trials.assign(arm=records.trials["arm"] + "/lr=0.1/kd_weight=1")
    longer = replace(records, trials=trials, studies={"tiny": study})
    with rc_context(style.STYLE):
        made = accuracy_figures.curves(longer, style.method_styles(trials["method"].dropna()))
        assert made is not None
        figure = made[2]
        figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.axison]
    legends = figure.findobj(Legend)
    assert len(panels) == len(legends) == 2
    assert min(panel.bbox.height for panel in panels) > figure.dpi  # one inch
    assert not any(legend.get_window_extent().overlaps(panel.bbox) for legend in legends for panel in panels)
    assert all(figure.bbox.x1 >= legend.get_window_extent().x1 for legend in legends)


@pytest.mark.filterwarnings("ignore:Glyph")  # a missing glyph is the font's problem
def test_special_characters_and_missing_values_break_no_figure_and_no_table(records: Records, tmp_path: Path) -> None:
    odd = {"cifar/logit/T=2": r"a$\frac$b [/x] <i>_%&#", "cifar/none": "[red]x", "imagenet/none": "c|d"}
    renamed = [json.loads(json.dumps(study)) for study in records.studies.values()]
    for arm in renamed[0]["arms"]:
        arm["name"] = odd.get(arm["name"], arm["name"])
    for contrast in renamed[0]["contrasts"]:
        contrast["weights"] = [[odd.get(arm, arm), weight] for arm, weight in contrast["weights"]]
        contrast["name"] += r" $\frac$ [/x] <i>"
    trials = records.trials.assign(arm=records.trials["arm"].replace(odd))
    trials.loc[trials["arm"] == "[red]x", "stem"] = None
    trials.loc[trials["method"] == "feature", "method"] = "dkd"
    strange = replace(records, trials=trials, studies={"tiny": renamed[0]})
    page = reporting.report(strange, tmp_path).read_text()
    assert "<i>" not in page
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal.arms(accuracy.arms(strange)))
    console.print(terminal.effects(contrasts.contrasts(strange)))
    assert "[red]x" in console.file.getvalue()  # type: ignore[attr-defined]
    assert r"a$\frac$b [/x] <i>_%&#" in console.file.getvalue()  # type: ignore[attr-defined]


SIGNS = {"long": "x", "formula": "$\\frac$ \\", "hidden": "_"}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # there is no room for names of this length
@pytest.mark.parametrize(
    "letters",
    [tuple(SIGNS.values()), *(pytest.param((sign,), id=each, marks=pytest.mark.slow) for each, sign in SIGNS.items())],
)
def test_very_long_names_of_any_characters_give_figures_of_usual_size(
    records: Records, letters: tuple[str, ...]
) -> None:
    """Names that cycle through each kind of character."""
    turns = cycle(letters)

    @cache
    def strange(name: str) -> str:
        return f"{(next(turns) * 10_000)[:10_000]}{name}"

    names = ["arm", "stem", "method", "student", "teacher"]
    (study,) = (json.loads(json.dumps(each)) for each in records.studies.values())
    for arm in study["arms"]:
        arm["name"] = strange(arm["name"])
    for contrast in study["contrasts"]:
        contrast["name"] = strange(contrast["name"])
        contrast["weights"] = [[strange(arm), weight] for arm, weight in contrast["weights"]]
    trials = records.trials.assign(**{name: records.trials[name].map(strange, na_action="ignore") for name in names})
    pictures = {each.name: each for each in figures.draw(replace(records, trials=trials, studies={"tiny": study}))}
    assert {"effects", "curves", "cost", "timeline"} <= set(pictures)
    before = {each.name: each for each in figures.draw(records)}
    for name, picture in pictures.items():
        assert picture.figure.get_figheight() <= 1.5 * before[name].figure.get_figheight()
        written = [text.get_text() for text in picture.figure.findobj(Text)]
        assert max(map(len, written)) < 300, name
        figures.rendered(picture.figure, "png")
        ElementTree.fromstring(figures.rendered(picture.figure, "svg"))
    for name in ("curves", "cost"):  # shown curves have a name
        panel = pictures[name].figure
        assert all(legend.get_texts() for legend in panel.findobj(Legend))


def test_a_figure_with_too_many_items_states_what_it_leaves_out(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "PANELS", 5)
    monkeypatch.setattr(accuracy_figures, "LINES_SHOWN", 4)
    trials = records.trials.assign(stem=[f"stem {number}" for number in range(len(records.trials))])
    pictures = {each.name: each for each in figures.draw(replace(records, trials=trials))}
    assert max(sum(axes.axison for axes in each.figure.axes) for each in pictures.values()) == 5
    assert len(pictures["effects"].figure.axes[0].get_yticks()) == 4
    for name, what in (("effects", "contrasts"), ("curves", "stems"), ("cost", "stems")):
        assert re.search(rf" \d+ more {what} are left out\.", pictures[name].caption), pictures[name].caption


def test_a_report_removes_tables_of_an_earlier_report_but_not_other_files(records: Records, tmp_path: Path) -> None:
    reporting.report(records, tmp_path, ["csv"])
    (tmp_path / "tables" / "mine.csv").write_text("kept")
    alone = replace(records, decisions=records.decisions.head(0))
    reporting.report(alone, tmp_path, ["csv"])
    left = {path.stem for path in (tmp_path / "tables").iterdir()}
    assert "decisions" not in left
    assert {"mine", "arms"} <= left


def test_built_in_methods_differ_in_marker_line_and_grey_level() -> None:
    looks = [style.METHOD_STYLES[name] for name in ("none", "logit", "feature")]
    assert len({look.marker for look in looks}) == 3
    assert len({look.line for look in looks}) == 3
    greys = sorted(sum(w * c for w, c in zip((0.299, 0.587, 0.114), colors.to_rgb(look.colour), strict=True))
                   for look in looks)  # fmt: skip
    assert greys[1] - greys[0] > 0.1 and greys[2] - greys[1] > 0.1


def test_new_methods_get_distinct_styles_and_built_in_ones_keep_theirs() -> None:
    new = ["dkd", "crd", "at", "rkd", "vid"]
    looks = style.method_styles(new)
    assert {name: looks[name] for name in style.METHOD_STYLES} == style.METHOD_STYLES
    for kind in ("colour", "marker", "line"):
        assert len({getattr(look, kind) for look in looks.values()}) == len(style.METHOD_STYLES) + len(new)
    assert len({looks[name].hatch for name in [*new, "feature", "teacher", "none"]}) == len(new) + 3
    assert len(set(style.method_styles(map(str, range(35))).values())) == len(style.METHOD_STYLES) + 35


@given(st.sets(st.text(), max_size=4), st.text())
def test_a_methods_style_ignores_the_order_and_changes_only_if_its_colour_is_taken(others: set[str], name: str) -> None:
    looks = style.method_styles([name, *others])
    assert looks == style.method_styles([*others, name])
    alone = style.method_styles([name])[name]
    taken = {look.colour for other, look in looks.items() if other != name}
    assert looks[name] == alone or alone.colour in taken


UNSEEN = {"logit": "dkd", "feature": "crd"}


@pytest.fixture(scope="module")
def unseen(records: Records) -> Records:
    """The run with its methods renamed to unknown ones, whose names are in no arm."""
    study = json.loads(json.dumps(records.study).replace("logit", "x").replace("feature", "y"))
    trials, decisions = records.trials.copy(), records.decisions.copy()
    for name in ("arm", "stratum"):
        for table in (trials, decisions):
            if name in table:
                table[name] = table[name].str.replace("logit", "x").str.replace("feature", "y")
    trials["method"] = trials["method"].replace(UNSEEN)
    return replace(records, trials=trials, decisions=decisions, studies={"tiny": study})


@pytest.fixture(scope="module")
def unseen_figures(unseen: Records) -> dict[str, Figure]:
    return {picture.name: picture.figure for picture in figures.draw(unseen)}


def test_unknown_methods_have_their_own_style_in_every_figure(unseen_figures: dict[str, Figure]) -> None:
    looks = style.method_styles(UNSEEN.values())
    students = [looks[name] for name in ("none", *UNSEEN.values())]
    colours = {look.colour for look in students}
    assert len(colours) == 3
    for axes in unseen_figures["curves"].axes:
        assert {line.get_color() for line in axes.lines} == colours
    for axes in unseen_figures["cost"].axes:
        marks = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() not in ("None", "_")}
        assert marks == {(look.colour, look.marker) for look in students}
    drawn = unseen_figures["rank_correlation"].axes
    strata = [{line.get_color() for line in axes.lines} - {"#666666"} for axes in drawn]
    assert all(len(colour) == 1 for colour in strata)
    assert set.union(*strata) == colours
    answer = unseen_figures["temperature"].axes[0].lines
    assert {line.get_color() for line in answer} == {looks["dkd"].colour, "#000000"}  # plus the control
    assert answer[0].get_marker() == looks["dkd"].marker
    bars = {(colors.to_hex(bar.get_facecolor()[0]).upper(), bar.get_hatch())  # type: ignore[index]
            for bar in unseen_figures["timeline"].axes[0].collections}  # fmt: skip
    assert bars == {(look.colour, look.hatch) for look in (*students, looks["teacher"])}


def test_an_effect_has_the_style_of_the_treated_arms_method(unseen: Records, unseen_figures: dict[str, Figure]) -> None:
    looks = style.method_styles(UNSEEN.values())
    (axes,) = unseen_figures["effects"].axes
    assert [text.get_text() for text in axes.texts] == ["primary", "secondary"]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    marks = {names[int(line.get_ydata()[0])]: line  # type: ignore[index, call-overload]
             for line in axes.lines[1:] if line.get_marker() != "None"}  # fmt: skip
    methods = dict(zip(unseen.trials["arm"], unseen.trials["method"], strict=True))
    assert set(marks) == {each["name"] for each in unseen.study["contrasts"]}
    for each in unseen.study["contrasts"]:
        effect = each["kind"] == "effect"
        look = looks[methods[each["weights"][0][0]]] if effect else accuracy_figures.MODERATION
        assert marks[each["name"]].get_color() == look.colour
        assert marks[each["name"]].get_marker() in (look.marker, "D")


def test_an_unknown_tuned_method_is_drawn_in_its_own_style(fair: Path) -> None:
    records = load(fair)
    trials = records.trials.assign(method=records.trials["method"].replace(UNSEEN))
    looks = style.method_styles(UNSEEN.values())
    (tuning,) = [each.figure for each in figures.draw(replace(records, trials=trials)) if each.name == "tuning"]
    shown = {(line.get_color(), line.get_marker()) for line in tuning.axes[0].lines if line.get_marker() != "None"}
    assert shown == {(looks[name].colour, looks[name].marker) for name in ("none", *UNSEEN.values())}


def test_a_tuned_setting_outside_the_schema_is_drawn(fair: Path) -> None:
    """A regression: such a setting broke the report of every study that tunes a setting of its own method."""
    records = load(fair)
    (run,) = records.runs
    study = json.loads(json.dumps(records.studies[run]).replace('"name": "alpha"', '"name": "kd_weight"'))
    trials = records.trials.rename(columns={"alpha": "kd_weight"}).assign(alpha=None)
    (tuning,) = [
        each.figure
        for each in figures.draw(replace(records, trials=trials, studies={run: study}))
        if each.name == "tuning"
    ]
    (panel,) = [axes for axes in tuning.axes if axes.get_xlabel() == "kd_weight"]
    drawn = trials[(trials["phase"] == "screen") & (trials["status"] == "completed")]["kd_weight"].dropna()
    shown = {x for line in panel.lines if line.get_marker() != "None" for x in line.get_xdata()}
    assert shown == set(drawn)


def test_the_tuning_axis_shows_every_draw_whole_and_hardly_extends_below_0(fair: Path) -> None:
    records = load(fair)
    trials = records.trials.assign(val_accuracy_best=records.trials["val_accuracy_best"].rank(pct=True) ** 3)
    (tuning,) = [each.figure for each in figures.draw(replace(records, trials=trials)) if each.name == "tuning"]
    for axes in tuning.axes:
        low, high = axes.get_ylim()
        heights = [y for line in axes.lines if line.get_marker() != "None" for y in line.get_ydata()]
        assert -0.1 * high < low < min(heights)
        assert high > 1.05 * max(heights)


def test_tables_without_methods_have_learning_curves(tmp_path: Path) -> None:
    """A regression: such tables broke the report, since null never compares equal."""
    ids = [(f"{arm}{seed}", arm, seed) for arm in "ab" for seed in (1, 2)]
    trials = pd.DataFrame(ids, columns=["trial_id", "arm", "seed"]).assign(test_accuracy_best=0.5, train_seconds=1.0)
    trials.to_parquet(tmp_path / "trials.parquet")
    epochs = pd.DataFrame(
        [{"trial_id": name, "epoch": epoch, "val_accuracy": 0.5} for name, *_ in ids for epoch in (1, 2)]
    )
    epochs.to_parquet(tmp_path / "epochs.parquet")
    assert {"curves", "cost"} <= {picture.name for picture in figures.draw(load(tmp_path))}


def test_png_files_are_3_4_inches_wide_at_200_dpi(records: Records, tmp_path: Path) -> None:
    reporting.report(records, tmp_path, ["png"])
    for path in (tmp_path / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 680  # 3.4 inches at 200 dots


def test_a_real_run_has_all_standard_tables_and_none_is_empty(records: Records) -> None:
    made = reporting.tables(records)
    assert {
        "contrasts",
        "arms",
        "exploratory",
        "measures",
        "costs",
        "temperature",
        "gaps",
        "decisions",
        "provenance",
    } <= set(made)
    for table in made.values():
        assert len(table)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("estimate", 0.0123, "+1.23"), ("mean", 0.5, "50.00"), ("low_pairs", -0.0142, "-1.42"),
     ("p_holm", 0.0004, "< 0.001"), ("p", 0.25, "0.250"),
     ("n", 1200, "1,200"), ("seed", 1200, "1200"), ("sd", float("nan"), ""), ("note", None, ""),
     ("train_seconds", 12345.6, "12,346"), ("kl_t1", 0.01234, "0.0123")],
)  # fmt: skip
def test_values_are_formatted_by_column(name: str, value: object, text: str) -> None:
    assert cell(name, value) == text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX (texlive-latex-recommended)")
def test_the_latex_tables_compile(records: Records, tmp_path: Path) -> None:
    reporting.report(records, tmp_path, ["tex"])
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path / "tables", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables" / "all.pdf").stat().st_size > 10_000


def test_latex_has_booktabs_rules_full_rows_and_no_bare_percent_sign(records: Records, tmp_path: Path) -> None:
    reporting.report(records, tmp_path, ["tex"])
    text = (tmp_path / "tables" / "contrasts.tex").read_text()
    for rule in ("\\toprule", "\\midrule", "\\bottomrule"):
        assert text.count(rule) == 1
    head = text.split("\\toprule")[1].split("\\midrule")[0]
    columns = head.count("&") + 1
    body = text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert {line.count(" & ") + 1 for line in body} == {columns}
    assert "%" not in text.split("\n", 1)[1].replace("\\%", "")

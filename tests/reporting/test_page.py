"""The page in a real browser: it makes no requests, sorts its tables, fits narrow and wide windows, and has a text for
every figure."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tune_kd.analysis.paper import paper
from tune_kd.analysis.summary import summary
from tune_kd.records.reader import load
from tune_kd.reporting import report as reporting
from tune_kd.reporting.page import html as page_html
from tune_kd.reporting.paper import grid


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reporting.report(load(finished), tmp_path_factory.mktemp("report"), ["html"])


HOSTILE = (
    "<script>window.strange = 1</script>", "<b>bold</b>", '" onclick="window.strange = 1" x="', "</td></table>",
    "javascript:window.strange = 1", "&lt;i&gt;", "__proto__", "{{ 7 * 7 }}", "'><img src=x onerror='strange = 1'>",
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of another tool's tables, with names that a browser could run as code."""
    folder = tmp_path_factory.mktemp("theirs")
    trials = [{"trial_id": f"{arm}{seed}", "arm": arm, "seed": seed, "test_accuracy_best": 0.5 + seed / 100}
              for arm in HOSTILE for seed in (1, 2)]  # fmt: skip
    pd.DataFrame(trials).to_parquet(folder / "trials.parquet")
    return reporting.report(load(folder), tmp_path_factory.mktemp("report"), ["html"])


def show(browser: Any, page: Path, width: int = 1440, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def test_the_page_logs_nothing_and_makes_no_requests(browser: Any, page: Path) -> None:
    browser.get_log("browser")  # log entries of earlier pages
    show(browser, page)
    assert browser.get_log("browser") == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_element_overflows_the_window(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
    outside = browser.execute_script("""
        return [...document.querySelectorAll("main *")].filter((each) => !each.closest(".scroll")
            && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 80))""")
    assert outside == []


def test_colours_follow_the_preferred_colour_scheme(browser: Any, page: Path) -> None:
    def luminance(what: str) -> float:
        colour = browser.execute_script(f"return getComputedStyle(document.body).{what}")
        return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765

    show(browser, page, scheme="light")
    assert luminance("backgroundColor") > 0.9 > 0.3 > luminance("color")
    show(browser, page, scheme="dark")
    assert luminance("backgroundColor") < 0.2 < 0.7 < luminance("color")


def test_every_image_loads_and_has_alternative_text(browser: Any, page: Path) -> None:
    show(browser, page)
    pictures = browser.execute_script(
        "return [...document.images].map((each) => [each.alt, each.complete && each.naturalWidth])"
    )
    assert len(pictures) >= 5
    for words, width in pictures:
        assert len(words) > 20
        assert width > 100


def column(browser: Any, table: int, place: int) -> list[str]:
    script = "return [...document.querySelectorAll('table')[arguments[0]].tBodies[0].rows].map((row) => row.cells[arguments[1]].dataset.key)"  # noqa: E501
    return list(browser.execute_script(script, table, place))


def test_clicking_a_heading_sorts_ascending_then_descending(browser: Any, page: Path) -> None:
    show(browser, page)
    heads = browser.execute_script(
        "return [...document.querySelectorAll('table')[0].tHead.rows[0].cells].map((e) => e.innerText)"
    )
    for name, as_number in (("estimate (points)", True), ("contrast", False)):
        place = heads.index(name)
        head = browser.find_elements("css selector", "table")[0].find_elements("css selector", "th button")[place]
        found = []
        for direction in ("ascending", "descending"):
            head.click()
            assert head.find_element("xpath", "..").get_attribute("aria-sort") == direction
            keys = [key for key in column(browser, 0, place) if key]
            found.append([float(key) for key in keys] if as_number else keys)
        assert len(found[0]) > 3
        in_order = (
            sorted(found[0])
            if as_number
            else browser.execute_script(
                "return arguments[0].toSorted((one, other) => one.localeCompare(other))", found[0]
            )
        )
        assert found == [in_order, in_order[::-1]]
    assert browser.get_log("browser") == []


def test_the_content_security_policy_blocks_injected_scripts_styles_and_requests(browser: Any, page: Path) -> None:
    """Even if some text were parsed as HTML."""
    text = page.read_text()
    assert text.count("</h1>") == 1
    stranger = (
        "<script>window.strange = 1</script><img src='data:,' onerror='window.strange = 2'>"
        "<img src='http://127.0.0.1:9/picture.png'><link rel='stylesheet' href='http://127.0.0.1:9/style.css'>"
        "<style>h1 { color: rgb(1, 2, 3) }</style><iframe src='http://127.0.0.1:9/'></iframe>"
        "<base href='http://127.0.0.1:9/'>"
    )
    changed = page.with_name("changed.html")
    changed.write_text(text.replace("</h1>", f"</h1>{stranger}"))
    browser.get_log("browser")
    show(browser, changed)
    assert browser.execute_script("return window.strange") is None
    assert browser.execute_script("return getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"
    assert browser.execute_script("return document.baseURI") == changed.as_uri()
    refused = [each["message"] for each in browser.get_log("browser")]
    assert all("Content Security Policy" in each for each in refused), refused
    for part in ("inline script", "inline event handler", "picture.png", "style.css", "inline style", "127.0.0.1:9/'"):
        assert any(part in each for each in refused), (part, refused)


def test_hostile_names_are_shown_as_text_and_run_no_code(browser: Any, hostile: Path) -> None:
    browser.get_log("browser")
    show(browser, hostile)
    table = next(each for each in browser.find_elements("css selector", "table") if "mean" in each.text)
    table.find_element("css selector", "th button").click()
    found = browser.execute_script(
        "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[0].innerText)", table
    )
    assert sorted(found) == sorted(" ".join(name.split()) for name in HOSTILE)
    assert (
        browser.execute_script("return document.querySelectorAll('main script, main a, main iframe, main b').length")
        == 0
    )
    assert browser.execute_script("return window.strange") is None
    assert browser.get_log("browser") == []


def test_the_paper_table_is_bold_only_for_verdicts_and_shows_hostile_names_as_text(
    browser: Any, finished: Path, tmp_path: Path
) -> None:
    records = load(finished)
    for name, theirs in zip(("cifar", "imagenet"), HOSTILE, strict=False):
        records.trials["stem"] = records.trials["stem"].replace(name, theirs)
    printed = grid(paper(records).assign(verdict=["better", *[None] * 7]), records)
    made = reporting.tables(records)
    titled = {name: (reporting.TABLES[name][0], table) for name, table in made.items()}
    (tmp_path / "report.html").write_text(page_html(records, titled, [], [], printed, summary(records)))
    browser.get_log("browser")
    show(browser, tmp_path / "report.html", width=360)
    region = browser.find_element("css selector", f"[aria-label='{reporting.TABLES['paper'][0]}']")
    assert [each.text for each in region.find_elements("css selector", "strong")] == [printed.rows[0][2].text]
    labels = [each.text for each in region.find_elements("css selector", "tbody td:first-child")]
    assert labels == [HOSTILE[1], HOSTILE[0]]
    assert browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
    assert browser.execute_script("return window.strange") is None
    assert browser.get_log("browser") == []


def test_sections_start_with_the_summary_and_the_verdicts(browser: Any, page: Path) -> None:
    show(browser, page)
    heads = [each.text for each in browser.find_elements("css selector", "h2")]
    assert heads == ["Summary", "Verdicts", "Figures", "Limits of the evidence", "Tables", "Checks and provenance"]
    assert browser.find_element("css selector", "p.question").text == "Does it work?"

"""The page in a real browser: it asks nobody for anything, sorts, fits narrow and wide windows, and has words for
every picture."""

from pathlib import Path
from typing import Any

import pytest

from tune_kd import report
from tune_kd.tables import load


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(tmp_path_factory.mktemp("report"), load(finished), ["html"])


def show(browser: Any, page: Path, width: int = 1440, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def test_nothing_is_said_on_the_console_and_nothing_is_asked_for(browser: Any, page: Path) -> None:
    browser.get_log("browser")  # of pages before this one
    show(browser, page)
    assert browser.get_log("browser") == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
    outside = browser.execute_script("""
        return [...document.querySelectorAll("main *")].filter((each) => !each.closest(".scroll")
            && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 80))""")
    assert outside == []


def test_the_colours_follow_the_scheme_of_the_reader(browser: Any, page: Path) -> None:
    def luminance(what: str) -> float:
        colour = browser.execute_script(f"return getComputedStyle(document.body).{what}")
        return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765

    show(browser, page, scheme="light")
    assert luminance("backgroundColor") > 0.9 > 0.3 > luminance("color")
    show(browser, page, scheme="dark")
    assert luminance("backgroundColor") < 0.2 < 0.7 < luminance("color")


def test_every_picture_is_there_and_has_words(browser: Any, page: Path) -> None:
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


def test_a_click_on_a_heading_sorts_up_and_another_one_down(browser: Any, page: Path) -> None:
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
        assert found[0] == found[1][::-1] or sorted(found[0]) == sorted(found[1])
        if as_number:
            assert found[0] == sorted(found[0])
            assert found[1] == sorted(found[1], reverse=True)
    assert browser.get_log("browser") == []


def test_what_matters_comes_first(browser: Any, page: Path) -> None:
    show(browser, page)
    heads = [each.text for each in browser.find_elements("css selector", "h2")]
    assert heads == ["Verdicts", "Limits of the evidence", "Figures", "Tables", "For those who check"]
    assert browser.find_element("css selector", "p.question").text == "Does it work?"

"""The documentation: each block is executed, or its commands are parsed. The site loads nothing from other hosts."""

import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_group

import tune_kd
from commands import call, command
from docs import pages
from tune_kd import cli
from tune_kd.analysis.summary import summary
from tune_kd.cli import running
from tune_kd.execute import session
from tune_kd.records import run_folder
from tune_kd.reporting import figures
from tune_kd.study import discover
from tune_kd.system import object_store

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
ONLY_PARSED = {
    "installs about 6 GB", "on another machine", "takes minutes", "under SLURM", "with a GPU", "with a cluster",
    "with a store",
}  # fmt: skip
"""Titles, or ends of titles, of blocks that cannot run in a test. Their commands are only parsed."""
COMMANDS = get_group(cli.app).commands


class Block(NamedTuple):
    language: str
    title: str | None
    text: str

    @property
    def is_only_parsed(self) -> bool:
        return self.title is not None

    @property
    def lines(self) -> list[list[str]]:
        """The words of each command."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [words for line in joined if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    text = pages.MARK.sub(lambda found: pages.PARTS[found[1]](), text)
    found = []
    for info, code in FENCE.findall(text):
        language, _, more = info.partition(" ")
        title = re.fullmatch(r'title="(.+)"', more)
        assert language in ("python", "bash", "text") and bool(more) == bool(title), f"{path}: {info}"
        found.append(Block(language, title and title[1], code))
    return found


def arguments(words: list[str]) -> list[str] | None:
    """Return the arguments of a line that calls tune_kd; None for another line."""
    line = " ".join(words)
    if "python -m tune_kd " not in f"{line} ":
        return None
    given = words[words.index("tune_kd") + 1 :]
    return given[: given.index("&")] if "&" in given else given


@pytest.fixture
def ready(finished: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `run` and `resume` end at once: a new run gets the records of a smaller one."""

    def start(study: Any, folder: Path, *_: Any) -> Any:
        shutil.copytree(finished, folder)
        shutil.copytree(finished.parent / "teachers", folder.parent / "teachers", dirs_exist_ok=True)
        return run_folder.reopen(folder), session.Ended(None, 0)

    monkeypatch.setattr(session, "start", start)
    monkeypatch.setattr(session, "go_on", lambda run, *_, **__: (run, session.Ended(None, 0)))
    monkeypatch.setattr(running, "print_report", lambda *_: None)  # the same pages also call `report`
    monkeypatch.setattr(figures, "draw", lambda _: [])  # figures take most of a report's time, and have their own tests
    monkeypatch.setattr(object_store, "_store", lambda _: None)  # would ask the network for a bucket's region
    monkeypatch.setenv("XDG_DATA_HOME", str(elsewhere / "data"))
    return elsewhere


@pytest.mark.long
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_one_after_another(
    path: Path, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [block for block in blocks(path) if block.language != "text" and not block.is_only_parsed]
    if not any("--name first" in block.text for block in found):
        for name in ("first", "RUN"):
            session.start(None, ready / "results" / name, None, None, None, None)  # type: ignore[arg-type]
    names: dict[str, Any] = {"__name__": path.stem}
    for block in found:
        if block.language == "python":
            exec(compile(block.text, str(path), "exec"), names)
            continue
        for words in block.lines:
            assert words[:3] == ["python", "-m", "tune_kd"], f"{words} is not executed; give its block a title"
            assert call(monkeypatch, *words[3:]) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_block_that_cannot_run_here_are_parsed(path: Path, ready: Path) -> None:
    for block in blocks(path):
        if not block.is_only_parsed:
            continue
        assert any(str(block.title).endswith(each) for each in ONLY_PARSED), block.title
        for given in filter(None, map(arguments, block.lines)):
            COMMANDS[given[0]].make_context(given[0], given[1:])
            if given[0] in ("run", "plan", "submit"):
                assert discover.find(given[1]).is_file()


def test_every_title_of_a_block_that_cannot_run_here_is_in_use() -> None:
    titles = {str(block.title) for path in FILES for block in blocks(path)}
    assert {each for each in ONLY_PARSED if not any(title.endswith(each) for title in titles)} == set()


def test_other_commands_are_skipped_and_a_missing_option_is_detected() -> None:
    assert arguments(["srun", "python", "-m", "tune_kd", "run", "x", "&"]) == ["run", "x"]
    assert arguments(["pytest", "-m", "gpu"]) is None
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["run"].make_context("run", ["ablation", "--gpu-per-trial", "1"])


@pytest.mark.slow
def test_the_quickstart_runs_without_changes(elsewhere: Path) -> None:
    for block in blocks(ROOT / "docs" / "quickstart.md"):
        if block.language == "python":
            exec(compile(block.text, "quickstart", "exec"), {})
        if block.language == "bash" and not block.is_only_parsed:
            for words in block.lines:
                process = command(elsewhere, *words[3:])
                shown = process.communicate(timeout=300)
                assert process.returncode == 0, (words, shown)


def test_the_reference_has_all_public_names() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    documented = set(re.findall(r"heading: tune_kd\.([\w.]+)", text))
    assert {*tune_kd.__all__, "training.Batch", "training.Context", "training.Shapes"} <= documented


def test_every_command_is_on_its_page_with_an_example() -> None:
    sections = re.split(r"^## ", pages.commands(), flags=re.M)[1:]
    assert [section.split()[0] for section in sections] == list(COMMANDS)
    for section in sections:
        assert f"python -m tune_kd {section.split()[0]}" in section


def test_the_page_of_commands_needs_neither_torch_nor_ray() -> None:
    code = "import sys; from docs import pages; pages.commands(); print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_fields_have_their_types_defaults_and_comments() -> None:
    text = pages.fields("study/spec.py", "Recipe")
    assert "- `lr: float = 0.1`: learning rate at the first step" in text
    assert "- `precision: str = 'float32'`: Precision of matrix products and convolutions. " in text
    assert "Maximum norm of the gradient" in text


@pytest.mark.parametrize("name", ["ablation", "tuned"])
def test_a_study_of_the_gallery_loads_and_its_summary_is_on_the_page(name: str) -> None:
    records = tune_kd.load(ROOT / "docs" / "gallery" / name)
    assert set(records.trials["status"]) <= {"completed", "stopped"}
    sentences = "".join(f"> - {sentence}\n" for sentence in summary(records).sentences)
    for page in ("docs/results.md", *["README.md"] * (name == "ablation")):
        assert sentences in (ROOT / page).read_text(), page


# The site, which .ci/run builds with `mkdocs build` before the tests


@pytest.fixture(scope="module")
def site() -> Path:
    if not (ROOT / "site" / "index.html").is_file():
        pytest.skip("needs the site: `uv run --group docs mkdocs build`")
    return ROOT / "site"


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link\b(?![^>]*rel=\"canonical\")[^>]*\bhref=[\"']?([^\"'\s>]+)", text)
        assert [each for each in loaded if re.match(r"(https?:)?//", each)] == [], path
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//[^)\"']*", path.read_text()) == [], path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_search_finds_a_word_of_a_page(served: str, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{served}/index.html")
    browser.execute_script("document.querySelector('#__search').click()")
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys("too_few_peers")
    links = WebDriverWait(browser, 30).until(
        lambda shown: shown.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert any("faq.html" in link.get_attribute("href") for link in links)


@pytest.mark.long
def test_no_page_is_wider_than_a_phone(served: str, site: Path, browser: Any) -> None:
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = {}
    try:
        for path in sorted(site.rglob("*.html")):
            browser.get(f"{served}/{path.relative_to(site)}")
            width = browser.execute_script("return document.documentElement.scrollWidth")
            if width > 360:
                wide[path.name] = width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not wide

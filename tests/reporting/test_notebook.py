"""The notebook in docs/, executed on a trained run."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "analysis.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # warnings of the kernel's own packages
def test_the_notebook_runs_and_agrees_with_the_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # readers must see output from their own run
    monkeypatch.setenv("TUNE_KD_RUN", str(finished))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    texts = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in text for text in texts)
    assert any("rules out" in text for text in texts)
    assert any(re.search(r"\b[1-9]\d* contrasts agree", text) for text in texts)

"""Parts of documents that commands generate, between `<!-- NAME: made by a command -->` and `<!-- end NAME -->`."""

from collections.abc import Sequence
from pathlib import Path


def put(document: Path, name: str, text: str) -> None:
    """Replace the text of a document's part. Raises `ValueError` if the document has no part of this name."""
    begin, end = f"<!-- {name}: made by a command -->\n", f"<!-- end {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{document} has no part {name!r}")
    document.write_text(f"{before}{begin}{text}{end}{after}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

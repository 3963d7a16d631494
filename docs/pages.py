"""A MkDocs hook that generates parts of pages from the code. It replaces each `<!-- from NAME -->` in a page, and each
`<!-- fields FILE CLASS -->` by the fields of a dataclass.

Modules of tune_kd are imported when a part is generated: while MkDocs loads a hook, `import statistics` finds
docs/statistics.py.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- from (.+?) -->$", re.M)
FIELDS = re.compile(r"^<!-- fields (\S+) (\w+) -->$", re.M)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the text of a page with its parts. MkDocs calls this before it resolves links."""
    if page.file.src_uri.count("/") == 0:
        markdown = markdown.replace("](../SECURITY.md)", "](security.md)")
    markdown = FIELDS.sub(lambda found: fields(found[1], found[2]), markdown)
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


@dataclass(frozen=True)
class Field:
    name: str
    kind: str
    default: str | None
    comment: str


def fields(path: str, name: str) -> str:
    """A list of a class's fields, with types, defaults and comments."""
    lines = []
    for each in _fields(path, name):
        default = "" if each.default is None else f" = {each.default}"
        comment = f": {_escaped(each.comment)}" if each.comment else ""
        lines.append(f"- `{each.name}: {each.kind}{default}`{comment}")
    return "\n".join(lines)


def commands() -> str:
    """A section for each command, as in `--help`: description, example, arguments and options."""
    from typer import Context
    from typer.main import get_group

    from tune_kd.cli import app

    sections = []
    for name, command in get_group(app).commands.items():
        example = (command.epilog or "").removeprefix("Example: ")
        where = ' title="with a cluster"' if "--address" in example else ""
        lines = [f"## {name}", "", _joined(command.help or ""), "", f"```bash{where}", example, "```", ""]
        for parameter in command.params:
            record = parameter.get_help_record(Context(command))
            if record is not None:
                lines += [f"`{record[0]}`", f":   {_escaped(record[1])}", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def columns() -> str:
    """A table of columns for each table of a run, with the comments from `study` and `records.schema`."""
    from tune_kd.records.schema import DECISIONS, EPOCHS, PANDAS, TRIALS

    comments = {
        "trials": _comments("study/spec.py", "Recipe", "Cell")
        | _comments("study/trial.py", "Outcome")
        | _comments("records/schema.py", "TrialRow"),
        "epochs": _comments("study/trial.py", "Epoch"),
        "decisions": _comments("study/trial.py", "Decision"),
    }
    sections = []
    for schema in (TRIALS, EPOCHS, DECISIONS):
        lines = [f"## {schema.name}.parquet", "", f"Key: {', '.join(f'`{name}`' for name in schema.key)}.", ""]
        lines += ["| column | type and meaning |", "|---|---|"]
        for name, kind in schema.in_parquet.items():
            levels = schema.levels.get(name)
            words = [comments[schema.name].get(name, ""), f"one of {', '.join(levels)}" if levels else ""]
            never = "never null" if name in (*schema.key, *schema.needed) else ""
            text = "; ".join(filter(None, (*words, never)))
            lines.append(f"| `{name}` | {PANDAS[kind]}{': ' if text else ''}{_escaped(text)} |")
        sections.append("\n".join([*lines, ""]))
    return "\n".join(sections)


def modules() -> str:
    """A section for each folder of the package, in the order of imports, with the docstrings of its modules."""
    table = (ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8")
    order = ast.literal_eval(table.partition("\nORDER = ")[2].partition("\n")[0])
    sections = []
    for folder in order:
        files = sorted((ROOT / "tune_kd" / folder).rglob("*.py"))
        lines = [f"### {folder}", "", _docstring(files[0].parent / "__init__.py"), ""]
        lines += [
            f"- `{path.relative_to(ROOT / 'tune_kd')}`: {_docstring(path)}" for path in files if path.stem != "__init__"
        ]
        sections.append("\n".join([*lines, ""]))
    return "\n".join(sections)


def security() -> str:
    """SECURITY.md without its title."""
    return (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("\n")[2]


PARTS: Mapping[str, Callable[[], str]] = {
    "the command line": commands,
    "the schemas": columns,
    "the docstrings": modules,
    "SECURITY.md": security,
}


def _joined(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Escape text for Markdown and its tables. Text between backticks stays code."""
    return re.sub(r"([\\*_{}\[\]<>|])", r"\\\1", text)


def _docstring(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _joined(text.partition("\n\n")[0])


def _comments(path: str, *names: str) -> dict[str, str]:
    """The comments of the fields of classes, by field."""
    return {each.name: each.comment for name in names for each in _fields(path, name) if each.comment}


def _fields(path: str, name: str) -> list[Field]:
    """The fields of a class. A field's comment is in the lines above it and at the end of its own lines."""
    text = (ROOT / "tune_kd" / path).read_text(encoding="utf-8")
    (found,) = (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == name)
    lines = text.splitlines()
    return [
        Field(
            ast.unparse(each.target),
            _kind(each.annotation),
            None if each.value is None else _default(each.value),
            _comment(lines, each.lineno - 1, each.end_lineno or each.lineno),
        )
        for each in found.body
        if isinstance(each, ast.AnnAssign)
    ]


def _kind(annotation: ast.expr) -> str:
    """The type of a field, without the rules of `Annotated`."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        annotation = annotation.slice.elts[0]
    return ast.unparse(annotation).replace("'", "").replace('"', "")


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    return "{}" if text == "field(default_factory=dict)" else text


def _comment(lines: Sequence[str], begin: int, end: int) -> str:
    above = []
    while lines[begin - 1].lstrip().startswith("# "):
        begin -= 1
        above.insert(0, lines[begin].strip().removeprefix("# "))
    behind = [line.partition("  # ")[2] for line in lines[begin + len(above) : end]]
    return _joined(" ".join(above + behind))

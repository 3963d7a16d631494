"""The command that writes an example study: `new`."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from tune_kd.system.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"


def new(file: Annotated[Path, typer.Argument(help="Path of the Python file to create.", metavar="FILE")]) -> None:
    """Write a commented example study, and a custom loss in a second file."""
    loss = file.with_name(f"{file.stem}_loss.py")
    there = [each for each in (file, loss) if os.path.lexists(each)]
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UserError(f"FILE is {str(file)!r}; allowed: the file name of a Python module, such as study.py")
    if there:
        raise UserError(f"FILE is {str(file)!r}, and {there[0]} exists; allowed: a name that does not exist yet")
    if not file.parent.is_dir():
        raise UserError(
            f"FILE is {str(file)!r}, and the folder {file.parent} does not exist; allowed: a file in an existing folder"
        )
    names = {"STUDY_FILE": file.name, "STUDY_NAME": file.stem, "LOSS_FILE": loss.name}
    for path, template in ((loss, "loss.py.txt"), (file, "study.py.txt")):
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for name, value in names.items():
            text = text.replace(name, value)
        path.write_text(text, encoding="utf-8")
    print(f"{file} is a study, and {loss} is its loss. Next: `python -m tune_kd plan {quote(str(file))}`")

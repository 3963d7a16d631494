"""Write a study to start from."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from tune_kd.system.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"


def new(file: Annotated[Path, typer.Argument(help="A Python file that is not there yet.", metavar="FILE")]) -> None:
    """Write a commented study to start from, with a loss of its own in a file beside it."""
    loss = file.with_name(f"{file.stem}_loss.py")
    there = [each for each in (file, loss) if os.path.lexists(each)]
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UserError(f"FILE is {str(file)!r}; allowed: a name as of a Python module, such as study.py")
    if there:
        raise UserError(f"FILE is {str(file)!r}, and {there[0]} exists; allowed: a name that is free")
    if not file.parent.is_dir():
        raise UserError(
            f"FILE is {str(file)!r}, and there is no folder {file.parent}; allowed: one in a folder that exists"
        )
    names = {"STUDY_FILE": file.name, "STUDY_NAME": file.stem, "LOSS_FILE": loss.name}
    for path, template in ((loss, "loss.py.txt"), (file, "study.py.txt")):
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for name, value in names.items():
            text = text.replace(name, value)
        path.write_text(text, encoding="utf-8")
    print(f"{file} is a study, and {loss} its loss: see `python -m tune_kd plan {quote(str(file))}`")

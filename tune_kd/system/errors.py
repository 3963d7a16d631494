"""Errors that callers handle: mistakes of the user and corrupt files."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Mistakes that the user has to correct. `problems` has one sentence for each, and the message lists all of them.

    A sentence names the field, its value and the allowed values. The command line prints them and exits with status 2.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise `UserError` with each distinct problem, if there is any."""
    if found := dict.fromkeys(problems):
        raise UserError(*found)


def collect(problems: list[str], check: Callable[[], T]) -> T | None:
    """Return the result of `check`. If it raises `UserError`, append its problems to `problems` and return None, so
    that all problems can be reported at once."""
    try:
        return check()
    except UserError as error:
        problems += error.problems
        return None


class CorruptFile(RuntimeError):
    """A file does not contain what was written to it."""


class UnexpectedFile(OSError, CorruptFile):
    """A path is not a regular file, or the file is larger than allowed."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"

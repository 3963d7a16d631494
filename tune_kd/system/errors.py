"""Errors that callers handle: what the user can mend, and files that are not what was written."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """What the user has to change. `problems` holds a sentence each; the message lists them all.

    A sentence names the field, its value and what is allowed. The command line prints them and exits with 2.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def collect(problems: list[str], check: Callable[[], T]) -> T | None:
    """Return what a check returns. Where it raises `UserError`, add its problems to the list and return None, so that
    all problems can be told at once."""
    try:
        return check()
    except UserError as error:
        problems += error.problems
        return None


class CorruptFile(RuntimeError):
    """A file does not hold the bytes that were written."""


class UnexpectedFile(OSError, CorruptFile):
    """A path leads to something that is no regular file, or to a file larger than its kind can be."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"

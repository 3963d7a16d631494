"""Errors that callers handle: what the user can mend, and files that are not what was written."""


class UserError(ValueError):
    """What the user has to change. `problems` holds a sentence each; the message lists them all.

    A sentence names the field, its value and what is allowed. The command line prints them and exits with 2.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class CorruptFile(RuntimeError):
    """A file does not hold the bytes that were written."""


class UnexpectedFile(OSError, CorruptFile):
    """A path leads to something that is no regular file, or to a file larger than its kind can be."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"

"""Text that would let somebody in, were it recorded or shown: found, and masked."""

import re
from collections.abc import Iterator
from typing import Any

SECRET = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"  # an address with a password in it
    r"|[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]{16,}@"  # or with a token for a user
    r"|\b(?:gh[oprsu]_|github_pat_|hf_|AKIA|(?:sk|xox[abeprs])-(?:[a-z0-9]+-)*)[A-Za-z0-9_]{16,}[A-Za-z0-9_-]*"
    r"|\b(?:glpat-|AIza)[A-Za-z0-9_-]{16,}"  # as services begin theirs
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"  # a JSON web token (RFC 7519)
)


def masked(text: str) -> str:
    """The text without what looks like a password or a token."""
    return SECRET.sub(lambda found: f"{found[0][:4]}***", text)


def secrets(value: Any, name: str = "") -> Iterator[str]:
    """A sentence for each text inside a value that looks as if it let somebody in. It is not repeated."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from secrets(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from secrets(each, f"{name}[{number}]")
    elif isinstance(value, str) and (found := SECRET.search(value)):
        yield (
            f"{name} holds what looks like a password or a token ({found[0][:4]}..., {len(found[0])} characters); "
            "allowed: text without one, since it is recorded and reported"
        )

"""Characters that are commands: to a terminal, which obeys them, or to whatever puts letters in order."""

import re

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Unicode's control characters, its separators of lines and paragraphs, and those that turn the direction of a text."""


def visible(text: str) -> str:
    """The text with a picture in the place of each control character, but for the ends of lines and tabs."""
    return CONTROL.sub(lambda found: _picture(found[0]), text)


def _picture(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

"""Control characters: terminals execute them, and some change the direction of text."""

import re

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Unicode control characters, line and paragraph separators, and marks that change the direction of text."""


def visible(text: str) -> str:
    """Replace each control character by a visible symbol. Keep newlines and tabs."""
    return CONTROL.sub(lambda found: _picture(found[0]), text)


def _picture(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

"""Text of others: what may be stored, and how the rest is shown. A terminal obeys control characters, and direction
overrides make it show another text than the one that is there."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"  # without which words of Persian or Hindi, and some emoji, cannot be written


def is_printable(character: str) -> bool:
    """Whether it is shown as itself: no control or format character, no end of a line, no lone surrogate."""
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def first_unprintable(text: str) -> str | None:
    """The first character that is not printable and its place, as `U+001B at character 5`; None: there is none."""
    for i, character in enumerate(text, 1):
        if not is_printable(character):
            return f"U+{ord(character):04X} at character {i}"
    return None


def escaped(text: str, keep: str = "") -> str:
    """The text as a terminal may have it: `\\x1b` for what is not printable, but for the characters to `keep`."""
    if text.isprintable():
        return text
    return "".join(c if is_printable(c) or c in keep else repr(c)[1:-1] for c in text)

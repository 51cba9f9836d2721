"""Patterns of tasks as `films-*`: `*` is any text, `?` one character, `[ab]` one of some."""

from __future__ import annotations

import fnmatch

ALL = "*"


def matches(pattern: str, task: str) -> bool:
    return fnmatch.fnmatchcase(task, pattern)


def covers(pattern: str, other: str) -> bool:
    """Whether `pattern` surely matches every task that `other` does. Where that is hard to tell, the answer is no."""
    if pattern == other:
        return True
    if "[" in other or (set(other) & set("*?") and set(pattern) & set("?[")):
        return False
    return matches(pattern, other)  # the wildcards of `other`, as characters, are matched by a `*` alone

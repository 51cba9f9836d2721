"""Names that users give: tasks, `TASK@VERSION`, `OWNER/TASK`. Matched whole before they touch anything."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefix_store.errors import NotFoundError

TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NUMBER = re.compile(r"[1-9][0-9]{0,8}")
DIGEST = re.compile(r"[0-9a-f]{12,64}")
PREVIOUS = "previous"


@dataclass(frozen=True)
class TaskRef:
    """`version` None: the one in service; else a number, 12 or more hex digits of the digest, or `previous`. `owner`
    None: the caller's own task."""

    task: str
    version: str | None = None
    owner: str | None = None

    @property
    def name(self) -> str:
        return self.task if self.owner is None else f"{self.owner}/{self.task}"


def is_task_name(text: str) -> bool:
    return TASK.fullmatch(text) is not None


def parse_ref(text: str) -> TaskRef:
    """`T`, `T@V`, `owner/T` or `owner/T@V`. Raises NotFoundError: a name that cannot be is a name that is not there."""
    name, at, version = text.partition("@")
    owner, slash, task = name.rpartition("/")
    if not is_task_name(task) or (slash and not is_task_name(owner)) or (at and not is_version(version)):
        raise NotFoundError(f"no task {text[:140]!r}; a task is [a-z0-9][a-z0-9._-]{{0,63}}, or TASK@VERSION")
    return TaskRef(task, version if at else None, owner if slash else None)


def is_version(text: str) -> bool:
    """Up to nine digits are a number; twelve or more hex digits, decimal ones too, are a digest's beginning."""
    return any((NUMBER.fullmatch(text), DIGEST.fullmatch(text), text == PREVIOUS))


def known_version(task: str, text: str) -> str:
    """A version's reference as it stands. Raises NotFoundError for one that cannot be."""
    if not is_version(text):
        raise NotFoundError(f"no version {text[:80]!r} of task {task!r}")
    return text

"""The prefixes that were resident, so that a server that starts again loads the hottest in the background."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError
from prefix_store.private_files import write

MAX_SAVED = 1024
MAX_BYTES = 2**20


@dataclass(frozen=True)
class Label:
    """Whose version a resident prefix is."""

    tenant: str
    task: str
    version: int


class WarmStart:
    """A file of labels, the hottest first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, labels: Iterable[Label]) -> None:
        """Whole or not at all. A disk that cannot take it costs a warm start, nothing else: raises OSError."""
        found = [[label.tenant, label.task, label.version] for label in labels][:MAX_SAVED]
        write(self._path, json.dumps({"residents": found}).encode())

    def saved(self) -> list[Label]:
        """Nothing where there is no such file or it is damaged."""
        try:
            found = read_json_object(self._path.read_bytes(), self._path.name, MAX_BYTES)["residents"]
            return [Label(str(tenant), str(task), int(number)) for tenant, task, number in found[:MAX_SAVED]]
        except (OSError, InvalidArtefactError, KeyError, TypeError, ValueError):
            return []

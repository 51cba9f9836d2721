"""A shared registry's documents on a replica's own disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefix_store.documents import write_tenant
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.tenants import Tenant


@dataclass(frozen=True)
class Position:
    """Of what data this is a copy (empty: of none yet), and the last event that it saw."""

    identity: str
    event: str


class LocalCopy(SqliteRegistry):
    """Read like any registry. It is written as the shared one is followed, so a crash costs the last moments, never the
    file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, is_durable=False, remedy="remove the file: it is read from the shared registry anew")

    def position(self) -> Position | None:
        with self._file.snapshot() as db:
            row = db.execute("SELECT identity, event FROM copied").fetchone()
        return None if row is None else Position(*row)

    def move(self, position: Position) -> None:
        with self._file.transaction() as db:
            db.execute("DELETE FROM copied")
            db.execute("INSERT INTO copied VALUES (?, ?)", (position.identity, position.event))

    def adopt_tenant(self, name: str, tenant: Tenant | None, revision: int) -> None:
        with self._file.transaction() as db:
            db.execute("UPDATE tenants_revision SET revision = ?", (revision,))
            db.execute("DELETE FROM tenants WHERE name = ?", (name,))
            if tenant is not None:
                db.execute("INSERT INTO tenants VALUES (?, ?)", (name, write_tenant(tenant)))

    def adopt_tenants(self, tenants: dict[str, Tenant], revision: int) -> None:
        """These are all."""
        with self._file.transaction() as db:
            db.execute("UPDATE tenants_revision SET revision = ?", (revision,))
            db.execute("DELETE FROM tenants")
            rows = [(name, write_tenant(tenant)) for name, tenant in tenants.items()]
            db.executemany("INSERT INTO tenants VALUES (?, ?)", rows)

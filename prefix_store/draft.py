"""A tenant's tasks while one change is decided, and what the change would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prefix_store.accounts import Accounts
from prefix_store.audit import SERVER, TASK_ACTIONS, AuditEntry, Author
from prefix_store.ensemble import Ensemble
from prefix_store.entries import PINNED, entries_of, file_entry, member_entry
from prefix_store.errors import NotFoundError
from prefix_store.task import Task
from prefix_store.tenants import Tenant, known_tenant


@dataclass(frozen=True)
class Stored:
    """What a tenant stores: versions, and the bytes of their files. A file that two versions share counts for both."""

    num_versions: int = 0
    num_bytes: int = 0

    def __add__(self, other: Stored) -> Stored:
        return Stored(self.num_versions + other.num_versions, self.num_bytes + other.num_bytes)

    def __sub__(self, other: Stored) -> Stored:
        return Stored(self.num_versions - other.num_versions, self.num_bytes - other.num_bytes)


@dataclass(frozen=True)
class Write:
    """One commit: the tenant's new revision, its tasks by name as they are from now on (None: gone), the entries that
    come and go with each, by how much `Stored` grows, and what the audit says of it."""

    tenant: str
    revision: int
    tasks: dict[str, Task | None]
    added: tuple[tuple[str, str], ...]  # entry, name of the task
    removed: tuple[tuple[str, str], ...]
    grown: Stored
    audit: tuple[AuditEntry, ...] = ()
    removes_tenant: bool = False


class Draft:
    """`read` gives a task by name and `holders` the names of the tenant's tasks under an entry, both as they are at
    `revision`; what was put or removed here is seen from then on. It is `by` whom the audit says. `accounts` are the
    tenants at that moment too."""

    def __init__(
        self,
        tenant: str,
        revision: int,
        stored: Stored,
        read: Callable[[str], Task | None],
        holders: Callable[[str], list[str]],
        names: Callable[[], list[str]],
        accounts: Accounts,
        by: Author = SERVER,
    ) -> None:
        self.tenant = tenant
        self.revision = revision
        self.stored = stored
        self.names = names
        self.accounts = accounts
        self._removes_tenant = False
        self._by = by
        self._read = read
        self._holders = holders
        self._before: dict[str, Task | None] = {}
        self._after: dict[str, Task | None] = {}
        self._audit: list[AuditEntry] = []

    def check_author(self) -> None:
        """Raises KeyEndedError, SuspendedError."""
        self.accounts.check_author(self._by)

    @property
    def account(self) -> Tenant:
        """The tenant itself. Raises NotFoundError where it is gone."""
        return known_tenant(self.tenant, self.accounts.get(self.tenant))

    def remove_tenant(self) -> None:
        self._removes_tenant = True

    def get(self, name: str) -> Task | None:
        if name not in self._after:
            self._before[name] = self._after[name] = self._read(name)
        return self._after[name]

    def present(self, name: str) -> Task:
        """Raises NotFoundError."""
        found = self.get(name)
        if found is None:
            raise NotFoundError(f"no task {name!r}")
        return found

    def put(self, task: Task) -> Task:
        """The task as it will be, with its new revision. A task counts its own changes, from a number that no task of
        this name had before."""
        self.get(task.name)
        before = self._before[task.name]
        revision = (self if before is None else before).revision + 1
        found = self._after[task.name] = replace(task, revision=revision)
        return found

    def adopt(self, name: str, task: Task | None) -> None:
        """As it is, with the revision that it has (None: gone)."""
        if self.get(name) != task:
            self._after[name] = task

    def remove(self, name: str) -> None:
        self.get(name)
        self._after[name] = None

    def record(self, action: str, subject: str) -> None:
        """Append this to the tenant's audit with the change, also where that leaves all as it was."""
        assert action in TASK_ACTIONS
        self._audit.append(self._by.entry(self.tenant, action, subject))

    def holders_of_file(self, digest: str) -> list[str]:
        """The tasks that have a version of this content."""
        return sorted(self._holders(file_entry(self.tenant, digest)))

    def users(self, task: str, version: int) -> list[str]:
        """The ensembles that have this version as a member, as `T@V`."""
        found = []
        for name in sorted(self._holders(member_entry(self.tenant, task, version))):
            user = self.get(name)
            for each in user.versions if user is not None else ():
                members = each.content.members if isinstance(each.content, Ensemble) else ()
                if any((member.task, member.version) == (task, version) for member in members):
                    found.append(f"{name}@{each.version}")
        return found

    def pinned(self) -> list[Task]:
        """The tenant's tasks that are pinned, as the registry has them."""
        return [self.present(name) for name in self._holders(PINNED)]

    @property
    def is_changed(self) -> bool:
        return self._removes_tenant or any(self._before[name] is not after for name, after in self._after.items())

    @property
    def audit(self) -> tuple[AuditEntry, ...]:
        return tuple(self._audit)

    def write(self) -> Write:
        tasks = {name: after for name, after in self._after.items() if self._before[name] is not after}
        added: list[tuple[str, str]] = []
        removed: list[tuple[str, str]] = []
        grown = Stored()
        for name, after in tasks.items():
            old, new = _entries(self._before[name]), _entries(after)
            added += [(entry, name) for entry in sorted(new - old)]
            removed += [(entry, name) for entry in sorted(old - new)]
            grown += _stored(after) - _stored(self._before[name])
        return Write(
            self.tenant, self.revision + 1, tasks, tuple(added), tuple(removed), grown, self.audit, self._removes_tenant
        )


def _entries(task: Task | None) -> frozenset[str]:
    return frozenset() if task is None else entries_of(task)


def _stored(task: Task | None) -> Stored:
    versions = () if task is None else task.versions
    return Stored(len(versions), sum(version.num_bytes for version in versions))

"""The contract of the registries that keep tasks, tenants, audit and usage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from prefix_store.audit import SERVER, AuditEntry, Author, no_entries
from prefix_store.buckets import Taken
from prefix_store.draft import Draft, Stored
from prefix_store.errors import ConflictError, NotFoundError
from prefix_store.task import Task, Version
from prefix_store.task_changes import check_key_left, delete_all, end_share
from prefix_store.tenants import DEFAULT_TENANT, Tenant, check_tenant_name
from prefix_store.usage import Usage

T = TypeVar("T")
PAGE = 1000


@dataclass(frozen=True)
class NewFile:
    """A file that a change will refer to. `put` stores it where it is not there; it may be called several times."""

    digest: str
    put: Callable[[], object]


@dataclass(frozen=True)
class Identity:
    """`id` is made with a registry's data and goes with its backups, so that files can name the registry that refers to
    them. `predecessors` are the registries whose data was copied into it, which it may follow as the files' owner."""

    id: str
    predecessors: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskCounts:
    """Tasks, and those of them whose active version was stored for another model than the one asked about."""

    num_tasks: int
    num_incompatible: int


class Registry(Protocol):
    """Every method is atomic, and durable when it returns. All raise UnavailableError where the registry cannot be
    reached. Tasks are found by tenant and name only."""

    max_upload_s: float
    """How long uploads of other processes may take, after which what they left is rubbish; 0: there are none."""

    @property
    def is_degraded(self) -> bool:
        """Whether what is read may be old, because a registry that others share is away."""
        return False

    def identity(self) -> Identity: ...

    def add_predecessors(self, ids: Iterable[str]) -> None:
        """Remember the registries whose data this one has."""
        ...

    def change(
        self, tenant: str, decide: Callable[[Draft], T], file: NewFile | None = None, *, by: Author = SERVER
    ) -> T:
        """Commit what `decide` does to a draft of the tenant's tasks, as if nobody else changed them meanwhile, and
        return what it returns; what it raises leaves everything as it was. It may be called several times, so that it
        does nothing but read and write its draft (`task_changes`). What it records is appended to the audit with the
        change, as done by `by`. Raises KeyEndedError, SuspendedError where this author may no longer change anything.

        `file` is stored before the change is there, and `release_unused` does not drop it in between.
        """
        ...

    def adopt(self, tenant: str, revision: int, tasks: Mapping[str, Task | None], *, are_all: bool = False) -> None:
        """Put in the tenant's tasks and revision as they are in another registry (None: gone); those not named go as
        well if these `are_all`. Raises ConflictError where they change meanwhile."""
        ...

    def revisions(self) -> dict[str, int]:
        """Of every tenant that has or had tasks: changes with each change of one."""
        ...

    def get_task(self, tenant: str, task: str) -> Task | None: ...

    def list_tasks(self, tenant: str, limit: int, after: str) -> list[Task]:
        """By name, from the first after `after`."""
        ...

    def count_tasks(self, fingerprint: str, tenant: str | None = None) -> TaskCounts:
        """Of one tenant or all; `fingerprint` is the model's."""
        fingerprints: list[str | None] = []
        for each in self.revisions() if tenant is None else (tenant,):
            after = ""
            while page := self.list_tasks(each, PAGE, after):
                fingerprints += [task.fingerprint for task in page]
                after = page[-1].name
        return TaskCounts(len(fingerprints), sum(found not in (None, fingerprint) for found in fingerprints))

    def is_shared(self, owner: str, task: str, tenant: str) -> bool:
        """Whether there is such a task that `tenant` may use. Takes the same time whether the task is not there or not
        shared."""
        ...

    def list_shared(self, tenant: str, limit: int, after: str) -> list[Task]:
        """Other tenants' tasks that this one may use, by `owner/T`, from the first after `after`."""
        ...

    def pinned_tasks(self) -> list[Task]:
        """Of all tenants, by tenant and name."""
        ...

    def stored(self, tenant: str) -> Stored: ...

    def digests(self) -> dict[str, set[str]]:
        """By tenant, the files that any version refers to."""
        ...

    def release_unused(self, tenant: str, digests: Iterable[str], drop: Callable[[str], None]) -> None:
        """Call `drop` for each of `digests` that no version of the tenant refers to and that no `change` is about to
        refer to."""
        ...

    def get_tenant(self, name: str) -> Tenant | None: ...

    def list_tenants(self) -> list[Tenant]:
        """By name."""
        ...

    def update_tenant(
        self,
        name: str,
        change: Callable[[Tenant | None], Tenant | None],
        record: Callable[[Tenant | None], Iterable[AuditEntry]] = no_entries,
        *,
        by: Author = SERVER,
        leaves_a_key: bool = False,
    ) -> Tenant | None:
        """Replace the tenant by what `change` makes of it (None: not there), with its new revision, and append what
        `record` gives for that to its audit. Both may be called several times; what they raise leaves everything as it
        was. Raises KeyEndedError, SuspendedError where the author `by` may no longer change anything, and ConflictError
        where the change `leaves_a_key` and no tenant would have one."""
        ...

    def delete_tenant(self, name: str, *, by: Author, leaves_a_key: bool = False) -> list[Version]:
        """The tenant goes with its keys and tasks, not with its files, and nothing is shared with it any more; the
        versions that it had. Where this is cut off a suspended tenant is left, which the audit has as deleted, and it
        can be called again. Raises NotFoundError, InvalidTenantError, ConflictError for `default`, and where it
        `leaves_a_key` and no tenant would have one."""
        if check_tenant_name(name) == DEFAULT_TENANT:
            raise ConflictError(f"tenant {DEFAULT_TENANT!r} cannot be deleted")
        if leaves_a_key:
            self.change(name, check_key_left, by=by)
        self.update_tenant(name, partial(_suspended, name), lambda _: [by.entry(name, "delete-tenant", name)], by=by)
        self._end_shares(name, by.let_in)
        gone = self.change(name, partial(delete_all, leaves_a_key=leaves_a_key))
        return [version for task in gone for version in task.versions]

    def _end_shares(self, name: str, by: Author) -> None:
        after = ""
        while found := self.list_shared(name, PAGE, after):
            for task in found:
                if name in task.shared_with:
                    self.change(task.tenant, partial(end_share, name=task.name, tenant=name), by=by)
            after = f"{found[-1].tenant}/{found[-1].name}"

    def tenants_revision(self) -> int:
        """Rises with every change of any tenant. For replicas and servers: what a tenant is shown it does not."""
        ...

    def append_audit(self, entry: AuditEntry) -> AuditEntry:
        """The entry with its number in its tenant's audit."""
        ...

    def list_audit(self, tenant: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        """Newest first, of one tenant or all, from the last whose number in this list is less than `before`."""
        ...

    def add_usage(self, rows: Iterable[Usage], batch: str) -> None:
        """Add to what is stored: all rows, or none. After UnavailableError they may have been added: rows of the same
        `batch`, an id of the caller's, are added once within a day, however often they are given."""
        ...

    def usage(self, tenant: str | None, first_day: str, last_day: str) -> list[Usage]:
        """Of one tenant or all, both days included, by day, tenant, task and version."""
        ...

    def take(
        self,
        tenant: str,
        bucket: str,
        amount: float,
        capacity: float,
        per_s: float,
        now: float,
        *,
        may_owe: bool = False,
    ) -> Taken:
        """Take `amount` out of a bucket that starts with `capacity` and gains `per_s` a second, or nothing. `may_owe`:
        take it even if the bucket sinks below nothing, which it then makes good for first. A negative amount gives
        back. `now` is the caller's clock in seconds; a registry that others share has its own."""
        ...

    def close(self) -> None: ...


def _suspended(name: str, tenant: Tenant | None) -> Tenant:
    if tenant is None:
        raise NotFoundError(f"no tenant {name!r}")
    return replace(tenant, is_suspended=True)

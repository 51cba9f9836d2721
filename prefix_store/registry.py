"""What the store knows about tasks and versions, and the contract of the registries that keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prefix_store.ensemble import KIND, Ensemble
from prefix_store.errors import NotFoundError, PreconditionFailedError
from prefix_store.prefix import Layout


@dataclass(frozen=True)
class NewVersion:
    """A version before it has a number. `num_bytes` is the native file's size (0: it has none, being an ensemble);
    `base` how it was matched with the model."""

    digest: str
    content: Layout | Ensemble
    num_bytes: int
    base: str
    base_model: str
    fingerprint: str
    note: str

    @property
    def kind(self) -> str:
        return KIND if isinstance(self.content, Ensemble) else self.content.kind

    @property
    def num_virtual_tokens(self) -> int:
        return self.content.num_virtual_tokens


@dataclass(frozen=True)
class Version(NewVersion):
    """Immutable."""

    tenant: str
    task: str
    version: int
    created_at_s: float


@dataclass(frozen=True)
class Task:
    """A name and its versions, oldest first. `revision` changes with every change and is never used again."""

    tenant: str
    name: str
    revision: int
    active: int | None
    previous: int | None
    is_pinned: bool
    versions: tuple[Version, ...]

    def find(self, version: str | None) -> Version:
        """The version of a reference: None (active), `previous`, a number, a digest's beginning."""
        if version is None or version == "previous":
            number = self.active if version is None else self.previous
            found = [v for v in self.versions if v.version == number]
        elif len(version) < 12:
            found = [v for v in self.versions if str(v.version) == version]
        else:
            found = [v for v in self.versions if v.digest.startswith(version)]
        if len(found) != 1:
            if version is None:
                raise NotFoundError(f"task {self.name!r} has no active version")
            raise NotFoundError(f"no version {version!r} of task {self.name!r}")
        return found[0]


@dataclass(frozen=True)
class Precondition:
    """`If-Match` (None: not given; `*` any) against a task's revision or a version's digest; `If-None-Match: *`."""

    if_match: frozenset[str] | None = None
    must_be_new: bool = False

    def check(self, etag: str | None) -> None:
        """Raises PreconditionFailedError. `etag` None: there is nothing yet."""
        if self.must_be_new and etag is not None:
            raise PreconditionFailedError(f"If-None-Match: expected nothing there, found revision {etag}")
        if self.if_match is None or (etag is not None and self.if_match & {etag, "*"}):
            return
        raise PreconditionFailedError(f"If-Match: expected {', '.join(sorted(self.if_match))}, found {etag}")


ANY = Precondition()


class Registry(Protocol):
    """Every method is atomic, and durable when it returns. Tasks are found by tenant and name only."""

    def add_version(
        self,
        tenant: str,
        task: str,
        new: NewVersion,
        activate: bool | None,
        precondition: Precondition,
        confirm: Callable[[], object],
    ) -> tuple[Task, Version, bool]:
        """The task, the version and whether it is new. `confirm` runs while no `release_unused` can. Raises
        NotFoundError for an ensemble whose members are not all there."""
        ...

    def get_task(self, tenant: str, task: str) -> Task | None: ...

    def list_tasks(self, tenant: str, limit: int, after: str) -> list[Task]:
        """By name, from the first after `after`."""
        ...

    def activate(self, tenant: str, task: str, version: str, precondition: Precondition) -> Task: ...

    def set_pinned(self, tenant: str, task: str, is_pinned: bool) -> Task: ...

    def pinned_tasks(self) -> list[Task]: ...

    def delete_version(self, tenant: str, task: str, version: str, precondition: Precondition) -> Version:
        """Raises ConflictError for the active version and for a member of an ensemble, naming the ensemble."""
        ...

    def delete_task(self, tenant: str, task: str, precondition: Precondition) -> Task:
        """Raises ConflictError where another task's ensemble has one of its versions."""
        ...

    def digests(self) -> set[str]:
        """All that any version refers to."""
        ...

    def release_unused(self, digests: set[str], drop: Callable[[str], None]) -> None:
        """Call `drop` for each of `digests` that no version refers to, while no `confirm` can run."""
        ...

    def close(self) -> None: ...

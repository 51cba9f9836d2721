"""A task: a name that points to versions, each immutable."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field, replace

from prefix_store.ensemble import KIND, Ensemble
from prefix_store.errors import NotFoundError, PreconditionFailedError
from prefix_store.prefix import Layout

EVERYONE = "*"
UNVERIFIED = "unverified"


@dataclass(frozen=True)
class NewVersion:
    """A version before it has a number. `num_bytes` is the native file's size (0: it has none, being an ensemble).

    `base` says how the artefact was matched with the model `base_model` of this `fingerprint`, `claimed_base` what its
    file names as its base model, and `is_base_accepted` that a caller took it although it was not matched.
    """

    digest: str
    content: Layout | Ensemble
    num_bytes: int
    base: str
    base_model: str
    fingerprint: str
    note: str
    claimed_base: str | None = field(default=None, kw_only=True)
    is_base_accepted: bool = field(default=False, kw_only=True)

    @property
    def may_go_live(self) -> bool:
        """Whether its base model was matched, or accepted as it is. One of another model is stored only if accepted."""
        return self.base != UNVERIFIED or self.is_base_accepted

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
    """A name and its versions, oldest first. `revision` changes with every change and is never used again, nor is a
    version's number: `last_version` is the highest so far.

    `weights` are versions and their shares of the traffic (none: all goes to `active`), `live_before` the version that
    was live when they were set (None: no weights, or weights of a release that did not keep it), `shared_with` the
    tenants that may use it, or `*`, and `quarantined` the versions that failed at run time.
    """

    tenant: str
    name: str
    revision: int
    active: int | None
    previous: int | None
    is_pinned: bool
    versions: tuple[Version, ...]
    last_version: int = 0
    weights: tuple[tuple[int, int], ...] = ()
    is_disabled: bool = False
    shared_with: tuple[str, ...] = ()
    quarantined: tuple[int, ...] = ()
    live_before: int | None = None

    @property
    def live(self) -> int | None:
        """The version that has all traffic; while weights are set, the one that had it when they were set."""
        return self.live_before or self.active if self.weights else self.active

    @property
    def rollback_version(self) -> int | None:
        """What the reference `previous` names: a rollback ends weights before it goes back further."""
        return self.live if self.weights else self.previous

    def pointed_to(self, version: int) -> Task:
        """The task with all its traffic at `version`."""
        changed = replace(self, active=version, weights=(), live_before=None)
        return changed if version == self.live else replace(changed, previous=self.live)

    def find(self, version: str | None) -> Version:
        """The version of a reference: None (active), `previous`, a number, a digest's beginning. Raises
        NotFoundError."""
        if version is None or version == "previous":
            number = self.active if version is None else self.rollback_version
            found = [v for v in self.versions if v.version == number]
        elif len(version) < 12:
            found = [v for v in self.versions if str(v.version) == version]
        else:
            found = [v for v in self.versions if v.digest.startswith(version)]
        if len(found) != 1:
            if version is None:
                stored = f"; stored: {', '.join(str(v.version) for v in self.versions[-4:])}" if self.versions else ""
                raise NotFoundError(f"task {self.name!r} has no active version{stored}")
            raise NotFoundError(f"no version {version!r} of task {self.name!r}")
        return found[0]

    def with_version(self, changed: Version) -> Task:
        """The task with `changed` in the place of the version of its number."""
        versions = tuple(changed if each.version == changed.version else each for each in self.versions)
        return replace(self, versions=versions)

    def choose(self, session: str | None = None) -> Version:
        """A version for one request: by the weights, the same for every request of a session as long as they are the
        same; without weights the active one. Raises NotFoundError."""
        if not self.weights:
            return self.find(None)
        total = sum(weight for _, weight in self.weights)
        if session is None:
            place = secrets.randbelow(total)
        else:
            place = int.from_bytes(hashlib.sha256(session.encode()).digest()[:16]) % total
        for version, weight in self.weights:
            if place < weight:
                return self.find(str(version))
            place -= weight
        raise AssertionError("a place is less than the sum of the weights")

    @property
    def fingerprint(self) -> str | None:
        """Of the model that the active version was stored for."""
        return next((version.fingerprint for version in self.versions if version.version == self.active), None)

    @property
    def in_service(self) -> tuple[Version, ...]:
        """The versions that requests without one may get."""
        numbers: set[int | None] = {version for version, _ in self.weights} or {self.active}
        return tuple(version for version in self.versions if version.version in numbers)

    def is_shared_with(self, tenant: str) -> bool:
        return tenant in self.shared_with or EVERYONE in self.shared_with


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

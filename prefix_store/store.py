"""The store: artefacts in, versions out. It knows nothing of HTTP, scheduling or the forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from prefix_store import task_changes
from prefix_store.admission import BASES, BASES_TO_ACCEPT, check_name, match_base
from prefix_store.audit import SERVER, Author
from prefix_store.blobs import Blobs
from prefix_store.draft import Stored
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import (
    DisabledError,
    IncompatibleError,
    InvalidArtefactError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
    in_full,
)
from prefix_store.file_owner import check_owner
from prefix_store.host_cache import HostCache
from prefix_store.names import TaskRef, is_task_name, known_version, parse_ref
from prefix_store.native_format import digest_of, read_native, write_native
from prefix_store.peft_format import read_peft
from prefix_store.prefix import Layout, ModelShape, Prefix
from prefix_store.printable import first_unprintable
from prefix_store.registry import NewFile, Registry, TaskCounts
from prefix_store.sweep import RULES, SweepRules, Swept, sweep
from prefix_store.task import ANY, NewVersion, Precondition, Task, Version
from prefix_store.task_changes import DeviceBytes, Published
from prefix_store.tenants import is_tenant_name
from prefix_store.upload import Upload

T = TypeVar("T")
MAX_NOTE = 200


class PrefixStore:
    """Versions of tasks for one model. All methods may be called from any thread, and raise UnavailableError where the
    registry cannot be reached, or a file cannot be written. Changes are in the audit as the author's, `by`."""

    def __init__(
        self, registry: Registry, blobs: Blobs, shape: ModelShape, *, max_host_bytes: int = 256 * 2**20
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._shape = shape
        self._loaded = HostCache(max_host_bytes)

    def sweep(self, rules: SweepRules = RULES) -> Swept:
        """Move files that no version refers to out of the way, and remove parts that killed writers left. Without the
        registry nothing can be told to be unused; what cannot be moved or deleted stays."""
        try:
            return sweep(self._registry, self._blobs, rules)
        except (UnavailableError, StorageFullError) as error:
            return Swept(reason=in_full(error))

    def parse_native(self, body: bytes) -> Prefix:
        """A validated prefix from a native file. Raises InvalidArtefactError."""
        return read_native(body, self._shape)

    def parse_peft(self, config: bytes, weights: bytes, index: int | None = None) -> Prefix:
        """A validated prefix from PEFT's two files. Raises InvalidArtefactError."""
        return read_peft(config, weights, self._shape, index)

    def match_base(self, prefix: Prefix, accept_base: bool = False, base_fingerprint: str | None = None) -> str:
        """As `admission.match_base`, with the store's model. Raises BaseMismatchError."""
        return match_base(prefix, self._shape, accept_base, base_fingerprint)

    def publish(
        self,
        tenant: str,
        task: str,
        prefix: Prefix,
        *,
        base: str,
        accept_base: bool = False,
        note: str = "",
        activate: bool | None = None,
        precondition: Precondition = ANY,
        within_limits: bool = False,
        by: Author = SERVER,
    ) -> Published:
        """Store a new version: when this returns it survives anything. `activate` None: it goes live unless weights
        are set, or nothing says for which model it was trained and the caller does not accept that (`accept_base`).
        `within_limits`: the tenant is there and its limits hold. Raises UnverifiedBaseError for one that is to go live
        and may not, QuotaError, ArtefactTooLargeError, PreconditionFailedError, StorageFullError, NotFoundError for a
        tenant that is gone, ForeignFilesError."""
        body = write_native(replace(prefix, base_model=self._shape.model_name, fingerprint=self._shape.fingerprint))
        new = self._new_version(task, digest_of(body), prefix.layout, len(body), base, note)
        is_accepted = accept_base and base in BASES_TO_ACCEPT
        new = replace(new, claimed_base=prefix.base_model, is_base_accepted=is_accepted)
        check_owner(self._registry, self._blobs, f"store a file of {len(body)} bytes")
        upload = Upload(self._blobs, tenant, body)
        try:
            return self._add_version(tenant, task, new, activate, precondition, within_limits, upload, by)
        except BaseException:
            self._drop_unused(tenant, {new.digest})
            raise

    def make_ensemble(self, tenant: str, members: Sequence[str], rule: str) -> Ensemble:
        """Of members `T@V` (`T`: the active one). Raises InvalidArtefactError naming one that cannot be."""
        found = []
        for i, ref in enumerate(members):
            try:
                parsed = parse_ref(ref)
                if parsed.owner not in (None, tenant):
                    raise InvalidArtefactError(f"expected a task of this tenant, got {ref!r}")
                version = self._checked(self.get_task(tenant, parsed.task).find(parsed.version))
            except (NotFoundError, IncompatibleError, InvalidArtefactError) as error:
                raise InvalidArtefactError(f"members[{i}]: {error}") from error
            if isinstance(version.content, Ensemble):
                raise InvalidArtefactError(f"members[{i}]: {ref!r} is an ensemble itself; name its members")
            found.append(Member(version.task, version.version, version.digest, version.content))
        return Ensemble(tuple(found), rule)  # type: ignore[arg-type]  # it checks its rule

    def publish_ensemble(
        self,
        tenant: str,
        task: str,
        ensemble: Ensemble,
        *,
        accept_base: bool = False,
        note: str = "",
        activate: bool | None = None,
        precondition: Precondition = ANY,
        within_limits: bool = False,
        by: Author = SERVER,
    ) -> Published:
        """As `publish`; matched with the model as the worst of its members, and accepted where they are. Raises
        NotFoundError if a member was deleted meanwhile."""
        members = [self.get_version(tenant, m.task, str(m.version)) for m in ensemble.members]
        base = max((member.base for member in members), key=BASES.index)
        new = self._new_version(task, ensemble.digest, ensemble, 0, base, note)
        is_accepted = accept_base or all(member.may_go_live for member in members)
        new = replace(new, is_base_accepted=is_accepted and base in BASES_TO_ACCEPT)
        return self._add_version(tenant, task, new, activate, precondition, within_limits, None, by)

    def _add_version(
        self,
        tenant: str,
        task: str,
        new: NewVersion,
        activate: bool | None,
        precondition: Precondition,
        within_limits: bool,
        upload: Upload | None,
        by: Author,
    ) -> Published:
        add = partial(task_changes.add_version, name=task, new=new, within_limits=within_limits, now_s=time.time())
        add = partial(add, activate=activate, precondition=precondition)
        if upload is None:
            return self._registry.change(tenant, add, by=by)
        add = partial(add, is_repair=lambda: upload.is_stored)
        return self._registry.change(tenant, add, NewFile(new.digest, upload.put), by=by)

    def _new_version(
        self, task: str, digest: str, content: Layout | Ensemble, num_bytes: int, base: str, note: str
    ) -> NewVersion:
        self.check_name(task)
        if len(note) > MAX_NOTE:
            raise InvalidArtefactError(f"note must be <= {MAX_NOTE} characters, got {len(note)}")
        if found := first_unprintable(note):
            raise InvalidArtefactError(f"note must be printable text on one line, got {found}")
        return NewVersion(
            digest=digest,
            content=content,
            num_bytes=num_bytes,
            base=base,
            base_model=self._shape.model_name,
            fingerprint=self._shape.fingerprint,
            note=note,
        )

    def check_name(self, task: str) -> None:
        """Raises InvalidArtefactError for a name that a task cannot have."""
        check_name(task, self._shape)

    def resolve(self, tenant: str, ref: str, session: str | None = None, *, any_owner: bool = False) -> Version:
        """The version that `T`, `T@V`, `owner/T` or `owner/T@V` means for a request of this session. Raises
        NotFoundError, the same for a task of others that is not there and one that is not shared; DisabledError,
        IncompatibleError."""
        parsed = parse_ref(ref)
        task = self.usable_task(tenant, parsed, any_owner=any_owner)
        if task.is_disabled:
            raise DisabledError(f"task {parsed.name!r} is disabled")
        return self._checked(task.choose(session) if parsed.version is None else task.find(parsed.version))

    def usable_task(self, tenant: str, ref: TaskRef, *, any_owner: bool = False) -> Task:
        """The tenant's own task, or another's that is shared with it; with `any_owner`, as an operator asks, any.
        Raises NotFoundError."""
        if ref.owner is None or ref.owner == tenant:
            return self.get_task(tenant, ref.task)
        if not is_task_name(ref.task) or not is_tenant_name(ref.owner):
            raise NotFoundError(f"no task {ref.name[:140]!r}")
        if any_owner:
            return self.get_task(ref.owner, ref.task)
        if self._registry.is_shared(ref.owner, ref.task, tenant):
            found = self._registry.get_task(ref.owner, ref.task)
            if found is not None and found.is_shared_with(tenant):
                return found
        raise NotFoundError(f"no task {ref.name!r}")

    def _checked(self, version: Version) -> Version:
        if not self.is_compatible(version):
            raise IncompatibleError(
                f"version {version.version} of task {version.task!r} was stored for {version.base_model} "
                f"({version.fingerprint[:12]}…), served is {self._shape.model_name} ({self._shape.fingerprint[:12]}…)"
            )
        return version

    def is_compatible(self, version: Version) -> bool:
        return version.fingerprint == self._shape.fingerprint

    def get_task(self, tenant: str, task: str) -> Task:
        """The tenant's own. Raises NotFoundError."""
        found = self._registry.get_task(tenant, task) if is_task_name(task) else None
        if found is None:
            raise NotFoundError(f"no task {task[:80]!r}")
        return found

    def has_task(self, tenant: str, task: str) -> bool:
        return self._registry.get_task(tenant, task) is not None

    def get_version(self, tenant: str, task: str, version: str) -> Version:
        """The tenant's own, of whatever model. Raises NotFoundError."""
        return self.get_task(tenant, task).find(known_version(task, version))

    def list_tasks(self, tenant: str, limit: int = 100, after: str = "") -> list[Task]:
        return self._registry.list_tasks(tenant, limit, after)

    def list_shared(self, tenant: str, limit: int = 1000, after: str = "") -> list[Task]:
        """Other tenants' tasks that this one may use, by `owner/T`, from the first after `after`."""
        return self._registry.list_shared(tenant, limit, after)

    def count_tasks(self, tenant: str | None = None) -> TaskCounts:
        """Of one tenant or all: the tasks, and those that this model cannot serve."""
        return self._registry.count_tasks(self._shape.fingerprint, tenant)

    def stored(self, tenant: str) -> Stored:
        """What counts towards the tenant's limits."""
        return self._registry.stored(tenant)

    def activate(
        self,
        tenant: str,
        task: str,
        version: str,
        precondition: Precondition = ANY,
        *,
        accept_base: bool = False,
        base_fingerprint: str | None = None,
        by: Author = SERVER,
    ) -> Task:
        """Point the task to a version, and clear its weights; `previous` rolls back. A version whose base model is
        unverified goes live if accepted, or with the fingerprint of the model that it was trained for. Raises
        NotFoundError, PreconditionFailedError, UnverifiedBaseError, BaseMismatchError."""
        given = {"precondition": precondition, "accept_base": accept_base, "base_fingerprint": base_fingerprint}
        number = known_version(task, version)
        return self._change(tenant, task, by, task_changes.activate, version=number, **given)

    def set_weights(
        self,
        tenant: str,
        task: str,
        weights: Mapping[str, int],
        precondition: Precondition = ANY,
        *,
        accept_base: bool = False,
        base_fingerprint: str | None = None,
        by: Author = SERVER,
    ) -> Task:
        """Divide the task's traffic between versions, each as in `activate`. Raises InvalidChangeError, NotFoundError,
        PreconditionFailedError, UnverifiedBaseError, BaseMismatchError."""
        given = {"precondition": precondition, "accept_base": accept_base, "base_fingerprint": base_fingerprint}
        wanted = {known_version(task, version): weight for version, weight in weights.items()}
        return self._change(tenant, task, by, task_changes.set_weights, weights=wanted, **given)

    def check_pinnable(self, tenant: str, task: str, device_bytes: DeviceBytes) -> None:
        """Raises NotFoundError, QuotaError as `set_pinned` would."""
        self._change(tenant, task, SERVER, task_changes.check_pinnable, device_bytes=device_bytes)

    def set_pinned(
        self,
        tenant: str,
        task: str,
        is_pinned: bool,
        device_bytes: DeviceBytes | None = None,
        *,
        by: Author = SERVER,
    ) -> Task:
        """`device_bytes`: pinned only within what the tenant may pin. Raises NotFoundError, QuotaError."""
        pin = partial(task_changes.set_pinned, is_pinned=is_pinned, device_bytes=device_bytes)
        return self._change(tenant, task, by, pin)

    def set_enabled(self, tenant: str, task: str, is_enabled: bool, *, by: Author = SERVER) -> Task:
        """A task that is not enabled cannot be resolved. Raises NotFoundError."""
        return self._change(tenant, task, by, task_changes.set_enabled, is_enabled=is_enabled)

    def share(
        self, tenant: str, task: str, tenants: Iterable[str], precondition: Precondition = ANY, *, by: Author = SERVER
    ) -> Task:
        """Let exactly these tenants use the task, `*` everyone, none nobody. Raises NotFoundError, InvalidTenantError,
        InvalidChangeError, PreconditionFailedError."""
        return self._change(tenant, task, by, task_changes.share, tenants=tuple(tenants), precondition=precondition)

    def quarantine(self, tenant: str, task: str, version: int) -> Task | None:
        """Take a version out of service that failed at run time. None: it was quarantined before. Raises
        NotFoundError."""
        return self._change(tenant, task, SERVER, task_changes.quarantine, version=version)

    def pinned_versions(self) -> list[Version]:
        """The versions in service of pinned tasks that this model can serve."""
        found = [version for task in self._registry.pinned_tasks() for version in task.in_service]
        return [version for version in found if self.is_compatible(version)]

    def delete_version(
        self, tenant: str, task: str, version: str, precondition: Precondition = ANY, *, by: Author = SERVER
    ) -> Version:
        """Raises NotFoundError, PreconditionFailedError, ConflictError for one in service or in an ensemble."""
        number = known_version(task, version)
        gone = self._change(tenant, task, by, task_changes.delete_version, version=number, precondition=precondition)
        self._drop_unused(tenant, {gone.digest})
        return gone

    def delete_task(self, tenant: str, task: str, precondition: Precondition = ANY, *, by: Author = SERVER) -> Task:
        """All its versions go. Raises NotFoundError, PreconditionFailedError, ConflictError."""
        gone = self._change(tenant, task, by, task_changes.delete_task, precondition=precondition)
        self._drop_unused(tenant, {version.digest for version in gone.versions})
        return gone

    def delete_tenant(self, name: str, *, by: Author = SERVER, leaves_a_key: bool = False) -> list[Version]:
        """The tenant goes with its keys, tasks and files; the versions that it had. Raises as the registry's."""
        gone = self._registry.delete_tenant(name, by=by, leaves_a_key=leaves_a_key)
        self._drop_unused(name, {version.digest for version in gone})
        return gone

    def has_file(self, tenant: str, digest: str) -> bool:
        """Whether any version of any of the tenant's tasks still refers to this content."""
        return self._blobs.exists(tenant, digest)

    def file_bytes(self, version: Version) -> bytes:
        """The native file. Raises DamagedBlobError, NotFoundError for an ensemble."""
        if isinstance(version.content, Ensemble):
            raise NotFoundError(f"{version.task}@{version.version} is an ensemble: its members have files, it has none")
        return self._blobs.get(version.tenant, version.digest)

    def load(self, tenant: str, digest: str) -> Prefix:
        """The source form of a tenant's own content, from host memory or the blob. Raises DamagedBlobError,
        InvalidArtefactError."""
        found = self._loaded.get(tenant, digest)
        if found is None:
            found = read_native(self._blobs.get(tenant, digest), self._shape)
            self._loaded.put(tenant, digest, found)
        return found

    def close(self) -> None:
        self._registry.close()

    def _change(self, tenant: str, task: str, by: Author, decide: Callable[..., T], **given: object) -> T:
        """Of a task that is there. Raises NotFoundError."""
        self.get_task(tenant, task)
        return self._registry.change(tenant, partial(decide, name=task, **given), by=by)

    def _drop_unused(self, tenant: str, digests: set[str]) -> None:
        """What cannot be deleted now the next start sweeps: the change itself is done."""
        for digest in digests:
            self._loaded.drop(tenant, digest)
        with suppress(UnavailableError, StorageFullError):
            check_owner(self._registry, self._blobs)
            self._registry.release_unused(tenant, digests, partial(self._blobs.delete, tenant))

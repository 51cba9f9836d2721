"""The store: artefacts in, versions out. It knows nothing of HTTP, scheduling or the forward pass."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefix_store.admission import BASES, check_name, match_base
from prefix_store.blobs import Blobs
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import IncompatibleError, InvalidArtefactError, NotFoundError
from prefix_store.names import is_task_name, is_version, parse_ref
from prefix_store.native_format import digest_of, read_native, write_native
from prefix_store.peft_format import read_peft
from prefix_store.prefix import Layout, ModelShape, Prefix
from prefix_store.registry import ANY, NewVersion, Precondition, Registry, Task, Version

MAX_NOTE = 200


@dataclass(frozen=True)
class Published:
    """What an upload became. `is_new` False: the task had this content already."""

    task: Task
    version: Version
    is_new: bool


class PrefixStore:
    """Versions of tasks for one model. All methods may be called from any thread."""

    def __init__(
        self, registry: Registry, blobs: Blobs, shape: ModelShape, *, max_host_bytes: int = 256 * 2**20
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._shape = shape
        self._max_host_bytes = max_host_bytes
        self._loaded: OrderedDict[str, Prefix] = OrderedDict()
        self._loaded_bytes = 0
        self._lock = threading.Lock()

    def sweep(self) -> None:
        """Remove what killed writers left: parts of files, and files that no version refers to."""
        self._blobs.sweep()
        orphans = self._blobs.digests() - self._registry.digests()
        if orphans:
            self._registry.release_unused(orphans, self._blobs.delete)

    def parse_native(self, body: bytes) -> Prefix:
        """A validated prefix from a native file. Raises InvalidArtefactError."""
        return read_native(body, self._shape)

    def parse_peft(self, config: bytes, weights: bytes, index: int | None = None) -> Prefix:
        """A validated prefix from PEFT's two files. Raises InvalidArtefactError."""
        return read_peft(config, weights, self._shape, index)

    def match_base(self, prefix: Prefix, accept_base: bool = False) -> str:
        """`verified`, `name-match`, `unverified` or, accepted, `mismatch`. Raises BaseMismatchError."""
        return match_base(prefix, self._shape, accept_base)

    def publish(
        self,
        tenant: str,
        task: str,
        prefix: Prefix,
        *,
        base: str,
        note: str = "",
        activate: bool | None = None,
        precondition: Precondition = ANY,
    ) -> Published:
        """Store a new version: when this returns it survives anything. `activate` None: it goes live."""
        body = write_native(replace(prefix, base_model=self._shape.model_name, fingerprint=self._shape.fingerprint))
        new = self._new_version(task, digest_of(body), prefix.layout, len(body), base, note)
        digest = self._blobs.put(body)
        try:
            # A delete of the same content may have come between: then the blob is put again.
            found, version, is_new = self._registry.add_version(
                tenant, task, new, activate, precondition, lambda: self._blobs.put(body)
            )
        except BaseException:
            self._registry.release_unused({digest}, self._blobs.delete)
            raise
        return Published(found, version, is_new)

    def make_ensemble(self, tenant: str, members: Sequence[str], rule: str) -> Ensemble:
        """Of members `T@V` (`T`: what it points to now). Raises InvalidArtefactError naming one that cannot be."""
        found = []
        for i, ref in enumerate(members):
            try:
                version = self.resolve(tenant, ref)
            except (NotFoundError, IncompatibleError) as error:
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
        note: str = "",
        activate: bool | None = None,
        precondition: Precondition = ANY,
    ) -> Published:
        """As `publish`; matched with the model as the worst of its members. Raises NotFoundError if a member was
        deleted meanwhile."""
        matched = {self.get_version(tenant, m.task, str(m.version)).base for m in ensemble.members}
        new = self._new_version(task, ensemble.digest, ensemble, 0, max(matched, key=BASES.index), note)
        found, version, is_new = self._registry.add_version(tenant, task, new, activate, precondition, lambda: None)
        return Published(found, version, is_new)

    def _new_version(
        self, task: str, digest: str, content: Layout | Ensemble, num_bytes: int, base: str, note: str
    ) -> NewVersion:
        self.check_name(task)
        if len(note) > MAX_NOTE:
            raise InvalidArtefactError(f"note must be <= {MAX_NOTE} characters, got {len(note)}")
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

    def resolve(self, tenant: str, ref: str) -> Version:
        """The version that `T` or `T@V` means now. Raises NotFoundError, IncompatibleError."""
        parsed = parse_ref(ref)
        version = self.get_task(tenant, parsed.task).find(parsed.version)
        if not self.is_compatible(version):
            raise IncompatibleError(
                f"version {version.version} of task {version.task!r} was stored for {version.base_model} "
                f"({version.fingerprint[:12]}…), served is {self._shape.model_name} ({self._shape.fingerprint[:12]}…)"
            )
        return version

    def is_compatible(self, version: Version) -> bool:
        return version.fingerprint == self._shape.fingerprint

    def get_task(self, tenant: str, task: str) -> Task:
        """Raises NotFoundError."""
        found = self._registry.get_task(tenant, task) if is_task_name(task) else None
        if found is None:
            raise NotFoundError(f"no task {task[:80]!r}")
        return found

    def has_task(self, tenant: str, task: str) -> bool:
        return self._registry.get_task(tenant, task) is not None

    def get_version(self, tenant: str, task: str, version: str) -> Version:
        """As `resolve`, of whatever model. Raises NotFoundError."""
        return self.get_task(tenant, task).find(_checked(task, version))

    def list_tasks(self, tenant: str, limit: int = 100, after: str = "") -> list[Task]:
        return self._registry.list_tasks(tenant, limit, after)

    def activate(self, tenant: str, task: str, version: str, precondition: Precondition = ANY) -> Task:
        """Point the task to a version; `previous` rolls back. Raises NotFoundError, PreconditionFailedError."""
        self.get_task(tenant, task)
        return self._registry.activate(tenant, task, _checked(task, version), precondition)

    def set_pinned(self, tenant: str, task: str, is_pinned: bool) -> Task:
        self.get_task(tenant, task)
        return self._registry.set_pinned(tenant, task, is_pinned)

    def pinned_versions(self) -> list[Version]:
        """The active versions of pinned tasks that this model can serve."""
        active = [v for task in self._registry.pinned_tasks() for v in task.versions if v.version == task.active]
        return [version for version in active if self.is_compatible(version)]

    def delete_version(self, tenant: str, task: str, version: str, precondition: Precondition = ANY) -> Version:
        """Raises NotFoundError, ConflictError for the active one."""
        self.get_task(tenant, task)
        gone = self._registry.delete_version(tenant, task, _checked(task, version), precondition)
        self._release([gone])
        return gone

    def delete_task(self, tenant: str, task: str, precondition: Precondition = ANY) -> Task:
        """All its versions go. Raises NotFoundError."""
        self.get_task(tenant, task)
        gone = self._registry.delete_task(tenant, task, precondition)
        self._release(list(gone.versions))
        return gone

    def has_file(self, digest: str) -> bool:
        """Whether any version of any task still refers to this content."""
        return self._blobs.exists(digest)

    def file_bytes(self, version: Version) -> bytes:
        """The native file. Raises DamagedBlobError, NotFoundError for an ensemble."""
        if isinstance(version.content, Ensemble):
            raise NotFoundError(f"{version.task}@{version.version} is an ensemble: its members have files, it has none")
        return self._blobs.get(version.digest)

    def load(self, digest: str) -> Prefix:
        """The source form, from host memory or the blob. Raises DamagedBlobError, InvalidArtefactError."""
        with self._lock:
            found = self._loaded.get(digest)
            if found is not None:
                self._loaded.move_to_end(digest)
                return found
        prefix = read_native(self._blobs.get(digest), self._shape)
        with self._lock:
            if digest not in self._loaded:
                self._loaded[digest] = prefix
                self._loaded_bytes += prefix.num_bytes
            while self._loaded_bytes > self._max_host_bytes:
                self._loaded_bytes -= self._loaded.popitem(last=False)[1].num_bytes
        return prefix

    def close(self) -> None:
        self._registry.close()

    def _release(self, versions: list[Version]) -> None:
        digests = {version.digest for version in versions}
        with self._lock:
            for digest in digests & set(self._loaded):
                self._loaded_bytes -= self._loaded.pop(digest).num_bytes
        self._registry.release_unused(digests, self._blobs.delete)


def _checked(task: str, version: str) -> str:
    if not is_version(version):
        raise NotFoundError(f"no version {version[:80]!r} of task {task!r}")
    return version

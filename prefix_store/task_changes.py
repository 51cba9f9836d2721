"""What may be changed about tasks, decided on a draft: the same for every registry.

Each function may be called again on a later draft, so none does anything but read and write its draft. A change that
leaves a task as it was writes nothing. Each tells the audit what was asked for, also where nothing had to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from prefix_store.draft import Draft
from prefix_store.ensemble import Ensemble
from prefix_store.errors import (
    ArtefactTooLargeError,
    ConflictError,
    InvalidChangeError,
    MemberError,
    NotFoundError,
    QuotaError,
)
from prefix_store.task import EVERYONE, NewVersion, Precondition, Task, Version
from prefix_store.tenants import Limits, check_tenant_name

MAX_WEIGHTS = 4
MAX_WEIGHT = 1_000_000
MAX_SHARES = 256
DeviceBytes = Callable[[Iterable[Version]], int]  # what prefixes take, or would


@dataclass(frozen=True)
class Published:
    """What an upload became. `is_new` False: the task had this content already. `is_repair`: its file had been missing
    or damaged before."""

    task: Task
    version: Version
    is_new: bool
    is_repair: bool = False


def add_version(
    draft: Draft,
    name: str,
    new: NewVersion,
    *,
    activate: bool | None,
    precondition: Precondition,
    within_limits: bool,
    now_s: float,
    is_repair: Callable[[], bool] = lambda: False,
) -> Published:
    """`activate` None: it goes live unless weights are set. `within_limits`: the tenant is there and its limits hold.
    `is_repair`: whether the content's file was missing or damaged; then no version with this content stays
    quarantined. Raises PreconditionFailedError, NotFoundError for an ensemble whose members are not all there and for
    a tenant that is gone, QuotaError and ArtefactTooLargeError beyond the limits."""
    limits = draft.account.limits if within_limits else Limits()
    task = draft.get(name)
    precondition.check(None if task is None else str(task.revision))
    if task is None:
        task = Task(draft.tenant, name, 0, None, None, False, ())
    known = next((version for version in task.versions if version.digest == new.digest), None)
    if is_repair():
        _end_quarantine(draft, new.digest)
        task = draft.get(name) or task
    if known is not None:
        draft.record("publish-known", f"{name}@{known.version}")
        task = draft.put(task) if is_repair() else task  # replicas follow the revision
        return Published(_point(draft, task, known.version) if activate else task, known, False, is_repair())
    _check_limits(draft, new, limits)
    for member in new.content.members if isinstance(new.content, Ensemble) else ():
        if draft.present(member.task).find(str(member.version)).digest != member.digest:
            raise NotFoundError(f"no version {member} any more: it was deleted and made anew")
    version = Version(**vars(new), tenant=draft.tenant, task=name, version=task.last_version + 1, created_at_s=now_s)
    task = replace(task, versions=(*task.versions, version), last_version=version.version)
    draft.record("publish", f"{name}@{version.version}")
    is_live = activate or (activate is None and not task.weights)
    return Published(_point(draft, task, version.version) if is_live else draft.put(task), version, True)


def activate(draft: Draft, name: str, version: str, precondition: Precondition) -> Task:
    """All traffic goes to this version, were it weighted or quarantined before. Raises NotFoundError,
    PreconditionFailedError."""
    task = _checked(draft, name, precondition)
    number = task.find(version).version
    draft.record("activate", f"{name}@{number}")
    return _point(draft, task, number)


def set_weights(draft: Draft, name: str, weights: Mapping[str, int], precondition: Precondition) -> Task:
    """Traffic by weights. An active version without one gives its place to the heaviest. Raises InvalidChangeError,
    NotFoundError, PreconditionFailedError."""
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise InvalidChangeError(f"weights must name 1 to {MAX_WEIGHTS} versions, got {len(weights)}")
    for version, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            raise InvalidChangeError(f"weights must be 1 to {MAX_WEIGHT}, got {weight!r} for {version[:80]!r}")
    task = _checked(draft, name, precondition)
    found = {task.find(version).version: weight for version, weight in weights.items()}
    if len(found) < len(weights):
        raise InvalidChangeError(f"weights must name each version once, got {', '.join(sorted(weights))[:200]}")
    draft.record("activate", f"{name}@{','.join(f'{number}:{weight}' for number, weight in sorted(found.items()))}")
    changed = replace(
        task,
        weights=tuple(sorted(found.items())),
        quarantined=tuple(number for number in task.quarantined if number not in found),
    )
    return _put(draft, task, _with_weighted_active(changed))


def check_pinnable(draft: Draft, name: str, device_bytes: DeviceBytes) -> None:
    """Raises NotFoundError, QuotaError where the tenant's pinned tasks would take more device memory than it may
    pin."""
    limit = draft.account.limits.max_pinned_bytes
    tasks = {task.name: task for task in [*draft.pinned(), draft.present(name)]}
    num_bytes = device_bytes([version for task in tasks.values() for version in task.in_service])
    if limit is not None and num_bytes > limit:
        raise QuotaError(f"this tenant may pin {limit} bytes of device memory, with {name!r} it were {num_bytes}")


def set_pinned(draft: Draft, name: str, is_pinned: bool, device_bytes: DeviceBytes | None = None) -> Task:
    """`device_bytes`: pinned within the tenant's limit only. Raises NotFoundError, QuotaError."""
    task = draft.present(name)
    if is_pinned and device_bytes is not None:
        check_pinnable(draft, name, device_bytes)
    draft.record("pin" if is_pinned else "unpin", name)
    return _put(draft, task, replace(task, is_pinned=is_pinned))


def set_enabled(draft: Draft, name: str, is_enabled: bool) -> Task:
    task = draft.present(name)
    draft.record("enable" if is_enabled else "disable", name)
    return _put(draft, task, replace(task, is_disabled=not is_enabled))


def share(draft: Draft, name: str, tenants: Iterable[str], precondition: Precondition) -> Task:
    """Exactly these may use it, each of them a tenant that is there. Raises InvalidTenantError, InvalidChangeError,
    NotFoundError, PreconditionFailedError."""
    wanted = sorted({each if each == EVERYONE else check_tenant_name(each) for each in tenants} - {draft.tenant})
    if len(wanted) > MAX_SHARES:
        raise InvalidChangeError(f"a task is shared with <= {MAX_SHARES} tenants, or with *, got {len(wanted)}")
    task = _checked(draft, name, precondition)
    for each in wanted:
        if each not in (EVERYONE, *task.shared_with) and not draft.accounts.can_share_with(each):
            raise InvalidChangeError(f"a task is shared with tenants that are there, got {each!r}")
    draft.record("share", f"{name} with {', '.join(wanted) or 'nobody'}")
    return _put(draft, task, replace(task, shared_with=tuple(wanted)))


def end_share(draft: Draft, name: str, tenant: str) -> None:
    """Of a tenant that goes; the task may have gone before."""
    task = draft.get(name)
    if task is not None and tenant in task.shared_with:
        wanted = tuple(each for each in task.shared_with if each != tenant)
        draft.record("share", f"{name} with {', '.join(wanted) or 'nobody'}")
        draft.put(replace(task, shared_with=wanted))


def quarantine(draft: Draft, name: str, version: int) -> Task | None:
    """Take a version that failed out of service: its traffic goes to the remaining weights, else to the previous
    version. It stays in service where there is neither. None: it was quarantined before. Raises NotFoundError."""
    task = draft.present(name)
    failed = task.find(str(version))
    if version in task.quarantined:
        return None
    draft.record("quarantine", f"{name}@{version}")
    changed = replace(task, quarantined=(*task.quarantined, version))
    weights = tuple((number, weight) for number, weight in task.weights if number != version)
    if weights:
        changed = _with_weighted_active(replace(changed, weights=weights))
    elif version == task.active and _can_replace(task, failed, task.previous):
        changed = replace(changed, active=task.previous, previous=version, weights=())
    return draft.put(changed)


def _end_quarantine(draft: Draft, digest: str) -> None:
    """Of all versions with this content, and of the ensembles that have them as members."""
    repaired: dict[str, set[int]] = {}
    for name in draft.holders_of_file(digest):
        for number in [version.version for version in draft.present(name).versions if version.digest == digest]:
            repaired.setdefault(name, set()).add(number)
            for user, _, ensemble in (each.partition("@") for each in draft.users(name, number)):
                repaired.setdefault(user, set()).add(int(ensemble))
    for name, numbers in repaired.items():
        task = draft.present(name)
        _put(draft, task, replace(task, quarantined=tuple(each for each in task.quarantined if each not in numbers)))


def delete_version(draft: Draft, name: str, version: str, precondition: Precondition) -> Version:
    """Raises NotFoundError, PreconditionFailedError; ConflictError for one in service and for a member of an ensemble,
    naming the ensemble."""
    task = draft.present(name)
    gone = task.find(version)
    precondition.check(gone.digest)
    number = gone.version
    if number == task.active:
        raise ConflictError(f"version {number} of task {name!r} is active; activate another or delete the task")
    if number in dict(task.weights):
        raise ConflictError(f"version {number} of task {name!r} has a weight; take it from the weights first")
    _refuse_member(draft, name, number)
    draft.record("delete", f"{name}@{number}")
    draft.put(
        replace(
            task,
            versions=tuple(each for each in task.versions if each is not gone),
            previous=None if task.previous == number else task.previous,
            quarantined=tuple(each for each in task.quarantined if each != number),
        )
    )
    return gone


def delete_task(draft: Draft, name: str, precondition: Precondition) -> Task:
    """The task as it was. Raises NotFoundError, PreconditionFailedError; ConflictError where another task's ensemble
    has one of its versions."""
    task = _checked(draft, name, precondition)
    for version in task.versions:
        _refuse_member(draft, name, version.version, but_of=name)
    draft.record("delete", name)
    draft.remove(name)
    return task


def check_key_left(draft: Draft) -> None:
    """Raises ConflictError where no other tenant has a key."""
    draft.accounts.check_key_left(draft.tenant, None)


def delete_all(draft: Draft, leaves_a_key: bool = False) -> list[Task]:
    """The tenant's tasks as they were; members and ensembles go together, and the tenant with them, which was suspended
    so that nothing comes meanwhile. Raises NotFoundError, ConflictError; where the end `leaves_a_key`, also if no other
    tenant has one."""
    if leaves_a_key:
        check_key_left(draft)
    if not draft.account.is_suspended:
        raise ConflictError(f"tenant {draft.tenant!r} was resumed while it was deleted")
    draft.remove_tenant()
    gone = [draft.present(name) for name in draft.names()]
    for task in gone:
        draft.remove(task.name)
    return gone


def _checked(draft: Draft, name: str, precondition: Precondition) -> Task:
    task = draft.present(name)
    precondition.check(str(task.revision))
    return task


def _put(draft: Draft, before: Task, after: Task) -> Task:
    return before if after == before else draft.put(after)


def _point(draft: Draft, task: Task, version: int) -> Task:
    changed = replace(task, weights=(), quarantined=tuple(each for each in task.quarantined if each != version))
    if version != task.active:
        changed = replace(changed, active=version, previous=task.active)
    return _put(draft, draft.get(task.name) or task, changed)


def _with_weighted_active(task: Task) -> Task:
    if task.active in dict(task.weights):
        return task
    heaviest = max(task.weights, key=lambda pair: (pair[1], -pair[0]))[0]
    return replace(task, active=heaviest, previous=task.active)


def _can_replace(task: Task, failed: Version, number: int | None) -> bool:
    found = next((version for version in task.versions if version.version == number), None)
    return found is not None and number not in task.quarantined and found.fingerprint == failed.fingerprint


def _refuse_member(draft: Draft, name: str, version: int, but_of: str = "") -> None:
    """Raises MemberError naming the ensembles that have this version, those of the task `but_of` apart."""
    users = [user for user in draft.users(name, version) if user.partition("@")[0] != but_of]
    if users:
        raise MemberError(f"version {version} of task {name!r}", draft.tenant, users)


def _check_limits(draft: Draft, new: NewVersion, limits: Limits) -> None:
    most = limits.max_virtual_tokens
    if most is not None and not isinstance(new.content, Ensemble) and new.num_virtual_tokens > most:
        raise ArtefactTooLargeError(f"max_virtual_tokens of this tenant is {most}, got {new.num_virtual_tokens}")
    if limits.max_prefixes is not None and draft.stored.num_versions >= limits.max_prefixes:
        raise QuotaError(
            f"max_prefixes of this tenant is {limits.max_prefixes}, it stores {draft.stored.num_versions}; "
            "delete a version first"
        )
    room = limits.max_stored_bytes
    if room is not None and draft.stored.num_bytes + new.num_bytes > room:
        raise QuotaError(
            f"max_stored_bytes of this tenant is {room}, it stores {draft.stored.num_bytes} and the file has "
            f"{new.num_bytes}"
        )

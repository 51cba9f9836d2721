"""What may be changed about tasks, decided on a draft: the same for every registry.

Each function may be called again on a later draft, so none does anything but read and write its draft. A change that
leaves a task as it was writes nothing. Each tells the audit what was asked for, also where nothing had to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from prefix_store.admission import BASES, BASES_TO_ACCEPT, next_step, other_fingerprint
from prefix_store.draft import Draft
from prefix_store.ensemble import Ensemble
from prefix_store.errors import (
    ArtefactTooLargeError,
    BaseMismatchError,
    ConflictError,
    InvalidChangeError,
    MemberError,
    NotFoundError,
    QuotaError,
    UnverifiedBaseError,
)
from prefix_store.task import EVERYONE, UNVERIFIED, NewVersion, Precondition, Task, Version
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
    """`activate` None: it goes live unless weights are set or its base model is unverified. Content that the task has
    already is no new version, but may bring a note, or what verifies its base model: with that it goes live as a new
    version does. `within_limits`: the tenant is there and its limits hold. `is_repair`: whether the content's file was
    missing or damaged; then no version with this content stays quarantined. Raises UnverifiedBaseError for one that is
    to go live and may not, PreconditionFailedError, NotFoundError for an ensemble whose members are not all there and
    for a tenant that is gone, QuotaError and ArtefactTooLargeError beyond the limits."""
    limits = draft.account.limits if within_limits else None
    task = draft.get(name)
    precondition.check(None if task is None else str(task.revision))
    if task is None:
        task = Task(draft.tenant, name, 0, None, None, False, ())
    known = next((version for version in task.versions if version.digest == new.digest), None)
    if is_repair():
        _end_quarantine(draft, new.digest)
        task = draft.get(name) or task
    if known is None:
        _check_limits(draft, task, new, limits)
        for member in new.content.members if isinstance(new.content, Ensemble) else ():
            if draft.present(member.task).find(str(member.version)).digest != member.digest:
                raise NotFoundError(f"no version {member} any more: it was deleted and made anew")
        number = task.last_version + 1
        version = Version(**vars(new), tenant=draft.tenant, task=name, version=number, created_at_s=now_s)
        task = replace(task, versions=(*task.versions, version), last_version=number)
        draft.record("publish", f"{name}@{number}")
    else:
        version = _renewed(known, new)
        task = task.with_version(version)
        draft.record("publish-known", f"{name}@{version.version}")
        task = draft.put(task) if is_repair() else task  # replicas follow the revision
    _record_base(draft, known, version)
    if activate:
        _check_base(draft, task, version)
    elif activate is None and (known is None or not known.may_go_live) and not task.weights:
        activate = _may_go_live(draft, version)
    changed = _point(draft, task, version.version) if activate else _put(draft, draft.get(name), task)
    return Published(changed, version, known is None, known is not None and is_repair())


def activate(
    draft: Draft,
    name: str,
    version: str,
    precondition: Precondition,
    *,
    accept_base: bool = False,
    base_fingerprint: str | None = None,
) -> Task:
    """All traffic goes to this version, were it weighted or quarantined before. `accept_base` and `base_fingerprint` as
    at an upload. Raises NotFoundError, PreconditionFailedError, UnverifiedBaseError, BaseMismatchError."""
    task = _checked(draft, name, precondition)
    number = task.find(version).version
    task = _with_base(draft, task, number, accept_base, base_fingerprint)
    draft.record("activate", f"{name}@{number}")
    return _point(draft, task, number)


def set_weights(
    draft: Draft,
    name: str,
    weights: Mapping[str, int],
    precondition: Precondition,
    *,
    accept_base: bool = False,
    base_fingerprint: str | None = None,
) -> Task:
    """Traffic by weights. An active version without one gives its place to the heaviest; weights that follow weights
    keep what a rollback goes back to, unless a single version had all the traffic. `accept_base` and
    `base_fingerprint` as at an upload, for each of the versions. Raises InvalidChangeError, NotFoundError,
    PreconditionFailedError, UnverifiedBaseError, BaseMismatchError."""
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise InvalidChangeError(f"weights must name 1 to {MAX_WEIGHTS} versions, got {len(weights)}")
    for version, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            raise InvalidChangeError(f"weights must be 1 to {MAX_WEIGHT}, got {weight!r} for {version[:80]!r}")
    task = _checked(draft, name, precondition)
    found = {task.find(version).version: weight for version, weight in weights.items()}
    if len(found) < len(weights):
        raise InvalidChangeError(f"weights must name each version once, got {', '.join(sorted(weights))[:200]}")
    before = task
    for number in found:
        task = _with_base(draft, task, number, accept_base, base_fingerprint)
    draft.record("activate", f"{name}@{','.join(f'{number}:{weight}' for number, weight in sorted(found.items()))}")
    settled = _settled(task, set(found))
    changed = replace(
        settled,
        weights=tuple(sorted(found.items())),
        quarantined=tuple(number for number in task.quarantined if number not in found),
    )
    return _put(draft, before, _with_weighted_active(changed, settled.live))


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
        changed = _with_weighted_active(replace(changed, weights=weights), task.live)
    elif version == task.active:
        before = (number for number in (task.live, task.previous) if number != version)
        found = next((number for number in before if _can_replace(task, failed, number)), None)
        if found is not None:
            changed = replace(changed, active=found, previous=version, weights=(), live_before=None)
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
    if number == task.live:
        raise ConflictError(f"version {number} of task {name!r} is what a rollback goes back to; end the weights first")
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


def _put(draft: Draft, before: Task | None, after: Task) -> Task:
    return before if after == before else draft.put(after)


def _point(draft: Draft, task: Task, version: int) -> Task:
    quarantined = tuple(each for each in task.quarantined if each != version)
    changed = replace(task.pointed_to(version), quarantined=quarantined)
    return _put(draft, draft.get(task.name) or task, changed)


def _renewed(known: Version, new: NewVersion) -> Version:
    """A version as an upload of the same content leaves it: with what either says of its base model, and the last
    note."""
    renewed = replace(known, note=new.note or known.note)
    if known.base == UNVERIFIED or BASES.index(new.base) < BASES.index(known.base):
        renewed = replace(renewed, base=new.base, claimed_base=new.claimed_base)
    is_accepted = known.is_base_accepted or (new.is_base_accepted and renewed.base in BASES_TO_ACCEPT)
    return replace(renewed, is_base_accepted=is_accepted)


def _record_base(draft: Draft, before: Version | None, after: Version) -> None:
    """Tell the audit what an upload or an activation said of a version's base model, and that its note changed."""
    subject = f"{after.task}@{after.version}"
    if after.is_base_accepted and not (before is not None and before.is_base_accepted):
        draft.record("accept-base", subject)
    if before is not None and after.base != before.base:
        draft.record("match-base", subject)
    if before is not None and after.note != before.note:
        draft.record("note", subject)


def _with_base(draft: Draft, task: Task, number: int, accept_base: bool, base_fingerprint: str | None) -> Task:
    """The task with a version that may go live. Raises BaseMismatchError, UnverifiedBaseError."""
    before = after = task.find(str(number))
    if base_fingerprint is not None and isinstance(after.content, Ensemble):
        raise InvalidChangeError("base_fingerprint is of a file's base model; an ensemble's members have theirs")
    if base_fingerprint == after.fingerprint:
        after = after if after.base == "mismatch" else replace(after, base="verified")  # its file says otherwise
    elif accept_base and not after.may_go_live:
        base = UNVERIFIED if base_fingerprint is None else "mismatch"
        after = replace(after, base=base, is_base_accepted=True)
    elif base_fingerprint is not None and not accept_base:
        reason = other_fingerprint(base_fingerprint, after.fingerprint)
        raise BaseMismatchError(f"base model: {reason}; accept_base=1 (--accept-base) takes it all the same")
    _record_base(draft, before, after)
    task = task.with_version(after)
    _check_base(draft, task, after)
    return task


def _check_base(draft: Draft, task: Task, version: Version) -> None:
    """Raises UnverifiedBaseError for a version that may not go live. One that was live stays so: a release before did
    not ask."""
    was_live = {task.active, task.previous, task.live, *dict(task.weights)}
    if version.version not in was_live and not _may_go_live(draft, version):
        raise UnverifiedBaseError(next_step(version) or "")


def _may_go_live(draft: Draft, version: Version) -> bool:
    """An ensemble may also where all its members may by now."""
    members = version.content.members if isinstance(version.content, Ensemble) else ()
    found = (draft.present(member.task).find(str(member.version)) for member in members)
    return version.may_go_live or (bool(members) and all(member.may_go_live for member in found))


def _settled(task: Task, wanted: set[int]) -> Task:
    """The task as new weights for the `wanted` versions find it. A single weight was all the traffic, so that its
    version is live, unless it is only weighed again."""
    weighted = {version for version, _ in task.weights}
    if len(weighted) == 1 and weighted != wanted:
        return task.pointed_to(*weighted)
    return task


def _with_weighted_active(task: Task, live: int | None) -> Task:
    """The task with a weighted version as the active one, and with `live` as the version that a rollback goes back to
    (None: no version was live before the weights, so the heaviest counts as that)."""
    active = task.active
    if active not in dict(task.weights):
        active = max(task.weights, key=lambda pair: (pair[1], -pair[0]))[0]
    return replace(task, active=active, live_before=live or active)


def _can_replace(task: Task, failed: Version, number: int | None) -> bool:
    found = next((version for version in task.versions if version.version == number), None)
    return found is not None and number not in task.quarantined and found.fingerprint == failed.fingerprint


def _refuse_member(draft: Draft, name: str, version: int, but_of: str = "") -> None:
    """Raises MemberError naming the ensembles that have this version, those of the task `but_of` apart."""
    users = [user for user in draft.users(name, version) if user.partition("@")[0] != but_of]
    if users:
        raise MemberError(f"version {version} of task {name!r}", draft.tenant, users)


def _check_limits(draft: Draft, task: Task, new: NewVersion, limits: Limits | None) -> None:
    if limits is None:
        return
    most = limits.max_virtual_tokens
    if most is not None and not isinstance(new.content, Ensemble) and new.num_virtual_tokens > most:
        raise ArtefactTooLargeError(f"max_virtual_tokens of this tenant is {most}, got {new.num_virtual_tokens}")
    if limits.max_prefixes is not None and draft.stored.num_versions >= limits.max_prefixes:
        raise QuotaError(
            f"max_prefixes of this tenant is {limits.max_prefixes}, it stores {draft.stored.num_versions}; "
            "delete a version first"
        )
    if limits.max_versions is not None and len(task.versions) >= limits.max_versions:
        raise QuotaError(
            f"max_versions of this tenant is {limits.max_versions} for a task, {task.name!r} has {len(task.versions)}; "
            f"delete old ones first (`prefixserve rm {task.name}@V`, DELETE /v1/prefixes/{task.name}/versions/V)"
        )
    room = limits.max_stored_bytes
    if room is not None and draft.stored.num_bytes + new.num_bytes > room:
        raise QuotaError(
            f"max_stored_bytes of this tenant is {room}, it stores {draft.stored.num_bytes} and the file has "
            f"{new.num_bytes}"
        )

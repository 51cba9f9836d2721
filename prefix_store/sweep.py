"""What no version refers to: moved to the trash, deleted after some days, given back to a registry that knows it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from prefix_store.blobs import Blobs, StoredFile
from prefix_store.file_owner import check_owner
from prefix_store.registry import Registry

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class SweepRules:
    """An unused file goes to the trash when it is `min_age_s` old and unused files are at most `max_share` of all. It
    is deleted when it has been in the trash for `grace_s`."""

    min_age_s: float = DAY_S
    grace_s: float = 7 * DAY_S
    max_share: float = 0.5


RULES = SweepRules()


@dataclass(frozen=True)
class Swept:
    """Files and bytes: moved to the trash, deleted from it, given back from it, and unused ones that stayed; the
    `reason` for which unused files stayed that are old enough, empty if none did."""

    num_files: int = 0
    num_bytes: int = 0
    num_deleted: int = 0
    deleted_bytes: int = 0
    num_restored: int = 0
    num_kept: int = 0
    kept_bytes: int = 0
    reason: str = ""


def sweep(registry: Registry, blobs: Blobs, rules: SweepRules) -> Swept:
    """One sweep by these rules. A registry that never had a task has nothing swept. Raises ForeignFilesError,
    UnavailableError."""
    check_owner(registry, blobs)
    blobs.sweep(max(rules.min_age_s, registry.max_upload_s))
    stored = list(blobs.files())  # before what is known, so that an upload in between is no rubbish
    known = registry.digests()
    there = {(file.tenant, file.digest) for file in stored}
    num_restored = sum(blobs.restore(*each) for each in blobs.trashed(known) if each not in there)
    unused = [file for file in stored if file.digest not in known.get(file.tenant, ())]
    reason = _reason(registry, len(unused), len(stored), rules.max_share)
    if reason:
        return Swept(num_restored=num_restored, num_kept=len(unused), kept_bytes=_bytes(unused), reason=reason)
    old = (file for file in unused if time.time() - file.modified_s >= rules.min_age_s)
    moved = [file for file in old if _discard(registry, blobs, file)]
    deleted = blobs.empty_trash(rules.grace_s)
    return Swept(
        num_files=len(moved),
        num_bytes=_bytes(moved),
        num_deleted=deleted.num_files,
        deleted_bytes=deleted.num_bytes,
        num_restored=num_restored,
        num_kept=len(unused) - len(moved),
        kept_bytes=_bytes(unused) - _bytes(moved),
    )


def _reason(registry: Registry, num_unused: int, num_stored: int, max_share: float) -> str:
    if registry.is_degraded:
        return "the shared registry is away"
    if num_unused and not registry.revisions():
        return "the registry has never had a task"
    if num_unused > max_share * num_stored:
        return f"the registry knows {num_stored - num_unused} of {num_stored} files; `prefixserve registry sweep --all`"
    return ""


def _discard(registry: Registry, blobs: Blobs, file: StoredFile) -> bool:
    """Whether this call moved the file to the trash: not if it is about to be used, or another replica was faster."""
    moved = False

    def drop(digest: str) -> None:
        nonlocal moved
        moved = blobs.discard(file.tenant, digest)

    registry.release_unused(file.tenant, [file.digest], drop)
    return moved


def _bytes(files: Iterable[StoredFile]) -> int:
    return sum(file.num_bytes for file in files)

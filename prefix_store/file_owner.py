"""Whose files a blob root holds: the root names its registry, and no other registry may delete or store files there."""

from __future__ import annotations

from prefix_store.blobs import OWNER, Blobs
from prefix_store.errors import ForeignFilesError
from prefix_store.registry import Registry

REMEDY = (
    "start with the registry that the files belong to, or, if this one is to have them, "
    "run `prefixserve registry take-over` with the same --data-dir, --redis-url and --blob-url"
)


def claim(registry: Registry, blobs: Blobs) -> str | None:
    """Mark the root as this registry's, where it is empty or where the registry knows any of its files; and where it is
    the root of a registry that this one was copied from: then that one's id. Raises ForeignFilesError."""
    own = registry.identity()
    found = blobs.owner()
    if found == own.id:
        return None
    if found in own.predecessors:
        blobs.set_owner(own.id, replaces=True)
        return found
    if found is None:
        stored, known = blobs.digests(), registry.digests()
        if stored and not any(digests & known.get(tenant, set()) for tenant, digests in stored.items()):
            num_files = sum(map(len, stored.values()))
            raise ForeignFilesError(
                f"expected files of registry {own.id} in {blobs.url}, found {num_files} files, none of which it knows; "
                + REMEDY
            )
        blobs.set_owner(own.id)
    check_owner(registry, blobs)
    return None


def take_over(registry: Registry, blobs: Blobs) -> str | None:
    """Give the files to this registry, whoever had them; the id that the root named before."""
    found = blobs.owner()
    blobs.set_owner(registry.identity().id, replaces=True)
    return found


def check_owner(registry: Registry, blobs: Blobs, purpose: str = f"read {OWNER}") -> None:
    """Raises ForeignFilesError where the root names another registry now. A root that names none may be used."""
    own, found = registry.identity().id, blobs.owner(purpose)
    if found is not None and found != own:
        raise ForeignFilesError(
            f"expected files of registry {own} in {blobs.url}, found those of registry {found!r}; {REMEDY}"
        )

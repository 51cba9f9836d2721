"""Errors of the store. Every text says what was expected and what came.

PrefixStoreError
├── InvalidArtefactError        the artefact itself is wrong
│   ├── BaseMismatchError       it was trained for another model
│   └── UnverifiedBaseError     nothing says for which model it was trained
├── ArtefactTooLargeError       more bytes or virtual tokens than the limit
├── InvalidTenantError          a tenant's name, key or limits are wrong
├── InvalidChangeError          weights or shares that a task cannot have
├── KeyEndedError               the author's key ended before the change was written
├── SuspendedError              the author's tenant was suspended before
├── NotFoundError               no such task or version for this tenant
├── ConflictError               the task's state forbids it
│   ├── IncompatibleError       stored for another model than the one served
│   └── MemberError             ensembles have the version that would go
├── DisabledError               the task was taken out of service by hand
├── PreconditionFailedError     If-Match or If-None-Match does not hold
├── DamagedBlobError            a stored file is missing or not what was written
├── StorageFullError            no room on the disk
│   └── QuotaError              no room in the tenant's own limits
└── UnavailableError            the registry or a file cannot be reached or written
    ├── DamagedRegistryError    the registry is there and cannot be read
    └── ForeignFilesError       the files belong to another registry
"""

from __future__ import annotations

from collections.abc import Callable


class PrefixStoreError(Exception):
    """Base of all. The text is for who asked; `detail` may name hosts and paths and is for operators only."""

    def __init__(self, message: str, *, detail: object = "") -> None:
        super().__init__(message)
        self.detail = str(detail)


class InvalidArtefactError(PrefixStoreError):
    """The artefact cannot be served; the text names the tensor or field."""


class BaseMismatchError(InvalidArtefactError):
    """The artefact names another base model or fingerprint."""


class UnverifiedBaseError(InvalidArtefactError):
    """The artefact names no base model that can be compared with the served one, and nobody has accepted it as it
    is."""


class ArtefactTooLargeError(PrefixStoreError):
    """More bytes or virtual tokens than the limit."""


class InvalidTenantError(PrefixStoreError):
    """A name, key or limit that cannot be."""


class InvalidChangeError(PrefixStoreError):
    """Weights or shares that cannot be."""


class KeyEndedError(PrefixStoreError):
    """The key that a change was asked with is no longer there."""


class SuspendedError(PrefixStoreError):
    """The tenant whose key a change was asked with is suspended."""


class NotFoundError(PrefixStoreError):
    """Not there, or not this tenant's: the two read the same."""


class ConflictError(PrefixStoreError):
    """The task's state forbids it."""


class IncompatibleError(ConflictError):
    """Stored for another model."""


class MemberError(ConflictError):
    """Ensembles of `tenant`, the versions `users`, have a version that would go."""

    def __init__(self, what: str, tenant: str, users: list[str]) -> None:
        super().__init__(f"{what} is a member of {', '.join(users)}; delete that first")
        self.what = what
        self.tenant = tenant
        self.users = users

    def seen_by(self, allows_task: Callable[[str], bool]) -> MemberError | ConflictError:
        """The same without the names of tasks that are not allowed."""
        seen = [user for user in self.users if allows_task(f"{self.tenant}/{user.partition('@')[0]}")]
        if seen:
            return MemberError(self.what, self.tenant, seen)
        return ConflictError(f"{self.what} is a member of an ensemble that this key is not for; delete that first")


class DisabledError(PrefixStoreError):
    """The task answers nobody until it is enabled."""


class PreconditionFailedError(PrefixStoreError):
    """The task has changed since the caller looked."""


class DamagedBlobError(PrefixStoreError):
    """A stored file is missing or was altered."""


class StorageFullError(PrefixStoreError):
    """The disk is full."""


class QuotaError(StorageFullError):
    """The tenant's limits on what it stores are reached."""


class UnavailableError(PrefixStoreError):
    """The registry cannot be reached; nothing was changed, or whether it was is not known."""


class DamagedRegistryError(UnavailableError):
    """The registry's file, or a document in it, is not what was written."""


class ForeignFilesError(UnavailableError):
    """The files belong to another registry than the one given."""


def in_full(error: Exception) -> str:
    """With its detail: for logs and the command line."""
    detail = error.detail if isinstance(error, PrefixStoreError) else ""
    return f"{error}: {detail}" if detail else str(error)

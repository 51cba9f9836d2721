"""Errors of the store. Every text says what was expected and what came.

PrefixStoreError
├── InvalidArtefactError        the artefact itself is wrong
│   ├── BaseMismatchError       it was trained for another model
│   └── UnverifiedBaseError     nothing says for which model it was trained
├── ArtefactTooLargeError       more bytes or virtual tokens than the limit
├── InvalidTenantError          a tenant's name, key or limits are wrong
├── InvalidChangeError          weights or shares that a task cannot have
├── NotFoundError               no such task or version for this tenant
├── ConflictError               the task's state forbids it
│   └── IncompatibleError       stored for another model than the one served
├── DisabledError               the task was taken out of service by hand
├── PreconditionFailedError     If-Match or If-None-Match does not hold
├── DamagedBlobError            a stored file is missing or not what was written
├── StorageFullError            no room on the disk
│   └── QuotaError              no room in the tenant's own limits
└── UnavailableError            the registry or a file cannot be reached or written
"""

from __future__ import annotations


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


class NotFoundError(PrefixStoreError):
    """Not there, or not this tenant's: the two read the same."""


class ConflictError(PrefixStoreError):
    """The task's state forbids it."""


class IncompatibleError(ConflictError):
    """Stored for another model."""


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


def in_full(error: Exception) -> str:
    """With its detail: for logs and the command line."""
    detail = error.detail if isinstance(error, PrefixStoreError) else ""
    return f"{error}: {detail}" if detail else str(error)

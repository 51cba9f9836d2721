"""Errors of the store. Every text says what was expected and what came.

PrefixStoreError
├── InvalidArtefactError        the artefact itself is wrong
│   └── BaseMismatchError       it was trained for another model
├── ArtefactTooLargeError       more bytes or virtual tokens than the limit
├── NotFoundError               no such task or version for this tenant
├── ConflictError               the task's state forbids it
│   └── IncompatibleError       stored for another model than the one served
├── PreconditionFailedError     If-Match or If-None-Match does not hold
├── DamagedBlobError            a stored file is missing or not what was written
└── StorageFullError            no room on the disk
"""

from __future__ import annotations


class PrefixStoreError(Exception):
    """Base of all."""


class InvalidArtefactError(PrefixStoreError):
    """The artefact cannot be served; the text names the tensor or field."""


class BaseMismatchError(InvalidArtefactError):
    """The artefact names another base model or fingerprint."""


class ArtefactTooLargeError(PrefixStoreError):
    """More bytes than the limit."""


class NotFoundError(PrefixStoreError):
    """Not there, or not this tenant's: the two read the same."""


class ConflictError(PrefixStoreError):
    """The task's state forbids it."""


class IncompatibleError(ConflictError):
    """Stored for another model."""


class PreconditionFailedError(PrefixStoreError):
    """The task has changed since the caller looked."""


class DamagedBlobError(PrefixStoreError):
    """A stored file is missing or was altered."""


class StorageFullError(PrefixStoreError):
    """The disk is full."""

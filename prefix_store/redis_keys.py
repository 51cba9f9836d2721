"""Every key in Redis. All have one hash tag, so that a script may use any of them together."""

from __future__ import annotations

PREFIX = "{prefixserve}"
SCHEMA = f"{PREFIX}:schema"  # string: SCHEMA_VERSION
REVISIONS = f"{PREFIX}:revisions"  # hash: tenant -> revision of its tasks
NUM_VERSIONS = f"{PREFIX}:num_versions"  # hash: tenant -> versions that it stores
NUM_BYTES = f"{PREFIX}:num_bytes"  # hash: tenant -> bytes of their files
ENTRIES = f"{PREFIX}:entries"  # sorted set, all of score 0: lines `ENTRY TENANT/TASK`
TENANTS = f"{PREFIX}:tenants"  # hash: name -> document
TENANTS_REVISION = f"{PREFIX}:tenants_revision"  # string: a number, of all tenants
EVENTS = f"{PREFIX}:events"  # stream: what changed, of late
HINTS = f"{PREFIX}:hints"  # channel: something changed
IDENTITY = f"{PREFIX}:identity"  # string: made when the data was
PREDECESSORS = f"{PREFIX}:predecessors"  # set: identities of the registries whose data was copied here
REPLICAS = f"{PREFIX}:replicas"  # sorted set: id -> until when it counts, in ms
AUDIT_NUMBER = f"{PREFIX}:audit_number"  # string: the last entry's number, over all tenants
USAGE_ROWS = f"{PREFIX}:usage_rows"  # sorted set, all of score 0: lines `DAY TENANT TASK VERSION`


def tasks(tenant: str) -> str:
    """Hash: name -> document."""
    return f"{PREFIX}:tasks:{tenant}"


def names(tenant: str) -> str:
    """Sorted set of the tasks' names, all of score 0."""
    return f"{PREFIX}:names:{tenant}"


def appended(tenant: str) -> list[str]:
    """What a script appends this tenant's audit entries to."""
    return [AUDIT_NUMBER, audit(None), audit(tenant)]


def audit(tenant: str | None) -> str:
    """Sorted set by number, which counts in this set: lines `NUMBER DOCUMENT`, of one tenant or all."""
    return f"{PREFIX}:audit" if tenant is None else f"{PREFIX}:audit:{tenant}"


def usage(row: str) -> str:
    """Hash: name -> count."""
    return f"{PREFIX}:usage:{row}"


def usage_batch(batch: str) -> str:
    """String: it was added."""
    return f"{PREFIX}:usage_batch:{batch}"


def bucket(tenant: str, name: str) -> str:
    """Hash: `level`, `at` (seconds)."""
    return f"{PREFIX}:bucket:{tenant}:{name}"


def leases(tenant: str, digest: str) -> str:
    """Hash of the uploads that are about to refer to this file: token -> when it ends, in ms."""
    return f"{PREFIX}:leases:{tenant}:{digest}"


def dropping(tenant: str, digest: str) -> str:
    """String, while somebody deletes this file: whose token."""
    return f"{PREFIX}:dropping:{tenant}:{digest}"

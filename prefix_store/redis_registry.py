"""The registry that replicas share: documents in one Redis, each change one script."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from prefix_store import redis_keys as keys
from prefix_store.accounts import Accounts
from prefix_store.audit import SERVER, Author
from prefix_store.documents import read_task, write_audit, write_task
from prefix_store.draft import Draft, Stored, Write
from prefix_store.entries import FILES, PINNED, shared_entry
from prefix_store.errors import ConflictError, PrefixStoreError, UnavailableError
from prefix_store.redis_accounts import MAX_EVENTS, MAX_TRIES, RedisAccounts
from prefix_store.redis_events import RedisEvents
from prefix_store.redis_files import LEASE_S, RedisFiles
from prefix_store.redis_scripts import COMMIT, LIST_TASKS
from prefix_store.redis_server import TIMEOUT_S, RedisServer
from prefix_store.registry import Identity, NewFile, Registry
from prefix_store.task import EVERYONE, Task

T = TypeVar("T")
MAX_BACKOFF_S = 0.05
BUCKET_S = 0.5


@dataclass(frozen=True)
class Revisions:
    """What a change is decided on: of the tenant's tasks, and of all tenants."""

    tasks: int
    tenants: int


class RedisRegistry(RedisAccounts, Registry):
    """Implements `Registry`. A change is decided on the tenant's documents and on all tenants as they are at one
    revision each, and committed if both still hold; else it is decided again. What was acknowledged survives a kill of
    Redis where it runs with `appendonly yes` and `appendfsync always`.

    `url` as `RedisServer` takes it. Nothing is sent before the first call.
    """

    max_upload_s = LEASE_S

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        server = RedisServer(url, timeout_s=timeout_s)
        super().__init__(server, RedisServer(url, timeout_s=min(timeout_s, BUCKET_S)))
        self.events = RedisEvents(server)
        self._files = RedisFiles(server)
        self._commit = server.script(COMMIT)
        self._list_tasks = server.script(LIST_TASKS)

    def is_there(self) -> bool:
        """Whether there is a registry in this Redis: the first call of another method makes one. Raises
        UnavailableError."""
        return self._server.has_registry()

    def losses(self) -> dict[str, str]:
        """As `RedisServer.losses`."""
        return self._server.losses()

    def identity(self) -> Identity:
        own = self.events.identity()
        with self._server.answering() as client:
            return Identity(own, tuple(sorted(client.smembers(keys.PREDECESSORS))))

    def add_predecessors(self, ids: Iterable[str]) -> None:
        with self._server.answering() as client:
            client.sadd(keys.PREDECESSORS, *ids)

    def change(
        self, tenant: str, decide: Callable[[Draft], T], file: NewFile | None = None, *, by: Author = SERVER
    ) -> T:
        if file is None:
            return self._change(tenant, decide, None, "", by)
        token = self._store(tenant, file)
        try:
            return self._change(tenant, decide, file, token, by)
        finally:
            self._files.release(tenant, file.digest, token)

    def _store(self, tenant: str, file: NewFile) -> str:
        token = self._files.acquire(tenant, file.digest)
        try:
            file.put()
        except BaseException:
            self._files.release(tenant, file.digest, token)
            raise
        return token

    def _change(self, tenant: str, decide: Callable[[Draft], T], file: NewFile | None, token: str, by: Author) -> T:
        for i in range(MAX_TRIES):
            found = self._revisions(tenant)
            draft = self._draft(tenant, by)
            try:
                draft.check_author()
                result = decide(draft)
            except PrefixStoreError:
                if self._revisions(tenant) == found:
                    raise
                continue
            if not draft.is_changed and not draft.audit:
                if self._revisions(tenant) == found:
                    return result
                continue
            digest = "" if file is None else file.digest
            outcome = self._write(draft.write(), found, digest, token, is_told_only=not draft.is_changed)
            if outcome == "done":
                return result
            if outcome == "lost":
                assert file is not None
                return self.change(tenant, decide, file, by=by)
            time.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.001 * 2**i)))
        raise UnavailableError(f"the tasks of {tenant!r} were changed {MAX_TRIES} times while one was to be changed")

    def adopt(self, tenant: str, revision: int, tasks: Mapping[str, Task | None], *, are_all: bool = False) -> None:
        found = self._revisions(tenant)
        draft = self._draft(tenant)
        for name in draft.names() if are_all else ():
            draft.adopt(name, tasks.get(name))
        for name, task in tasks.items():
            draft.adopt(name, task)
        if self._write(replace(draft.write(), revision=revision), found) != "done":
            raise ConflictError(f"the tasks of {tenant!r} were changed meanwhile")

    def revisions(self) -> dict[str, int]:
        with self._server.answering() as client:
            return {tenant: int(revision) for tenant, revision in client.hgetall(keys.REVISIONS).items()}

    def get_task(self, tenant: str, task: str) -> Task | None:
        with self._server.answering() as client:
            document = client.hget(keys.tasks(tenant), task)
        return None if document is None else read_task(document)

    def list_tasks(self, tenant: str, limit: int, after: str) -> list[Task]:
        with self._server.answering() as client:
            listed = [keys.names(tenant), keys.tasks(tenant)]
            documents = self._list_tasks(keys=listed, args=[f"({after}" if after else "-", limit], client=client)
        return [read_task(document) for document in documents]

    def is_shared(self, owner: str, task: str, tenant: str) -> bool:
        lines = [f"{shared_entry(name)} {owner}/{task}" for name in (tenant, EVERYONE)]
        with self._server.answering() as client:
            return any(score is not None for score in client.zmscore(keys.ENTRIES, lines))

    def list_shared(self, tenant: str, limit: int, after: str) -> list[Task]:
        found = {name for each in (tenant, EVERYONE) for name in self._holders(shared_entry(each))}
        wanted = sorted(name for name in found if name > after and name.partition("/")[0] != tenant)[:limit]
        return [task for task in self._tasks(wanted) if task.is_shared_with(tenant)]

    def pinned_tasks(self) -> list[Task]:
        found = self._tasks(self._holders(PINNED))
        return sorted((task for task in found if task.is_pinned), key=lambda task: (task.tenant, task.name))

    def stored(self, tenant: str) -> Stored:
        return self._draft(tenant).stored

    def digests(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for line in self._lines(FILES):
            _, tenant, digest, _ = line.split(" ")
            found.setdefault(tenant, set()).add(digest)
        return found

    def release_unused(self, tenant: str, digests: Iterable[str], drop: Callable[[str], None]) -> None:
        for digest in digests:
            self._files.drop_unused(tenant, digest, drop)

    def close(self) -> None:
        self._server.close()
        self._bucket_server.close()

    def _draft(self, tenant: str, by: Author = SERVER) -> Draft:
        with self._server.answering() as client, client.pipeline(transaction=True) as pipeline:
            for key in (keys.REVISIONS, keys.NUM_VERSIONS, keys.NUM_BYTES):
                pipeline.hget(key, tenant)
            revision, num_versions, num_bytes = (int(found or 0) for found in pipeline.execute())
        read, holders = partial(self.get_task, tenant), partial(self._own_holders, tenant)
        stored, names = Stored(num_versions, num_bytes), partial(self._names, tenant)
        accounts = Accounts(self.get_tenant, self.list_tenants)
        return Draft(tenant, revision, stored, read, holders, names, accounts, by)

    def _revisions(self, tenant: str) -> Revisions:
        with self._server.answering() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.hget(keys.REVISIONS, tenant)
            pipeline.get(keys.TENANTS_REVISION)
            return Revisions(*(int(found or 0) for found in pipeline.execute()))

    def _names(self, tenant: str) -> list[str]:
        with self._server.answering() as client:
            found: list[str] = client.zrange(keys.names(tenant), 0, -1)
        return found

    def _lines(self, entry: str) -> list[str]:
        with self._server.answering() as client:
            found: list[str] = client.zrangebylex(keys.ENTRIES, f"[{entry} ", f"({entry}!")
        return found

    def _holders(self, entry: str) -> list[str]:
        """As `TENANT/TASK`."""
        return [line.rpartition(" ")[2] for line in self._lines(entry)]

    def _own_holders(self, tenant: str, entry: str) -> list[str]:
        found = (name.partition("/") for name in self._holders(entry))
        return [task for owner, _, task in found if owner == tenant]

    def _tasks(self, names: Iterable[str]) -> list[Task]:
        """Of these, `TENANT/TASK`, the ones that are there."""
        with self._server.answering() as client, client.pipeline(transaction=False) as pipeline:
            for name in names:
                tenant, _, task = name.partition("/")
                pipeline.hget(keys.tasks(tenant), task)
            documents = pipeline.execute()
        return [read_task(document) for document in documents if document is not None]

    def _write(
        self, write: Write, expected: Revisions, digest: str = "", token: str = "", *, is_told_only: bool = False
    ) -> str:
        tenant = write.tenant
        change: dict[str, Any] = {
            "tenant": tenant,
            "expected": expected.tasks,
            "expected_tenants": expected.tenants,
            "revision": write.revision,
            "token": token,
            "documents": {name: write_task(task) for name, task in write.tasks.items() if task is not None},
            "gone": [name for name, task in write.tasks.items() if task is None],
            "added": [f"{entry} {tenant}/{name}" for entry, name in write.added],
            "removed": [f"{entry} {tenant}/{name}" for entry, name in write.removed],
            "num_versions": write.grown.num_versions,
            "num_bytes": write.grown.num_bytes,
            "names": json.dumps(sorted(write.tasks)),
            "audit": [write_audit(entry) for entry in write.audit],
            "removes_tenant": write.removes_tenant,
            "is_told_only": is_told_only,
        }
        written = [keys.REVISIONS, keys.NUM_VERSIONS, keys.NUM_BYTES, keys.tasks(tenant), keys.names(tenant)]
        told = [*keys.appended(tenant), keys.TENANTS, keys.TENANTS_REVISION]
        with self._server.answering() as client:
            outcome: str = self._commit(
                keys=[*written, keys.ENTRIES, keys.EVENTS, keys.leases(tenant, digest), *told],
                args=[json.dumps(change), keys.HINTS, MAX_EVENTS],
                client=client,
            )
        return outcome

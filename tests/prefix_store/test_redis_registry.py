"""What only a registry in Redis has: leases and marks of files, lost answers, a server that goes and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store import redis_files
from prefix_store import redis_keys as keys
from prefix_store.audit import AuditEntry
from prefix_store.blobs import Blobs
from prefix_store.documents import write_audit
from prefix_store.draft import Draft
from prefix_store.errors import ConflictError, NotFoundError, StorageFullError, UnavailableError, in_full
from prefix_store.prefix import Layout
from prefix_store.redis_files import RedisFiles
from prefix_store.redis_registry import RedisRegistry
from prefix_store.redis_server import RedisServer
from prefix_store.registry import NewFile
from prefix_store.store import PrefixStore
from prefix_store.task import ANY, Task
from prefix_store.task_changes import Published, add_version
from prefix_store.tenants import Tenant
from prefix_store.usage import Usage
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import AT_ONCE, OURS, SHAPE, THEIRS, add, new_version, publish

DIGEST = "a" * 64
LAYOUT = Layout("kv", num_decoder_tokens=1)


@pytest.fixture
def registry(redis_process: RedisProcess) -> Iterator[RedisRegistry]:
    opened = RedisRegistry(redis_process.url, timeout_s=1.0)
    yield opened
    opened.close()


@pytest.fixture
def files(redis_process: RedisProcess) -> Iterator[RedisFiles]:
    server = RedisServer(redis_process.url)
    yield RedisFiles(server)
    server.close()


def dropped_by(files: RedisFiles, digest: str = DIGEST) -> list[str]:
    dropped: list[str] = []
    files.drop_unused(OURS, digest, dropped.append)
    return dropped


class TestFiles:
    def test_leased_file_is_not_deleted(self, files: RedisFiles) -> None:
        tokens = [files.acquire(OURS, DIGEST) for _ in range(2)]
        for token in tokens:
            assert dropped_by(files) == []
            files.release(OURS, DIGEST, token)
        assert dropped_by(files) == [DIGEST]
        assert dropped_by(files) == [DIGEST]

    def test_lease_ends_by_itself(self, files: RedisFiles, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_files, "LEASE_S", 0.1)
        files.acquire(OURS, DIGEST)
        assert dropped_by(files) == []
        time.sleep(0.15)
        assert dropped_by(files) == [DIGEST]

    def test_file_that_a_version_has_is_not_deleted(self, files: RedisFiles, registry: RedisRegistry) -> None:
        add(registry, "t", new_version(DIGEST, LAYOUT))
        add(registry, "t", new_version("b" * 64, LAYOUT), tenant="other")
        assert dropped_by(files) == []
        assert dropped_by(files, "b" * 64) == ["b" * 64]

    def test_upload_waits_until_the_file_is_deleted(self, files: RedisFiles) -> None:
        is_deleting, order = threading.Event(), []

        def drop(digest: str) -> None:
            is_deleting.set()
            time.sleep(0.2)
            order.append("deleted")

        thread = threading.Thread(target=files.drop_unused, args=(OURS, DIGEST, drop))
        thread.start()
        is_deleting.wait()
        assert dropped_by(files) == []
        files.acquire(OURS, DIGEST)
        order.append("leased")
        thread.join()
        assert order == ["deleted", "leased"]

    def test_upload_waits_for_the_end_of_a_dead_ones_mark(
        self, files: RedisFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_files, "MARK_S", 0.3)

        def die(digest: str) -> None:
            raise OSError("gone")

        started_s = time.monotonic()
        with pytest.raises(OSError, match="gone"):
            files.drop_unused(OURS, DIGEST, die)
        files.acquire(OURS, DIGEST)
        assert time.monotonic() - started_s >= 0.3

    def test_upload_does_not_wait_for_ever(
        self, files: RedisFiles, redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_files, "MARK_S", 0.1)
        monkeypatch.setattr(redis_files, "DROP_S", 0.1)
        with redis_process.client() as client:
            client.set(keys.dropping(OURS, DIGEST), "somebody")
        with pytest.raises(UnavailableError, match="is being deleted"):
            files.acquire(OURS, DIGEST)

    def test_who_was_held_up_deletes_nothing(self, files: RedisFiles, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_files, "DROP_S", 0.0)
        assert dropped_by(files) == []

    def test_lease_that_ended_is_taken_again_and_the_file_stored_again(
        self, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        puts: list[int] = []

        def put() -> None:
            puts.append(1)
            if len(puts) == 1:
                with redis_process.client() as client:
                    client.delete(keys.leases(OURS, DIGEST))

        def decide(draft: Draft) -> Published:
            decisions.append(1)
            new = new_version(DIGEST, LAYOUT)
            return add_version(draft, "t", new, activate=None, precondition=ANY, within_limits=False, now_s=0.0)

        decisions: list[int] = []
        assert registry.change(OURS, decide, NewFile(DIGEST, put)).is_new
        assert (len(puts), len(decisions)) == (2, 2)
        task = registry.get_task(OURS, "t")
        assert task is not None
        assert len(task.versions) == 1
        with redis_process.client() as client:
            assert not client.exists(keys.leases(OURS, DIGEST))

    def test_failed_upload_gives_its_lease_back(self, registry: RedisRegistry, redis_process: RedisProcess) -> None:
        def put() -> None:
            raise StorageFullError("no room")

        with pytest.raises(StorageFullError):
            registry.change(OURS, lambda draft: None, NewFile(DIGEST, put))
        with redis_process.client() as client:
            assert client.keys("*leases*") == []


class TestClock:
    """A step of Redis's own clock is to what is kept there as if it had been written then."""

    @pytest.mark.parametrize("step_s", [-30 * 86400, -3600, 3600, 30 * 86400])
    def test_a_bucket_neither_locks_out_nor_overflows(
        self, registry: RedisRegistry, redis_process: RedisProcess, step_s: int
    ) -> None:
        def take(amount: float) -> tuple[bool, float, float]:
            return registry.take(OURS, "b", amount, 10, 5, 0.0)

        assert take(10)[0]
        with redis_process.client() as client:
            at_s = float(client.hget(keys.bucket(OURS, "b"), "at"))
            client.hset(keys.bucket(OURS, "b"), "at", at_s - step_s)
        _, remaining, wait_s = take(5)
        assert 0 <= remaining <= 10
        assert wait_s <= 1
        time.sleep(wait_s)
        assert take(1)[0]

    def test_a_lease_that_ended_by_a_step_is_taken_again(
        self, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        num_puts = 0

        def put() -> None:
            nonlocal num_puts
            num_puts += 1
            with redis_process.client() as client:
                leases = client.hgetall(keys.leases(OURS, DIGEST))
                if num_puts == 1:
                    client.hset(keys.leases(OURS, DIGEST), mapping=dict.fromkeys(leases, 1))

        def decide(draft: Draft) -> Published:
            new = new_version(DIGEST, LAYOUT)
            return add_version(draft, "t", new, activate=None, precondition=ANY, within_limits=False, now_s=0.0)

        assert registry.change(OURS, decide, NewFile(DIGEST, put)).is_new
        assert num_puts == 2

    def test_a_lease_from_the_future_keeps_a_file_and_no_upload(
        self, files: RedisFiles, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        """Of an upload that was killed before the clock went back: its file stays until then."""
        token = files.acquire(OURS, DIGEST)
        with redis_process.client() as client:
            client.hset(keys.leases(OURS, DIGEST), token, int((time.time() + 30 * 86400) * 1000))
        assert dropped_by(files) == []
        assert add(registry, "t", new_version(DIGEST, LAYOUT)).is_new


class TestAway:
    def test_every_call_says_that_the_registry_is_away(self, tmp_path: Path) -> None:
        process = RedisProcess(tmp_path)
        registry = RedisRegistry(process.url.replace("redis://", "redis://:secret@"))
        store = PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)
        for call in (
            lambda: store.resolve(OURS, "t"),
            lambda: publish(store, "t"),
            lambda: store.list_tasks(OURS),
            lambda: store.list_shared(OURS),
            lambda: registry.digests(),
            lambda: registry.update_tenant(OURS, lambda _: Tenant(OURS)),
            lambda: registry.tenants_revision(),
            lambda: registry.take(OURS, "b", 1, 1, 1, 0.0),
            lambda: registry.list_audit(None, 1, None),
            lambda: registry.usage(None, "2026-01-01", "2026-01-02"),
        ):
            with pytest.raises(UnavailableError, match="cannot be reached") as caught:
                call()
            assert "secret" not in in_full(caught.value)
            assert "127.0.0.1" not in str(caught.value)
        store.sweep(AT_ONCE)
        registry.close()

    def test_usage_whose_answer_got_lost_counts_once(
        self, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        row = Usage("2026-11-25", OURS, "t", 1, num_requests=1)
        registry.add_usage([row], "before")
        redis_process.stop()
        try:
            with pytest.raises(UnavailableError):
                registry.add_usage([row], "lost")
        finally:
            redis_process.go_on()
        assert registry.usage(OURS, row.day, row.day) == [row + row], "what was sent was done all the same"
        registry.add_usage([row], "lost")
        assert registry.usage(OURS, row.day, row.day) == [row + row]

    def test_server_that_hangs_holds_a_call_for_its_timeout_only(
        self, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        add(registry, "t", new_version(DIGEST, LAYOUT))
        redis_process.stop()
        started_s = time.monotonic()
        try:
            with pytest.raises(UnavailableError):
                registry.get_task(OURS, "t")
        finally:
            redis_process.go_on()
        assert time.monotonic() - started_s < 15
        assert registry.get_task(OURS, "t") is not None

    def test_a_change_is_not_written_for_a_tenant_that_went_meanwhile(self, registry: RedisRegistry) -> None:
        registry.update_tenant(OURS, lambda _: Tenant(OURS))
        num_decided = 0

        def decide(draft: Draft) -> None:
            nonlocal num_decided
            assert draft.account.name == OURS
            draft.put(Task(OURS, "t", 0, None, None, False, ()))
            num_decided += 1
            registry.update_tenant(OURS, lambda _: None)

        with pytest.raises(NotFoundError, match="no tenant"):
            registry.change(OURS, decide)
        assert num_decided == 1
        assert registry.get_task(OURS, "t") is None

    def test_an_audit_that_was_numbered_over_all_tenants_goes_on(
        self, registry: RedisRegistry, redis_process: RedisProcess
    ) -> None:
        """As it was kept before each tenant's was numbered by itself."""
        with redis_process.client() as client:
            for number, tenant in enumerate((OURS, THEIRS, THEIRS, OURS), 1):
                line = f"{number} {write_audit(AuditEntry(tenant, 'operator', 'publish', 't@1', 1.5))}"
                for key in (keys.audit(None), keys.audit(tenant)):
                    client.zadd(key, {line: number})
            client.set(keys.AUDIT_NUMBER, 4)
        made = [registry.append_audit(AuditEntry(each, "operator", "pin", "t", 1.5)) for each in (OURS, THEIRS, OURS)]
        assert [entry.number for entry in made] == [5, 4, 6]
        assert [entry.number for entry in registry.list_audit(OURS, 9, None)] == [6, 5, 4, 1]
        assert [entry.number for entry in registry.list_audit(THEIRS, 9, 4)] == [3, 2]
        assert [entry.number for entry in registry.list_audit(None, 9, None)] == [7, 6, 5, 4, 3, 2, 1]

    def test_acknowledged_changes_survive_a_kill_of_redis(self, tmp_path: Path) -> None:
        process = RedisProcess(tmp_path / "redis")
        process.start()
        registry = RedisRegistry(process.url)
        store = PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)
        for seed in range(3):
            made = publish(store, "t", seed)
            process.kill()
            with pytest.raises(UnavailableError):
                store.resolve(OURS, "t")
            with pytest.raises(UnavailableError):
                publish(store, "t", 10 + seed)
            process.start()
            assert store.get_task(OURS, "t") == made.task
        store.sweep(AT_ONCE)
        assert len(Blobs(tmp_path / "blobs").digests()[OURS]) == 3
        registry.close()
        process.kill()

    def test_data_of_another_schema_is_refused(self, redis_process: RedisProcess, registry: RedisRegistry) -> None:
        with redis_process.client() as client:
            client.set(keys.SCHEMA, 2)
        with pytest.raises(ConflictError, match="expected a registry of schema 1 in Redis, got 2"):
            registry.get_task(OURS, "t")

    @pytest.mark.parametrize("url", ["localhost:6379", "http://:secret@localhost", "redis://:secret@localhost:port"])
    def test_url_that_cannot_be_is_refused(self, url: str) -> None:
        with pytest.raises(UnavailableError, match="expected a URL as rediss://") as caught:
            RedisRegistry(url)
        assert "secret" not in str(caught.value)

    def test_full_server_is_full_storage(self, registry: RedisRegistry, redis_process: RedisProcess) -> None:
        add(registry, "t", new_version(DIGEST, LAYOUT))
        with redis_process.client() as client:
            client.config_set("maxmemory", 1)
            try:
                with pytest.raises(StorageFullError, match="cannot store more"):
                    add(registry, "t", new_version("b" * 64, LAYOUT))
                assert registry.get_task(OURS, "t") is not None
            finally:
                client.config_set("maxmemory", 0)

    def test_events_say_what_changed(self, registry: RedisRegistry, redis_process: RedisProcess) -> None:
        add(registry, "t", new_version(DIGEST, LAYOUT))
        registry.update_tenant(OURS, lambda _: Tenant(OURS))
        with redis_process.client() as client:
            found = [fields for _, fields in client.xrange(keys.EVENTS)]
        assert found == [
            {"tenant": OURS, "revision": "1", "names": '["t"]'},
            {"tenants": OURS, "revision": "1"},
        ]

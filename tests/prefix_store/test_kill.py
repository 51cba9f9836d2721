"""200 times `kill -9` on each registry amid uploads, ensembles among them, flips and deletes: every acknowledged change
is there, and none is half done, or without its entry in the audit."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from prefix_store.audit import AuditEntry
from prefix_store.blobs import Blobs
from prefix_store.ensemble import Ensemble
from prefix_store.store import PrefixStore
from prefix_store.task import Task
from tests.prefix_store.killed_writer import Acknowledged, open_store, task_of, write
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS

NUM_KILLS = 200


def check_whole(store: PrefixStore, task: Task, tasks: dict[str, Task]) -> None:
    assert task.active in [version.version for version in task.versions]
    assert [version.version for version in task.versions] == sorted({version.version for version in task.versions})
    for version in task.versions:
        if isinstance(version.content, Ensemble):
            assert version.digest == version.content.digest
            for member in version.content.members:
                assert tasks[member.task].find(str(member.version)).digest == member.digest
        else:
            assert store.load(OURS, version.digest).layout == version.content


def told_by(audit: list[AuditEntry]) -> dict[str, tuple[set[int], int]]:
    """What the entries, the newest first, make of it: each task's versions and its active one."""
    found: dict[str, tuple[set[int], int]] = {}
    for entry in reversed(audit):
        task, _, number = entry.subject.partition("@")
        versions, active = found.get(task, (set(), 0))
        match entry.action:
            case "publish":
                found[task] = versions | {int(number)}, int(number)
            case "activate":
                found[task] = versions, int(number)
            case "delete" if number:
                found[task] = versions - {int(number)}, active
            case "delete":
                del found[task]
            case other:
                assert other == "publish-known"
    return found


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_acknowledged_changes_survive_kill(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    choose = random.Random(0)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.prefix_store.killed_writer"])  # so that a start takes no seconds
    redis_process: RedisProcess | None = request.getfixturevalue("redis_process") if kind == "redis" else None
    url = "" if redis_process is None else redis_process.url
    known: dict[str, Task] = {}
    first = num_kills = 0
    while num_kills < NUM_KILLS or first <= 2 * NUM_KILLS:  # a slow machine is killed more often
        assert num_kills < 4 * NUM_KILLS, f"only {first} changes"
        num_kills += 1
        heard, acknowledge = processes.Pipe(duplex=False)
        writer = processes.Process(target=write, args=(tmp_path, url, first, acknowledge))
        writer.start()
        acknowledge.close()
        assert heard.recv() is None
        time.sleep(choose.uniform(0.0, 0.08))
        writer.kill()
        writer.join()
        while True:
            try:
                found: Acknowledged = heard.recv()
            except (EOFError, OSError):  # it was killed amid a word
                break
            known.pop(task_of(found.number), None)
            if found.task is not None:
                known[found.task.name] = found.task
            first = found.number + 1
        heard.close()
        store = open_store(tmp_path, url)
        tasks = {task.name: task for task in store.list_tasks(OURS)}
        told = told_by(store._registry.list_audit(OURS, 1_000_000, None))
        assert told == {
            name: ({version.version for version in task.versions}, task.active) for name, task in tasks.items()
        }
        open_change = task_of(first)
        assert {**tasks, open_change: None} == {**known, open_change: None}
        known = tasks
        if open_change in tasks:
            check_whole(store, tasks[open_change], tasks)
        store.close()
    if redis_process is not None:
        with redis_process.client() as client:  # what killed uploads and deletions held ends by itself, in minutes
            for key in (*client.scan_iter("*:leases:*"), *client.scan_iter("*:dropping:*")):
                client.delete(key)
    store = open_store(tmp_path, url)
    Blobs(tmp_path / "blobs").sweep()
    for task in known.values():
        check_whole(store, task, known)
    versions = [version for task in known.values() for version in task.versions]
    files = {version.digest for version in versions if not isinstance(version.content, Ensemble)}
    assert {path.stem for path in (tmp_path / "blobs").rglob("*.*")} == files
    store.close()

"""An acknowledged upload survives `kill -9`: 200 uploads, ensembles among them, to a process that holds only the
store."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from prefix_store.blobs import Blobs
from prefix_store.ensemble import Ensemble
from prefix_store.prefix import ModelShape
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore

SHAPE = ModelShape(2, 2, 8, 32, 100, 512, torch.float32, "tiny", "f" * 64)
WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from prefix_store.prefix import Prefix
from tests.prefix_store.test_kill import open_store
store = open_store(Path(sys.argv[1]))
first = int(sys.argv[2])
print("open", flush=True)
for i in range(first, 200):
    if i % 10 == 9:
        ensemble = store.make_ensemble("default", [f"task-{(i - n) % 7}" for n in (1, 2, 3)], "vote")
        found = store.publish_ensemble("default", "ensembles", ensemble)
    else:
        table = torch.randn(40, 32, generator=torch.Generator().manual_seed(i))
        prefix = Prefix("soft", embeddings=table, placement=("prefix", "infix")[i % 2])
        found = store.publish("default", f"task-{i % 7}", prefix, base="unverified")
    print(i, found.version.task, found.version.version, found.version.digest, flush=True)
"""


def open_store(folder: Path) -> PrefixStore:
    store = PrefixStore(SqliteRegistry(folder / "registry.sqlite"), Blobs(folder / "blobs"), SHAPE)
    store.sweep()
    return store


def test_acknowledged_uploads_survive_kill(tmp_path: Path) -> None:
    choose = random.Random(0)
    root = str(Path(__file__).parents[2])
    acknowledged: dict[tuple[str, int], str] = {}
    first, num_kills = 0, 0
    while first < 200:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(first), root]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            if first < 160:
                time.sleep(choose.uniform(0.0, 0.08))
                process.send_signal(signal.SIGKILL)
                num_kills += 1
            for line in process.stdout:
                if line.endswith("\n"):
                    number, task, version, digest = line.split()
                    acknowledged[task, int(version)] = digest
                    first = int(number) + 1
        store = open_store(tmp_path)
        versions = {(v.task, v.version): v for task in store.list_tasks("default") for v in task.versions}
        assert acknowledged.items() <= {key: v.digest for key, v in versions.items()}.items()
        files = {v.digest: v for v in versions.values() if not isinstance(v.content, Ensemble)}
        for digest, found in files.items():
            assert store.load(digest).layout == found.content
        assert len(list((tmp_path / "blobs").rglob("*.*"))) == len(files)
        for found in versions.values():
            if isinstance(found.content, Ensemble):
                assert found.digest == found.content.digest
                for member in found.content.members:
                    assert versions[member.task, member.version].digest == member.digest
        store.close()
    assert num_kills >= 3
    assert len(set(acknowledged.values())) >= 190
    assert sum(task == "ensembles" for task, _ in acknowledged) == 20

"""A data folder in which many tasks are registered, without a server: thousands of uploads would take minutes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from in_process import CPU
from workloads import Measures, Task

from prefix_store.blobs import Blobs
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.tenants import DEFAULT_TENANT
from server.engine.model_measures import measure_shape
from server.engine.model_runner import load_model, native_dtype
from server.model_files import ModelFiles, fingerprint


def register(files: ModelFiles, tasks: Iterable[Task], measures: Measures, data_dir: Path) -> None:
    """As `serve` with its own settings would have stored them."""
    model = load_model(files.path, native_dtype("auto", CPU), CPU, reorders=False)
    shape = measure_shape(model, files.name, fingerprint(files.path))
    store = PrefixStore(SqliteRegistry(data_dir / "registry.sqlite"), Blobs(data_dir / "blobs"), shape)
    for task in tasks:
        store.publish(DEFAULT_TENANT, task.name, task.prefix(measures), base="verified")
    store.close()

"""An upload's checks on files at hand: what an artefact is, and whether it would be taken. No weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from prefix_store.blobs import Blobs
from prefix_store.errors import BaseMismatchError, InvalidArtefactError
from prefix_store.local_files import read_path
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from server.config import Settings
from server.engine.kv_blocks import block_bytes, prefix_blocks
from server.engine.model_runner import measure_shape, model_class, native_dtype
from server.model_files import find_model, fingerprint
from server.start import DEFAULT_PREFIX_BYTES


@dataclass(frozen=True)
class Inspection:
    """`reason` says why it does not fit; what could not be read is None. `base` is as in an upload's manifest."""

    path: str
    model: str
    fits: bool
    reason: str | None = None
    base: str | None = None
    base_model: str | None = None
    kind: str | None = None
    num_virtual_tokens: int | None = None
    num_bytes: int | None = None
    device_bytes: int | None = None


def model_shape(settings: Settings) -> ModelShape:
    """The measures of the model that `settings` would serve, from its config alone. Raises ModelFilesError."""
    files = find_model(settings.model, settings.model_revision)
    config = AutoConfig.from_pretrained(files.path)
    with torch.device("meta"):
        empty = model_class(config).from_config(config, dtype=native_dtype(settings.dtype, torch.device("cpu")))
    return measure_shape(
        empty,
        settings.model_name or files.name,
        fingerprint(files.path),
        settings.model_alias,
        settings.max_virtual_tokens,
    )


def inspect(
    path: Path,
    settings: Settings,
    index: int | None = None,
    *,
    accept_base: bool = False,
    task: str | None = None,
) -> Inspection:
    """What the server of `settings` would say to the upload of `path` (as `task`), its trial forward apart."""
    shape = model_shape(settings)
    prefix: Prefix | None = None
    base = reason = None
    try:
        prefix = read_path(path, shape, index)
        with _scratch_store(shape) as store:
            if task is not None:
                store.check_name(task)
            base = store.match_base(prefix, accept_base)
    except BaseMismatchError as error:
        base, reason = "mismatch", str(error)
    except InvalidArtefactError as error:
        reason = str(error)
    if prefix is None:
        return Inspection(str(path), shape.model_name, fits=False, reason=reason)
    device_bytes = prefix_blocks(prefix.layout, shape) * block_bytes(shape)
    pool_bytes = int(settings.prefix_bytes or DEFAULT_PREFIX_BYTES)
    if reason is None and device_bytes > pool_bytes:
        reason = f"it needs {device_bytes} bytes of prefix memory, the pool has {pool_bytes}"
    return Inspection(
        path=str(path),
        model=shape.model_name,
        fits=reason is None,
        reason=reason,
        base=base,
        base_model=prefix.base_model,
        kind=prefix.kind,
        num_virtual_tokens=prefix.num_virtual_tokens,
        num_bytes=prefix.num_bytes,
        device_bytes=device_bytes,
    )


@contextmanager
def _scratch_store(shape: ModelShape) -> Iterator[PrefixStore]:
    """A store of nothing, thrown away: the rules of an upload are its."""
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(SqliteRegistry(Path(folder) / "registry.sqlite"), Blobs(Path(folder) / "blobs"), shape)
        try:
            yield store
        finally:
            store.close()

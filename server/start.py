"""From settings to a finished AppState: model, pools, engine, store. The one place where they are put together."""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
import torch
from rich.console import Console
from transformers import AutoTokenizer

from prefix_store.admission import next_step
from prefix_store.blobs import Blobs
from prefix_store.errors import (
    DamagedRegistryError,
    InvalidArtefactError,
    StorageFullError,
    UnavailableError,
    in_full,
)
from prefix_store.file_owner import claim
from prefix_store.local_files import CONFIG, peft_files
from prefix_store.mirror import Mirror
from prefix_store.prefix import ModelShape
from prefix_store.redis_registry import RedisRegistry
from prefix_store.redis_server import DURABLE
from prefix_store.registry import Registry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.tenants import DEFAULT_TENANT
from server.api.app import serve
from server.api.auth import KeyRing
from server.api.limits import RateLimits
from server.api.metering import Meter
from server.api.state import AppState
from server.config import Settings, is_loopback
from server.data_folder import BLOBS, MIRROR, REGISTRY, serving
from server.engine.async_engine import AsyncEngine
from server.engine.checked_model import checked_model
from server.engine.cpu_kernels import load_kernels
from server.engine.engine import Engine
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, block_bytes, split_pool
from server.engine.model_config import reason_of
from server.engine.model_runner import ModelRunner, native_dtype
from server.engine.threads import use_one_thread, workers
from server.engine.token_texts import TokenTexts, special_token_ids
from server.errors import StartError
from server.first_request import curl_line, task_to_try
from server.generation_config import defaults_of, read_generation_config
from server.key_file import read_operator_key
from server.listening import port_of
from server.logs import adopt_loggers
from server.metrics import Metrics
from server.model_files import ModelFiles, cache_dir, fetch_model, fingerprint, folder_fingerprint
from server.model_folder import check_model_folder
from server.preflight import check_keys
from server.progress import progress_bar
from server.registries import name_of

log = structlog.get_logger()
DEFAULT_ROW_TOKENS = 1024  # KV memory a row has on average, where `kv_bytes` is not given
DEFAULT_PREFIX_BYTES = 512 * 2**20


def make_state(settings: Settings, files: ModelFiles) -> AppState:
    """Load the model of `files`, check it, and build everything on it. Raises StartError, ModelRefusedError."""
    check_model_folder(files.path)
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise StartError(f"device must be cpu, cuda or cuda:N, got {settings.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"device {settings.device!r} was asked for, this torch sees no CUDA device")
    registry = open_registry(settings)
    is_local = is_loopback(settings.host)
    keys = KeyRing(registry, read_operator_key(settings.operator_key_file), is_local=is_local)
    check_keys(settings.host, has_keys=keys.has_keys)
    blobs = Blobs(settings.blob_url or settings.data_dir / BLOBS)
    if (former := claim(registry, blobs)) is not None:
        log.warning("files_taken_over", root=blobs.url, registry=registry.identity().id, copied_from=former)
    tokenizer = load_tokenizer(files.path)
    fields = read_generation_config(files.path, settings.generation_config)
    kernels = load_kernels(cache_dir() / "kernels") if device.type == "cpu" else None
    use_one_thread()
    checked = checked_model(
        files.path,
        native_dtype(settings.dtype, device),
        device,
        name=settings.model_name or files.name,
        fingerprint=fingerprint(files.path),
        aliases=settings.model_alias,
        max_virtual_tokens=settings.max_virtual_tokens,
        kernels=kernels,
        quantizes=settings.quantize is not None,
    )
    model, shape, kernels = checked.model, checked.shape, checked.kernels
    num_blocks, num_prefix_blocks = _pool(settings, shape)
    try:
        kv_blocks = KVBlocks(shape, num_blocks, device, kernels)
    except (OSError, torch.OutOfMemoryError) as error:
        num_bytes = num_blocks * block_bytes(shape)
        raise StartError(
            f"expected {num_bytes:,} bytes of memory for kv_bytes and prefix_bytes, got: {error}"
        ) from error
    runner = ModelRunner(model, shape, kv_blocks)
    store = PrefixStore(registry, blobs, shape)
    engine = Engine(
        runner,
        lambda ref: store.load(ref.tenant_id or DEFAULT_TENANT, ref.digest),
        num_prefix_blocks=num_prefix_blocks,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        special_token_ids=special_token_ids(tokenizer),
        max_rows=settings.max_rows,
        max_step_tokens=settings.max_step_tokens,
        max_queue_s=settings.max_queue_s,
        executor=workers(1, "load"),
    )
    metrics = Metrics()
    return AppState(
        settings=settings,
        engine=AsyncEngine(
            engine,
            tokenizer,
            metrics,
            max_queued=settings.max_queued,
            control_tokens=settings.special_tokens_in_text,
        ),
        store=store,
        registry=registry,
        keys=keys,
        limits=RateLimits(registry),
        meter=Meter(registry),
        metrics=metrics,
        defaults=defaults_of(fields, tokenizer, settings.generation_config),
    )


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer. Raises StartError for one that cannot be loaded or has no text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")
        decode = TokenTexts(tokenizer).decode
        has_text = any(decode([token_id]).strip() for token_id in range(len(tokenizer)))
    except Exception as error:  # whatever its files, or a package that it needs, give rise to
        names = ("tokenizer.json", "tokenizer_config.json")
        is_there = any((path / name).exists() for name in names)
        why = f"it cannot be loaded: {reason_of(error)}" if is_there else f"found neither {' nor '.join(names)}"
        raise StartError(f"expected a tokenizer in the model's folder {path}, {why}") from error
    if not has_text:
        raise StartError(f"expected a tokenizer's files in the model's folder {path}, found none")
    return tokenizer


def open_registry(settings: Settings) -> Registry:
    """Where tasks, versions, tenants and keys are kept: a file of this server's, or what replicas share, read through a
    copy on this one's disk. Raises DamagedRegistryError."""
    if settings.redis_url is None:
        registry = SqliteRegistry(settings.data_dir / REGISTRY)
        registry.pinned_tasks()  # which the start needs: here damage is told of in a line
        return registry
    shared = RedisRegistry(settings.redis_url)
    mirror = _open_mirror(shared, settings.data_dir / MIRROR)
    with suppress(UnavailableError):
        if losses := shared.losses():
            expected = {name: DURABLE[name] for name in losses}
            log.warning("redis_may_lose_what_it_acknowledged", expected=expected, got=losses)
    return mirror


def _open_mirror(shared: RedisRegistry, path: Path) -> Mirror:
    """A copy that is damaged is made anew."""
    try:
        mirror = Mirror(shared, path)
        mirror.start()
        mirror.pinned_tasks()
    except DamagedRegistryError as error:
        log.warning("registry_copy_made_anew", reason=in_full(error))
        for each in path.parent.glob(f"{path.name}*"):
            each.unlink()
        mirror = Mirror(shared, path)
        mirror.start()
    return mirror


def run(settings: Settings, console: Console, sockets: list[socket.socket], examples: Path | None = None) -> None:
    """Fetch the model if need be, load it, publish examples, and serve on `sockets` until a signal."""
    adopt_loggers()
    with progress_bar(console) as report:
        report("looking for the model", None)
        files = fetch_model(settings.model, settings.model_revision, report)
        report(f"loading {files.name}", None)
        state = make_state(settings, files)
    if examples is not None:
        publish_examples(state.store, examples)
    task = task_to_try(state.store, state.keys)

    port = port_of(sockets)

    def say_ready() -> None:
        place = settings.data_dir if settings.redis_url is None else settings.redis_url
        log.info("ready", model=state.model_name, host=settings.host, port=port, registry=name_of(place))
        curl = curl_line(settings.host, port, settings.root_path, state.keys, task)
        if settings.log_json:
            log.info("try", curl=curl)
        else:  # alone on its line, to be copied
            console.print(curl, highlight=False, markup=False, soft_wrap=True)

    gc.freeze()  # hundreds of thousands of objects that stay: to go through them stops every stream for 0.3 s
    gc.enable()
    try:
        with serving(settings.data_dir):
            asyncio.run(serve(state, sockets, say_ready))
    finally:
        state.store.close()


def publish_examples(store: PrefixStore, folder: Path) -> None:
    """Every PEFT folder in `folder` as a task of its name, unless there is a task of that name already. A model's
    folder that one names, if it is on this disk, verifies its base model. The server starts without those that are
    damaged or cannot be stored now."""
    for path in sorted(folder.iterdir()):
        if (path / CONFIG).is_file() and not store.has_task(DEFAULT_TENANT, path.name):
            try:
                prefix = store.parse_peft(*peft_files(path))
                found = None if prefix.base_model is None else folder_fingerprint(prefix.base_model)
                base = store.match_base(prefix, base_fingerprint=found)
                version = store.publish(DEFAULT_TENANT, path.name, prefix, base=base, note="example").version
                if not version.may_go_live:
                    log.warning("example_not_live", task=path.name, reason=next_step(version))
            except (OSError, InvalidArtefactError, UnavailableError, StorageFullError) as error:
                log.warning("example_not_published", task=path.name, reason=in_full(error))


def _pool(settings: Settings, shape: ModelShape) -> tuple[int, int]:
    """Blocks of the whole pool and of its prefix part."""
    token_bytes = block_bytes(shape) // BLOCK_SIZE
    row_tokens = min(DEFAULT_ROW_TOKENS, shape.max_positions)
    kv_tokens = settings.max_rows * row_tokens if settings.kv_bytes is None else int(settings.kv_bytes) // token_bytes
    prefix_bytes = DEFAULT_PREFIX_BYTES if settings.prefix_bytes is None else int(settings.prefix_bytes)
    if kv_tokens < BLOCK_SIZE or prefix_bytes < token_bytes * BLOCK_SIZE:
        raise StartError(f"kv_bytes and prefix_bytes must hold one block of {token_bytes * BLOCK_SIZE} bytes at least")
    return split_pool(kv_tokens // BLOCK_SIZE * BLOCK_SIZE, prefix_bytes // token_bytes // BLOCK_SIZE * BLOCK_SIZE)


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the generation config, where it has them, else of the tokenizer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return frozenset(i for i in ids if i is not None) or frozenset(i for i in [tokenizer.eos_token_id] if i is not None)

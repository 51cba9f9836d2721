"""What is wrong with the settings of `serve`, told before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from prefix_store.errors import UnavailableError
from server.config import Settings, is_loopback
from server.data_folder import REGISTRY, close_folder
from server.errors import StartError
from server.key_file import read_operator_key
from server.listening import bind
from server.model_files import DEFAULT_MODEL_NAME, default_model_path, find_model

DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")


def check(settings: Settings, examples: Path | None = None) -> list[socket.socket]:
    """Sockets bound to the settings' address. Raises StartError, the store's errors, OSError."""
    if not DEVICE.fullmatch(settings.device):
        raise StartError(f"device must be cpu, cuda or cuda:N, got {settings.device!r}")
    if examples is not None and not examples.is_dir():
        raise StartError(f"publish_examples must be a folder of PEFT folders, got {examples}")
    operator_key = read_operator_key(settings.operator_key_file)
    if default_model_path().exists() or settings.model not in (None, DEFAULT_MODEL_NAME):  # else it is fetched
        check_model(settings.model)
    if settings.blob_url is not None:
        _check_blob_url(settings.blob_url)
    sockets = bind(settings.host, settings.port)
    try:
        check_keys(settings.host, has_keys=_has_keys(settings) or operator_key is not None)
        close_folder(settings.data_dir, settings.blob_url)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def check_model(name: str | None) -> None:
    """As `find_model`, which the names of the hub are left to: its cache takes huggingface_hub to read. Raises
    ModelFilesError."""
    if name is None or name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).is_dir():
        find_model(name)


def check_keys(host: str, *, has_keys: bool) -> None:
    """Raises StartError for a server that others reach and that asks nobody for a key."""
    if not is_loopback(host) and not has_keys:
        raise StartError(
            f"host must be a loopback address while no keys are configured, got {host}; "
            "give operator_key_file, or make a tenant with `prefixserve tenant create --create`"
        )


def _has_keys(settings: Settings) -> bool:
    """Whether the registry has a tenant's key. True where that is not known yet: a replica starts while the shared one
    is away."""
    from prefix_store.redis_registry import RedisRegistry
    from prefix_store.sqlite_registry import SqliteRegistry

    if settings.redis_url is None:
        if not (settings.data_dir / REGISTRY).is_file():
            return False
        registry: RedisRegistry | SqliteRegistry = SqliteRegistry(settings.data_dir / REGISTRY)
    else:
        registry = RedisRegistry(settings.redis_url)  # a URL that cannot be read is refused here
    try:
        return any(tenant.keys for tenant in registry.list_tenants())
    except UnavailableError:
        return True
    finally:
        registry.close()


def _check_blob_url(url: str) -> None:
    from fsspec import get_filesystem_class
    from fsspec.utils import get_protocol

    try:
        get_filesystem_class(get_protocol(url))
    except (ValueError, ImportError) as error:  # neither text has more of the URL than its scheme
        raise StartError(f"blob_url must be a folder or a URL that fsspec can open: {error}") from error

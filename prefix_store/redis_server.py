"""One Redis server: its connections, what its errors mean, and whose data it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from prefix_store import redis_keys as keys
from prefix_store.errors import ConflictError, StorageFullError, UnavailableError

SCHEMA_VERSION = 1
CONNECT_S = 2.0
TIMEOUT_S = 3.0
DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
EXPECTED = "expected a URL as rediss://:PASSWORD@HOST:PORT/0, with %2F, %23 and %40 for a password's own /, # and @;"
UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.NoPermissionError,
)


class RedisServer:
    """`url` is `redis://…` or, with TLS, `rediss://…`, a password in it. Nothing is sent before the first call. May be
    used from any thread.

    Nothing is sent twice: a script whose answer got lost may have run.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        try:
            _ = urlsplit(url).port
        except ValueError:  # its text may hold a part of the password
            raise UnavailableError(f"{EXPECTED} got one that cannot be read") from None
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                decode_responses=True,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=min(CONNECT_S, timeout_s),
                socket_timeout=timeout_s,
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # reads the URL's options; it connects later
        except (ValueError, TypeError, redis.RedisError) as error:
            raise UnavailableError(f"{EXPECTED} got: {error}") from error
        self._is_checked = False

    @contextmanager
    def answering(self) -> Iterator[Any]:
        """The client. Raises UnavailableError where the server cannot be reached, StorageFullError where it has no
        room, ConflictError where its data is of another schema."""
        try:
            if not self._is_checked:
                self._client.set(keys.SCHEMA, SCHEMA_VERSION, nx=True)
                found = self._client.get(keys.SCHEMA)
                if found != str(SCHEMA_VERSION):
                    raise ConflictError(f"expected a registry of schema {SCHEMA_VERSION} in Redis, got {found}")
                self._is_checked = True
            yield self._client
        except UNAVAILABLE as error:
            raise UnavailableError("the registry in Redis cannot be reached", detail=error) from error
        except redis.ResponseError as error:
            if isinstance(error, redis.OutOfMemoryError) or str(error).startswith("MISCONF"):
                raise StorageFullError("the registry in Redis cannot store more", detail=error) from error
            raise

    def has_registry(self) -> bool:
        """Whether it is one's data already; asking makes none. Raises UnavailableError."""
        try:
            return bool(self._client.exists(keys.SCHEMA))
        except (*UNAVAILABLE, redis.ResponseError) as error:
            raise UnavailableError("the registry in Redis cannot be reached", detail=error) from error

    def losses(self) -> dict[str, str]:
        """The settings, of those in `DURABLE`, with which the server may lose what it acknowledged. None where it does
        not say: managed ones forbid CONFIG. Raises UnavailableError."""
        with self.answering() as client:
            try:
                found = {name: client.config_get(name).get(name, wanted) for name, wanted in DURABLE.items()}
            except redis.ResponseError:
                return {}
        return {name: value for name, value in found.items() if value != DURABLE[name]}

    def script(self, text: str) -> Any:
        """To be called with `keys`, `args` and the `client` that answers."""
        return self._client.register_script(text)

    def close(self) -> None:
        self._client.close()

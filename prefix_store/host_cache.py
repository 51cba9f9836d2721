"""Prefixes in host memory, in their source form, the least used going first."""

from __future__ import annotations

import threading
from collections import OrderedDict

from prefix_store.prefix import Prefix


class HostCache:
    """By tenant and digest, so that nobody can tell what another tenant has loaded. May be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._prefixes: OrderedDict[tuple[str, str], Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tenant: str, digest: str) -> Prefix | None:
        with self._lock:
            found = self._prefixes.get((tenant, digest))
            if found is not None:
                self._prefixes.move_to_end((tenant, digest))
            return found

    def put(self, tenant: str, digest: str, prefix: Prefix) -> None:
        with self._lock:
            if (tenant, digest) not in self._prefixes:
                self._prefixes[tenant, digest] = prefix
                self._num_bytes += prefix.num_bytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._prefixes.popitem(last=False)[1].num_bytes

    def drop(self, tenant: str, digest: str) -> None:
        with self._lock:
            gone = self._prefixes.pop((tenant, digest), None)
            if gone is not None:
                self._num_bytes -= gone.num_bytes

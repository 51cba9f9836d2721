"""The request that a new server's log suggests: one that this server answers."""

from __future__ import annotations

import ipaddress
import json
import shlex
from urllib.parse import quote

from prefix_store.errors import PrefixStoreError
from prefix_store.store import PrefixStore
from prefix_store.tenants import DEFAULT_TENANT
from server.api.auth import KeyRing

FILMS, FILMS_TEXT, TEXT = "films", "A warm, funny and moving film.\nSentiment:", "Once upon a time"
KEY = '-H "Authorization: Bearer $PREFIXSERVE_API_KEY"'
MAX_LOOKED_AT = 100


def curl_line(host: str, port: int, root_path: str, keys: KeyRing, task: str | None) -> str:
    """For a shell. A key is named by the variable that the command line also reads."""
    query = "" if task is None else f"?task={quote(task)}"
    url = f"http://{_reachable(host)}:{port}{root_path.rstrip('/')}/generate{query}"
    body = json.dumps({"inputs": FILMS_TEXT if task == FILMS else TEXT, "parameters": {"max_new_tokens": 20}})
    key = "" if keys.is_open else f" {KEY}"
    return f"curl {shlex.quote(url)}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def task_to_try(store: PrefixStore, keys: KeyRing) -> str | None:
    """A task of `default` that answers; None, for the bare model, also where only tenants' keys could ask for it."""
    if not (keys.is_open or keys.has_operator):
        return None
    names = [task.name for task in store.list_tasks(DEFAULT_TENANT, MAX_LOOKED_AT)]
    return next((name for name in (FILMS, *names) if _answers(store, name)), None)


def _answers(store: PrefixStore, task: str) -> bool:
    try:
        store.resolve(DEFAULT_TENANT, task)
    except PrefixStoreError:  # it is not there, disabled, or of another model
        return False
    return True


def _reachable(host: str) -> str:
    """An address of this machine for a server that listens on all of them; IPv6 in brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"

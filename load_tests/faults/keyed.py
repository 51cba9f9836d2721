"""The real program with an operator's key, in a process of its own, and tenants on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from served import Served, served

OPERATOR_KEY = "the-operator-of-a-load-test-and-nobody-else"


@dataclass(frozen=True)
class Keyed:
    served: Served
    http: httpx.Client  # the operator's

    @property
    def port(self) -> int:
        return self.served.port

    def tenant(self, name: str, **limits: Any) -> str:
        """Make a tenant; its key."""
        made = self.http.put(f"/v1/tenants/{name}", json={"limits": limits} if limits else {})
        key: str = made.raise_for_status().json()["key"]
        return key

    def put(self, key: str, task: str, body: bytes) -> None:
        """A version of a tenant's task from a native file."""
        headers = {"Content-Type": "application/octet-stream", "Authorization": f"Bearer {key}"}
        self.http.put(f"/v1/prefixes/{task}?accept_base=1", content=body, headers=headers).raise_for_status()

    def metric(self, name: str) -> float:
        """One without labels."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        return float(next(line for line in lines if line.startswith(f"prefixserve_{name} ")).split()[1])


@contextmanager
def keyed(*options: str, data_dir: Path | None = None) -> Iterator[Keyed]:
    """`options` are those of `serve`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "operator.key"
        file.touch(0o600)
        file.write_text(OPERATOR_KEY)
        with served("--operator-key-file", str(file), *options, data_dir=data_dir) as server:
            headers = {"Authorization": f"Bearer {OPERATOR_KEY}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=60) as http:
                yield Keyed(server, http)

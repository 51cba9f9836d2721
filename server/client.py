"""The command line's side of the HTTP contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from prefix_store.local_files import CONFIG, WEIGHTS, peft_files

TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ClientError(Exception):
    """The server refused, or cannot be reached; the text is the server's own."""


class Client:
    """One server, one key."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)

    def push(
        self, task: str, path: Path, *, index: int | None, note: str, activate: str, accept_base: bool
    ) -> dict[str, Any]:
        params: dict[str, Any] = {"activate": activate}
        if index is not None:
            params["index"] = index
        if note:
            params["note"] = note
        if accept_base:
            params["accept_base"] = 1
        if path.is_dir():
            config, weights = peft_files(path)
            files = {CONFIG: (CONFIG, config), WEIGHTS: (WEIGHTS, weights)}
            return self._json("PUT", f"/v1/prefixes/{task}", params=params, files=files)
        headers = {"Content-Type": "application/octet-stream"}
        return self._json("PUT", f"/v1/prefixes/{task}", params=params, content=path.read_bytes(), headers=headers)

    def list_tasks(self) -> list[dict[str, Any]]:
        tasks: list[dict[str, Any]] = []
        after = ""
        while True:
            page = self._json("GET", "/v1/prefixes", params={"limit": 1000, "after": after})
            tasks += page["prefixes"]
            if page["next"] is None:
                return tasks
            after = page["next"]

    def task(self, task: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/prefixes/{task}")

    def activate(self, task: str, version: str) -> dict[str, Any]:
        value: int | str = int(version) if version.isdecimal() and len(version) < 10 else version
        return self._json("POST", f"/v1/prefixes/{task}/activate", json={"version": value})

    def delete(self, target: str) -> None:
        """`T`, or `T@V`."""
        task, at, version = target.partition("@")
        self._request("DELETE", f"/v1/prefixes/{task}/versions/{version}" if at else f"/v1/prefixes/{task}")

    def generate(self, task: str, text: str, max_new_tokens: int) -> dict[str, Any]:
        body = {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens}}
        return self._json("POST", "/generate", params={"task": task}, json=body)

    def generate_stream(self, task: str, text: str, max_new_tokens: int) -> Iterator[dict[str, Any]]:
        body = {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens}}
        try:
            with self._http.stream("POST", "/generate_stream", params={"task": task}, json=body) as response:
                if response.is_error:
                    response.read()
                    raise ClientError(_reason(response))
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        event = json.loads(line[5:])
                        if "error" in event:
                            raise ClientError(event["error"])
                        yield event
        except httpx.HTTPError as error:
            raise ClientError(f"{self._http.base_url}: {error}") from error

    def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._request(method, path, **more).json()
        return found

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise ClientError(f"{self._http.base_url}: {error}") from error
        if response.is_error:
            raise ClientError(_reason(response))
        return response


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return f"{response.status_code} {response.reason_phrase}"
    text = body.get("detail") or body.get("error") or body
    return f"{response.status_code}: {text['message'] if isinstance(text, dict) else text}"

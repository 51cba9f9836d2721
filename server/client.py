"""The command line's side of the HTTP contract."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError

TIMEOUT = httpx.Timeout(600.0, connect=5.0)
ENSEMBLE = "ensemble"
MAX_ENSEMBLE_BYTES = 64 * 1024
OpenFile = Callable[[Path], BinaryIO]


class ClientError(Exception):
    """The server refused, or cannot be reached; the text is the server's own."""


class Client:
    """One server, one key. Leaving the `with` closes its connections."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ClientError(f"url must be as http://127.0.0.1:8000 and the key ASCII: {error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def push(
        self,
        task: str,
        path: Path,
        *,
        index: int | None = None,
        note: str = "",
        activate: str = "auto",
        accept_base: bool = False,
        base_fingerprint: str | None = None,
        open_file: OpenFile = lambda path: path.open("rb"),
    ) -> dict[str, Any]:
        """Send a PEFT folder or a native file as it is read through `open_file`. Raises InvalidArtefactError."""
        from prefix_store.local_files import CONFIG, WEIGHTS, peft_files  # torch takes seconds

        params: dict[str, Any] = {"activate": activate}
        if index is not None:
            params["index"] = index
        if note:
            params["note"] = note
        if accept_base:
            params["accept_base"] = 1
        if base_fingerprint is not None:
            params["base_fingerprint"] = base_fingerprint
        with ExitStack() as stack:
            if not path.is_dir():
                file = stack.enter_context(open_file(path))
                headers = {"Content-Type": "application/octet-stream"}
                return self._json("PUT", f"/v1/prefixes/{_quoted(task)}", params=params, content=file, headers=headers)
            peft_files(path)  # says which one is missing
            parts = {name: (name, stack.enter_context(open_file(path / name))) for name in (CONFIG, WEIGHTS)}
            return self._json("PUT", f"/v1/prefixes/{_quoted(task)}", params=params, files=parts)

    def push_ensemble(
        self, task: str, path: Path, *, note: str = "", activate: str = "auto", accept_base: bool = False
    ) -> dict[str, Any]:
        """Send the ensemble that the JSON file names. Raises InvalidArtefactError."""
        content = read_json_object(path.read_bytes(), path.name, MAX_ENSEMBLE_BYTES)
        if content.get("kind") != ENSEMBLE:
            raise InvalidArtefactError(f"{path.name}: kind must be {ENSEMBLE!r}, got {str(content.get('kind'))[:40]!r}")
        params = {"activate": activate} | ({"note": note} if note else {})
        if accept_base:
            params["accept_base"] = "1"
        return self._json("PUT", f"/v1/prefixes/{_quoted(task)}", params=params, json=content)

    def list_tasks(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """The caller's own and those shared with it; for an operator, another tenant's, or `*` all."""
        tasks: list[dict[str, Any]] = []
        after = ""
        whose = {} if tenant is None else {"tenant": tenant}
        while True:
            page = self._json("GET", "/v1/prefixes", params={"limit": 1000, "after": after, **whose})
            tasks += page["prefixes"]
            if page["next"] is None:
                return tasks
            after = page["next"]

    def task(self, task: str) -> dict[str, Any]:
        """`T` or the version `T@V`; of another tenant `OWNER/T`."""
        return self._json("GET", f"/v1/prefixes/{_quoted(task)}")

    def activate(self, task: str, version: str, *, accept_base: bool = False) -> dict[str, Any]:
        params = {"accept_base": 1} if accept_base else {}
        return self._json("POST", f"/v1/prefixes/{_quoted(task)}/activate", params=params, json={"version": version})

    def delete(self, target: str) -> None:
        """`T`, or the version `T@V`."""
        self._request("DELETE", f"/v1/prefixes/{_quoted(target)}")

    def usage(self, tenant: str | None, first_day: str | None, last_day: str | None) -> list[dict[str, Any]]:
        given = {"tenant": tenant, "first_day": first_day, "last_day": last_day}
        params = {name: value for name, value in given.items() if value is not None}
        rows: list[dict[str, Any]] = self._json("GET", "/v1/usage", params=params)["usage"]
        return rows

    def generate(self, task: str, text: str, max_new_tokens: int, *, details: bool = False) -> dict[str, Any]:
        body = {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens, "details": details}}
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
        response = self._request(method, path, **more)
        try:
            found: dict[str, Any] = response.json()
        except ValueError as error:
            raise ClientError(f"expected JSON from {response.url}, got {response.text[:80]!r}") from error
        return found

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise ClientError(f"{self._http.base_url}: {error}") from error
        if response.is_error:
            raise ClientError(_reason(response))
        return response


def _quoted(task: str) -> str:
    """One segment of a path, whatever was typed; the server says what is wrong with it."""
    return quote(task, safe="@") or "%20"


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
        text = body.get("detail") or body["error"]
    except (ValueError, AttributeError, KeyError):  # not an answer of ours
        return f"{response.status_code} {response.reason_phrase}"
    return f"{response.status_code}: {text['message'] if isinstance(text, dict) else text}"

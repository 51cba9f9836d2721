"""A server in a thread of this process, on a free loopback port, for what is measured over HTTP."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from server.api.app import create_app
from server.api.state import AppState
from server.config import Settings
from server.model_files import ModelFiles
from server.start import make_state


@dataclass(frozen=True)
class Served:
    url: str
    state: AppState

    def seconds(self, asked: Sequence[tuple[str, str | None]], num_tokens: int) -> float:
        """For all (text, task) at once, `num_tokens` new tokens each, EOS ignored, until the last answer is there."""
        return asyncio.run(self._seconds(asked, num_tokens))

    async def _seconds(self, asked: Sequence[tuple[str, str | None]], num_tokens: int) -> float:
        parameters = {"max_new_tokens": num_tokens, "ignore_eos": True}
        limits = httpx.Limits(max_connections=len(asked))
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:

            async def ask(text: str, task: str | None) -> None:
                query = {} if task is None else {"task": task}
                answer = await client.post("/generate", params=query, json={"inputs": text, "parameters": parameters})
                assert answer.status_code == 200, answer.text

            start_s = time.perf_counter()
            await asyncio.gather(*(ask(text, task) for text, task in asked))
            return time.perf_counter() - start_s


@contextmanager
def served(files: ModelFiles, **settings: Any) -> Iterator[Served]:
    """`settings` are those of `serve`; the data folder is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        state = make_state(Settings(data_dir=Path(folder), port=0, **settings), files)
        server = uvicorn.Server(uvicorn.Config(create_app(state), host="127.0.0.1", port=0, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", state)
        finally:
            server.should_exit = True
            thread.join()
            state.store.close()


def spread(values: Sequence[float]) -> str:
    """The median with the range."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return f"{median:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"

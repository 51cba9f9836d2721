"""The FastAPI application over a finished AppState."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import Depends, FastAPI

from server.api import errors, generate, openai, ops, prefixes, records, tenants, uploads
from server.api.auth import check_again
from server.api.connection import BoundedConnection
from server.api.gate import Gate
from server.api.query import refuse_unknown_query
from server.api.schema import DescribedAPI
from server.api.state import AppState
from server.api.upkeep import Upkeep

DESCRIPTION = "One frozen language model, thousands of learned prefixes, one continuous batch."


def create_app(state: AppState) -> FastAPI:
    """Starts the engine with the application and stops it with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.start()
        upkeep = Upkeep(state)
        await upkeep.start()
        yield
        await upkeep.stop()
        await state.engine.shutdown(drain=False)

    app = DescribedAPI(
        title="prefixserve",
        description=DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(check_again), Depends(refuse_unknown_query)],
    )
    app.state.prefixserve = state
    for module in (generate, openai, uploads, prefixes, tenants, records, ops):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(Gate, state=state)
    return app


class Server(uvicorn.Server):
    """A first signal drains: not ready, new work refused, running requests finish. A second one stops at once."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._state.is_draining:
            self.should_exit = self.force_exit = True
        self._state.is_draining = True

    async def exit_when_drained(self) -> None:
        while not self._state.is_draining or self._state.num_active:
            await asyncio.sleep(0.05)
        self.should_exit = True


def server_config(state: AppState) -> uvicorn.Config:
    """On the settings' host and port."""
    return uvicorn.Config(
        create_app(state),
        host=state.settings.host,
        port=state.settings.port,
        http=BoundedConnection,
        log_config=None,
        access_log=False,
        lifespan="on",
    )


async def serve(state: AppState) -> None:
    """Serve until a signal."""
    server = Server(server_config(state), state)
    waiting = asyncio.create_task(server.exit_when_drained())
    try:
        await server.serve()
    finally:
        waiting.cancel()

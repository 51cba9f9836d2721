"""The FastAPI application over a finished AppState."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType

import uvicorn
from fastapi import Depends, FastAPI

from server.api import errors, generate, openai, ops, pages, prefixes, records, tenants, uploads
from server.api.auth import check_again
from server.api.connection import BoundedConnection
from server.api.gate import Gate
from server.api.listener import Listener
from server.api.query import refuse_unknown_query
from server.api.route_table import RouteTable
from server.api.schema import DescribedAPI
from server.api.state import AppState
from server.api.upkeep import Upkeep
from server.errors import StartError
from server.listening import bind

BACKLOG = 4096  # callers that the system keeps until the loop comes round; those beyond it try again after a second
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
        docs_url=None,  # `pages` has them: FastAPI's load scripts from another host
        redoc_url=None,
        servers=[{"url": state.settings.root_path}] if state.settings.root_path else None,
        redirect_slashes=False,
        dependencies=[Depends(check_again), Depends(refuse_unknown_query)],
    )
    app.state.prefixserve = state
    routes = list(app.routes)
    for module in (generate, openai, uploads, prefixes, tenants, records, ops, pages):
        app.include_router(module.router)
        routes += module.router.routes
    errors.install(app)
    app.add_middleware(Gate, state=state, routes=RouteTable(routes))
    return app


class Server(uvicorn.Server):
    """Calls `on_ready` when connections are accepted. A first signal drains: not ready, new work refused, running
    requests finish. A second one stops at once."""

    def __init__(self, config: uvicorn.Config, state: AppState, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """On `sockets`, or on the settings' host and port. Raises StartError where these cannot be listened on."""
        settings, connections = self._state.settings, self._state.connections
        bound = sockets or bind(settings.host, settings.port)
        await super().startup([Listener(each, connections) for each in bound])
        if self.started:
            self._on_ready()

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
        http=partial(BoundedConnection, connections=state.connections),  # type: ignore[arg-type]
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        log_level="error",  # of requests that are refused
        access_log=False,
        proxy_headers=False,
        lifespan="on",
    )


async def serve(
    state: AppState, sockets: list[socket.socket] | None = None, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve on `sockets`, which are bound, or on the settings' host and port, until a signal. Raises StartError where
    that never began."""
    server = Server(server_config(state), state, on_ready)
    waiting = asyncio.create_task(server.exit_when_drained())
    try:
        await server.serve(sockets)
    finally:
        waiting.cancel()
    if not server.started:
        raise StartError("the server could not start; its log has the reason")

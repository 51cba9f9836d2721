"""Imports go one way: `server.api` -> `server.engine` -> `prefix_store`. HTTP is the api's; asyncio has two files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = ("fastapi", "starlette", "uvicorn", "httpx")
# Where a package's files may not import from.
FORBIDDEN = {
    "prefix_store": ("server", "asyncio", *HTTP),
    "server/engine": ("server.api", "server.start", "server.cli", "redis", "sqlite3", *HTTP),
    "server/api": ("server.cli", "server.client", "server.start", "httpx"),
}
ASYNC_FILES = {"async_engine.py", "request_stream.py"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        if any(is_in(name, other) for other in FORBIDDEN[package])
    ]
    assert not wrong


def test_the_engine_itself_is_synchronous() -> None:
    using = {path.name for path in (ROOT / "server" / "engine").glob("*.py") if "asyncio" in set(imported(path))}
    assert using == ASYNC_FILES

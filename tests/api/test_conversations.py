"""Conversations of several turns with the stock clients, unmodified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.api.test_openai import chat
from tests.conftest import Served
from tests.conversations import CLIENTS, SYSTEM, TURNS, Talk

# Litellm's.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .* using the `ReadOnly` qualifier:UserWarning")


@pytest.fixture(autouse=True)
def event_loop_of_the_thread() -> Iterator[None]:
    """Litellm asks for one outside of any coroutine, and would leave the one that is then made open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.run_until_complete(asyncio.sleep(0))
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.parametrize("talk", CLIENTS)
def test_three_turns_with_a_stock_client(served: Served, films: str, talk: Talk) -> None:
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    wanted = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        answer = chat(served, model=films, messages=messages, max_tokens=6)
        wanted.append(answer.json()["choices"][0]["message"]["content"])
        messages.append({"role": "assistant", "content": wanted[-1]})
    assert talk(served.url, films) == wanted
    assert len(set(wanted)) == 3

"""Can a tenant tell by response time what another has? Pairs of probes, one of which another tenant's state could speed
up; the area under the ROC curve says how well the times tell them apart (0.5: not at all).

    PYTHONPATH=load_tests python -m faults.timing [--probes 2000]

`task`: a name that another tenant has, resident, against one that nobody has; both answer 404. `text`: a prompt that
another tenant has just asked against one that nobody has. `content`: uploading what another tenant has stored and has
resident against what nobody has; `load`: then asking behind it for the first time. Exits 1 for an area of 0.55 or more.
Shared tasks are shared and eviction by others' loads can be felt: neither is probed here.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from faults.keyed import Keyed, keyed
from http_client import Connection

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS, save_byte_model

MAX_AREA = 0.55
TEXT_TOKENS = 160
NUM_VIRTUAL = 40


def area(theirs: list[float], nobodys: list[float]) -> float:
    """The chance that a probe of what another has differs from one of what nobody has in the direction that tells
    more, 0.5 to 1."""
    ordered = np.sort(nobodys)
    below = (np.searchsorted(ordered, theirs, "left") + np.searchsorted(ordered, theirs, "right")) / 2
    found = below.mean() / len(nobodys)
    return float(max(found, 1 - found))


def native(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(LAYERS, 2, KV_HEADS, NUM_VIRTUAL, HEAD_DIM, generator=generator)
    return write_native(Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(LAYERS)}))


def text(seed: str) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=TEXT_TOKENS))


def body(inputs: str) -> dict[str, object]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 1}}


class Prober:
    """The victim's and the attacker's connections to one server."""

    def __init__(self, server: Keyed) -> None:
        self._server = server
        self._keys = {name: server.tenant(name) for name in ("victim", "attacker")}
        self._chance = random.Random(0)

    async def open(self) -> None:
        port = self._server.port
        self._victim, self._attacker = [await Connection.open(port, key) for key in self._keys.values()]

    async def task(self, number: int) -> tuple[float, float]:
        if number == 0:
            self._server.put(self._keys["victim"], "private", native(0))
        await self._victim.request("POST", "/generate?task=private", body("x"))
        return await self._pair(lambda is_theirs: self._refused("private" if is_theirs else "absent0"))

    async def text(self, number: int) -> tuple[float, float]:
        asked, other = text(f"asked {number}"), text(f"other {number}")
        await self._victim.request("POST", "/generate", body(asked))
        return await self._pair(lambda is_theirs: self._ask("", asked if is_theirs else other))

    async def content(self, number: int) -> tuple[float, float]:
        theirs, nobodys = native(10 + 2 * number), native(11 + 2 * number)
        self._server.put(self._keys["victim"], "stored", theirs)
        await self._victim.request("POST", "/generate?task=stored", body("x"))
        self._names = {True: f"a{number}", False: f"b{number}"}

        async def put(is_theirs: bool) -> float:
            start_s = time.perf_counter()
            content = theirs if is_theirs else nobodys
            await asyncio.to_thread(self._server.put, self._keys["attacker"], self._names[is_theirs], content)
            return time.perf_counter() - start_s

        return await self._pair(put)

    async def load(self, number: int) -> tuple[float, float]:
        """After `content`."""
        found = await self._pair(lambda is_theirs: self._ask(f"?task={self._names[is_theirs]}", "x"))
        for name in self._names.values():
            await self._attacker.request("DELETE", f"/v1/prefixes/{name}")
        return found

    async def _pair(self, probe) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        """Seconds of the two, in an order of chance."""
        order = [True, False]
        self._chance.shuffle(order)
        found = {is_theirs: await probe(is_theirs) for is_theirs in order}
        return found[True], found[False]

    async def _ask(self, query: str, inputs: str) -> float:
        start_s = time.perf_counter()
        await self._attacker.request("POST", f"/generate{query}", body(inputs))
        return time.perf_counter() - start_s

    async def _refused(self, task: str) -> float:
        start_s = time.perf_counter()
        try:
            await self._attacker.request("POST", f"/generate?task={task}", body("x"))
        except RuntimeError as error:
            took_s, reason = time.perf_counter() - start_s, str(error)
            if " 404 " in reason:
                return took_s
            raise
        raise RuntimeError(f"task {task!r} is another's and must be 404")


async def probe_all(server: Keyed, num_probes: int) -> dict[str, float]:
    prober = Prober(server)
    await prober.open()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("task", "text", "content", "load")}
    for number in range(num_probes // 2):  # two probes a pair
        for name, (theirs, nobodys) in times.items():
            one, other = await getattr(prober, name)(number)
            theirs.append(one)
            nobodys.append(other)
    return {name: area(*found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_byte_model(Path(folder) / "timed")
        with keyed("--model", str(model), "--dtype", "float32") as server:
            found = asyncio.run(probe_all(server, arguments.probes))
    for name, value in found.items():
        print(f"{name}: {value:.3f}, held to < {MAX_AREA}")
    sys.exit(max(found.values()) >= MAX_AREA)


if __name__ == "__main__":
    main()

"""`kill -9` of the whole server amid uploads, flips and deletions of several clients, again and again, on each
registry.

    PYTHONPATH=load_tests python -m faults.kill [--rounds 10] [--clients 4] [--seed 0] [--registry sqlite]

A real server with a tiny model; with Redis this goes on while the server is killed. Every client changes tasks of its
own, so that it knows what they must be after each change that was acknowledged. After the restart every task must be as
it was last acknowledged, or, the one with a change on its way, as it would be after it. Every version that is listed is
downloaded and has the digest that is listed, every active one answers, and on SQLite, where no upload can still be
going on elsewhere, `registry sweep` leaves no other files in the end. Exits 1 where that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from faults.replicas import native
from machine import ROOT
from served import free_port, served

from prefix_store.blobs import OWNER
from tests.byte_model import save_byte_model
from tests.prefix_store.redis_process import RedisProcess

NUM_TASKS = 3  # a client's
MIN_S, MAX_S = 0.3, 2.0  # after which the server is killed
OCTETS = {"Content-Type": "application/octet-stream"}
NEW = "?"  # the digest of an upload that was not acknowledged


@dataclass(frozen=True)
class State:
    """A task: digests by version; none: it is not there."""

    versions: dict[int, str] = field(default_factory=dict)
    active: int = 0

    def is_like(self, seen: State) -> bool:
        """Versions are numbered on after those that were deleted, so that only a new one's number is not known."""
        new = [number for number, digest in self.versions.items() if digest == NEW]
        if not new:
            return self == seen
        found = set(seen.versions) - set(self.versions)
        kept = {number: digest for number, digest in self.versions.items() if digest != NEW}
        rest = {number: digest for number, digest in seen.versions.items() if number not in found}
        return len(found) == 1 and rest == kept and seen.active == max(found)


class Client:
    """`tasks` are as they were last acknowledged; `open_change` is a task and how it would be after the change that
    nobody has answered."""

    def __init__(self, number: int, seed: int) -> None:
        self.tasks = {f"client{number}-{i}": State() for i in range(NUM_TASKS)}
        self.open_change: tuple[str, State] | None = None
        self._chance = random.Random(f"{seed} {number}")

    async def run(self, port: int, counts: Counter[str]) -> None:
        """Until the server is gone."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            while True:
                try:
                    await self._change(http, counts)
                except httpx.TransportError:
                    return

    async def _change(self, http: httpx.AsyncClient, counts: Counter[str]) -> None:
        task = self._chance.choice(sorted(self.tasks))
        state, draw = self.tasks[task], self._chance.random()
        others = sorted(set(state.versions) - {state.active})
        if draw < 0.5 or not state.versions:
            body = native(self._chance.randrange(1 << 40))
            after = State(state.versions | {0: NEW}, 0)
            answer = await self._send(http, "PUT", task, "?accept_base=1", after, content=body, headers=OCTETS)
            found = answer.json()
            after = State(state.versions | {found["version"]: found["digest"]}, found["active"])
            kind = "upload"
        elif draw < 0.7 and others:
            after = replace(state, active=self._chance.choice(others))
            await self._send(http, "POST", task, "/activate", after, json={"version": after.active})
            kind = "flip"
        elif draw < 0.9 and others:
            gone = self._chance.choice(others)
            after = State({n: digest for n, digest in state.versions.items() if n != gone}, state.active)
            await self._send(http, "DELETE", task, f"/versions/{gone}", after)
            kind = "deleted version"
        elif draw > 0.95:
            after = State()
            await self._send(http, "DELETE", task, "", after)
            kind = "deleted task"
        else:
            return
        self.tasks[task] = after
        self.open_change = None
        counts[kind] += 1

    async def _send(
        self, http: httpx.AsyncClient, method: str, task: str, rest: str, after: State, **given: object
    ) -> httpx.Response:
        self.open_change = task, after
        answer = await http.request(method, f"/v1/prefixes/{task}{rest}", **given)  # type: ignore[arg-type]
        return answer.raise_for_status()


def check(clients: list[Client], http: httpx.Client, blobs: Path, is_swept: bool) -> list[str]:
    """What is wrong after a restart. What was seen is what the clients go on from."""
    wrong: list[str] = []
    digests: set[str] = set()
    for client in clients:
        for task, known in client.tasks.items():
            seen = look(http, task)
            allowed = [known]
            if client.open_change is not None and client.open_change[0] == task:
                allowed.append(client.open_change[1])
            if not any(one.is_like(seen) for one in allowed):
                wrong.append(f"{task}: expected {' or '.join(map(str, allowed))}, got {seen}")
            wrong += whole(http, task, seen)
            digests |= set(seen.versions.values())
            client.tasks[task] = seen
        client.open_change = None
    if is_swept:
        files = {path.stem for path in blobs.rglob("*") if path.is_file() and path.name != OWNER}
        wrong += [f"a file that no version has: {name}" for name in sorted(files - digests)]
    return wrong


def sweep(data_dir: Path) -> None:
    command = [sys.executable, "-m", "server", "registry", "sweep", "--data-dir", str(data_dir), "--all"]
    subprocess.run([*command, "--min-age-s", "0", "--grace-s", "0"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def look(http: httpx.Client, task: str) -> State:
    answer = http.get(f"/v1/prefixes/{task}")
    if answer.status_code == 404:
        return State()
    found = answer.raise_for_status().json()
    return State({one["version"]: one["digest"] for one in found["versions"]}, found["active"])


def whole(http: httpx.Client, task: str, seen: State) -> list[str]:
    wrong = []
    for number, digest in seen.versions.items():
        answer = http.get(f"/v1/prefixes/{task}/versions/{number}/file")
        if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != digest:
            wrong.append(f"{task}@{number}: its file is {answer.status_code} or another than {digest[:12]}")
    if seen.versions:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
        answer = http.post(f"/generate?task={task}", json=body)
        if answer.status_code != 200 or answer.headers["x-prefix-version"] != str(seen.active):
            wrong.append(f"{task}: expected an answer of version {seen.active}, got {answer.status_code}")
    return wrong


def kill_again_and_again(
    folder: Path, options: tuple[str, ...], arguments: argparse.Namespace, is_alone: bool
) -> tuple[list[str], Counter[str]]:
    """What was wrong, and how many changes were acknowledged."""
    clients = [Client(number, arguments.seed) for number in range(arguments.clients)]
    chance, port = random.Random(arguments.seed), free_port()
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for number in range(arguments.rounds + 1):
        with (
            served(*options, data_dir=folder / "data", port=port) as server,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        ):
            is_swept = is_alone and number == arguments.rounds
            if is_swept:
                sweep(folder / "data")
            found = check(clients, http, folder / "data" / "blobs", is_swept)
            wrong += [f"after kill {number}: {text}" for text in found]
            if number == arguments.rounds:
                break
            asyncio.run(until_killed(clients, port, counts, server.kill, chance.uniform(MIN_S, MAX_S)))
    return wrong, counts


async def until_killed(
    clients: list[Client], port: int, counts: Counter[str], kill: Callable[[], None], seconds: float
) -> None:
    running = asyncio.gather(*(client.run(port, counts) for client in clients))
    await asyncio.sleep(seconds)
    await asyncio.to_thread(kill)
    await running
    counts["on their way when it was killed"] += sum(client.open_change is not None for client in clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--registry", choices=["sqlite", "redis"], help="One alone; none: both.")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server: two threads would only wait for each other
    is_wrong = False
    for registry in ("sqlite", "redis"):
        if arguments.registry not in (None, registry):
            continue
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            options: tuple[str, ...] = ("--model", str(save_byte_model(folder / "killed-model")), "--dtype", "float32")
            if registry == "redis":
                redis = RedisProcess(folder / "redis")
                redis.start()
                stack.callback(redis.kill)
                options += ("--redis-url", redis.url)
            wrong, counts = kill_again_and_again(folder, options, arguments, is_alone=registry == "sqlite")
        print(f"{registry}: {arguments.rounds} kills, acknowledged {dict(counts)}, {len(wrong)} wrong", flush=True)
        for text in wrong[:20]:
            print(text)
        is_wrong |= bool(wrong)
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()

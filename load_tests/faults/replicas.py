"""Two replicas on one Redis: how soon both serve a flip, and what requests meet while Redis is away or hangs.

    PYTHONPATH=load_tests python -m faults.replicas [--seconds 10] [--flips 200] [--away 60] [--hang 10]

Two real servers with a tiny model, data folders of their own, one folder of files, and a redis-server with every write
on the disk before it is answered. Streams of requests for many known tasks go to both all the time. `flips`: a task is
activated through either replica in turn, until both answer with the new version, from the moment that the activation
is sent. `away`: Redis is killed for `--away` seconds, and meanwhile one replica is killed and started again, which must
get ready from its disk; requests that cannot reach this one go to the other and are counted apart. `hang`: Redis is
there and answers nothing. Changes are asked for all the time, and must be refused while Redis is gone.

Exits 1 where a flip's 99th percentile is 250 ms or more, a request for a known task fails, a change without Redis is
answered otherwise than 503, `/readyz` is not ready or does not say `degraded`, both replicas need more than 5 s from
the return of Redis to serve a new flip, or a request beside a hanging Redis takes a second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from faults.keyed import OPERATOR_KEY
from http_client import Connection
from served import Served, free_port, served

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS, save_byte_model
from tests.prefix_store.redis_process import RedisProcess

NUM_TASKS, NUM_LIMITED, NUM_STREAMS, NUM_VIRTUAL = 40, 10, 8, 5
PAUSE_S = 0.04
NUM_CHANGING, CHANGE_S = 8, 0.5  # streams of uploads, and as many of flips, at each replica; their pause
RESTART_AFTER = 0.25  # of the time that Redis is away
DEGRADED_S = 5.0  # within which a replica notices
MAX_FLIP_P99_S, MAX_CONVERGE_S, MAX_HANG_S = 0.25, 5.0, 1.0
FLIPPED = "flipped"
ALL = "requests_per_minute", "tokens_per_minute"


def native(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(LAYERS, 2, KV_HEADS, NUM_VIRTUAL, HEAD_DIM, generator=generator)
    return write_native(Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(LAYERS)}))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Replica:
    """A server that is killed and started again at the same port with the same data."""

    def __init__(self, folder: Path, name: str, options: tuple[str, ...]) -> None:
        self.name, self.port = name, free_port()
        self.is_down = True
        self._folder, self._options = folder, options
        self._running = ExitStack()
        self._server: Served | None = None

    def start(self) -> float:
        """Seconds until it is ready."""
        one = served(*self._options, data_dir=self._folder / self.name, port=self.port)
        self._server = self._running.enter_context(one)
        self.is_down = False
        return self._server.ready_s

    def kill(self) -> None:
        assert self._server is not None
        self.is_down = True
        self._server.kill()
        self._running.close()

    def close(self) -> None:
        self._running.close()


@dataclass
class Phase:
    """What happened to requests that ended in it."""

    took_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    num_turned: int = 0  # from the replica that was down to the other

    def __str__(self) -> str:
        p50, p99 = quantile(self.took_s, 0.5) * 1e3, quantile(self.took_s, 0.99) * 1e3
        return (
            f"{len(self.took_s)} answers, p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {max(self.took_s) * 1e3:.0f} ms; "
            f"{len(self.failed)} failed, {self.num_turned} went to the other replica"
        )


class Run:
    def __init__(self, replicas: tuple[Replica, Replica], redis: RedisProcess, limited_key: str) -> None:
        self.replicas, self.redis = replicas, redis
        self.phase = Phase()
        self.broken: list[str] = []
        self._limited_key = limited_key
        self._clients: dict[str, httpx.AsyncClient] = {}  # made before anything is timed: each takes a while
        self._version = 1
        self._seed = 10_000

    def hold(self, is_held: bool, what: str) -> None:
        print(f"{'held' if is_held else 'BROKEN'}: {what}", flush=True)
        if not is_held:
            self.broken.append(what)

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        for one in self.replicas:
            self._clients[one.name] = httpx.AsyncClient(base_url=url(one), headers=bearer(), timeout=60)
        streams = [asyncio.create_task(self._ask_on(number)) for number in range(NUM_STREAMS)]
        try:
            yield
        finally:
            for stream in streams:
                stream.cancel()
            for client in self._clients.values():
                await client.aclose()
            for found in await asyncio.gather(*streams, return_exceptions=True):
                if not isinstance(found, asyncio.CancelledError):
                    raise RuntimeError("a stream of requests ended") from found

    def begin(self) -> Phase:
        self.phase = Phase()
        return self.phase

    async def _ask_on(self, number: int) -> None:
        """One request after another, at either replica; every fourth stream is of the tenant that has limits."""
        chance = random.Random(number)
        is_limited = number % 4 == 3
        while True:
            await asyncio.sleep(PAUSE_S * chance.uniform(0.5, 1.5))
            task = f"limited{chance.randrange(NUM_LIMITED)}" if is_limited else f"task{chance.randrange(NUM_TASKS)}"
            key = self._limited_key if is_limited else OPERATOR_KEY
            first = chance.randrange(2)
            parameters = {"max_new_tokens": chance.randint(1, 8), "ignore_eos": True}
            body = {"inputs": f"A fine film, number {chance.randrange(100)}.", "parameters": parameters}
            start_s = time.perf_counter()
            for replica in (self.replicas[first], self.replicas[1 - first]):
                try:
                    await ask(replica, key, task, body)
                except (OSError, asyncio.IncompleteReadError) as error:
                    if not replica.is_down:
                        self.phase.failed.append(f"{replica.name}: {error!r}")
                        break
                    self.phase.num_turned += 1
                except RuntimeError as error:
                    self.phase.failed.append(f"{replica.name}: {error}")
                    break
                else:
                    self.phase.took_s.append(time.perf_counter() - start_s)
                    break

    async def flip(self, through: Replica) -> float | int:
        """Seconds from sending it until both replicas answer with the new version, or 503."""
        wanted = 3 - self._version
        start_s = time.perf_counter()
        connection = await Connection.open(through.port, OPERATOR_KEY)
        try:
            await connection.request("POST", f"/v1/prefixes/{FLIPPED}/activate", {"version": wanted})
        except RuntimeError as error:
            if "activate: 503 " in str(error):
                return 503
            raise
        finally:
            await connection.close()
        self._version = wanted
        await asyncio.gather(*(self._answers_with(replica, wanted) for replica in self.replicas))
        return time.perf_counter() - start_s

    async def _answers_with(self, replica: Replica, version: int) -> None:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
        async with asyncio.timeout(60):
            while await ask(replica, OPERATOR_KEY, FLIPPED, body) != str(version):
                pass

    @asynccontextmanager
    async def changes(self, statuses: Counter[str]) -> AsyncIterator[None]:
        """Uploads and flips at both replicas, counted by their answers."""
        kinds = (True, False) * NUM_CHANGING
        tasks = [asyncio.create_task(self._change(statuses, one, kind)) for one in self.replicas for kind in kinds]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _change(self, statuses: Counter[str], replica: Replica, uploads: bool) -> None:
        http = self._clients[replica.name]
        while True:
            self._seed += 1
            try:
                if uploads:
                    task, body = f"new{self._seed % 64}", native(self._seed)
                    answer = await http.put(f"/v1/prefixes/{task}?accept_base=1", content=body, headers=OCTETS)
                else:
                    body = {"version": self._version}
                    answer = await http.post(f"/v1/prefixes/{FLIPPED}/activate", json=body)
                statuses[f"{'upload' if uploads else 'flip'} {answer.status_code}"] += 1
            except httpx.TransportError as error:
                statuses[f"{type(error).__name__} {'(was down)' if replica.is_down else ''}"] += 1
            await asyncio.sleep(CHANGE_S)

    async def readiness(self, replica: Replica) -> str:
        """`ok`, `degraded`, or a status."""
        answer = await self._clients[replica.name].get("/readyz")
        return str(answer.json()["registry"]) if answer.status_code == 200 else str(answer.status_code)

    async def flips(self, num_flips: int) -> None:
        phase = self.begin()
        took = [await self.flip(self.replicas[number % 2]) for number in range(num_flips)]
        seconds = [one for one in took if isinstance(one, float)]
        print(f"flips: {phase}")
        p50, p99 = quantile(seconds, 0.5) * 1e3, quantile(seconds, 0.99) * 1e3
        text = f"{len(seconds)} of {num_flips} flips seen by both, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        self.hold(
            len(seconds) == num_flips and p99 < MAX_FLIP_P99_S * 1e3,
            f"{text}, longest {max(seconds) * 1e3:.0f} ms, p99 < {MAX_FLIP_P99_S * 1e3:.0f} ms",
        )
        self.hold(not phase.failed, f"no request failed beside flips, got {phase.failed[:3]}")

    async def away(self, seconds: float) -> None:
        phase, statuses = self.begin(), Counter[str]()
        restarted = self.replicas[1]
        self.redis.kill()
        start_s = time.perf_counter()
        async with self.changes(statuses):
            await asyncio.sleep(min(DEGRADED_S, seconds * RESTART_AFTER))
            found = [await self.readiness(replica) for replica in self.replicas]
            await asyncio.sleep(max(0.0, start_s + seconds * RESTART_AFTER - time.perf_counter()))
            await asyncio.to_thread(restarted.kill)
            ready_s = await asyncio.to_thread(restarted.start)
            found += [await self.readiness(replica) for replica in self.replicas]
            await asyncio.sleep(max(0.0, start_s + seconds - time.perf_counter()))
            found += [await self.readiness(replica) for replica in self.replicas]
        print(f"away: {phase}")
        print(f"away: one replica ready again after {ready_s:.1f} s, changes answered {dict(statuses)}")
        self.hold(set(found) == {"degraded"}, f"ready and degraded without Redis, got {found}")
        self.hold(not phase.failed, f"no request failed without Redis, got {phase.failed[:3]}")
        self._only_refused(statuses)
        await self.back("away", await asyncio.to_thread(self._start_redis))

    async def hang(self, seconds: float) -> None:
        phase, statuses = self.begin(), Counter[str]()
        self.redis.stop()
        async with self.changes(statuses):
            await asyncio.sleep(seconds)
            found = [await self.readiness(replica) for replica in self.replicas]
        print(f"hang: {phase}")
        print(f"hang: changes answered {dict(statuses)}")
        longest_s = max(phase.took_s)
        self.hold(set(found) == {"degraded"}, f"ready and degraded beside a hanging Redis, got {found}")
        self.hold(not phase.failed, f"no request failed beside a hanging Redis, got {phase.failed[:3]}")
        self.hold(longest_s < MAX_HANG_S, f"longest request beside a hanging Redis {longest_s:.2f} s < {MAX_HANG_S} s")
        self._only_refused(statuses)
        self.redis.go_on()
        await self.back("hang", time.perf_counter())

    def _start_redis(self) -> float:
        self.redis.start()
        return time.perf_counter()

    def _only_refused(self, statuses: Counter[str]) -> None:
        answered = {name for name in statuses if "(was down)" not in name}
        self.hold(answered == {"upload 503", "flip 503"}, f"changes without Redis are 503, got {sorted(answered)}")

    async def back(self, name: str, back_s: float) -> None:
        """A flip through each replica as soon as it takes one, from the return of Redis until both serve it."""
        phase = self.begin()
        for replica in self.replicas:
            num_refused = 0
            while isinstance(took := await self.flip(replica), int):
                num_refused += 1
                await asyncio.sleep(0.05)
            seen_s = time.perf_counter() - back_s
            print(
                f"{name}: a flip through {replica.name}, refused {num_refused} times, was seen in {took * 1e3:.0f} ms"
            )
        found = [await self.readiness(replica) for replica in self.replicas]
        self.hold(set(found) == {"ok"}, f"ready and not degraded after {name}, got {found}")
        self.hold(seen_s < MAX_CONVERGE_S, f"{seen_s:.2f} s from Redis' return to both flips, < {MAX_CONVERGE_S} s")
        await asyncio.sleep(2)
        self.hold(not phase.failed, f"no request failed afterwards, got {phase.failed[:3]}")


OCTETS = {"Content-Type": "application/octet-stream"}


def url(replica: Replica) -> str:
    return f"http://127.0.0.1:{replica.port}"


def bearer(key: str = OPERATOR_KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(replica: Replica, key: str, task: str, body: object) -> str:
    """The version that answered. On a connection of its own: one that the server closes after a while is no fault."""
    connection = await Connection.open(replica.port, key)
    try:
        await connection.request("POST", f"/generate?task={task}", body)
        return connection.headers["x-prefix-version"]
    finally:
        await connection.close()


def set_up(replica: Replica) -> str:
    """Tasks of the operator's and of a tenant with limits that it never reaches; this one's key."""
    with httpx.Client(base_url=url(replica), headers=bearer(), timeout=60) as http:

        def put(task: str, seed: int, key: str = OPERATOR_KEY) -> None:
            headers = OCTETS | bearer(key)
            path = f"/v1/prefixes/{task}?accept_base=1"
            http.put(path, content=native(seed), headers=headers).raise_for_status()

        limits = dict.fromkeys(ALL, 100_000_000)
        key: str = http.put("/v1/tenants/limited", json={"limits": limits}).raise_for_status().json()["key"]
        for number in range(NUM_TASKS):
            put(f"task{number}", number)
        time.sleep(1)  # a key is known within a second
        for number in range(NUM_LIMITED):
            put(f"limited{number}", 1000 + number, key)
        for seed in (2000, 2001):
            put(FLIPPED, seed)
        http.post(f"/v1/prefixes/{FLIPPED}/activate", json={"version": 1}).raise_for_status()
    return key


async def run_all(run: Run, arguments: argparse.Namespace) -> None:
    async with run.load():
        await asyncio.sleep(2)
        phase = run.begin()
        await asyncio.sleep(arguments.seconds)
        print(f"steady: {phase}", flush=True)
        run.hold(not phase.failed, f"no request failed, got {phase.failed[:3]}")
        await run.flips(arguments.flips)
        await run.away(arguments.away)
        await run.hang(arguments.hang)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of load without a fault")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--away", type=float, default=60)
    parser.add_argument("--hang", type=float, default=10)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers: two threads would only wait for each other
    with tempfile.TemporaryDirectory() as found, ExitStack() as stack:
        folder = Path(found)
        (folder / "operator.key").touch(0o600)
        (folder / "operator.key").write_text(OPERATOR_KEY)
        model = save_byte_model(folder / "replica-model")
        redis = RedisProcess(folder / "redis")
        redis.start()
        stack.callback(redis.kill)
        options = ("--model", str(model), "--dtype", "float32", "--redis-url", redis.url)
        options += ("--blob-url", str(folder / "blobs"), "--operator-key-file", str(folder / "operator.key"))
        replicas = Replica(folder, "one", options), Replica(folder, "two", options)
        for replica in replicas:
            print(f"{replica.name}: ready after {replica.start():.1f} s", flush=True)
            stack.callback(replica.close)
        run = Run(replicas, redis, set_up(replicas[0]))
        asyncio.run(run_all(run, arguments))
    print(f"{len(run.broken)} bounds broken")
    sys.exit(bool(run.broken))


if __name__ == "__main__":
    main()

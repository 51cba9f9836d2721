"""Every tenant's task is fitted to say its own secret; many requests at once, with uploads, flips, evictions and
callers who go: no answer may hold a token of another's.

    PYTHONPATH=load_tests python -m faults.canaries [--tenants 200] [--requests 20000] [--seed 0]

All tasks have one name, so that only the key tells them apart, and the device has room for an eighth of them. Exits 1
for any foreign token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from faults.keyed import keyed
from http_client import Connection
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS, save_byte_model

NUM_VIRTUAL, SECRET_BYTES, NUM_AT_ONCE = 8, 8, 32
PROMPTS = ("say it", "what is your word?")
TASK = "canary"
MAX_FIT_STEPS = 4000
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 16 * 4  # of 16 tokens in fp32


@dataclass
class Tenant:
    """`secrets` by version; `num_versions` are there."""

    name: str
    key: str
    secrets: tuple[str, str]
    bodies: tuple[bytes, bytes]
    num_versions: int = 0
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)


def secrets_of(num: int, chance: random.Random) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    found: set[str] = set()
    while len(found) < num:
        found.add("".join(chance.choices(letters, k=SECRET_BYTES)))
    return sorted(found)


def fit(model_path: Path, secrets: list[str]) -> list[bytes]:
    """Native files of KV prefixes behind which the model answers every prompt with its secret. All at once."""
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    generator = torch.Generator().manual_seed(0)
    size = (LAYERS, 2, len(secrets), KV_HEADS, NUM_VIRTUAL, HEAD_DIM)
    kv = torch.nn.Parameter(torch.randn(size, generator=generator))
    wanted = torch.tensor([tokenizer(secret)["input_ids"] for secret in secrets])
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    optimiser = torch.optim.Adam([kv], lr=0.05)
    for step in range(MAX_FIT_STEPS):
        losses, is_right = [], torch.ones(len(secrets), dtype=torch.bool)
        for prompt in prompts:
            cache = DynamicCache(config=model.config)
            for layer in range(LAYERS):
                cache.update(kv[layer, 0], kv[layer, 1], layer)
            ids = torch.cat((prompt.expand(len(secrets), -1), wanted[:, :-1]), dim=1)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, len(prompt) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none"))
            is_right &= (logits.argmax(-1) == wanted).all(1)
        if bool(is_right.all()):
            print(f"fitted {len(secrets)} prefixes in {step} steps", flush=True)
            return [
                write_native(Prefix("kv", layers={i: (one[i, 0], one[i, 1]) for i in range(LAYERS)}))
                for one in kv.detach().unbind(2)
            ]
        if step % 200 == 0:
            print(f"step {step}: {int(is_right.sum())} of {len(secrets)} say their secret", flush=True)
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    sys.exit(f"only {int(is_right.sum())} of {len(secrets)} prefixes could be fitted in {MAX_FIT_STEPS} steps")


class Run:
    def __init__(self, port: int, tenants: list[Tenant], seed: int) -> None:
        self._port, self._tenants = port, tenants
        self._chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.foreign: list[str] = []
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)

    async def all(self, num_requests: int) -> None:
        numbers = iter(range(num_requests))

        async def work() -> None:
            for _ in numbers:
                await self._one(self._chance.choice(self._tenants))

        await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
        await self._http.aclose()

    async def _one(self, tenant: Tenant) -> None:
        draw = self._chance.random()
        if draw < 0.02 or not tenant.num_versions:
            await self._upload(tenant)
        elif draw < 0.06:
            await self._flip(tenant)
        elif draw < 0.12:
            await self._go_away(tenant)
        else:
            await self._ask(tenant)

    async def _upload(self, tenant: Tenant) -> None:
        async with tenant.busy:
            number = min(tenant.num_versions, 1)
            answer = await self._http.put(
                f"/v1/prefixes/{TASK}?accept_base=1",
                content=tenant.bodies[number],
                headers={"Content-Type": "application/octet-stream", "Authorization": f"Bearer {tenant.key}"},
            )
            self.outcomes[f"upload {answer.status_code}"] += 1
            if answer.is_success:
                tenant.num_versions = max(tenant.num_versions, answer.json()["version"])

    async def _flip(self, tenant: Tenant) -> None:
        version = self._chance.randint(1, tenant.num_versions)
        answer = await self._http.post(
            f"/v1/prefixes/{TASK}/activate",
            json={"version": version},
            headers={"Authorization": f"Bearer {tenant.key}"},
        )
        self.outcomes[f"flip {answer.status_code}"] += 1

    def _body(self) -> dict[str, object]:
        parameters = {"max_new_tokens": SECRET_BYTES, "ignore_eos": True, "details": True}
        return {"inputs": self._chance.choice(PROMPTS), "parameters": parameters}

    async def _go_away(self, tenant: Tenant) -> None:
        connection = await Connection.open(self._port, tenant.key)
        asking = asyncio.create_task(connection.request("POST", f"/generate?task={TASK}", self._body()))
        await asyncio.sleep(self._chance.uniform(0, 0.05))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await connection.close()
        self.outcomes["gone"] += 1

    async def _ask(self, tenant: Tenant) -> None:
        connection = await Connection.open(self._port, tenant.key)
        try:
            answer = json.loads(await connection.request("POST", f"/generate?task={TASK}", self._body()))
        except RuntimeError as error:
            self.outcomes[f"refused: {str(error)[:60]}"] += 1
            return
        finally:
            await connection.close()
        expected = tenant.secrets[answer["details"]["version"] - 1]
        if answer["generated_text"] == expected:
            self.outcomes["own secret"] += 1
        else:
            self.foreign.append(f"{tenant.name}: expected {expected!r}, got {answer['generated_text']!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = save_byte_model(Path(folder) / "canary-model")
        secrets = secrets_of(2 * arguments.tenants, chance)
        bodies = fit(model, secrets)
        room = max(4, arguments.tenants // 8) * BLOCK_BYTES
        options = ("--model", str(model), "--prefix-bytes", str(room), "--kv-bytes", str(256 * BLOCK_BYTES))
        with keyed(*options, "--dtype", "float32") as server:
            tenants = []
            for i in range(arguments.tenants):
                one, two = 2 * i, 2 * i + 1
                both = (secrets[one], secrets[two]), (bodies[one], bodies[two])
                tenants.append(Tenant(f"t{i}", server.tenant(f"t{i}"), *both))
            run = Run(server.port, tenants, arguments.seed)
            start_s = time.perf_counter()
            asyncio.run(run.all(arguments.requests))
            took_s = time.perf_counter() - start_s
            names = ("prefix_evictions_total", "prefix_loads_total", "num_preemptions_total")
            counts = {name: server.metric(name) for name in names}
    for outcome, count in run.outcomes.most_common():
        print(f"{count:8,} {outcome}")
    for name, value in counts.items():
        print(f"{value:8,.0f} {name}")
    print(f"{arguments.requests:,} requests in {took_s:.0f} s, {len(run.foreign)} with foreign tokens")
    for text in run.foreign[:10]:
        print(text)
    sys.exit(bool(run.foreign) or not run.outcomes["own secret"])


if __name__ == "__main__":
    main()

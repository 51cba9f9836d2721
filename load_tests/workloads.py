"""What everyone is asked: seeded prompts, made-up tasks, and the workloads made of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig

from prefix_store.prefix import Prefix
from server.engine.kv_blocks import BLOCK_SIZE, num_blocks_for

NUM_IN, NUM_OUT, NUM_VIRTUAL = 32, 32, 20
WORDS = (" the", " of", " and", " to", " in", " is", " was", " for", " on", " that", " with", " as", " by", " at")


@dataclass(frozen=True)
class Measures:
    """Of the model, what a made-up prefix must fit."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """On the device, in whole blocks."""
        num_slots = num_blocks_for(num_tokens) * BLOCK_SIZE
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize * num_slots


@dataclass(frozen=True)
class Task:
    """A name and random values that belong to it."""

    name: str
    kind: Literal["soft", "kv"] = "soft"
    num_virtual_tokens: int = NUM_VIRTUAL
    seed: int = 0

    def values(self, measures: Measures) -> torch.Tensor:
        """A soft prompt's `[n, hidden_size]`, or KV as PEFT keeps it, `[n, 2 * layers * kv_heads * head_dim]`."""
        width = measures.hidden_size
        if self.kind == "kv":
            width = 2 * measures.num_layers * measures.num_kv_heads * measures.head_dim
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.num_virtual_tokens, width, generator=generator) * 0.1

    def prefix(self, measures: Measures) -> Prefix:
        values = self.values(measures).bfloat16()
        if self.kind == "soft":
            return Prefix("soft", embeddings=values)
        split = values.view(self.num_virtual_tokens, 2 * measures.num_layers, measures.num_kv_heads, -1)
        parts = split.permute(1, 2, 0, 3).contiguous()  # [2 * layers, kv_heads, n, head_dim]
        return Prefix("kv", layers={i: (parts[2 * i], parts[2 * i + 1]) for i in range(measures.num_layers)})


@dataclass(frozen=True)
class Ask:
    """One request. No task: the bare model."""

    text: str
    task: Task | None = None


@dataclass(frozen=True)
class Workload:
    """Requests and how many tokens each wants; `num_at_once` bounds those on their way.

    `lead` is asked before the clock starts. `num_resident` says for how many of its tasks the device has room.
    With `is_first_token` the figure is the time to the first token, else the tokens a second.
    """

    name: str
    title: str
    asks: tuple[Ask, ...]
    num_out: int = NUM_OUT
    num_at_once: int = 64
    lead: Ask | None = None
    num_resident: int | None = None
    is_first_token: bool = False

    @property
    def unit(self) -> str:
        return "ms" if self.is_first_token else "tokens/s"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Each once, in the order in which they are asked for."""
        return tuple(dict.fromkeys(ask.task for ask in self.asks if ask.task is not None))

    def figure(self, num_asks: int, seconds: float) -> float:
        """In `unit`, for so many of its requests."""
        return seconds * 1e3 if self.is_first_token else num_asks * self.num_out / seconds


def measures_of(model: Path) -> Measures:
    config = AutoConfig.from_pretrained(model)
    return Measures(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.hidden_size)


def check_prompts(model: Path) -> None:
    """Every word must be one token of the model, so that prompts are as long as they say."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lengths = {word: len(tokenizer.encode(word).ids) for word in WORDS}
    assert set(lengths.values()) == {1}, f"expected words of one token each, got {lengths}"


def prompt(seed: object, num_tokens: int = NUM_IN) -> str:
    """Common words, as many as tokens."""
    return "".join(random.Random(str(seed)).choices(WORDS, k=num_tokens))


def asks_of(tasks: list[Task] | list[None], num_in: int = NUM_IN, turn: int = 0) -> tuple[Ask, ...]:
    """A prompt of its own for every one of `tasks`, another one each turn: nobody gains by keeping text."""
    return tuple(Ask(prompt(f"{turn} {i}", num_in), task) for i, task in enumerate(tasks))


def soft_tasks(num_tasks: int, stem: str = "soft", num_virtual_tokens: int = NUM_VIRTUAL) -> list[Task]:
    return [Task(f"{stem}-{i}", num_virtual_tokens=num_virtual_tokens, seed=i) for i in range(num_tasks)]


def zipf(quick: bool, turn: int) -> Workload:
    tasks = soft_tasks(64)
    drawn = random.Random(0).choices(tasks, [1 / (i + 1) for i in range(64)], k=4 if quick else 64)
    title = f"{len(drawn)} requests, Zipf(1) over 64 tasks ({len(set(drawn))} drawn) of {NUM_VIRTUAL} virtual tokens"
    return Workload("zipf", title, asks_of(drawn, turn=turn))


def one_task(quick: bool, turn: int) -> Workload:
    asks = asks_of(soft_tasks(1) * (4 if quick else 64), turn=turn)
    return Workload("one-task", f"{len(asks)} requests of one task", asks)


def distinct(quick: bool, turn: int) -> Workload:
    asks = asks_of(soft_tasks(4 if quick else 64), turn=turn)
    return Workload("distinct", f"{len(asks)} requests, each of another task", asks)


def shared_long(quick: bool, turn: int) -> Workload:
    task = Task("shared", "kv", 256 if quick else 2048)
    asks = asks_of([task] * (4 if quick else 32), turn=turn)
    return Workload("shared-2048", f"{len(asks)} requests behind one KV prefix of {task.num_virtual_tokens:,}", asks)


def eight_long(quick: bool, turn: int) -> Workload:
    num_tasks, num_rows, num_virtual = (2, 2, 128) if quick else (8, 4, 1024)
    tasks = [Task(f"long-{i}", "kv", num_virtual, seed=i) for i in range(num_tasks)]
    asks = asks_of([task for task in tasks for _ in range(num_rows)], turn=turn)
    title = f"{len(asks)} requests, {num_rows} behind each of {num_tasks} KV prefixes of {num_virtual:,}"
    return Workload("eight-long", title, asks)


def single(quick: bool, turn: int) -> Workload:
    num_out = 16 if quick else 128
    return Workload("single", f"one request, {num_out} tokens out", asks_of(soft_tasks(1), turn=turn), num_out=num_out)


def churn(quick: bool, turn: int) -> Workload:
    tasks, num_resident = (soft_tasks(12), 4) if quick else (soft_tasks(500), 50)
    title = f"{len(tasks)} requests, each of another task that is cold; room for {num_resident}"
    return Workload("churn", title, asks_of(tasks, turn=turn), num_resident=num_resident)


def template(quick: bool, turn: int, *, is_cached: bool = True) -> Workload:
    """Each turn has a template of its own, so the first request with it is cold."""
    num_template, (task,) = 100 if quick else 500, soft_tasks(1)
    text = prompt(f"template {is_cached} {turn}", num_template)
    lead, ask = (Ask(text + prompt(f"{i} {turn}"), task) for i in range(2))
    return Workload(
        "template",
        f"time to the first token of {NUM_IN} behind {num_template} that an earlier request had",
        (ask,),
        num_out=1,
        lead=lead if is_cached else None,
        is_first_token=True,
    )


# Made for a turn: the same requests with other texts.
WORKLOADS: dict[str, Callable[[bool, int], Workload]] = {
    "zipf": zipf,
    "one-task": one_task,
    "distinct": distinct,
    "shared-2048": shared_long,
    "eight-long": eight_long,
    "single": single,
    "churn": churn,
    "template": template,
}

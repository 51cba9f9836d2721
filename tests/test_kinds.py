"""Every kind of artefact on decoder-only models, all mixed in one batch, against the naive loop token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.native_format import read_native, write_native
from prefix_store.prefix import ModelShape, Prefix
from server.engine.model_runner import load_model, measure_shape
from tests import naive
from tests.cases import NEW_TOKENS, Case, run_ours, wrong
from tests.tiny_models import FAMILIES, HIDDEN, VOCAB

SEPARATOR = 7
SUBSET = (1,)  # of the layers
REQUESTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "bare": ((),),
    "kv": (("kv",),),
    "soft": (("soft",),),
    "subset": (("subset",),),
    "soft infix": (("soft-infix",),),
    "kv infix": (("kv-infix",),),
    "subset infix": (("subset-infix",),),
    "prefix and soft infix": (("kv", "soft-infix"),),
    "prefix and kv infix": (("kv", "kv-infix"),),
    "soft prefix and kv infix": (("soft", "kv-infix"),),
    "two prefixes": (("kv", "kv-long"),),
    "the same two in the other order": (("kv-long", "kv"),),
    "a subset among three": (("kv", "subset", "kv-long"),),
    "ensemble": (("kv",), ("soft",), ("kv-long",), ("kv-infix",), ("subset", "kv")),
    "ensemble with the bare model": (("soft-infix",), ()),
}


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    """Through the native file, as they are served."""
    generator = torch.Generator().manual_seed(11)

    def kv(n: int, layers: tuple[int, ...] | None = None, **fields: Any) -> Prefix:
        size = (shape.num_layers, 2, shape.num_kv_heads, n, shape.head_dim)
        made = torch.randn(size, generator=generator)
        return Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in layers or range(shape.num_layers)}, **fields)

    def soft(n: int, **fields: Any) -> Prefix:
        return Prefix("soft", embeddings=torch.randn(n, HIDDEN, generator=generator) * 0.6, **fields)

    infix = {"placement": "infix", "separator": SEPARATOR}
    made = {
        "kv": kv(5),
        "kv-long": kv(19),
        "subset": kv(6, SUBSET),
        "soft": soft(4),
        "soft-infix": soft(3, placement="infix"),
        "kv-infix": kv(17, **infix),
        "subset-infix": kv(4, SUBSET, **infix),
    }
    return {name: read_native(write_native(prefix), shape) for name, prefix in made.items()}


World = tuple[Any, ModelShape, dict[str, Prefix], list[Case]]


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]()).float().save_pretrained(folder)
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=naive.NAME).eval()
    shape = replace(measure_shape(ours, "tiny", "none"), max_virtual_tokens=64)
    prefixes = make_prefixes(shape)
    cases = []
    for i, (name, members) in enumerate(REQUESTS.items()):
        prompt = torch.randint(3, VOCAB, (2 + 5 * i % 31,)).tolist()
        tokens, logits = naive.generate(plain, prompt, [[prefixes[p] for p in row] for row in members], NEW_TOKENS)
        cases.append(Case(name, prompt, members, tokens, logits))
    return ours, shape, prefixes, cases


def test_the_references_answers_can_prove_something(world: World) -> None:
    _, _, _, cases = world
    assert len({token for case in cases for token in case.tokens}) >= 8
    assert len({tuple(case.tokens) for case in cases}) == len(cases)


@pytest.mark.parametrize("stagger", [1, 20])
def test_every_kind_in_one_batch_answers_as_the_naive_loop(world: World, stagger: int) -> None:
    model, shape, prefixes, cases = world
    assert not wrong(cases, run_ours(model, shape, cases, prefixes, stagger=stagger))


def test_every_kind_answers_so_after_eviction_and_preemption(world: World) -> None:
    model, shape, prefixes, cases = world
    seen = {"evictions": 0, "preemptions": 0}

    def count(engine: Any) -> None:
        seen["evictions"] = engine.residents.counts.num_evictions
        seen["preemptions"] = engine.scheduler.num_preemptions

    answers = run_ours(model, shape, cases, prefixes, kv=26 * 16, room=7 * 16, stagger=20, each_step=count)
    assert not wrong(cases, answers)
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("name", ["subset", "soft-infix", "kv-infix", "kv-long"])
def test_a_dropped_virtual_token_is_noticed(world: World, name: str) -> None:
    model, shape, prefixes, cases = world
    short = prefixes[name]
    if short.embeddings is not None:
        short = replace(short, embeddings=short.embeddings[:-1])
    else:
        short = replace(short, layers={i: (k[:, :-1], v[:, :-1]) for i, (k, v) in short.layers.items()})
    concerned = [case for case in cases if any(name in row for row in case.members)]
    found = wrong(cases, run_ours(model, shape, cases, prefixes | {name: short}, stagger=20))
    assert found
    assert {text.partition(" at ")[0] for text in found} <= {case.name for case in concerned}


def test_a_layer_that_should_be_absent_is_noticed(world: World) -> None:
    """Zero keys are not the same as none."""
    model, shape, prefixes, cases = world
    key, value = prefixes["subset"].layers[SUBSET[0]]
    zeros = (torch.zeros_like(key), torch.zeros_like(value))
    full = replace(prefixes["subset"], layers={i: zeros for i in range(shape.num_layers)} | prefixes["subset"].layers)
    found = wrong(cases, run_ours(model, shape, cases, prefixes | {"subset": full}, stagger=20))
    assert any(text.startswith("subset at") for text in found)


def test_an_infix_is_not_a_prefix(world: World) -> None:
    model, shape, prefixes, cases = world
    moved = replace(prefixes["soft-infix"], placement="prefix")
    found = wrong(cases, run_ours(model, shape, cases, prefixes | {"soft-infix": moved}, stagger=20))
    assert any(text.startswith("soft infix at") for text in found)

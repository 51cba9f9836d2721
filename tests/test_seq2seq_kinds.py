"""The papers' `[PREFIX_enc; x; PREFIX_dec; y]` with cross-attention, every part alone, some layers of each, composed
and in ensembles, all mixed in one batch, against the naive loop token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from prefix_store.native_format import read_native, write_native
from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.model_runner import load_model, measure_shape
from tests import naive
from tests.cases import NEW_TOKENS, Case, run_ours, wrong
from tests.tiny_models import HIDDEN, SEQ2SEQ_FAMILIES, VOCAB, seq2seq_model

SUBSET = (1,)  # of the layers
REQUESTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "bare": ((),),
    "three parts": (("three",),),
    "encoder only": (("encoder",),),
    "decoder only": (("decoder",),),
    "cross only": (("cross",),),
    "some encoder layers": (("some-encoder",),),
    "some decoder layers": (("some-decoder",),),
    "some cross layers": (("some-cross",),),
    "some layers of each": (("some-three",),),
    "soft": (("soft",),),
    "two of three parts": (("three", "three-long"),),
    "the same two in the other order": (("three-long", "three"),),
    "parts of different artefacts": (("encoder", "decoder", "some-cross"),),
    "a soft prompt behind keys": (("three", "soft"),),
    "ensemble": (("three",), ("soft",), ("encoder",), ("some-decoder", "cross"), ("three-long",)),
    "ensemble with the bare model": (("decoder",), ()),
}
PARTS = {"encoder": "encoder", "decoder": "layers", "cross": "cross"}
World = tuple[Any, ModelShape, dict[str, Prefix], list[Case]]


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    """Through the native file, as they are served."""
    generator = torch.Generator().manual_seed(12)

    def kv(n: int, num_layers: int, layers: tuple[int, ...] = ()) -> Layers:
        made = torch.randn((num_layers, 2, shape.num_kv_heads, n, shape.head_dim), generator=generator)
        return {i: (made[i, 0], made[i, 1]) for i in layers or range(num_layers)}

    def prefix(encoder: int = 0, decoder: int = 0, cross: int = 0, layers: tuple[int, ...] = ()) -> Prefix:
        return Prefix(
            "kv",
            kv(decoder, shape.num_layers, layers) if decoder else {},
            encoder=kv(encoder, shape.num_encoder_layers, layers) if encoder else {},
            cross=kv(cross, shape.num_layers, layers) if cross else {},
            is_seq2seq=True,
        )

    made = {
        "three": prefix(4, 6, 5),
        "three-long": prefix(18, 3, 17),
        "encoder": prefix(encoder=7),
        "decoder": prefix(decoder=17),
        "cross": prefix(cross=6),
        "some-encoder": prefix(encoder=5, layers=SUBSET),
        "some-decoder": prefix(decoder=6, layers=SUBSET),
        "some-cross": prefix(cross=7, layers=SUBSET),
        "some-three": prefix(3, 5, 4, layers=SUBSET),
        "soft": Prefix("soft", embeddings=torch.randn(5, HIDDEN, generator=generator) * 0.6, is_seq2seq=True),
    }
    return {name: read_native(write_native(one), shape) for name, one in made.items()}


@pytest.fixture(scope="module", params=list(SEQ2SEQ_FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp(request.param)
    config: Any = SEQ2SEQ_FAMILIES[request.param]()
    deeper = "decoder_layers" if request.param == "bart" else "num_decoder_layers"
    setattr(config, deeper, getattr(config, deeper) + 1)  # no part has the other's number of layers
    seq2seq_model(config).save_pretrained(folder)
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation=naive.NAME).eval()
    shape = replace(measure_shape(ours, "tiny", "none"), max_virtual_tokens=64)
    prefixes = make_prefixes(shape)
    cases = []
    for i, (name, members) in enumerate(REQUESTS.items()):
        prompt = torch.randint(3, VOCAB, (2 + 5 * i % 31,)).tolist()
        tokens, logits = naive.generate(plain, prompt, [[prefixes[p] for p in row] for row in members], NEW_TOKENS)
        cases.append(Case(name, prompt, members, tokens, logits))
    return ours, shape, prefixes, cases


def test_the_references_answers_can_prove_something(world: World) -> None:
    _, shape, _, cases = world
    assert shape.num_layers != shape.num_encoder_layers
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

    answers = run_ours(model, shape, cases, prefixes, kv=20 * 16, room=14 * 16, stagger=20, each_step=count)
    assert not wrong(cases, answers)
    assert min(seen.values()) >= 3, seen


def check_notices(world: World, changed: dict[str, Prefix], *must: str) -> None:
    """Some of the cases that a change concerns answer wrongly, those of `must` among them; no other case does."""
    model, shape, prefixes, cases = world
    found = wrong(cases, run_ours(model, shape, cases, prefixes | changed, stagger=20))
    names = {text.partition(" at ")[0] for text in found}
    concerned = {case.name for case in cases if any(name in row for row in case.members for name in changed)}
    assert names
    assert set(must) <= names <= concerned


@pytest.mark.parametrize("part", list(PARTS))
def test_a_dropped_virtual_token_of_any_part_is_noticed(world: World, part: str) -> None:
    full = world[2]["three"]
    layers: Layers = getattr(full, PARTS[part])
    short = {i: (key[:, :-1], value[:, :-1]) for i, (key, value) in layers.items()}
    check_notices(world, {"three": replace(full, **{PARTS[part]: short})})


def test_a_dropped_virtual_token_of_a_soft_prompt_is_noticed(world: World) -> None:
    full = world[2]["soft"]
    assert full.embeddings is not None
    check_notices(world, {"soft": replace(full, embeddings=full.embeddings[:-1])}, "soft")


def test_swapped_parts_are_noticed(world: World) -> None:
    """The decoder's self-attention and its cross-attention have the same shapes."""
    full = world[2]["three"]
    check_notices(world, {"three": replace(full, layers=full.cross, cross=full.layers)}, "three parts")


@pytest.mark.parametrize("part", list(PARTS))
def test_a_layer_that_should_be_absent_is_noticed(world: World, part: str) -> None:
    """Zero keys are not the same as none."""
    name = f"some-{part}"
    some: Layers = getattr(world[2][name], PARTS[part])
    key, value = some[SUBSET[0]]
    num_layers = world[1].num_encoder_layers if part == "encoder" else world[1].num_layers
    full = {i: (torch.zeros_like(key), torch.zeros_like(value)) for i in range(num_layers)} | dict(some)
    check_notices(world, {name: replace(world[2][name], **{PARTS[part]: full})}, f"some {part} layers")


def test_swapped_prefixes_are_noticed(world: World) -> None:
    three, long = world[2]["three"], world[2]["three-long"]
    check_notices(world, {"three": long, "three-long": three}, "three parts", "a soft prompt behind keys")

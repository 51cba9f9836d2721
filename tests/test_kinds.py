"""Every kind of artefact, all mixed in one batch, against the naive loop token by token. Decoders have prefixes and
infixes; encoder-decoders the papers' `[PREFIX_enc; x; PREFIX_dec; y]` with cross-attention, every part alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_store.prefix import Layers
from server.engine import attention
from server.engine.batch import Batch
from server.engine.cpu_kernels import CpuKernels
from tests.cases import PATHS, Reference, World, share_every_prefix, without_last_token
from tests.kinds import SUBSET, make_reference

CAUSAL = ["llama", "gemma3", "gpt2"]
SEQ2SEQ = ["t5", "mt5", "bart"]
PARTS = {"encoder": "encoder", "decoder": "layers", "cross": "cross"}
on_decoders = pytest.mark.parametrize("reference", CAUSAL, indirect=True)
on_encoder_decoders = pytest.mark.parametrize("reference", SEQ2SEQ, indirect=True)


@pytest.fixture(scope="module", params=CAUSAL + SEQ2SEQ)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=PATHS)
def world(request: pytest.FixtureRequest, reference: Reference, kernels: CpuKernels) -> World:
    return reference.world(request.param, kernels)


def test_the_references_answers_can_prove_something(world: World) -> None:
    assert world.shape.num_layers != world.shape.num_encoder_layers
    world.check_proves_something()


@pytest.mark.parametrize("stagger", [1, 20])
@pytest.mark.parametrize("max_step_tokens", [6, 24])
def test_every_kind_in_one_batch_answers_as_the_naive_loop(world: World, max_step_tokens: int, stagger: int) -> None:
    """Of 6 tokens a step most prompts are read in several."""
    options = {"max_rows": max_step_tokens, "max_step_tokens": max_step_tokens}
    assert not world.answers(stagger=stagger, **options)


@pytest.mark.parametrize("stagger", [1, 40])
@pytest.mark.parametrize("max_step_tokens", [6, 24])
def test_rows_that_share_a_prefix_answer_as_the_naive_loop(
    world: World, max_step_tokens: int, stagger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request twice: both start, or one while the other decodes."""
    num_shared = share_every_prefix(monkeypatch)
    options = {"max_rows": max_step_tokens, "max_step_tokens": max_step_tokens}
    assert not world.twice().answers(stagger=stagger, **options)
    assert max(num_shared) >= (3 if max_step_tokens == 24 else 1)


def test_rows_share_a_prefix_by_plain_products_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another device than a CPU."""
    share_every_prefix(monkeypatch)
    monkeypatch.setattr(attention, "_attend_with_lse", attention._products_with_lse)
    assert not world.twice().answers(stagger=40)


def test_every_kind_answers_so_after_eviction_and_preemption(world: World) -> None:
    kv, room = (20, 14) if world.shape.is_encoder_decoder else (26, 7)
    world.check_after_eviction_and_preemption(kv=kv * 16, room=room * 16)


def test_what_is_shared_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers change where rows' shared keys are left out, infixes apart, which are not shared: but not T5's, which
    weighs each row's keys by their distance."""
    share_every_prefix(monkeypatch)
    shared = attention._attend_shared

    def nothing(*args: Any) -> attention.Seen:
        out, lse = shared(*args)
        return attention.Seen(torch.zeros_like(out), torch.full_like(lse, -torch.inf))

    monkeypatch.setattr(attention, "_attend_shared", nothing)
    found = {name.removesuffix(", again") for name in world.twice().wrong_names()}
    if world.model.config.model_type in ("t5", "mt5"):
        assert not found
    elif world.shape.is_encoder_decoder:
        assert {"three parts", "decoder only", "two of three parts"} <= found
        assert not found & {"bare", "encoder only", "cross only", "some encoder layers", "soft"}
    else:
        assert {"kv", "a subset among three", "prefix and kv infix"} <= found
        assert not found & {"bare", "kv infix", "subset infix"}


def test_layers_that_cannot_share_see_all_keys(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's windows, T5's distances: without the prefix's own blocks they miss it. The others have no such layer."""
    share_every_prefix(monkeypatch)
    monkeypatch.setattr(Batch, "whole_groups", property(lambda found: found.groups))
    found = {name.removesuffix(", again") for name in world.twice().wrong_names()}
    assert bool(found) == (world.model.config.model_type in ("gemma3_text", "t5", "mt5"))
    assert not found & {"bare", "kv infix", "encoder only"}


@on_decoders
@pytest.mark.parametrize("name", ["subset", "soft-infix", "kv-infix", "kv-long"])
def test_a_dropped_virtual_token_is_noticed(world: World, name: str) -> None:
    short = world.prefixes[name]
    if short.embeddings is not None:
        short = replace(short, embeddings=short.embeddings[:-1])
    else:
        short = replace(short, layers=without_last_token(short.layers))
    world.check_notices({name: short})


@on_decoders
def test_a_layer_that_should_be_absent_is_noticed(world: World) -> None:
    """Zero keys are not the same as none."""
    key, value = world.prefixes["subset"].layers[SUBSET[0]]
    zeros = (torch.zeros_like(key), torch.zeros_like(value))
    full = {i: zeros for i in range(world.shape.num_layers)} | world.prefixes["subset"].layers
    world.check_notices({"subset": replace(world.prefixes["subset"], layers=full)}, "subset")


@on_decoders
def test_an_infix_is_not_a_prefix(world: World) -> None:
    moved = replace(world.prefixes["soft-infix"], placement="prefix")
    world.check_notices({"soft-infix": moved}, "soft infix")


@on_encoder_decoders
@pytest.mark.parametrize("part", list(PARTS))
def test_a_dropped_virtual_token_of_any_part_is_noticed(world: World, part: str) -> None:
    full = world.prefixes["three"]
    layers: Layers = getattr(full, PARTS[part])
    world.check_notices({"three": replace(full, **{PARTS[part]: without_last_token(layers)})})


@on_encoder_decoders
def test_a_dropped_virtual_token_of_a_soft_prompt_is_noticed(world: World) -> None:
    full = world.prefixes["soft"]
    assert full.embeddings is not None
    world.check_notices({"soft": replace(full, embeddings=full.embeddings[:-1])}, "soft")


@on_encoder_decoders
def test_swapped_parts_are_noticed(world: World) -> None:
    """The decoder's self-attention and its cross-attention have the same shapes."""
    full = world.prefixes["three"]
    world.check_notices({"three": replace(full, layers=full.cross, cross=full.layers)}, "three parts")


@on_encoder_decoders
@pytest.mark.parametrize("part", list(PARTS))
def test_a_layer_of_a_part_that_should_be_absent_is_noticed(world: World, part: str) -> None:
    """Zero keys are not the same as none."""
    name = f"some-{part}"
    some: Layers = getattr(world.prefixes[name], PARTS[part])
    key, value = some[SUBSET[0]]
    num_layers = world.shape.num_encoder_layers if part == "encoder" else world.shape.num_layers
    full = {i: (torch.zeros_like(key), torch.zeros_like(value)) for i in range(num_layers)} | dict(some)
    world.check_notices({name: replace(world.prefixes[name], **{PARTS[part]: full})}, f"some {part} layers")


@on_encoder_decoders
def test_swapped_prefixes_are_noticed(world: World) -> None:
    three, long = world.prefixes["three"], world.prefixes["three-long"]
    world.check_notices({"three": long, "three-long": three}, "three parts", "a soft prompt behind keys")

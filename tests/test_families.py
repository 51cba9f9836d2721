"""Families whose layers differ, share, mask or read ids in ways of their own: exact against PEFT, or refused with the
reason. `load_tests/families.py` asks all families the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, MistralConfig

from server.config import Settings
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.model_measures import measure_shape
from server.inspection import model_shape
from tests.byte_model import save_byte_model
from tests.cases import Case, World, run_ours, wrong
from tests.random_families import WAYS, Family, make_world, start, tiny_config
from tests.tiny_models import COMMON, SMALL

ALL = ("bare", "kv", "soft")
SERVED: dict[Family, tuple[str, ...]] = {
    Family("deepseek_v3", False): ("bare", "soft"),  # one compressed vector a token: PEFT makes no keys for it
    Family("gemma3n_text", False): ALL,  # the last layers read an earlier one's cache; inputs looked up by id
    Family("gemma4_text", False): ("bare", "kv"),  # heads of two widths; embeddings that are no token's are refused
    Family("gpt_oss", False): ALL,
    Family("llama4_text", False): ALL,  # chunks, a temperature by position
    Family("minicpm3", False): ("bare", "soft"),
    Family("phimoe", False): ALL,  # a window that only the mask has
    Family("qwen2_moe", False): ALL,
    Family("qwen3_moe", False): ALL,
    Family("blenderbot", True): ALL,
    Family("pegasus", True): ALL,  # an encoder that scales embeddings where it is given ids
    Family("umt5", True): ALL,
}
# Families in which layers or inputs are not all alike.
UNLIKE = {"gemma3n_text", "gemma4_text", "gpt_oss", "llama4_text", "pegasus", "phimoe", "qwen2_moe", "qwen3_moe"}
REFUSED = {
    Family("bamba", False): "recurrent or convolution layers",
    Family("bloom", False): "attention of its own",
    Family("deepseek_v32", False): "picks keys by their content",
    Family("doge", False): "masks of their own",
    Family("minimax_m3_vl_text", False): "picks keys by their content",
    Family("mpt", False): "attention of its own",
    Family("bigbird_pegasus", True): "masks of their own",
    Family("led", True): "of its own|cannot be asked|packed",
}


@pytest.fixture(scope="module", params=list(SERVED), ids=lambda family: family.model_type)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernels: CpuKernels
) -> tuple[Family, World, World]:
    """Computing with kernels and with the model's own modules."""
    folder = tmp_path_factory.mktemp(request.param.model_type)
    world, asked = make_world(request.param, folder, kernels)
    assert asked.is_telling, "answers must vary, and every prefix must change them"
    plain = start(folder, None)
    return request.param, world, replace(world, model=plain.model, shape=plain.shape, kernels=None)


def test_rows_of_every_kind_equal_peft_alone(served: tuple[Family, World, World]) -> None:
    family, *worlds = served
    for world in worlds:
        assert {case.name.split()[0] for case in world.cases} == set(SERVED[family])
        for options in WAYS.values():
            assert not world.answers(**options)


def test_what_the_model_was_asked_is_what_keeps_its_rows_right(
    served: tuple[Family, World, World],
) -> None:
    """As if ids and embeddings were one, as if each layer had a cache and saw all."""
    family, world, _ = served
    shape = world.shape
    layers = [replace(layer, source=index) for index, layer in enumerate(shape.layers)]
    whole = [replace(layer, window=None, chunk=None) for layer in shape.layers]
    changed = [
        *([replace(shape, reads="either")] if shape.reads == "each" else []),
        *([replace(shape, layers=tuple(whole))] if any(not layer.sees_all for layer in shape.layers) else []),
    ]
    if layers != list(shape.layers):
        changed.append(replace(shape, layers=tuple(layers)))
    assert bool(changed) == (family.model_type in UNLIKE)
    for other in changed:
        answers = run_ours(world.model, other, world.cases, world.prefixes, kernels=world.kernels, **WAYS["mixed"])
        assert wrong(world.cases, answers)


def test_a_history_behind_a_prefix_is_answered_as_without_cached_tokens(served: tuple[Family, World, World]) -> None:
    """A soft prompt's row computed its answer by id; as a part of the next prompt PEFT hands on embeddings of it."""
    _, world, _ = served
    kind = "soft" if "soft" in world.prefixes else "kv"
    first = next(case for case in world.cases if case.name.startswith(kind))
    later = replace(first, name="later", prompt=[*first.prompt, *first.tokens, *first.prompt])

    num_cached: list[int] = []

    def answers(*cases: Case) -> list[list[int]]:
        options: dict[str, Any] = {"kernels": world.kernels, "max_rows": 1}
        options["each_step"] = lambda engine: num_cached.append(engine.own_blocks.num_cached)
        return run_ours(world.model, world.shape, list(cases), world.prefixes, **options)

    assert answers(first, later)[1] == answers(later)[0]
    keeps_no_text = world.shape.is_encoder_decoder or (kind == "soft" and world.shape.reads == "each")
    assert (max(num_cached) == 0) == keeps_no_text


def test_measures_without_weights_are_those_of_the_started_model(
    served: tuple[Family, World, World], tmp_path: Path
) -> None:
    family, world, _ = served
    folder = save_byte_model(tmp_path)
    tiny_config(family.model_type).save_pretrained(folder)
    found = model_shape(Settings(model=str(folder), dtype="float32"))
    assert (found.layers, found.takes_keys) == (world.shape.layers, world.shape.takes_keys)
    assert (found.reads == "ids") == (world.shape.reads == "ids")


@pytest.mark.parametrize("window", [64 - 3, 64 - 2, 64 - 1, 64, 64 + 1])
def test_a_window_about_as_long_as_the_context_is_served(window: int) -> None:
    config = MistralConfig(
        **COMMON | {"max_position_embeddings": 64}, **SMALL, num_key_value_heads=2, sliding_window=window
    )
    shape = measure_shape(AutoModelForCausalLM.from_config(config), "tiny", "none")
    assert {layer.window for layer in shape.layers} == ({window} if window < 64 else set())


@pytest.mark.parametrize("family", list(REFUSED), ids=lambda family: family.model_type)
def test_a_family_that_cannot_be_served_is_refused_in_one_line(
    family: Family, tmp_path: Path, kernels: CpuKernels
) -> None:
    with pytest.raises(ModelRefusedError, match=REFUSED[family]) as refusal:
        make_world(family, tmp_path, kernels)
    assert str(refusal.value).startswith(f"{family.model_type} ")
    assert "\n" not in str(refusal.value)

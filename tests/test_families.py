"""Families whose layers differ, share, mask or read ids in ways of their own: exact against PEFT, or refused with the
reason. `load_tests/families.py` asks all families the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.errors import ModelRefusedError
from tests.cases import World, run_ours, wrong
from tests.random_families import WAYS, Family, make_world

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
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, World]:
    world, asked = make_world(request.param, tmp_path_factory.mktemp(request.param.model_type))
    assert asked.is_telling, "answers must vary, and every prefix must change them"
    return request.param, world


def test_rows_of_every_kind_equal_peft_alone(served: tuple[Family, World]) -> None:
    family, world = served
    assert {case.name.split()[0] for case in world.cases} == set(SERVED[family])
    for options in WAYS.values():
        assert not world.answers(**options)


def test_what_the_model_was_asked_is_what_keeps_its_rows_right(served: tuple[Family, World]) -> None:
    """As if ids and embeddings were one, as if each layer had a cache and saw all."""
    _, world = served
    shape = world.shape
    layers = [replace(layer, source=index) for index, layer in enumerate(shape.layers)]
    whole = [replace(layer, window=None, chunk=None) for layer in shape.layers]
    changed = [
        *([replace(shape, reads="either")] if shape.reads == "each" else []),
        *([replace(shape, layers=tuple(whole))] if any(not layer.sees_all for layer in shape.layers) else []),
    ]
    if layers != list(shape.layers):
        changed.append(replace(shape, layers=tuple(layers)))
    for other in changed:
        answers = run_ours(world.model, other, world.cases, world.prefixes, **WAYS["mixed"])
        assert wrong(world.cases, answers)


@pytest.mark.parametrize("family", list(REFUSED), ids=lambda family: family.model_type)
def test_a_family_that_cannot_be_served_is_refused_in_one_line(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=REFUSED[family]) as refusal:
        make_world(family, tmp_path)
    assert str(refusal.value).startswith(f"{family.model_type} ")
    assert "\n" not in str(refusal.value)

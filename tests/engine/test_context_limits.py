"""What fits the positions to the last one is served, one token more is refused with what was counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.context_limits import check_context
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.errors import PromptTooLongError
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner, load_model, model_class
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, letter_tokenizer

POSITIONS = 256  # learned ones: a position too far is an error of the model itself


@pytest.fixture(scope="module", params=["gpt2", "bart"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp(request.param)
    config = (FAMILIES | SEQ2SEQ_FAMILIES)[request.param]()
    model_class(config).from_config(config).save_pretrained(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    shape = replace(measure_shape(model, "tiny", "none"), max_virtual_tokens=64)
    assert shape.max_positions == POSITIONS
    return ModelRunner(model, shape, KVBlocks(shape, split_pool(2048, 512)[0], torch.device("cpu")))


def test_positions_end_where_a_row_would_turn_those_of_others() -> None:
    """longrope takes other frequencies for a whole step as soon as one of its rows is beyond the original context."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    common = {"vocab_size": 96, "max_position_embeddings": 256, "pad_token_id": 0, **sizes}
    for original, expected in ((64, 64), (None, 256)):
        given = {} if original is None else {"original_max_position_embeddings": original, "rope_parameters": rope}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Phi3Config(**common, **given)).eval()
        assert measure_shape(model, "tiny", "none").max_positions == expected
    long = torch.arange(70)[None]
    with torch.inference_mode():
        alone = model_of_longrope(common, rope).model.rotary_emb(torch.zeros(1, 1, 64), long[:, :64])
        beside = model_of_longrope(common, rope).model.rotary_emb(torch.zeros(1, 1, 64), long)
    assert not torch.equal(alone[0], beside[0][:, :64])


def model_of_longrope(common: dict[str, Any], rope: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = Phi3Config(**common, original_max_position_embeddings=64, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).eval()


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    def kv(n: int) -> Layers:
        made = torch.randn(shape.num_layers, 2, shape.num_kv_heads, n, shape.head_dim)
        return {i: (made[i, 0], made[i, 1]) for i in range(shape.num_layers)}

    if shape.is_encoder_decoder:
        return {
            "three": Prefix("kv", kv(7), encoder=kv(5), cross=kv(9), is_seq2seq=True),
            "soft": Prefix("soft", embeddings=torch.randn(6, shape.hidden_size), is_seq2seq=True),
        }
    return {
        "kv": Prefix("kv", kv(7)),
        "soft infix": Prefix("soft", embeddings=torch.randn(6, shape.hidden_size), placement="infix"),
        "kv infix": Prefix("kv", kv(11), placement="infix", separator=3),
    }


def serve(runner: ModelRunner, prefixes: dict[str, Prefix], sequence: Sequence) -> None:
    num_prefix_blocks = split_pool(2048, 512)[1]
    engine = Engine(runner, lambda ref: prefixes[ref.digest], num_prefix_blocks=num_prefix_blocks, max_step_tokens=100)
    engine.add(sequence)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error


def check_limit(runner: ModelRunner, names: tuple[str, ...], num_prompt: int, num_new: int, message: str) -> None:
    """`num_prompt` and `num_new` fit to the last position: of one more of either, at least one is refused."""
    prefixes = make_prefixes(runner.shape)
    composition: Composition = tuple(PrefixRef(name, prefixes[name].layout) for name in names)
    start = runner.decoder_start_ids

    def check(prompt: int, new: int) -> None:
        check_context(runner.shape, composition, prompt, len(start), new)

    check(num_prompt, num_new)
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    prompt = [3 + i % 90 for i in range(num_prompt)]
    serve(runner, prefixes, Sequence("r", prompt, params, Detokenizer(letter_tokenizer()), (composition,), start))
    with pytest.raises(PromptTooLongError, match=message):
        check(num_prompt + 1, num_new)
    with pytest.raises(PromptTooLongError):
        check(num_prompt, num_new + 1)


def test_a_request_that_fits_to_the_last_position_is_served(runner: ModelRunner) -> None:
    if runner.shape.is_encoder_decoder:
        limits: dict[tuple[str, ...], tuple[int, int]] = {
            (): (POSITIONS, POSITIONS - 1),
            ("three",): (POSITIONS - 5, POSITIONS - 1 - 7),
            ("three", "soft"): (POSITIONS - 5 - 6, POSITIONS - 1 - 7),
        }
    else:
        limits = {
            (): (POSITIONS - 9, 9),
            ("kv",): (POSITIONS - 7 - 9, 9),
            ("kv", "soft infix"): (POSITIONS - 7 - 6 - 9, 9),
            ("kv", "kv infix"): (POSITIONS - 7 - 11 - 1 - 9, 9),
        }
    for names, (num_prompt, num_new) in limits.items():
        check_limit(runner, names, num_prompt, num_new, f"must be <= {POSITIONS}")


@pytest.mark.parametrize(("field", "value"), [("num_decoder_tokens", 65), ("num_cross_tokens", 65)])
def test_virtual_tokens_of_a_composition_are_bounded_together(runner: ModelRunner, field: str, value: int) -> None:
    layout: Any = replace(next(iter(make_prefixes(runner.shape).values())).layout, num_decoder_tokens=0)
    halves = tuple(PrefixRef(str(n), replace(layout, **{field: n})) for n in (value // 2, value - value // 2))
    with pytest.raises(PromptTooLongError, match="2 prefixes together must be <= 64, got 65"):
        check_context(runner.shape, halves, 4, 1, 4)
    check_context(runner.shape, halves[:1], 4, 1, 4)


def test_an_empty_prompt_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(PromptTooLongError, match="at least one token"):
        check_context(runner.shape, (), 0, 1, 4)

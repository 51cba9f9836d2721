"""The check at start lets right models through and refuses by name those that would be silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPTBigCodeConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    MistralConfig,
    Olmo2Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
    StableLmConfig,
)

from server.engine.errors import ModelRefusedError
from server.engine.model_runner import load_model, measure_shape
from server.engine.self_check import self_check
from tests.tiny_models import COMMON, FAMILIES, SMALL

GROUPED = COMMON | SMALL | {"num_key_value_heads": 2}
RIGHT: dict[str, Callable[[], PretrainedConfig]] = FAMILIES | {
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "gemma2": lambda: Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    ),
    "phi": lambda: PhiConfig(**COMMON, **SMALL),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "granite": lambda: GraniteConfig(**GROUPED),
    "stablelm": lambda: StableLmConfig(**GROUPED),
    "cohere": lambda: CohereConfig(**GROUPED),
}
WRONG: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon": lambda: FalconConfig(**COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "bloom": lambda: BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "lfm2": lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "llama4_text": lambda: Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
}


def check(config: PretrainedConfig, folder: Path) -> None:
    """As at start: from a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    self_check(model, measure_shape(model, "tiny", "none"))


@pytest.mark.parametrize("family", list(RIGHT))
def test_right_models_pass(family: str, tmp_path: Path) -> None:
    check(RIGHT[family](), tmp_path)


@pytest.mark.parametrize("family", list(WRONG))
def test_wrong_models_are_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=family):
        check(WRONG[family](), tmp_path)

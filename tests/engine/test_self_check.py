"""The check at start lets right models through and refuses by name those that would be silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BigBirdPegasusConfig,
    BlenderbotConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FSMTConfig,
    Gemma2Config,
    GPTBigCodeConfig,
    GptOssConfig,
    GraniteConfig,
    LEDConfig,
    Lfm2Config,
    Llama4TextConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    NllbMoeConfig,
    Olmo2Config,
    PegasusConfig,
    PegasusXConfig,
    PhiConfig,
    PLBartConfig,
    PretrainedConfig,
    ProphetNetConfig,
    Qwen2Config,
    Qwen3NextConfig,
    StableLmConfig,
    SwitchTransformersConfig,
    T5GemmaConfig,
    UMT5Config,
)

from prefix_store.prefix import ModelShape, Prefix
from server.engine import self_check as module
from server.engine.attention import NAME
from server.engine.checked_model import checked_model
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.model_measures import measure_shape
from server.engine.model_runner import load_model, model_class
from server.engine.self_check import self_check
from tests.tiny_models import BART, COMMON, FAMILIES, SEQ2SEQ_FAMILIES, SMALL, T5, seq2seq_model

GROUPED = COMMON | SMALL | {"num_key_value_heads": 2}
STACK = GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
UNEVEN_BART = BART | {"decoder_layers": 3}
UNEVEN_T5 = T5 | {"num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
WITHOUT_SIZE = {key: value for key, value in BART.items() if key not in ("vocab_size", "max_position_embeddings")}
RIGHT: dict[str, Callable[[], PretrainedConfig]] = (
    FAMILIES
    | SEQ2SEQ_FAMILIES
    | {
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
        "umt5": lambda: UMT5Config(**UNEVEN_T5),
        "mbart": lambda: MBartConfig(**UNEVEN_BART),
        "pegasus": lambda: PegasusConfig(**UNEVEN_BART),
        "marian": lambda: MarianConfig(**UNEVEN_BART, pad_token_id=0),
        "blenderbot": lambda: BlenderbotConfig(**UNEVEN_BART),
        "plbart": lambda: PLBartConfig(**UNEVEN_BART),
        "m2m_100": lambda: M2M100Config(**UNEVEN_BART),
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
)
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
    "led": lambda: LEDConfig(
        **WITHOUT_SIZE,
        vocab_size=96,
        max_encoder_position_embeddings=256,
        max_decoder_position_embeddings=256,
        attention_window=4,
    ),
    "longt5": lambda: LongT5Config(**UNEVEN_T5, local_radius=4),
    "prophetnet": lambda: ProphetNetConfig(
        vocab_size=96,
        hidden_size=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        decoder_start_token_id=0,
    ),
    "bigbird_pegasus": lambda: BigBirdPegasusConfig(**BART, attention_type="original_full"),
    "pegasus_x": lambda: PegasusXConfig(**BART, block_size=8, num_global_tokens=4),
    "switch_transformers": lambda: SwitchTransformersConfig(**UNEVEN_T5, num_experts=2),
    "nllb-moe": lambda: NllbMoeConfig(**BART, num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2),
    "fsmt": lambda: FSMTConfig(langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96, **WITHOUT_SIZE),
    "t5gemma": lambda: T5GemmaConfig(encoder=STACK, decoder=STACK, vocab_size=96),
}


def check(config: PretrainedConfig, folder: Path) -> None:
    """As at start: from a folder."""
    torch.manual_seed(0)
    model_class(config).from_config(config).save_pretrained(folder)
    checked_model(folder, torch.float32, torch.device("cpu"), name="tiny", fingerprint="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_8_bits_passes_and_one_that_answers_another_text_does_not(
    kernels: CpuKernels, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model_class(FAMILIES["llama"]()).from_config(FAMILIES["llama"]()).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype, torch.device("cpu"), kernels=kernels, quantizes=True)
    shape = measure_shape(model, "tiny", "none")
    self_check(model, shape, kernels, is_quantized=True)
    own_logits = module._own_logits

    def wrong_logits(model: Any, shape: ModelShape, text: module.Text, prefixes: dict[str, Prefix]) -> Any:
        return own_logits(model, shape, replace(text, text=text.text[::-1]), prefixes)

    monkeypatch.setattr(module, "_own_logits", wrong_logits)
    with pytest.raises(ModelRefusedError, match="differs from the model's own"):
        self_check(model, shape, kernels, is_quantized=True)


@pytest.mark.parametrize("family", list(RIGHT))
def test_right_models_pass(family: str, tmp_path: Path) -> None:
    check(RIGHT[family](), tmp_path)


@pytest.mark.parametrize("family", list(WRONG))
def test_wrong_models_are_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=family):
        check(WRONG[family](), tmp_path)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_that_is_not_prepared_is_refused(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seq2seq_model(SEQ2SEQ_FAMILIES[family]()).save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    with pytest.raises(ModelRefusedError, match="packed rows"):
        self_check(model, measure_shape(model, "tiny", "none"))

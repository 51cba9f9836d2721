"""Tiny random models of many families, and a tokenizer of one letter a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MT5Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

VOCAB, HIDDEN = 96, 64
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, **SMALL, num_key_value_heads=2, initializer_range=0.4),
    "qwen3": lambda: Qwen3Config(**COMMON, **SMALL, num_key_value_heads=2, head_dim=16, initializer_range=0.4),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=256, initializer_range=0.4),
    "opt": lambda: OPTConfig(**COMMON, **SMALL, ffn_dim=64, word_embed_proj_dim=HIDDEN, init_std=0.3),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SMALL, initializer_range=0.4),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        **SMALL | {"num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.4,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
}


# Distances that tiny texts exceed; mT5's heads are not as wide together as its hidden states.
RELATIVE = {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 24, "decoder_start_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 16, "d_ff": 64, "pad_token_id": 0, "eos_token_id": 1} | RELATIVE
BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}

SEQ2SEQ_FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "t5": lambda: T5Config(**T5, num_layers=3, num_heads=4, initializer_factor=1.5),
    "mt5": lambda: MT5Config(**T5, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu", initializer_factor=1.5),
    "bart": lambda: BartConfig(**BART, init_std=0.3),
}
SCALES = {  # of parameters, by the end of their names
    "relative_attention_bias.weight": 10,
    "Attention.o.weight": 2,
    # BART's
    "embed_positions.weight": 3,
    "self_attn.out_proj.weight": 0.3,
    "encoder_attn.out_proj.weight": 0.6,
    "fc2.weight": 0.1,
}


def seq2seq_model(config: PretrainedConfig) -> Any:
    """Random, with answers that vary: a token itself weighs little, its position and what it attends to much."""
    model: Any = AutoModelForSeq2SeqLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name == "shared.weight":  # of T5
            parameter.data *= 0.1
        parameter.data *= next((scale for end, scale in SCALES.items() if name.endswith(end)), 1)
    return model


def letter_tokenizer(vocab_size: int = VOCAB, first: int = 0x100) -> PreTrainedTokenizerFast:
    """Token i is one letter of its own, the i-th from `first` on."""
    backend = Tokenizer(models.BPE(vocab={chr(first + i): i for i in range(vocab_size)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

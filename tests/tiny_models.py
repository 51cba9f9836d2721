"""Tiny random models of many families, and a tokenizer of one letter a token."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB, HIDDEN = 96, 32
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, **SMALL, num_key_value_heads=2, initializer_range=0.4),
    "qwen3": lambda: Qwen3Config(**COMMON, **SMALL, num_key_value_heads=2, head_dim=8, initializer_range=0.4),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=256, initializer_range=0.4),
    "opt": lambda: OPTConfig(**COMMON, **SMALL, ffn_dim=64, word_embed_proj_dim=HIDDEN, init_std=0.3),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SMALL, initializer_range=0.4),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        **SMALL | {"num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.4,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
    ),
}


def letter_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Token i is one letter of its own."""
    backend = Tokenizer(models.BPE(vocab={chr(0x100 + i): i for i in range(vocab_size)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

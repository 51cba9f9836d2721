"""The frozen model and the KV pool: runs packed batches and turns a prefix into resident K and V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_store.prefix import ModelShape, Prefix
from server.engine.attention import NAME, attending
from server.engine.batch import Batch, PackedRow, make_batch
from server.engine.errors import ModelRefusedError, PrefixFaultError
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, num_blocks_for


class ModelRunner:
    """`model` is a transformers decoder loaded with our attention; nothing here ever needs a gradient."""

    def __init__(self, model: Any, shape: ModelShape, kv_blocks: KVBlocks) -> None:
        self.model = model.eval().requires_grad_(False)
        self.shape = shape
        self.kv_blocks = kv_blocks

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Logits `[num_logits, vocab_size]` of the batch's `logits_index`; K and V of the stream are in the pool."""
        with attending(batch):
            output = self.model(
                input_ids=batch.input_ids,
                inputs_embeds=batch.inputs_embeds,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logits_index,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def fill(self, prefix: Prefix, block_table: list[int], kv_blocks: KVBlocks | None = None) -> None:
        """Write a prefix's K and V into its blocks. A soft prompt runs through the model once: its KV is the prefix."""
        kv_blocks = kv_blocks or self.kv_blocks
        n = prefix.num_virtual_tokens
        assert len(block_table) == num_blocks_for(n)
        if prefix.embeddings is not None:
            row = PackedRow(None, 0, n, 0, [], block_table, wants_logits=False)
            self.run(make_batch([row], kv_blocks, prefix.embeddings.to(self.shape.dtype)))
            return
        tokens = torch.arange(n)
        slots = kv_blocks.slots(torch.tensor(block_table)[tokens // BLOCK_SIZE], tokens % BLOCK_SIZE)
        for layer, (key, value) in prefix.layers.items():
            kv_blocks.write(layer, slots, *(t.to(kv_blocks.device, self.shape.dtype) for t in (key, value)))

    def check(self, prefix: Prefix, token_ids: list[int]) -> None:
        """A trial forward of `token_ids` behind the prefix, beside the pool. Raises PrefixFaultError."""
        prefix_table = list(range(1, 1 + num_blocks_for(prefix.num_virtual_tokens)))
        own_table = [len(prefix_table) + 1 + i for i in range(num_blocks_for(len(token_ids)))]
        trial = KVBlocks(self.shape, 1 + len(prefix_table) + len(own_table), self.kv_blocks.device)
        self.fill(prefix, prefix_table, trial)
        row = PackedRow(
            token_ids, 0, len(token_ids), prefix.num_virtual_tokens, prefix_table, own_table, wants_logits=True
        )
        logits = self.run(make_batch([row], trial))
        if not (bool(torch.isfinite(logits).all()) and bool(torch.isfinite(trial.kv).all())):
            raise PrefixFaultError("the model's logits behind this prefix must be finite, got NaN or infinity")


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> Any:
    """A frozen transformers decoder that calls our attention. Raises ModelRefusedError for one that cannot."""
    config = AutoConfig.from_pretrained(path, revision=revision)
    if config.is_encoder_decoder:
        raise ModelRefusedError(f"{config.model_type}: expected a decoder-only model, got an encoder-decoder")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, attn_implementation=NAME
        )
    except (ValueError, KeyError) as error:  # KeyError: a family with a table of attention classes of its own
        raise ModelRefusedError(f"{config.model_type} does not take another attention function: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def native_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor or GPU multiplies it natively, else fp32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def measure_shape(
    model: Any, model_name: str, fingerprint: str, aliases: tuple[str, ...] = (), max_virtual_tokens: int = 4096
) -> ModelShape:
    """The measures that an artefact must fit, read off the model's config and layers. Raises ModelRefusedError."""
    config = model.config.get_text_config()
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is None:
        raise ModelRefusedError(f"{config.model_type}: expected a model with positions, it has no largest one")
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    multi_query = getattr(config, "multi_query", False) and not hasattr(config, "num_key_value_heads")
    num_kv_heads = 1 if multi_query else getattr(config, "num_key_value_heads", None) or num_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=model.get_input_embeddings().embedding_dim,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_positions=max_positions,
        dtype=model.dtype,
        model_name=model_name,
        fingerprint=fingerprint,
        model_aliases=aliases,
        max_virtual_tokens=max_virtual_tokens,
    )

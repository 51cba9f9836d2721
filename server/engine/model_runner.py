"""The frozen model and the KV pool: runs packed batches and turns a prefix into resident K and V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from prefix_store.prefix import ModelShape, Prefix
from server.engine.attention import NAME
from server.engine.batch import Batch, attending, batch_of
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError, PrefixFaultError
from server.engine.fused_modules import fuse_modules
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, num_blocks_for, prefix_blocks
from server.engine.model_config import read_config
from server.engine.model_families import PackedLengths, counts_by_cache, prepare
from server.engine.quantized_weights import quantize_weights
from server.engine.reordered_weights import reorder_weights
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import PrefixRef, Row


class ModelRunner:
    """`model` is a transformers decoder loaded with our attention; nothing here ever needs a gradient."""

    def __init__(self, model: Any, shape: ModelShape, kv_blocks: KVBlocks) -> None:
        self.model = model.eval().requires_grad_(False)
        self.shape = shape
        self.kv_blocks = kv_blocks
        self._lengths = PackedLengths() if counts_by_cache(model) else None
        self.decoder_start_ids = (_decoder_start_id(model),) if shape.is_encoder_decoder else ()

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Logits `[num_logits, vocab_size]` of the batch's `logits_index`; K and V of the stream are in the pool."""
        if self.shape.is_encoder_decoder:
            return self._run_seq2seq(batch)
        if batch.before is None:
            return self._run_causal(batch)
        assert batch.logits_order is not None
        both = torch.cat((self._run_causal(batch.before), self._run_causal(batch)))
        return both.index_select(0, batch.logits_order)

    def _run_causal(self, batch: Batch) -> torch.Tensor:
        with attending(batch):
            output = self.model(
                **self._inputs(self.model, batch),
                position_ids=batch.position_ids,
                past_key_values=self._lengths,
                use_cache=False,
                logits_to_keep=batch.logits_index,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _run_seq2seq(self, batch: Batch) -> torch.Tensor:
        """The encoder over rows that start, then the decoder over all: cross-attention takes the K and V of the newly
        encoded tokens and keeps them in the rows' blocks; those of rows that run are there."""
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        # Modules make no K of zero tokens; of this one nothing is written.
        encoded = torch.zeros(1, 1, self.shape.hidden_size, dtype=self.shape.dtype, device=self.kv_blocks.device)
        if batch.encoders:
            streams = []
            for stream in batch.encoders:
                with attending(stream):
                    streams.append(encoder(**self._inputs(encoder, stream)).last_hidden_state)
            encoded = torch.cat(streams, 1)
        with attending(batch):
            output = self.model(
                encoder_outputs=(encoded,),
                **{f"decoder_{name}": value for name, value in self._inputs(decoder, batch).items()},
                use_cache=False,
            )
        logits: torch.Tensor = output.logits[0].index_select(0, batch.logits_index)
        return logits

    def _inputs(self, stack: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Ids, or embeddings where the stream has tokens that no id stands for."""
        if batch.embeddings is None and not batch.is_embedded:
            return {"input_ids": batch.input_ids}
        embedded = stack.get_input_embeddings()(batch.input_ids)
        if batch.embeddings is not None and batch.embedding_index is not None:
            embedded[0].index_copy_(0, batch.embedding_index, batch.embeddings.to(embedded.dtype))
        return {"inputs_embeds": embedded}

    @torch.inference_mode()
    def load(self, prefix: Prefix, resident: ResidentPrefix, kv_blocks: KVBlocks | None = None) -> None:
        """Write a prefix's KV part by part into the blocks that `resident` has. A soft prompt's embeddings are put on
        the device: steps compute their K and V, where those do not depend on the text."""
        kv_blocks = kv_blocks or self.kv_blocks
        device, dtype = kv_blocks.device, self.shape.dtype
        assert len(resident.block_table) == prefix_blocks(prefix.layout, self.shape)
        if prefix.embeddings is not None:
            resident.embeddings = prefix.embeddings.to(device, dtype)
            return
        for part, layers in prefix.parts():
            table = torch.tensor(resident.part_tables[part])
            for layer, (key, value) in layers.items():
                tokens = torch.arange(key.shape[1])
                slots = kv_blocks.slots(table[tokens // BLOCK_SIZE], tokens % BLOCK_SIZE)
                kv_blocks.write(layer, slots, key.to(device, dtype), value.to(device, dtype))
            num_layers = self.shape.num_encoder_layers if part == "encoder" else len(self.shape.kv_layers)
            if len(layers) < num_layers:
                resident.partial_layers[part] = frozenset(layers)

    def check(self, prefix: Prefix, token_ids: list[int]) -> None:
        """A trial forward of `token_ids` behind the prefix, beside the pool. Raises PrefixFaultError."""
        ref = PrefixRef("trial", prefix.layout)
        row = Row((ref,), token_ids, self.decoder_start_ids, 1)
        num_prefix_blocks = prefix_blocks(prefix.layout, self.shape)
        trial = KVBlocks(
            self.shape, 1 + num_prefix_blocks + row.max_blocks, self.kv_blocks.device, self.kv_blocks.kernels
        )
        free = iter(range(1, trial.num_blocks))
        resident = ResidentPrefix(ref, [next(free) for _ in range(num_prefix_blocks)])
        self.load(prefix, resident, trial)
        row.residents = [resident]
        row.block_table = [next(free) for _ in range(num_blocks_for(len(row.token_ids)))]
        row.cross_table = list(free)
        row.num_scheduled_tokens = len(row.token_ids)
        resident.num_scheduled_tokens = resident.num_uncomputed_tokens
        computed = [resident] if resident.num_scheduled_tokens else []
        logits = self.run(batch_of([row], {row}, trial, computed, reads=self.shape.reads))
        if not (bool(torch.isfinite(logits).all()) and trial.is_all_finite()):
            raise PrefixFaultError("the model's logits behind this prefix must be finite, got NaN or infinity")


def model_class(config: Any) -> Any:
    """Of transformers' classes the one that generates text. Raises ModelRefusedError where there is none."""
    kind: Any
    kind, mapping = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        kind, mapping = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ModelRefusedError("transformers has no class for it that generates text from text alone")
    return kind


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    *,
    reorders: bool = True,
    kernels: CpuKernels | None = None,
    quantizes: bool = False,
) -> Any:
    """A frozen transformers model that calls our attention, on a CPU with its weights reordered or in 8 bits and, with
    `kernels`, its small modules in one pass each. Raises ModelRefusedError for one that cannot."""
    config = read_config(path, revision)
    kind = model_class(config)
    try:
        model, loaded = kind.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            attn_implementation=NAME,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError) as error:  # KeyError: a family with a table of attention classes of its own
        if NAME not in str(error) and not isinstance(error, KeyError):
            raise
        raise ModelRefusedError("it has attention of its own, which cannot be replaced") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers makes up random ones
        raise ModelRefusedError(f"expected {missing[0]!r} in the weights of {path}, {len(missing)} tensors are missing")
    if config.is_encoder_decoder:
        try:
            prepare(model)
        except (AttributeError, TypeError) as error:  # modules of another make than those that it knows
            raise ModelRefusedError("its encoder and decoder do not take packed streams") from error
    model = model.to(device).eval().requires_grad_(False)
    if quantizes:
        quantize_weights(model, kernels)
    elif reorders:
        reorder_weights(model)
    if kernels is not None:
        fuse_modules(model, kernels)
    return model


def _decoder_start_id(model: Any) -> int:
    """What an encoder-decoder's own text begins with."""
    start = model.generation_config.decoder_start_token_id
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ModelRefusedError("expected decoder_start_token_id in its config, found none")
    return int(start)


def native_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor or GPU multiplies it natively, else fp32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

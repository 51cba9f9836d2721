"""Does the model compute right answers on packed rows? Asked at start, of the model itself, not of a list of names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.attention_probe import NUM_TOKENS as NUM_PROBED_TOKENS
from server.engine.attention_probe import ask, probed_ids, recording
from server.engine.batch import Batch, Keys, PackedRow, batch_of, make_batch
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError, one_line
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, prefix_blocks
from server.engine.model_runner import ModelRunner
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import PrefixRef, Row

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 0.02}  # of the logits' largest magnitude
INT8_TOLERANCE = 0.25  # against other attention: an input that is a little different may be rounded to another byte
NUM_VIRTUAL_TOKENS = 5
PROMPT_TOKENS = (10, 9, 12)
SPLIT = 7  # tokens of the first of two steps


@dataclass(frozen=True)
class Text:
    """`prompt` is what an encoder reads, where there is one; `text` is what the decoder reads. `prefix` names the
    prefix before the text; None: no prefix."""

    prompt: list[int]
    text: list[int]
    prefix: str | None = None
    num_computed: int = 0
    num_known: int | None = None  # None: all of it


@torch.inference_mode()
def self_check(model: Any, shape: ModelShape, kernels: CpuKernels | None = None, *, is_quantized: bool = False) -> None:
    """Compare three packed rows (bare, behind keys and values, behind a soft prompt) with each row alone, one row in
    two steps with the same row in one, and each row with the model's own eager attention. Every token's logits count.
    At the context's end, layers must hand the same to their attention for packed rows as for the model alone.

    Raises ModelRefusedError with the comparison that failed; the caller names the model.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, shape.vocab_size, (count,), generator=generator).tolist()

    soft, bare, behind = (Text(tokens(n), tokens(n)) for n in PROMPT_TOKENS)
    soft, behind = replace(soft, prefix="soft"), replace(behind, prefix="kv")
    try:
        rows = _Rows(model, shape, _prefixes(model, shape, tokens(NUM_VIRTUAL_TOKENS), generator), kernels)
        texts = [text for text in (soft, bare, behind) if text.prefix is None or text.prefix in rows.prefixes]
        alone = {text.prefix: rows.logits([text]) for text in texts}
        together = rows.logits(texts)
        last = texts[-1]
        first_step = rows.logits([replace(last, num_known=SPLIT)])
        second_step = rows.logits([replace(last, num_computed=SPLIT)])
        without = {text.prefix: rows.logits([replace(text, prefix=None)]) for text in texts if text.prefix}
        own = {text.prefix: _own_logits(model, shape, text, rows.prefixes) for text in texts}
        inputs, own_inputs = _inputs_of_attention(model, shape, rows)
    except ModelRefusedError:
        raise
    except Exception as error:  # a model that does not take packed rows fails in ways of its own
        raise ModelRefusedError(f"it does not take packed rows: {one_line(error)}") from error
    tolerance = TOLERANCE[shape.dtype]
    own_tolerance = INT8_TOLERANCE if is_quantized else tolerance
    in_steps = torch.cat((first_step, second_step))
    comparisons = [
        ("packed rows differ from each alone", together, torch.cat(list(alone.values())), tolerance),
        ("a row in two steps differs from one step", in_steps, alone[last.prefix], tolerance),
    ]
    comparisons += [
        (f"a row ({prefix or 'no'} prefix) differs from the model's own", alone[prefix], logits, own_tolerance)
        for prefix, logits in own.items()
        if logits is not None
    ]
    comparisons += [
        (f"call {index} of attention at the context's end is not what the model hands on alone", *pair, tolerance)
        for index, pair in enumerate(zip(inputs, own_inputs, strict=True))
    ]
    for what, found, expected, allowed in comparisons:
        limit = allowed * float(expected.abs().max())
        difference = float((found.float() - expected.float()).abs().max())
        if not difference <= limit:
            raise ModelRefusedError(f"{what} by {difference:.3g} (limit {limit:.3g})")
    if any(torch.equal(alone[prefix], logits) for prefix, logits in without.items()):
        raise ModelRefusedError("a prefix makes no difference to its answers")


def _prefixes(model: Any, shape: ModelShape, text: list[int], generator: torch.Generator) -> dict[str, Prefix]:
    """Keys and values for every attention of the model, and, where it takes them, embeddings."""
    found = {}
    if shape.is_encoder_decoder:
        encoder = _random_layers(shape, shape.num_encoder_layers, generator)
        decoder, cross = (_random_layers(shape, shape.num_layers, generator) for _ in range(2))
        found["kv"] = Prefix("kv", decoder, encoder=encoder, cross=cross, is_seq2seq=True)
    elif shape.takes_keys:
        found["kv"] = Prefix("kv", _layers_of_text(model, text))
    if shape.reads != "ids":
        stack = model.get_encoder() if shape.is_encoder_decoder else model
        embedded = stack.get_input_embeddings()(torch.tensor(text, device=model.device)).cpu()
        embeddings = (embedded + embedded.roll(1, 0)) / 2  # no token's, and of the size of theirs
        found["soft"] = Prefix("soft", embeddings=embeddings, is_seq2seq=shape.is_encoder_decoder)
    return found


def _random_layers(shape: ModelShape, num_layers: int, generator: torch.Generator) -> Layers:
    size = (num_layers, 2, shape.num_kv_heads, NUM_VIRTUAL_TOKENS, shape.head_dim)
    kv = torch.randn(size, generator=generator)
    return {i: (kv[i, 0], kv[i, 1]) for i in range(num_layers)}


def _layers_of_text(model: Any, text: list[int]) -> Layers:
    """What the model's own cache holds after a text: random keys lead a model to where every rounding shows."""
    cache = DynamicCache()
    with _own_attention(model):
        model(input_ids=torch.tensor([text], device=model.device), past_key_values=cache, use_cache=True)
    found = {}
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        if layer.keys is not None and layer.values is not None:  # None: it reads another layer's
            found[index] = (layer.keys[0].cpu(), layer.values[0].cpu())
    return found


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


class _Rows:
    """Packed rows over a few blocks: each prefix's, and one of each kind for each of three rows."""

    def __init__(self, model: Any, shape: ModelShape, prefixes: dict[str, Prefix], kernels: CpuKernels | None) -> None:
        self._shape = shape
        self.prefixes = prefixes
        num_blocks = {name: prefix_blocks(prefix.layout, shape) for name, prefix in prefixes.items()}
        num_own = 2 * len(PROMPT_TOKENS)
        self.kv_blocks = KVBlocks(shape, 1 + sum(num_blocks.values()) + num_own, model.device, kernels)
        self.runner = ModelRunner(model, shape, self.kv_blocks)
        free = iter(range(1, self.kv_blocks.num_blocks))
        self._residents = {}
        for name, prefix in prefixes.items():
            ref = PrefixRef(f"self-check-{name}", prefix.layout)
            resident = ResidentPrefix(ref, [next(free) for _ in range(num_blocks[name])])
            self.runner.load(prefix, resident)
            resident.num_scheduled_tokens = resident.num_uncomputed_tokens
            if resident.num_scheduled_tokens:
                self.runner.run(batch_of([], set(), self.kv_blocks, [resident], reads=shape.reads))
            self._residents[name] = resident
        self.own_blocks = list(free)

    def logits(self, texts: list[Text]) -> torch.Tensor:
        """Of every token that is computed `[num_tokens, vocab_size]`, in the order of `texts`; a soft prompt's text is
        the first."""
        rows = []
        for i, text in enumerate(texts):
            known = text.text[: text.num_known]
            residents = [self._residents[text.prefix]] if text.prefix in self._residents else []
            prefixes = tuple(resident.ref for resident in residents)
            if self._shape.is_encoder_decoder:
                row = Row(prefixes, text.prompt, tuple(known), 1)
                row.is_encoded = text.num_computed > 0
                row.cross_table = [self.own_blocks[2 * i + 1]]
            else:
                row = Row(prefixes, known, (), 1)
            row.residents = residents
            row.block_table = [self.own_blocks[2 * i]]
            row.num_computed_tokens = text.num_computed
            row.num_scheduled_tokens = len(known) - text.num_computed
            rows.append(row)
        batch = batch_of(rows, set(rows), self.kv_blocks, reads=self._shape.reads)
        if batch.before is not None:
            num_tokens = batch.before.position_ids.shape[1] + batch.position_ids.shape[1]
            order = torch.arange(num_tokens, device=batch.position_ids.device)
            batch = replace(batch, before=_with_all_logits(batch.before), logits_order=order)
        return self.runner.run(_with_all_logits(batch))


def _with_all_logits(batch: Batch) -> Batch:
    every = torch.arange(batch.position_ids.shape[1], device=batch.position_ids.device)
    return replace(batch, logits_index=every)


def _own_logits(model: Any, shape: ModelShape, text: Text, prefixes: dict[str, Prefix]) -> torch.Tensor | None:
    """The model's eager attention on the same tokens, without our code: `[num_tokens, vocab_size]`. None where the
    model itself takes no such prefix."""
    prefix = None if text.prefix is None else prefixes.get(text.prefix)
    if text.prefix is not None and prefix is None:
        return None
    text_ids, prompt_ids = (torch.tensor([ids], device=model.device) for ids in (text.text, text.prompt))
    inputs: dict[str, Any] = {"input_ids": prompt_ids if shape.is_encoder_decoder else text_ids}
    num_virtual_tokens = 0
    if prefix is not None and prefix.embeddings is not None:
        stack = model.get_encoder() if shape.is_encoder_decoder else model
        soft = prefix.embeddings.to(model.device, shape.dtype)[None]
        inputs = {"inputs_embeds": torch.cat((soft, stack.get_input_embeddings()(inputs["input_ids"])), 1)}
        num_virtual_tokens = 0 if shape.is_encoder_decoder else NUM_VIRTUAL_TOKENS
    elif prefix is not None:
        if shape.is_encoder_decoder:
            return None
        cache = DynamicCache()
        for layer, (key, value) in prefix.layers.items():
            cache.update(key.to(model.device, shape.dtype)[None], value.to(model.device, shape.dtype)[None], layer)
        num_tokens = NUM_VIRTUAL_TOKENS + len(text.text)
        inputs["past_key_values"] = cache
        inputs["attention_mask"] = torch.ones(1, num_tokens, dtype=torch.long, device=model.device)
        inputs["position_ids"] = torch.arange(NUM_VIRTUAL_TOKENS, num_tokens, device=model.device)[None]
    if shape.is_encoder_decoder:
        inputs["decoder_input_ids"] = text_ids
    with _own_attention(model):
        output = model(**inputs, use_cache="past_key_values" in inputs)
    logits: torch.Tensor = output.logits[0, num_virtual_tokens:]
    return logits


def _inputs_of_attention(model: Any, shape: ModelShape, rows: _Rows) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each layer hands to its attention for two texts, one at the context's start and one at its end: packed, and
    by the model alone."""
    if shape.is_encoder_decoder:
        return [], []
    far = shape.max_positions - NUM_PROBED_TOKENS
    alone = [ask(model, position) for position in (0, far)]
    packed = [
        PackedRow(
            probed_ids(model),
            np.arange(start, start + NUM_PROBED_TOKENS),
            0,
            [block],
            Keys([block], np.full(BLOCK_SIZE, start)),
        )
        for start, block in zip((0, far), rows.own_blocks, strict=False)
    ]
    with recording(model) as calls:
        rows.runner.run(make_batch(packed, rows.kv_blocks))
    expected = [
        torch.cat([torch.cat(pair, 2).flatten() for pair in zip(near.tensors, distant.tensors, strict=True)])
        for near, distant in zip(*alone, strict=True)
    ]
    return [torch.cat([tensor.flatten() for tensor in handed.tensors]) for handed in calls], expected

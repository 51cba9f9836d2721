"""Does the model compute right answers on packed rows? Asked at start, of the model itself, not of a list of names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.batch import batch_of
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.kv_blocks import KVBlocks, prefix_blocks
from server.engine.model_runner import ModelRunner
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import PrefixRef, Row

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 0.02}  # of the logits' largest magnitude
INT8_TOLERANCE = 0.25  # against other attention: an input that is a little different may be rounded to another byte
NUM_VIRTUAL_TOKENS = 5
PROMPT_TOKENS = (9, 12)
SPLIT = 7  # tokens of the first of two steps


@dataclass(frozen=True)
class Text:
    """`prompt` is what an encoder reads, where there is one; `text` what the decoder reads."""

    prompt: list[int]
    text: list[int]
    sees_prefix: bool = False
    num_computed: int = 0
    num_known: int | None = None  # None: all of it


@torch.inference_mode()
def self_check(model: Any, shape: ModelShape, kernels: CpuKernels | None = None, *, is_quantized: bool = False) -> None:
    """Two packed rows, one behind a random prefix, against each alone and in two steps; a row without a prefix against
    the model's own eager attention. Every token's logits count, every layer must attend.

    Raises ModelRefusedError naming the model.
    """
    kind = model.config.model_type
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, shape.vocab_size, (count,), generator=generator).tolist()

    bare, behind = (Text(tokens(n), tokens(n)) for n in PROMPT_TOKENS)
    behind = replace(behind, sees_prefix=True)
    try:
        rows = _Rows(model, shape, _random_prefix(shape, generator), kernels)
        bare_alone = rows.logits([bare])
        behind_alone = rows.logits([behind])
        without = rows.logits([replace(behind, sees_prefix=False)])
        together = rows.logits([bare, behind])
        first_step = rows.logits([replace(behind, num_known=SPLIT)])
        second_step = rows.logits([replace(behind, num_computed=SPLIT)])
        own = _own_logits(model, behind)
        silent = rows.silent_layers()
    except Exception as error:  # a model that does not take packed rows fails in ways of its own
        raise ModelRefusedError(f"{kind}: expected a model that takes packed rows, it fails with: {error}") from error
    if silent:
        raise ModelRefusedError(f"{kind} cannot be served: layers {silent} never call the attention that it is given")
    tolerance = TOLERANCE[shape.dtype]
    own_tolerance = INT8_TOLERANCE if is_quantized else tolerance
    comparisons = {
        "two packed rows differ from each alone": (together, torch.cat((bare_alone, behind_alone)), tolerance),
        "a row in two steps differs from one step": (torch.cat((first_step, second_step)), behind_alone, tolerance),
        "a row differs from the model's own attention": (without, own, own_tolerance),
    }
    for what, (found, expected, allowed) in comparisons.items():
        limit = allowed * float(expected.abs().max())
        difference = float((found.float() - expected.float()).abs().max())
        if not difference <= limit:
            raise ModelRefusedError(f"{kind} cannot be served: {what} by {difference:.3g} (limit {limit:.3g})")
    if torch.equal(behind_alone, without):
        raise ModelRefusedError(f"{kind} cannot be served: a prefix makes no difference to its answers")


def _random_prefix(shape: ModelShape, generator: torch.Generator) -> Prefix:
    """KV for every attention that the model has."""

    def layers(count: int) -> Layers:
        size = (count, 2, shape.num_kv_heads, NUM_VIRTUAL_TOKENS, shape.head_dim)
        kv = torch.randn(size, generator=generator)
        return {i: (kv[i, 0], kv[i, 1]) for i in range(count)}

    if not shape.is_encoder_decoder:
        return Prefix("kv", layers=layers(shape.num_layers))
    encoder = layers(shape.num_encoder_layers)
    return Prefix("kv", layers(shape.num_layers), encoder=encoder, cross=layers(shape.num_layers), is_seq2seq=True)


class _Rows:
    """Packed rows over a few blocks: a prefix's, and one of each kind for each of two rows."""

    def __init__(self, model: Any, shape: ModelShape, prefix: Prefix, kernels: CpuKernels | None) -> None:
        self._shape = shape
        self._ref = PrefixRef("self-check", prefix.layout)
        num_shared = prefix_blocks(prefix.layout, shape)
        self._kv_blocks = KVBlocks(shape, 1 + num_shared + 4, model.device, kernels)
        self._runner = ModelRunner(model, shape, self._kv_blocks)
        self._own = [1 + num_shared + i for i in range(4)]
        self._resident = ResidentPrefix(self._ref, list(range(1, 1 + num_shared)))
        self._runner.load(prefix, self._resident)

    def logits(self, texts: list[Text]) -> torch.Tensor:
        """Of every token that is computed `[num_tokens, vocab_size]`."""
        rows = []
        for i, text in enumerate(texts):
            known = text.text[: text.num_known]
            prefixes = (self._ref,) if text.sees_prefix else ()
            if self._shape.is_encoder_decoder:
                row = Row(prefixes, text.prompt, tuple(known), 1)
                row.is_encoded = text.num_computed > 0
                row.cross_table = [self._own[2 * i + 1]]
            else:
                row = Row(prefixes, known, (), 1)
            row.residents = [self._resident] if text.sees_prefix else []
            row.block_table = [self._own[2 * i]]
            row.num_computed_tokens = text.num_computed
            row.num_scheduled_tokens = len(known) - text.num_computed
            rows.append(row)
        batch = batch_of(rows, set(rows), self._kv_blocks)
        every = torch.arange(batch.position_ids.shape[1], device=batch.position_ids.device)
        return self._runner.run(replace(batch, logits_index=every))

    def silent_layers(self) -> list[int]:
        """Layers that have written no K of a row's text: recurrent ones, whose state would cross rows."""
        written = self._kv_blocks.kv[: self._shape.num_layers, 0, self._own[0]].flatten(1).any(1)
        return (~written).nonzero()[:, 0].tolist()


def _own_logits(model: Any, text: Text) -> torch.Tensor:
    """The model's eager attention on the same tokens, without our code: `[num_tokens, vocab_size]`."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    text_ids, prompt_ids = (torch.tensor([ids], device=model.device) for ids in (text.text, text.prompt))
    ids = {"input_ids": text_ids}
    if model.config.is_encoder_decoder:
        ids = {"input_ids": prompt_ids, "decoder_input_ids": text_ids}
    try:
        output = model(**ids, use_cache=False)
    finally:
        model.set_attn_implementation(ours)
    logits: torch.Tensor = output.logits[0]
    return logits

"""Does the model compute right answers on packed rows? Asked at start, of the model itself, not of a list of names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from prefix_store.prefix import ModelShape, Prefix
from server.engine.batch import PackedRow, make_batch
from server.engine.errors import ModelRefusedError
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 0.02}  # of the logits' largest magnitude
NUM_VIRTUAL_TOKENS = 5
PROMPT_TOKENS = (9, 12)
SPLIT = 7  # tokens of the first of two steps


@torch.inference_mode()
def self_check(model: Any, shape: ModelShape) -> None:
    """Two packed rows, one behind a random prefix, against each alone and in two steps; a row without a prefix against
    the model's own eager attention. Every token's logits count, every layer must attend.

    Raises ModelRefusedError naming the model.
    """
    kind = model.config.model_type
    generator = torch.Generator().manual_seed(0)
    bare, text = (torch.randint(3, shape.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_TOKENS)
    kv = torch.randn(shape.num_layers, 2, shape.num_kv_heads, NUM_VIRTUAL_TOKENS, shape.head_dim, generator=generator)
    prefix = Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(shape.num_layers)})
    try:
        rows = _Rows(model, shape, prefix)
        bare_alone = rows.logits([(bare, False, 0)])
        text_alone = rows.logits([(text, True, 0)])
        without = rows.logits([(text, False, 0)])
        together = rows.logits([(bare, False, 0), (text, True, 0)])
        first_step = rows.logits([(text[:SPLIT], True, 0)])
        second_step = rows.logits([(text, True, SPLIT)])
        own = _own_logits(model, text)
        silent = rows.silent_layers()
    except Exception as error:  # a model that does not take packed rows fails in ways of its own
        raise ModelRefusedError(f"{kind}: expected a model that takes packed rows, it fails with: {error}") from error
    if silent:
        raise ModelRefusedError(f"{kind} cannot be served: layers {silent} never call the attention that it is given")
    comparisons = {
        "two packed rows differ from each alone": (together, torch.cat((bare_alone, text_alone))),
        "a row in two steps differs from one step": (torch.cat((first_step, second_step)), text_alone),
        "a row differs from the model's own attention": (without, own),
    }
    for what, (found, expected) in comparisons.items():
        limit = TOLERANCE[shape.dtype] * float(expected.abs().max())
        difference = float((found.float() - expected.float()).abs().max())
        if not difference <= limit:
            raise ModelRefusedError(f"{kind} cannot be served: {what} by {difference:.3g} (limit {limit:.3g})")
    if torch.equal(text_alone, without):
        raise ModelRefusedError(f"{kind} cannot be served: a prefix makes no difference to its answers")


class _Rows:
    """Packed rows over a few blocks: a prefix's, and one for each row's text."""

    def __init__(self, model: Any, shape: ModelShape, prefix: Prefix) -> None:
        self._kv_blocks = KVBlocks(shape, 4, model.device)
        self._runner = ModelRunner(model, shape, self._kv_blocks)
        self._runner.fill(prefix, [1])

    def logits(self, rows: list[tuple[list[int], bool, int]]) -> torch.Tensor:
        """Of every token `[num_tokens, vocab_size]`. A row: its text, whether it sees the prefix, where it starts."""
        packed = [
            PackedRow(
                token_ids=tokens[start:],
                start=start,
                end=len(tokens),
                num_virtual_tokens=NUM_VIRTUAL_TOKENS if sees_prefix else 0,
                prefix_blocks=[1] if sees_prefix else [],
                own_blocks=[2 + i],
                wants_logits=True,
            )
            for i, (tokens, sees_prefix, start) in enumerate(rows)
        ]
        batch = make_batch(packed, self._kv_blocks)
        every = torch.arange(batch.position_ids.shape[1], device=batch.position_ids.device)
        return self._runner.run(replace(batch, logits_index=every))

    def silent_layers(self) -> list[int]:
        """Layers that have written no K of a row's text: recurrent ones, whose state would cross rows."""
        written = self._kv_blocks.kv[:, 0, 2].flatten(1).any(1)
        return (~written).nonzero()[:, 0].tolist()


def _own_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """The model's eager attention on the same tokens, without our code: `[num_tokens, vocab_size]`."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        output = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(ours)
    logits: torch.Tensor = output.logits[0]
    return logits

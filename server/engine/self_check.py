"""Does the model compute right answers on packed rows? Asked at start, of the model itself, not of a list of names."""

from __future__ import annotations

from typing import Any

import torch

from prefix_store.prefix import ModelShape, Prefix
from server.engine.batch import PackedRow, make_batch
from server.engine.errors import ModelRefusedError
from server.engine.kv_blocks import KVBlocks, num_blocks_for
from server.engine.model_runner import ModelRunner

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 0.02}  # of the logits' largest magnitude
NUM_VIRTUAL_TOKENS = 5
PROMPT_TOKENS = (9, 12)


@torch.inference_mode()
def self_check(model: Any, shape: ModelShape) -> None:
    """Two packed rows, one behind a random prefix, against each alone; and the bare one against the model's own eager
    attention. Raises ModelRefusedError naming the model type."""
    kind = model.config.model_type
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, shape.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_TOKENS]
    kv = torch.randn(shape.num_layers, 2, shape.num_kv_heads, NUM_VIRTUAL_TOKENS, shape.head_dim, generator=generator)
    prefix = Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(shape.num_layers)})
    try:
        together = _logits(model, shape, prompts, prefix, [0, 1])
        alone = torch.cat([_logits(model, shape, prompts, prefix, [i]) for i in (0, 1)])
        bare = _logits(model, shape, prompts, None, [1])
        own = _own_logits(model, prompts[1])
    except ModelRefusedError:
        raise
    except Exception as error:  # a model that does not know our arguments fails in ways of its own
        raise ModelRefusedError(f"{kind}: expected a model that takes packed rows, it fails with: {error}") from error
    differences = {
        "two packed rows differ from each alone": (together, alone),
        "a row differs from the model's own attention": (bare, own),
    }
    for what, (found, expected) in differences.items():
        limit = TOLERANCE[shape.dtype] * max(float(expected.abs().max()), 1.0)
        difference = float((found.float() - expected.float()).abs().max())
        if not difference <= limit:
            raise ModelRefusedError(f"{kind} cannot be served: {what} by {difference:.3g} (limit {limit:.3g})")
    if float((alone[1:].float() - bare.float()).abs().max()) == 0.0:
        raise ModelRefusedError(f"{kind} cannot be served: a prefix makes no difference to its answers")


def _logits(
    model: Any, shape: ModelShape, prompts: list[list[int]], prefix: Prefix | None, which: list[int]
) -> torch.Tensor:
    """Logits of the rows' last tokens; row 1 is behind `prefix`."""
    kv_blocks = KVBlocks(shape, 8, model.device)
    runner = ModelRunner(model, shape, kv_blocks)
    prefix_blocks = [1] if prefix is not None else []
    if prefix is not None:
        assert num_blocks_for(NUM_VIRTUAL_TOKENS) == 1
        runner.fill(prefix, prefix_blocks)
    rows = [
        PackedRow(
            prompts[i],
            0,
            len(prompts[i]),
            NUM_VIRTUAL_TOKENS if i == 1 and prefix_blocks else 0,
            prefix_blocks if i == 1 else [],
            [2 + i],
            wants_logits=True,
        )
        for i in which
    ]
    return runner.run(make_batch(rows, kv_blocks))


def _own_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """The model's eager attention on the same tokens, without our code."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        output = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(ours)
    logits: torch.Tensor = output.logits[0, -1:]
    return logits

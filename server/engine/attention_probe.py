"""What a model hands to its attention, layer by layer: widths, whose keys it reads, and how far its masks let it see.

The model itself is asked, with three tokens that stand far into a text; no list of families decides. The text before
them is only claimed by a cache, so the question costs no more than three tokens do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from server.engine.errors import ModelRefusedError
from server.engine.reach import WHOLE, Reach

NAME = "prefixserve-probe"
NUM_TOKENS = 3
# Arguments of an attention function that say nothing of what is attended, or that ours honours.
KNOWN = ("softcap", "s_aux", "position_bias", "position_ids", "cache_position", "logits_to_keep")


@dataclass(frozen=True, eq=False)
class Handed:
    """One call of a layer's attention. Tensors are `[1, heads, tokens, dim]`; `mask` is a MaskRule, a mask that the
    model made itself, or None. `unknown` names arguments that our attention would ignore. `is_cached`: the layer's
    cache, or another layer's, holds these very keys and values."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: object
    unknown: tuple[str, ...]
    is_cached: bool = True

    @property
    def layer(self) -> int:
        return int(self.module.layer_idx)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


@dataclass(frozen=True)
class MaskRule:
    """A mask as a function: transformers' own, of (batch, head, query position, key position)."""

    function: Callable[..., torch.Tensor]

    def sees(self, query_positions: torch.Tensor, num_keys: int) -> torch.Tensor:
        """`[queries, num_keys]`."""
        keys = torch.arange(num_keys, device=query_positions.device)[None]
        zero = torch.zeros((), dtype=torch.long, device=query_positions.device)
        seen = self.function(zero, zero, query_positions[:, None], keys)
        return seen.expand(len(query_positions), num_keys)


class ClaimedCache(DynamicCache):
    """Says that `num_tokens` came before, and holds none of them."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.taken.append((key_states, value_states))
        return key_states, value_states

    def holds(self, handed: Handed) -> bool:
        return any(_is_same(key, handed.key) and _is_same(value, handed.value) for key, value in self.taken)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0


_calls: ContextVar[list[Handed]] = ContextVar("calls")


def _record(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """An attention function that records its arguments. Every token attends to itself alone, and in cross-attention to
    the mean of the other text."""
    unknown = tuple(name for name, given in more.items() if name not in KNOWN and isinstance(given, torch.Tensor))
    _calls.get().append(Handed(module, query, key, value, attention_mask, unknown))
    if value.shape[2] != query.shape[2]:
        value = value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _record)
AttentionMaskInterface.register(NAME, lambda *_, mask_function, **__: MaskRule(mask_function))


@contextmanager
def recording(model: Any) -> Iterator[list[Handed]]:
    """Inside, the model's layers record what they hand to their attention, attend to nothing and drop nothing out."""
    ours, is_training = model.config._attn_implementation, model.training
    model.eval()
    calls: list[Handed] = []
    token = _calls.set(calls)
    model.set_attn_implementation(NAME)
    try:
        yield calls
    finally:
        model.set_attn_implementation(ours)
        model.train(is_training)
        _calls.reset(token)


@torch.inference_mode()
def ask(model: Any, position: int) -> list[Handed]:
    """What a decoder-only model hands on for tokens from `position` on, behind a text that is only claimed."""
    ids = _ids(model)
    inputs = {"input_ids": ids}
    if ids.is_meta:  # where families look into ids there are none
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    cache = ClaimedCache(position)
    with recording(model) as calls:
        model(
            **inputs,
            position_ids=torch.arange(position, position + NUM_TOKENS, device=model.device)[None],
            past_key_values=cache if position else None,
            logits_to_keep=torch.arange(NUM_TOKENS, device=model.device),
        )
    return [replace(handed, is_cached=cache.holds(handed)) for handed in calls]


@torch.inference_mode()
def ask_seq2seq(model: Any) -> list[Handed]:
    """What an encoder-decoder hands on in its encoder, its decoder and its cross-attention."""
    ids = _ids(model)
    with recording(model) as calls:
        model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    return calls


def probed_ids(model: Any) -> list[int]:
    """Three tokens that are no special ones."""
    middle = model.get_input_embeddings().num_embeddings // 2
    return [middle + i for i in range(NUM_TOKENS)]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and (one.is_meta or torch.equal(one, other)))


def _ids(model: Any) -> torch.Tensor:
    return torch.tensor([probed_ids(model)], device=model.device)


def reach_of(handed: Handed, position: int) -> Reach:
    """How far the layer's mask lets it see, at positions up to `position`. Raises ModelRefusedError where that is
    neither a window nor a chunk."""
    rule = handed.mask
    if rule is None:
        return WHOLE
    if not isinstance(rule, MaskRule):
        raise ModelRefusedError(f"layer {handed.layer} makes a mask of its own, which packed rows do not have")
    num_keys = position + 1
    device = torch.device("cpu") if handed.query.is_meta else handed.query.device
    keys = torch.arange(num_keys, device=device)[None]

    def first(query: int) -> int:
        """The first key that a query sees."""
        return int(rule.sees(torch.tensor([query], device=device), num_keys)[0].int().argmax())

    start = first(position)
    if start == 0:
        reach = WHOLE
    elif first(position - 1) == start - 1:
        reach = Reach(window=num_keys - start)
    else:
        reach = Reach(chunk=start - first(start - 1))
    size = reach.window or reach.chunk or 1
    near = (0, 1, size - 1, size, size + 1, position // 2, position - size, position - 1, position)
    queries = torch.tensor(sorted({query for query in near if 0 <= query <= position}), device=device)
    expected = reach.sees(queries[:, None], keys)
    if not handed.module.is_causal:
        expected = torch.ones_like(expected)
    if not torch.equal(rule.sees(queries, num_keys), expected):
        raise ModelRefusedError(f"layer {handed.layer} sees keys that are neither of a window nor of a chunk")
    return reach

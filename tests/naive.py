"""A naive loop with the plain transformers model: one row, every token computed again at every step, no cache.

Prefixes are concatenated to each layer's own keys and values as the papers write it, with a dense mask. What this has
in common with the engine is the model's own modules, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from prefix_store.prefix import Layers, Prefix

NAME = "naive_for_tests"


@dataclass
class Shared:
    """Keys beside the row's own: at `positions`, seen by queries at `seen_from` or later."""

    layers: Layers
    position: int
    seen_from: int = 0

    @property
    def num_tokens(self) -> int:
        return next(iter(self.layers.values()))[0].shape[1]


@dataclass
class Stack:
    """One attention's rules: the positions of its queries and own keys, what it shares, its bias table (T5)."""

    positions: torch.Tensor
    shared: list[Shared] = field(default_factory=list)
    is_causal: bool = True
    bias_module: Any = None


@dataclass
class State:
    own: Stack
    cross: Stack | None = None


_now: list[State] = []


def naive_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    state = _now[-1]
    is_cross = state.cross is not None and not module.is_causal
    stack = state.cross if is_cross and state.cross is not None else state.own
    own_positions = torch.arange(key.shape[2]) if is_cross else stack.positions
    keys, values, positions, seen_from = [], [], [], []
    for shared in stack.shared:
        if module.layer_idx in shared.layers:
            k, v = shared.layers[module.layer_idx]
            keys.append(k)
            values.append(v)
            positions.append(torch.arange(shared.position, shared.position + shared.num_tokens))
            seen_from.append(torch.full((shared.num_tokens,), shared.seen_from))
    k = torch.cat([*keys, key[0]], 1)  # [num_kv_heads, keys, head_dim]
    v = torch.cat([*values, value[0]], 1)
    at = torch.cat([*positions, own_positions])
    first = torch.cat([*seen_from, own_positions if stack.is_causal else torch.zeros_like(own_positions)])
    num_repeats = query.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(num_repeats, 0), v.repeat_interleave(num_repeats, 0)
    scores = query[0] @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    queries = stack.positions[:, None]
    seen = queries >= first[None]
    if sliding_window is not None:
        seen &= queries - at[None] < sliding_window
    if stack.bias_module is not None:
        bias_of = stack.bias_module
        buckets = bias_of._relative_position_bucket(
            at[None] - queries,
            bidirectional=not stack.is_causal,
            num_buckets=bias_of.relative_attention_num_buckets,
            max_distance=bias_of.relative_attention_max_distance,
        )
        scores = scores + bias_of.relative_attention_bias(buckets).permute(2, 0, 1)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    return (weights @ v).transpose(0, 1)[None], None


AttentionInterface.register(NAME, naive_attention)


class Positions(torch.nn.Module):
    """BART's positions, from a start of our own."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding, self.positions = embedding, torch.zeros(1, dtype=torch.long)

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(self.positions[None] + self.embedding.offset, self.embedding.weight)


def _run(state: State, call: Any) -> Any:
    _now.append(state)
    try:
        with torch.inference_mode():
            return call()
    finally:
        _now.pop()


def next_logits(model: Any, prompt: list[int], text: list[int], prefixes: Sequence[Prefix]) -> torch.Tensor:
    """Of the token after `prompt` and `text`, `[vocab_size]`. `model` has the attention of this file."""
    embed = model.get_input_embeddings()
    front, pieces, shared = 0, [], []
    infix = next((p for p in prefixes if p.placement == "infix"), None)
    for prefix in prefixes:
        if prefix.placement == "infix":
            continue
        if prefix.embeddings is not None:  # in front of the text, through every layer, as at training
            pieces.append(prefix.embeddings)
        else:
            shared.append(Shared(prefix.layers, front))
            front += prefix.num_virtual_tokens
    num_soft = sum(len(piece) for piece in pieces)
    pieces.append(embed(torch.tensor(prompt)))
    gap = 0
    if infix is not None and infix.embeddings is not None:
        pieces.append(infix.embeddings)
    elif infix is not None:
        gap = infix.num_virtual_tokens
        after = front + num_soft + len(prompt)
        shared.append(Shared(infix.layers, after, seen_from=after + gap))
        pieces.append(embed(torch.tensor([infix.separator])))
    if text:
        pieces.append(embed(torch.tensor(text)))
    embeddings = torch.cat(pieces)
    steps = torch.arange(len(embeddings))
    positions = front + torch.where(steps < num_soft + len(prompt), steps, steps + gap)
    state = State(Stack(positions, shared))
    output = _run(state, lambda: model(inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False))
    return output.logits[0, -1].float()


def next_logits_seq2seq(
    model: Any, prompt: list[int], text: list[int], prefixes: Sequence[Prefix], start: int
) -> torch.Tensor:
    """`[PREFIX_enc; x; PREFIX_dec; y]` and cross-attention, of the token after `text`."""
    encoder, decoder = model.get_encoder(), model.get_decoder()

    def shared_by(part: str) -> tuple[list[Shared], int]:
        found, position = [], 0
        for prefix in prefixes:
            layers = {"encoder": prefix.encoder, "decoder": prefix.layers, "cross": prefix.cross}[part]
            if layers:
                found.append(Shared(layers, position))
                position += found[-1].num_tokens
        return found, position

    pieces = [prefix.embeddings for prefix in prefixes if prefix.embeddings is not None]
    embedded = torch.cat([*pieces, encoder.get_input_embeddings()(torch.tensor(prompt))])
    shared, front = shared_by("encoder")
    positions = front + torch.arange(len(embedded))
    own = Stack(positions, shared, is_causal=False, bias_module=_bias_module(encoder))
    _set_positions(encoder, positions)
    encoded = _run(State(own), lambda: encoder(inputs_embeds=embedded[None])).last_hidden_state
    ids = torch.tensor([[start, *text]])
    shared, front = shared_by("decoder")
    positions = front + torch.arange(ids.shape[1])
    own = Stack(positions, shared, bias_module=_bias_module(decoder))
    cross = Stack(positions, shared_by("cross")[0], is_causal=False)
    _set_positions(decoder, positions)
    output = _run(State(own, cross), lambda: model(encoder_outputs=(encoded,), decoder_input_ids=ids, use_cache=False))
    return output.logits[0, -1].float()


def _bias_module(stack: Any) -> Any:
    return next((m for m in stack.modules() if getattr(m, "has_relative_attention_bias", False)), None)


def _set_positions(stack: Any, positions: torch.Tensor) -> None:
    if hasattr(stack, "embed_positions"):
        if not isinstance(stack.embed_positions, Positions):
            stack.embed_positions = Positions(stack.embed_positions)
        stack.embed_positions.positions = positions


def generate(
    model: Any, prompt: list[int], members: Sequence[Sequence[Prefix]], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the (log-)scores `[num_tokens, vocab_size]` they were chosen by: the logits of one member, the
    log of the mean of several members' distributions."""
    text: list[int] = []
    scores = []
    for _ in range(num_tokens):
        if model.config.is_encoder_decoder:
            start = model.generation_config.decoder_start_token_id
            found = [next_logits_seq2seq(model, prompt, text, prefixes, start) for prefixes in members]
        else:
            found = [next_logits(model, prompt, text, prefixes) for prefixes in members]
        score = found[0] if len(found) == 1 else torch.stack([f.softmax(-1) for f in found]).mean(0).log()
        scores.append(score)
        text.append(int(score.argmax()))
    return text, torch.stack(scores)

"""What the model's generation config does to a row's logits before its token is chosen, as transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from server.engine.sequence import Sequence

SMALLEST = 1e-30  # that a float32 logit can be divided by
TokenSequence = tuple[int, ...]
LARGEST_GROWTH = 1e30  # of a length penalty: any logit but 0 is then the best


@dataclass(frozen=True)
class LogitRules:
    """One object for all requests of a server, named as in `GenerationConfig`; its tensors are made once, on the CPU,
    and so is all that looks at token ids: a device gets the ids of logits to change.

    Token ids lie within the vocabulary. Lengths count the text that the model continues: a causal model's prompt and
    answer without virtual tokens, of an encoder-decoder what its decoder has read.
    """

    sequence_bias: tuple[tuple[TokenSequence, float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[TokenSequence, ...] = ()
    min_length: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @cached_property
    def are_none(self) -> bool:
        """Whether they leave every logit as it is."""
        return self == NO_RULES

    def shape(self, scores: torch.Tensor, sequence: Sequence, eos_token_ids: torch.Tensor) -> torch.Tensor:
        """The row's `scores` `[vocab_size]`, float32, after these rules and the request's penalty and least length, in
        the order of transformers' processors; the same tensor where nothing concerns this token. `eos_token_ids`
        `[n]` is empty for a request that ignores EOS."""
        params, text, eos = sequence.sampling_params, sequence.text_ids, eos_token_ids
        if self.sequence_bias:
            scores = scores + self._bias(text, scores)
        prompt = sequence.encoder_text_ids
        if self.encoder_repetition_penalty != 1.0 and prompt is not None:
            scores = _penalised(scores, prompt, 1 / self.encoder_repetition_penalty)
        if params.repetition_penalty != 1.0:
            scores = _penalised(scores, text, max(params.repetition_penalty, SMALLEST))
        banned = list(self._bad_words(text, eos))
        if self.no_repeat_ngram_size:
            banned.append(_repeating(text, text, self.no_repeat_ngram_size))
        if self.encoder_no_repeat_ngram_size and prompt is not None:
            banned.append(_repeating(prompt, text, self.encoder_no_repeat_ngram_size))
        num_given, num_new = sequence.num_given_tokens, sequence.num_generated_tokens
        least = self.min_length if params.min_new_tokens is None else num_given + params.min_new_tokens
        if len(text) < least:
            banned.append(eos)
        scores = _without(scores, banned)
        if self.forced_bos_token_id is not None and len(text) == 1:
            scores = _only(scores, (self.forced_bos_token_id,))
        if self.forced_eos_token_ids and num_new == params.max_new_tokens - 1:
            scores = _only(scores, self.forced_eos_token_ids)
        if self.exponential_decay_length_penalty is not None:
            start, factor = self.exponential_decay_length_penalty
            scores = _raised(scores, eos, factor, num_new - start)
        suppressed = [self._suppressed] if self.suppress_tokens else []
        begins_later = num_given == 1 and self.forced_bos_token_id is not None
        if self.begin_suppress_tokens and num_new == begins_later:
            suppressed.append(self._suppressed_at_begin)
        return _without(scores, suppressed)

    @cached_property
    def _suppressed(self) -> torch.Tensor:
        return torch.tensor(self.suppress_tokens)

    @cached_property
    def _suppressed_at_begin(self) -> torch.Tensor:
        return torch.tensor(self.begin_suppress_tokens)

    @cached_property
    def _biased_by_length(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Sequences `[n, length]` and their biases `[n]`."""
        biases = torch.tensor([bias for _, bias in self.sequence_bias])
        return [(ids, biases[which]) for ids, which in _by_length(ids for ids, _ in self.sequence_bias)]

    @cached_property
    def _bad_by_length(self) -> list[torch.Tensor]:
        return [ids for ids, _ in _by_length(self.bad_words_ids)]

    def _bias(self, text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros_like(scores)
        for ids, biases in self._biased_by_length:
            completed = _completed(ids, text)
            bias.index_add_(0, ids[completed, -1].to(bias.device), biases[completed].to(bias.device))
        return bias

    def _bad_words(self, text: torch.Tensor, eos: torch.Tensor) -> Iterator[torch.Tensor]:
        """Tokens that would complete one. EOS alone is none, as in transformers."""
        for ids in self._bad_by_length:
            last = ids[_completed(ids, text), -1]
            yield last[~torch.isin(last, eos)] if ids.shape[1] == 1 else last


NO_RULES = LogitRules()


def _by_length(sequences: Iterable[TokenSequence]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`[n, length]`, and which they are; single tokens first."""
    found: dict[int, list[tuple[int, TokenSequence]]] = {1: []}
    for i, ids in enumerate(sequences):
        found.setdefault(len(ids), []).append((i, ids))
    return [
        (torch.tensor([ids for _, ids in group]), torch.tensor([i for i, _ in group]))
        for group in found.values()
        if group
    ]


def _completed(sequences: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Which of `sequences` `[n, length]` the next token can complete, `[n]`: all but their last token end `text`."""
    num_before = sequences.shape[1] - 1
    if num_before > len(text):
        return torch.zeros(len(sequences), dtype=torch.bool)
    return (sequences[:, :num_before] == text[len(text) - num_before :]).all(-1)


def _repeating(of: torch.Tensor, text: torch.Tensor, size: int) -> torch.Tensor:
    """Tokens that would make the last `size` tokens of `text` an n-gram of `of`."""
    if len(of) < size:
        return of[:0]
    ngrams = of.unfold(0, size, 1)
    return ngrams[_completed(ngrams, text), -1]


def _penalised(scores: torch.Tensor, token_ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Less probable (penalty > 1) or more, each token once; ids of embeddings that have no logit are left out."""
    token_ids = token_ids[token_ids < len(scores)].to(scores.device)
    values = scores[token_ids]
    return scores.index_put((token_ids,), torch.where(values < 0, values * penalty, values / penalty))


def _raised(scores: torch.Tensor, eos: torch.Tensor, factor: float, num_over: int) -> torch.Tensor:
    """EOS more probable (factor > 1), exponentially in the number of tokens beyond the start."""
    if num_over <= 0 or not len(eos):
        return scores
    growth = factor**num_over if num_over * math.log(factor) < math.log(LARGEST_GROWTH) else LARGEST_GROWTH
    eos = eos.to(scores.device)
    values = scores[eos]
    raised = (values.abs() * (growth - 1)).masked_fill(~torch.isfinite(values), 0.0)
    return scores.index_put((eos,), values + raised)


def _without(scores: torch.Tensor, banned: list[torch.Tensor]) -> torch.Tensor:
    token_ids = torch.cat(banned) if banned else None
    if token_ids is None or not len(token_ids):
        return scores
    return scores.index_fill(0, token_ids[token_ids < len(scores)].to(scores.device), -math.inf)


def _only(scores: torch.Tensor, token_ids: tuple[int, ...]) -> torch.Tensor:
    forced = torch.full_like(scores, -math.inf)
    forced[list(token_ids)] = 0.0
    return forced

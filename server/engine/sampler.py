"""From logits to one token a row. Every row brings its own parameters and random numbers."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from server.engine.cpu_kernels import DTYPES, CpuKernels
from server.engine.logit_rules import SMALLEST
from server.engine.sequence import Sequence


@dataclass(frozen=True)
class Sample:
    """`token_id` None: the row's logits were not finite."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    sequences: list[Sequence],
    kernels: CpuKernels | None = None,
    eos_token_ids: Collection[int] = (),
) -> list[Sample]:
    """One `Sample` a sequence; `logits` `[rows, vocab_size]` are those of their rows, in order.

    The rows of an ensemble choose together, from the mean of their distributions (Lester et al., 2021).
    Log-probabilities only for sequences that ask; they are the model's, whatever shapes the choice. Where rules leave
    no token, the first is chosen.
    """
    if logits.shape[0] != len(sequences):
        logits = _mean(logits, [len(sequence.rows) for sequence in sequences])
    greedy = _best(logits, kernels)
    samples = []
    for row, sequence in enumerate(sequences):
        params = sequence.sampling_params
        token_id = greedy[row]
        if token_id is None:
            samples.append(Sample(None))
            continue
        if params.do_sample or (params.shapes_logits and not _stays_best(token_id, sequence, eos_token_ids)):
            eos = [i for i in eos_token_ids if not params.ignore_eos and 0 <= i < logits.shape[1]]
            scores = logits[row].float()
            shaped = params.rules.shape(scores, sequence, torch.tensor(eos, dtype=torch.long))
            if params.do_sample:
                token_id = _draw(shaped, sequence)
            elif shaped is not scores:
                token_id = _best(shaped[None], kernels)[0] or 0
        if params.num_top_logprobs is None:
            samples.append(Sample(token_id))
            continue
        logprobs = torch.log_softmax(logits[row].float(), -1)
        top = torch.topk(logprobs, params.num_top_logprobs)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        samples.append(Sample(token_id, float(logprobs[token_id]), pairs))
    return samples


def _best(logits: torch.Tensor, kernels: CpuKernels | None) -> list[int | None]:
    """The best token of each row, None where a NaN or an infinity is among them."""
    if kernels is not None and logits.dtype in DTYPES:
        return [token_id if token_id >= 0 else None for token_id in kernels.argmax(logits)]
    best, best_ids = logits.max(-1)  # a NaN or an infinity in a row is its maximum
    pairs = zip(best_ids.tolist(), torch.isfinite(best).tolist(), strict=True)
    return [token_id if is_finite else None for token_id, is_finite in pairs]


def _stays_best(token_id: int, sequence: Sequence, eos_token_ids: Collection[int]) -> bool:
    """Whether the best token stays the best because only others are made less probable: a penalty is for tokens that
    were in the text, a least length for EOS."""
    params = sequence.sampling_params
    only_lowers = params.rules.are_none and params.repetition_penalty >= 1.0
    return only_lowers and token_id not in eos_token_ids and not bool((sequence.text_ids == token_id).any())


def _mean(logits: torch.Tensor, num_rows: list[int]) -> torch.Tensor:
    """Log-probabilities `[sequences, vocab_size]`; the logits as they are of those with one row."""
    pieces = torch.split(logits.float(), num_rows)
    return torch.stack([piece[0] if len(piece) == 1 else _log_of_mean(piece) for piece in pieces])


def _log_of_mean(logits: torch.Tensor) -> torch.Tensor:
    """`[vocab_size]`, finite also where every probability is too small for its type."""
    return torch.log_softmax(logits, -1).logsumexp(0) - math.log(len(logits))


def _draw(logits: torch.Tensor, sequence: Sequence) -> int:
    """A token from `logits` `[vocab_size]`: temperature, top-k, top-p, min-p, draw; in transformers' order."""
    params = sequence.sampling_params
    assert sequence.generator is not None
    uniform = torch.rand((), generator=sequence.generator).item()
    if not torch.isfinite(logits.max()):
        return 0
    logits = (logits - logits.max()) / max(params.temperature, SMALLEST)
    num_kept = params.top_k or logits.shape[0]
    if num_kept < logits.shape[0] or params.top_p < 1.0:
        values, ids = torch.topk(logits, min(num_kept, logits.shape[0]))
    else:
        values, ids = logits, None
    probabilities = torch.softmax(values, -1)
    if params.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[1:].masked_fill_(before[1:] >= params.top_p, 0.0)  # however small it is, one stays
    if params.min_p > 0.0:
        probabilities.masked_fill_(probabilities < params.min_p * probabilities.max(), 0.0)
    # The inverse of the distribution function at one uniform number of the row's own generator.
    cumulative = probabilities.double().cumsum(-1)
    drawn = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    if drawn >= cumulative.shape[0] or math.isclose(float(probabilities[drawn]), 0.0, abs_tol=0.0):
        drawn = int(probabilities.nonzero()[-1])
    return drawn if ids is None else int(ids[drawn])

"""From logits to one token a row. Every row brings its own parameters and random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from server.engine.cpu_kernels import DTYPES, CpuKernels
from server.engine.sequence import Sequence

SMALLEST = 1e-30  # that a float32 logit can be divided by


@dataclass(frozen=True)
class Sample:
    """`token_id` None: the row's logits were not finite."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: list[Sequence], kernels: CpuKernels | None = None) -> list[Sample]:
    """One `Sample` a sequence; `logits` `[rows, vocab_size]` are those of their rows, in order.

    The rows of an ensemble choose together, from the mean of their distributions (Lester et al., 2021).
    Log-probabilities only for sequences that ask.
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
        if params.do_sample or params.repetition_penalty != 1.0:
            token_id = _choose(logits[row].float(), sequence)
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


def _mean(logits: torch.Tensor, num_rows: list[int]) -> torch.Tensor:
    """Log-probabilities `[sequences, vocab_size]`; the logits as they are of those with one row."""
    pieces = torch.split(logits.float(), num_rows)
    return torch.stack([piece[0] if len(piece) == 1 else _log_of_mean(piece) for piece in pieces])


def _log_of_mean(logits: torch.Tensor) -> torch.Tensor:
    """`[vocab_size]`, finite also where every probability is too small for its type."""
    return torch.log_softmax(logits, -1).logsumexp(0) - math.log(len(logits))


def _choose(logits: torch.Tensor, sequence: Sequence) -> int:
    """A token from `logits` `[vocab_size]`: penalty, temperature, top-k, top-p, draw; in transformers' order."""
    params = sequence.sampling_params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.seen_token_ids)), device=logits.device)
        values = logits[seen]
        penalty = max(params.repetition_penalty, SMALLEST)
        logits = logits.index_put((seen,), torch.where(values < 0, values * penalty, values / penalty))
    if not params.do_sample:
        return int(logits.argmax())
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
    assert sequence.generator is not None
    # The inverse of the distribution function at one uniform number of the row's own generator.
    threshold = torch.rand((), generator=sequence.generator).item()
    cumulative = probabilities.double().cumsum(-1)
    drawn = int(torch.searchsorted(cumulative, threshold * float(cumulative[-1]), right=True))
    if drawn >= cumulative.shape[0] or math.isclose(float(probabilities[drawn]), 0.0, abs_tol=0.0):
        drawn = int(probabilities.nonzero()[-1])
    return drawn if ids is None else int(ids[drawn])

"""Rows that choose together, beside rows that choose alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.detokenizer import Detokenizer
from server.engine.logit_rules import LogitRules
from server.engine.sampler import Sample, sample
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Sequence
from tests.tiny_models import VOCAB, letter_tokenizer

GREEDY = SamplingParams(max_new_tokens=4)
SAMPLED = SamplingParams(max_new_tokens=4, do_sample=True, temperature=1.3, top_k=20, top_p=0.9, seed=5)
LOGPROBS = SamplingParams(max_new_tokens=4, num_top_logprobs=3)
PENALISED = SamplingParams(max_new_tokens=4, repetition_penalty=4.0)


def sequence_of(num_rows: int, params: SamplingParams, prompt: tuple[int, ...] = (3, 4)) -> Sequence:
    return Sequence("r", list(prompt), params, Detokenizer(letter_tokenizer()), ((),) * num_rows)


def logits_of(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(num_rows)) * 3


def log_of_mean(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).mean(0, keepdim=True).log()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, LOGPROBS, PENALISED, replace(SAMPLED, repetition_penalty=1.5)])
def test_an_ensemble_chooses_as_one_row_with_the_mean_of_its_distributions(params: SamplingParams) -> None:
    logits = logits_of(3)
    together, alone = sequence_of(3, params), sequence_of(1, params)
    chosen = [(sample(logits, [together])[0], sample(log_of_mean(logits), [alone])[0]) for _ in range(10)]
    for ours, expected in chosen:
        assert ours.token_id == expected.token_id
        assert ours.logprob == pytest.approx(expected.logprob)
        assert dict(ours.top_logprobs) == pytest.approx(dict(expected.top_logprobs))


def test_the_mean_is_of_probabilities_not_of_logits() -> None:
    """0.96 + 0.1 + 0.1 is more than 0.04 + 0.5 + 0.5; the products of the same are the other way round."""
    probabilities = torch.zeros(3, VOCAB)
    probabilities[0, 1], probabilities[0, 2] = 0.96, 0.04
    probabilities[1:, 1], probabilities[1:, 2], probabilities[1:, 3] = 0.1, 0.5, 0.4
    logits = probabilities.clamp(min=1e-9).log()
    assert int(logits.mean(0).argmax()) == 2
    assert sample(logits, [sequence_of(3, GREEDY)])[0].token_id == 1


def test_an_ensemble_draws_with_the_means_frequencies() -> None:
    logits = torch.full((2, VOCAB), -50.0)
    logits[0, 1] = logits[1, 2] = 0.0  # one half each
    sequence = sequence_of(2, SamplingParams(do_sample=True, seed=1))
    drawn = Counter(sample(logits, [sequence])[0].token_id for _ in range(400))
    assert set(drawn) == {1, 2}
    assert 160 < drawn[1] < 240


def test_neighbours_of_an_ensemble_keep_their_own_rows() -> None:
    """Rows follow one another in the order of their sequences, whatever their number."""
    logits = logits_of(6)
    sequences = [sequence_of(n, GREEDY) for n in (1, 3, 1, 1)]
    expected = [int(logits[0].argmax()), int(log_of_mean(logits[1:4]).argmax()), *logits[4:].argmax(-1).tolist()]
    assert [chosen.token_id for chosen in sample(logits, sequences)] == expected


def test_one_member_that_is_not_finite_fails_its_ensemble_alone() -> None:
    logits = logits_of(4)
    logits[1, 7] = float("nan")
    first, ensemble, last = sample(logits, [sequence_of(1, GREEDY), sequence_of(2, GREEDY), sequence_of(1, GREEDY)])
    assert ensemble == Sample(None)
    assert [first.token_id, last.token_id] == [int(logits[0].argmax()), int(logits[3].argmax())]


def test_a_penalty_counts_the_prompt_and_every_token_so_far() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 3.0, 2.9, 2.8
    sequence = sequence_of(2, PENALISED, prompt=(5,))
    taken = []
    for _ in range(2):
        token_id = sample(logits, [sequence])[0].token_id
        assert token_id is not None
        sequence.append(token_id)
        taken.append(token_id)
    assert taken == [6, 7]


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.05, 4.0])
@pytest.mark.parametrize("num_least", [None, 2])
def test_a_best_token_that_stays_the_best_is_what_all_rules_choose(penalty: float, num_least: int | None) -> None:
    """It is not looked for again where a penalty lowers others only."""
    params = SamplingParams(max_new_tokens=4, repetition_penalty=penalty, min_new_tokens=num_least)
    generator = torch.Generator().manual_seed(4)
    eos = (5, 9)
    for _ in range(300):
        logits = torch.randn(1, 12, generator=generator).round(decimals=1)
        sequence = sequence_of(1, params, tuple(torch.randint(0, 12, (3,), generator=generator).tolist()))
        shaped = params.rules.shape(logits[0], sequence, torch.tensor(eos))
        assert sample(logits, [sequence], eos_token_ids=eos)[0].token_id == int(shaped.argmax())


def test_log_probabilities_of_sure_members_are_finite() -> None:
    """A difference of 200 in the logits is nothing as a probability and has no end as its logarithm."""
    logits = torch.full((2, VOCAB), -200.0)
    logits[:, 1] = 0.0
    found = sample(logits, [sequence_of(2, LOGPROBS)])[0]
    assert [round(value) for _, value in found.top_logprobs] == [0, -200, -200]


@pytest.mark.parametrize(
    "shaping", [{"repetition_penalty": 4.0}, {"rules": LogitRules(suppress_tokens=tuple(range(50)))}]
)
def test_log_probabilities_are_the_models_whatever_shapes_the_choice(shaping: dict[str, Any]) -> None:
    logits = logits_of(1)
    plain, shaped = (
        sample(logits.clone(), [sequence_of(1, replace(LOGPROBS, **more), prompt=(3, 4, 5, 6))])[0]
        for more in ({}, shaping)
    )
    assert dict(shaped.top_logprobs) == pytest.approx(dict(plain.top_logprobs))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_row_whose_rules_leave_no_token_has_the_first(params: SamplingParams) -> None:
    everything = replace(params, rules=LogitRules(suppress_tokens=tuple(range(VOCAB))))
    assert sample(logits_of(1), [sequence_of(1, everything)])[0].token_id == 0


def test_what_is_less_probable_than_min_p_is_never_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 4.0, 3.0
    sequence = sequence_of(1, SamplingParams(do_sample=True, min_p=0.3, seed=1))
    assert {sample(logits, [sequence])[0].token_id for _ in range(100)} == {5, 6}


def test_rows_beside_one_that_is_shaped_keep_the_models_best() -> None:
    logits = logits_of(3)
    best = logits.argmax(-1).tolist()
    shaped = replace(GREEDY, rules=LogitRules(suppress_tokens=(best[1],)))
    chosen = sample(logits, [sequence_of(1, params) for params in (GREEDY, shaped, GREEDY)])
    assert [chosen[0].token_id, chosen[2].token_id] == [best[0], best[2]]
    assert chosen[1].token_id == logits[1].topk(2).indices[1]


def test_ids_of_a_prompt_that_have_no_logit_are_not_penalised() -> None:
    """An embedding may have more rows than the model has logits."""
    logits = logits_of(1)
    sequence = sequence_of(1, PENALISED, prompt=(VOCAB + 3, 4))
    assert sample(logits, [sequence])[0] == sample(logits, [sequence_of(1, PENALISED, prompt=(4,))])[0]


@pytest.mark.parametrize(("name", "best"), [("temperature", 9), ("top_p", 9), ("repetition_penalty", 3)])
def test_the_smallest_parameter_chooses_as_its_limit(name: str, best: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4], logits[0, 9] = 2.0, 1.0, 3.0
    params = replace(SamplingParams(max_new_tokens=4, do_sample=True, seed=5), **{name: 5e-324})
    assert sample(logits, [sequence_of(1, params)])[0].token_id == best

"""Text that comes again is not computed again, and no answer changes by it: the engine with a tiny Llama in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import ModelShape, Prefix
from server.engine.attention import NAME
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.errors import GenerationError
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from tests.tiny_models import FAMILIES, HIDDEN, VOCAB, letter_tokenizer

Members = tuple[Composition, ...]
TEMPLATE = [3 + 7 * i % 90 for i in range(40)]  # 2 blocks and a half
STEP_TOKENS = 24


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)


@pytest.fixture(scope="module")
def prefixes(model: Any) -> dict[str, Prefix]:
    shape = measure_shape(model, "tiny", "none")

    def kv(n: int, **fields: Any) -> Prefix:
        made = torch.randn(shape.num_layers, 2, shape.num_kv_heads, n, shape.head_dim)
        return Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in range(shape.num_layers)}, **fields)

    bad = kv(5)
    bad.layers[0][1][:, 2] = float("nan")
    return {
        "a": kv(5),
        "b": kv(20),
        "bad": bad,
        "kv infix": kv(6, placement="infix", separator=7),
        "soft infix": Prefix("soft", embeddings=torch.randn(20, HIDDEN), placement="infix"),
    }


def make_engine(model: Any, prefixes: dict[str, Prefix], *, num_blocks: int = 64) -> Engine:
    shape: ModelShape = measure_shape(model, "tiny", "none")
    total, num_prefix_blocks = split_pool(num_blocks * 16, 16 * 16)
    runner = ModelRunner(model, shape, KVBlocks(shape, total, torch.device("cpu")))
    return Engine(
        runner,
        lambda ref: prefixes[ref.digest],
        num_prefix_blocks=num_prefix_blocks,
        max_rows=8,
        max_step_tokens=STEP_TOKENS,
    )


class Asked:
    """Requests to one engine, by name of their artefacts: `a+b` is a composition, `a|b` an ensemble."""

    def __init__(self, engine: Engine, prefixes: dict[str, Prefix]) -> None:
        self.engine = engine
        self._refs = {name: PrefixRef(name, prefix.layout) for name, prefix in prefixes.items()}
        self._num_asked = 0

    def add(self, name: str, prompt: list[int], *, num_tokens: int = 20, tenant_id: str = "") -> Sequence:
        members: Members = tuple(
            tuple(self._refs[part] for part in member.split("+") if part != "bare") for member in name.split("|")
        )
        self._num_asked += 1
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        detokenizer = Detokenizer(letter_tokenizer())
        request_id = f"r{self._num_asked}"
        sequence = Sequence(request_id, prompt, params, detokenizer, members, tenant_id=tenant_id)
        self.engine.add(sequence)
        return sequence

    def step(self) -> list[Exception]:
        errors = [output.error for output in self.engine.step() if output.error is not None]
        self.engine.check_integrity()
        return list(errors)

    def finish(self) -> None:
        while self.engine.has_work:
            assert not self.step()

    def answer(self, name: str, prompt: list[int], **fields: Any) -> Sequence:
        sequence = self.add(name, prompt, **fields)
        self.finish()
        return sequence


@pytest.fixture
def asked(model: Any, prefixes: dict[str, Prefix]) -> Asked:
    return Asked(make_engine(model, prefixes), prefixes)


@pytest.fixture
def cold(model: Any, prefixes: dict[str, Prefix]) -> Any:
    """The tokens of a request to an engine that has seen no other."""

    def answer(name: str, prompt: list[int], **fields: Any) -> list[int]:
        return Asked(make_engine(model, prefixes), prefixes).answer(name, prompt, **fields).output_token_ids

    return answer


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens each step computed."""
    counts: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, __, out: counts.append(out.shape[-2]))
    try:
        yield counts
    finally:
        hook.remove()


KINDS = ["bare", "a", "a+b", "a|bare", "a|b", "kv infix", "a+kv infix", "soft infix", "soft infix|bare|kv infix"]


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_that_comes_again_is_not_computed_again(asked: Asked, model: Any, name: str) -> None:
    first = asked.answer(name, TEMPLATE)
    with counted(model) as counts:
        again = asked.answer(name, TEMPLATE)
    assert first.num_cached_tokens == 0
    num_known = [_num_known(member) for member in name.split("|")]
    assert again.num_cached_tokens == min(40, *num_known)
    assert again.output_token_ids == first.output_token_ids
    num_cold = sum(len(row.token_ids) - 1 for row in again.rows)
    assert sum(counts) == num_cold - sum(num_known)


def _num_known(name: str) -> int:
    """Of 40 tokens of prompt, and what an infix adds to them, those in full blocks before the last."""
    return (40 + ("kv infix" in name) + 20 * ("soft infix" in name) - 1) // 16 * 16


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 32, 33])
def test_at_least_the_last_token_is_computed(asked: Asked, cold: Any, num_tokens: int) -> None:
    asked.answer("a", TEMPLATE)
    prompt = TEMPLATE[:num_tokens]
    sequence = asked.answer("a", prompt)
    assert sequence.num_cached_tokens == (num_tokens - 1) // 16 * 16
    assert sequence.output_token_ids == cold("a", prompt)


@pytest.mark.parametrize("name", KINDS)
def test_a_chat_goes_on_from_its_history(asked: Asked, cold: Any, name: str) -> None:
    """What stands behind an infix is no history: it is at other positions, or not there at all."""
    prompt: list[int] = list(TEMPLATE)
    for num_turns in range(3):
        sequence = asked.answer(name, prompt, num_tokens=24)
        assert sequence.output_token_ids == cold(name, prompt, num_tokens=24)
        if "infix" in name:
            assert sequence.num_cached_tokens <= num_turns * (24 + 5) + 40
        else:
            assert sequence.num_cached_tokens == (0, 48, 80)[num_turns]  # 63, 92 of the prompt were computed
        prompt = [*prompt, *sequence.output_token_ids, *TEMPLATE[num_turns : num_turns + 5]]


@pytest.mark.parametrize("name", KINDS)
def test_a_newcomer_shares_the_blocks_of_a_row_that_runs(asked: Asked, cold: Any, name: str) -> None:
    """And keeps them when that row ends, or is aborted."""
    running = asked.add(name, [*TEMPLATE, 5], num_tokens=40)
    while running.num_generated_tokens < 3:
        asked.step()
    newcomer = asked.add(name, [*TEMPLATE, 6], num_tokens=30)
    asked.step()
    assert newcomer.num_cached_tokens == 32
    for row, other in zip(newcomer.rows, running.rows, strict=True):
        assert row.block_table[:2] == other.block_table[:2]
    asked.engine.abort(running.request_id)
    asked.engine.check_integrity()
    asked.finish()
    assert newcomer.output_token_ids == cold(name, [*TEMPLATE, 6], num_tokens=30)
    assert asked.engine.own_blocks.num_used == 0


def test_what_two_requests_compute_at_once_is_kept_once(asked: Asked, cold: Any) -> None:
    """Eight choices of one prompt start in one step, or nearly."""
    sequences = [asked.add("a", TEMPLATE[:20]) for _ in range(8)]
    while not all(sequence.num_generated_tokens for sequence in sequences):
        asked.step()
    assert len({sequence.rows[0].block_table[0] for sequence in sequences}) == 1
    asked.finish()
    assert [sequence.output_token_ids for sequence in sequences] == [cold("a", TEMPLATE[:20])] * 8


@pytest.mark.parametrize(("name", "tenant_id"), [("a", "other"), ("b", "one"), ("a+b", "one"), ("bare", "one")])
def test_other_tenants_and_other_artefacts_share_nothing(asked: Asked, cold: Any, name: str, tenant_id: str) -> None:
    asked.answer("a", TEMPLATE, tenant_id="one")
    assert asked.answer("a", TEMPLATE, tenant_id="one").num_cached_tokens == 32
    sequence = asked.answer(name, TEMPLATE, tenant_id=tenant_id)
    assert sequence.num_cached_tokens == 0
    assert sequence.output_token_ids == cold(name, TEMPLATE)


@pytest.mark.parametrize(("name", "expected"), [("a|b", 0), ("a|a", 32), ("a|bare", 0), ("a+b|a", 0)])
def test_the_count_of_an_ensemble_is_what_all_its_rows_reused(
    asked: Asked, cold: Any, name: str, expected: int
) -> None:
    """Rows start at different places and still choose every token together."""
    asked.answer("a", TEMPLATE)
    sequence = asked.add(name, TEMPLATE)
    while sequence.started_s is None:
        asked.step()
    assert sequence.num_cached_tokens == expected
    assert max(row.num_registered_blocks for row in sequence.rows) == 2
    while not sequence.num_generated_tokens:
        assert all(row.num_uncomputed_tokens for row in sequence.rows)
        asked.step()
    assert {row.num_uncomputed_tokens for row in sequence.rows} == {1}
    asked.finish()
    assert sequence.output_token_ids == cold(name, TEMPLATE)


def test_a_member_that_has_less_to_compute_leaves_the_step_to_the_others(asked: Asked) -> None:
    prompt = [*TEMPLATE, *TEMPLATE]
    asked.answer("a", prompt)
    sequence = asked.add("a|b", prompt)
    num_steps = 0
    while not sequence.num_generated_tokens:
        asked.step()
        num_steps += 1
    assert num_steps == 5  # 16 and 80 tokens in steps of 24, the last ones together


def test_a_row_that_ends_in_its_prompt_leaves_nothing(asked: Asked) -> None:
    """No logits have shown that it was finite."""
    sequence = asked.add("a", [*TEMPLATE, *TEMPLATE])
    while sequence.rows[0].num_computed_tokens < 32:
        asked.step()
    assert not sequence.num_generated_tokens
    asked.engine.abort(sequence.request_id)
    asked.engine.check_integrity()
    assert asked.engine.own_blocks.num_cached == 0
    assert asked.answer("a", [*TEMPLATE, *TEMPLATE]).num_cached_tokens == 0


def test_a_row_that_is_aborted_later_leaves_what_it_was_sampled_from(asked: Asked, cold: Any) -> None:
    sequence = asked.add("a", TEMPLATE)
    while sequence.num_generated_tokens < 12:  # 51 tokens are computed
        asked.step()
    asked.engine.abort(sequence.request_id)
    asked.engine.check_integrity()
    assert (asked.engine.own_blocks.num_cached, asked.engine.own_blocks.num_used) == (3, 0)
    prompt = [*TEMPLATE, *sequence.output_token_ids]
    again = asked.answer("a", prompt)
    assert again.num_cached_tokens == 48
    assert again.output_token_ids == cold("a", prompt)


@pytest.mark.parametrize("name", ["bad", "a|bad"])
def test_text_behind_a_bad_prefix_is_never_kept(asked: Asked, cold: Any, name: str) -> None:
    for _ in range(2):
        sequence = asked.add(name, TEMPLATE)
        errors = []
        while asked.engine.has_work:
            errors += asked.step()
        assert [type(error) for error in errors] == [GenerationError]
        assert sequence.num_cached_tokens == 0
        assert asked.engine.own_blocks.num_cached == 0
    assert asked.answer("a", TEMPLATE).output_token_ids == cold("a", TEMPLATE)


def test_a_fault_in_the_middle_of_a_row_leaves_what_was_good(asked: Asked, cold: Any) -> None:
    sequence = asked.add("a", TEMPLATE)
    while sequence.num_generated_tokens < 12:
        asked.step()
    kv_blocks = asked.engine.runner.kv_blocks
    own = sequence.rows[0].unregistered_blocks
    assert len(own) == 1
    for layer in kv_blocks.layers:
        layer.index_fill_(1, torch.tensor(own), float("nan"))
    (error,) = asked.step()
    assert isinstance(error, GenerationError)
    assert asked.engine.own_blocks.num_cached == 3
    assert kv_blocks.is_all_finite()
    again = asked.answer("a", [*TEMPLATE, *sequence.output_token_ids])
    assert again.num_cached_tokens == 48
    assert again.output_token_ids == cold("a", [*TEMPLATE, *sequence.output_token_ids])


def test_under_pressure_old_text_is_evicted_and_answers_stay(model: Any, prefixes: Any, cold: Any) -> None:
    tight = Asked(make_engine(model, prefixes, num_blocks=20), prefixes)
    prompts = [[*TEMPLATE[i:], *TEMPLATE[:i], 5 + i] for i in range(0, 40, 4)]
    expected = {(name, i): cold(name, prompt) for name in ("a", "a|b") for i, prompt in enumerate(prompts)}
    num_cached = num_computed = 0
    for round_ in range(3):
        made = {key: tight.add(key[0], prompts[key[1]]) for key in list(expected)[:: 1 if round_ % 2 else -1]}
        tight.finish()
        assert {key: made[key].output_token_ids for key in made} == {key: expected[key] for key in made}
        num_cached += sum(sequence.num_cached_tokens for sequence in made.values())
        num_computed += sum(len(row.token_ids) for sequence in made.values() for row in sequence.rows)
    assert tight.engine.own_blocks.num_free == 20
    assert num_cached > 0
    assert num_computed > 20 * 16 * 8


def test_a_preempted_row_goes_on_from_what_is_left_of_its_text(model: Any, prefixes: Any, cold: Any) -> None:
    tight = Asked(make_engine(model, prefixes, num_blocks=8), prefixes)
    old = tight.add("a", TEMPLATE, num_tokens=60)
    young = tight.add("b", TEMPLATE, num_tokens=60)
    while not young.num_preemptions:
        tight.step()
    num_known = len(young.rows[0].token_ids)
    num_left = len(tight.engine.own_blocks.find(young.rows[0]))
    assert num_left >= 2
    while young in tight.engine.scheduler.waiting:
        num_left = len(tight.engine.own_blocks.find(young.rows[0]))
        with counted(model) as counts:
            tight.step()
    assert num_left >= 1  # `old` has grown and taken the end of it
    assert sum(counts) <= num_known - 16 * num_left + 1
    tight.finish()
    assert young.num_cached_tokens == 0  # it counts the first start only
    for sequence, name in ((old, "a"), (young, "b")):
        assert sequence.output_token_ids == cold(name, TEMPLATE, num_tokens=60)


def test_rows_that_share_all_their_blocks_make_way_for_one_another(model: Any, prefixes: Any, cold: Any) -> None:
    """To preempt one of them frees nothing, or little."""
    tight = Asked(make_engine(model, prefixes, num_blocks=8), prefixes)
    names: Iterable[str] = ("a", "a|a", "a", "a|b")
    sequences = [tight.add(name, [*TEMPLATE, i]) for i, name in enumerate(names, 3)]
    tight.finish()
    for i, (sequence, name) in enumerate(zip(sequences, names, strict=True), 3):
        assert sequence.output_token_ids == cold(name, [*TEMPLATE, i])
    assert tight.engine.scheduler.num_preemptions


def test_a_prefix_that_was_evicted_and_came_back_finds_its_text(asked: Asked) -> None:
    first = asked.answer("a", TEMPLATE)
    assert asked.engine.residents.evict("a")
    again = asked.answer("a", TEMPLATE)
    assert asked.engine.residents.counts.num_loads == 2
    assert again.num_cached_tokens == 32
    assert again.output_token_ids == first.output_token_ids


def test_a_vocabulary_is_not_so_small_that_answers_are_alike(cold: Any) -> None:
    answers = [cold(name, TEMPLATE) for name in KINDS]
    assert len({tuple(tokens) for tokens in answers}) == len(KINDS)
    assert len({token for tokens in answers for token in tokens}) >= 8
    assert max(TEMPLATE) < VOCAB

"""Who runs in a step where it is tricky: rows that choose together, texts that cannot be cut, several prefixes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import ModelShape, Prefix
from server.engine.attention import NAME
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, StepOutput
from server.engine.errors import PinnedRoomError, PrefixLoadError
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, split_pool
from server.engine.model_families import prepare
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, Layout, PrefixRef, Sequence
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, VOCAB, letter_tokenizer, seq2seq_model

STEP_TOKENS = 24


class LateLoads:
    """An executor whose loads run when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, load: Callable[[], None]) -> None:
        self.waiting.append(load)

    def run(self, count: int | None = None) -> None:
        for load in self.waiting[:count]:
            load()
        del self.waiting[:count]


def make_engine(model: Any, prefixes: dict[str, Prefix], *, prefix_blocks: int = 64, executor: Any = None) -> Engine:
    shape = measure_shape(model, "tiny", "none")
    num_blocks, num_prefix_blocks = split_pool(4096, prefix_blocks * BLOCK_SIZE)
    return Engine(
        ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"))),
        lambda ref: prefixes[ref.digest],
        num_prefix_blocks=num_prefix_blocks,
        max_rows=8,
        max_step_tokens=STEP_TOKENS,
        executor=executor,
    )


def make_sequence(engine: Engine, request_id: str, num_tokens: int, members: tuple[Composition, ...]) -> Sequence:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    prompt = [3 + i % (VOCAB - 3) for i in range(num_tokens)]
    detokenizer = Detokenizer(letter_tokenizer())
    return Sequence(request_id, prompt, params, detokenizer, members, engine.runner.decoder_start_ids)


def step(engine: Engine) -> list[StepOutput]:
    outputs = engine.step()
    engine.check_integrity()
    return outputs


def finish(engine: Engine, max_steps: int = 200) -> int:
    """Steps until nothing is left."""
    for num_steps in range(max_steps):
        if not engine.has_work:
            return num_steps
        assert all(output.error is None for output in step(engine))
    raise AssertionError(f"sequences are left after {max_steps} steps")


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    model = seq2seq_model(SEQ2SEQ_FAMILIES["t5"]())
    model.set_attn_implementation(NAME)
    prepare(model)
    return model


def kv(shape: ModelShape, num_tokens: int, **fields: Any) -> Prefix:
    made = torch.randn(shape.num_layers, 2, shape.num_kv_heads, num_tokens, shape.head_dim)
    return Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in range(shape.num_layers)}, **fields)


def refs_of(prefixes: dict[str, Prefix]) -> dict[str, PrefixRef]:
    return {name: PrefixRef(name, prefix.layout) for name, prefix in prefixes.items()}


def test_members_of_different_lengths_reach_their_token_in_the_same_step(llama: Any) -> None:
    """A soft infix of 40 tokens makes one member's stream much longer than the bare one's."""
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {"infix": Prefix("soft", embeddings=torch.randn(40, shape.hidden_size), placement="infix")}
    engine = make_engine(llama, prefixes)
    sequence = make_sequence(engine, "r", 50, ((refs_of(prefixes)["infix"],), ()))
    engine.add(sequence)
    long, short = sequence.rows
    num_steps = 0
    while not step(engine):
        num_steps += 1
        assert long.num_uncomputed_tokens >= 1
        assert short.num_uncomputed_tokens >= 1
    assert num_steps >= 5  # 140 tokens in steps of 24
    assert [row.num_uncomputed_tokens for row in sequence.rows] == [1, 1]  # the token just chosen
    while engine.has_work:
        assert len(step(engine)) == 1  # then a token a step
    assert sequence.num_generated_tokens == 3


def test_a_long_ensemble_does_not_hold_up_rows_that_decode(llama: Any) -> None:
    engine = make_engine(llama, {})
    first = make_sequence(engine, "first", 4, ((),))
    engine.add(first)
    step(engine)
    engine.add(make_sequence(engine, "long", 100, ((), (), ())))
    for _ in range(2):
        assert [output.sequence for output in step(engine)] == [first]
    finish(engine)


@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("num_tokens", [7, 8, 21, 22, 23, 24, 25, 70])
def test_an_encoder_text_of_any_length_is_served(t5: Any, num_tokens: int, num_members: int) -> None:
    """Also where it fills the step to the last token, and beside rows that take some of every step."""
    engine = make_engine(t5, {})
    engine.add(make_sequence(engine, "long", num_tokens, ((),) * num_members))
    assert finish(engine) == 3
    for i in range(5):
        engine.add(make_sequence(engine, f"short {i}", 3, ((),)))
    engine.add(make_sequence(engine, "long", num_tokens, ((),) * num_members))
    assert finish(engine) <= 7


@pytest.mark.parametrize("num_first", [5, 40])
def test_a_long_encoder_text_does_not_start_behind_another_in_one_step(t5: Any, num_first: int) -> None:
    engine = make_engine(t5, {})
    sequences = [make_sequence(engine, f"r{i}", n, ((),)) for i, n in enumerate((num_first, 40))]
    for sequence in sequences:
        engine.add(sequence)
    assert [output.sequence for output in step(engine)] == sequences[:1]
    assert [output.sequence for output in step(engine)] == sequences


def test_a_text_is_encoded_once(t5: Any) -> None:
    engine = make_engine(t5, {})
    engine.add(make_sequence(engine, "r", 9, ((), ())))
    encoded: list[int] = []
    hook = t5.get_encoder().register_forward_hook(lambda _, __, out: encoded.append(out.last_hidden_state.shape[1]))
    finish(engine)
    hook.remove()
    assert encoded == [18]


def test_two_compositions_that_together_exceed_the_room_run_one_after_the_other(llama: Any) -> None:
    """Each needs 2 of 3 blocks; were half a row's prefixes kept, each would wait for the other's for ever."""
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "abcd"}
    refs, late = refs_of(prefixes), LateLoads()
    engine = make_engine(llama, prefixes, prefix_blocks=3, executor=late)
    one = make_sequence(engine, "one", 6, ((refs["a"], refs["b"]),))
    other = make_sequence(engine, "other", 6, ((refs["c"], refs["d"]),))
    for sequence in (one, other):
        engine.add(sequence)
    for _ in range(3):
        assert not step(engine)
        assert [len(row.residents) for row in (*one.rows, *other.rows)] == [2, 0]  # all or none
    while engine.has_work:
        late.run()
        assert all(output.error is None for output in step(engine))
        assert len(other.rows[0].residents) in (0, 2)
    assert one.num_generated_tokens == other.num_generated_tokens == 3


def test_all_rows_of_an_ensemble_hold_their_prefixes_or_none_does(llama: Any) -> None:
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "abc"}
    refs = refs_of(prefixes)
    engine = make_engine(llama, prefixes, prefix_blocks=2)
    running = make_sequence(engine, "running", 6, ((refs["a"],),))
    engine.add(running)
    step(engine)
    ensemble = make_sequence(engine, "ensemble", 6, ((refs["b"],), (refs["c"],)))
    engine.add(ensemble)
    while running.finish_reason is None:
        assert not any(row.residents for row in ensemble.rows)
        step(engine)
    finish(engine)
    assert ensemble.num_generated_tokens == 3


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_failed_load_of_one_of_two_prefixes_fails_the_row_and_lets_the_other_go(llama: Any, which: str) -> None:
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "ab"}
    refs, late = refs_of(prefixes), LateLoads()
    engine = make_engine(llama, prefixes, executor=late)
    beside = make_sequence(engine, "beside", 6, ((refs["b" if which == "a" else "a"],),))
    pair = make_sequence(engine, "pair", 6, ((refs["a"], refs["b"]),))
    for sequence in (pair, beside):
        engine.add(sequence)
    assert not step(engine)
    prefixes.pop(which)
    late.run()
    failed = [output for output in step(engine) if output.error is not None]
    assert [output.sequence for output in failed] == [pair]
    assert isinstance(failed[0].error, PrefixLoadError)
    assert not pair.rows[0].residents
    finish(engine)
    assert beside.num_generated_tokens == 3
    assert engine.residents.num_references == 0
    assert [digest for digest in "ab" if engine.residents.get(digest)] == [name for name in "ab" if name != which]


def test_a_prefix_that_fails_to_load_is_not_asked_for_again_at_once(llama: Any) -> None:
    missing = PrefixRef("gone", Layout(num_decoder_tokens=4))
    engine = make_engine(llama, {})
    for name in ("first", "second"):
        engine.add(make_sequence(engine, name, 6, ((missing,),)))
    errors = [output.error for _ in range(3) for output in step(engine)]
    assert [type(error) for error in errors] == [PrefixLoadError, PrefixLoadError]
    assert engine.residents.counts.num_failed_loads == 1


def test_a_preempted_ensemble_gives_back_all_its_rows_and_keeps_its_prefixes(llama: Any) -> None:
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "ab"}
    refs = refs_of(prefixes)
    engine = make_engine(llama, prefixes)
    engine.own_blocks.allocate(engine.own_blocks.num_free - 4)  # 4 blocks are left
    old = make_sequence(engine, "old", 15, ((),))
    ensemble = make_sequence(engine, "ensemble", 3, ((refs["a"],), (refs["b"],)))
    other = make_sequence(engine, "other", 15, ((),))
    for sequence in (old, other, ensemble):
        engine.add(sequence)
    while not ensemble.num_preemptions:
        assert engine.step() or engine.has_work
    assert [row.block_table for row in ensemble.rows] == [[], []]
    assert [len(row.residents) for row in ensemble.rows] == [1, 1]
    while engine.has_work:
        assert all(output.error is None for output in engine.step())
    assert ensemble.num_generated_tokens == 3
    assert engine.own_blocks.num_free == 4


def test_waiting_for_room_counts_no_hit_and_loads_nothing(llama: Any) -> None:
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "abc"}
    refs = refs_of(prefixes)
    engine = make_engine(llama, prefixes, prefix_blocks=2)
    running = make_sequence(engine, "running", 6, ((refs["a"],),))
    both = make_sequence(engine, "both", 6, ((refs["b"], refs["c"]),))
    for sequence in (running, both):
        engine.add(sequence)
    while running.finish_reason is None:
        step(engine)
        assert engine.residents.num_resident == 1
    finish(engine)
    counts = engine.residents.counts
    assert (counts.num_hits, counts.num_misses, counts.num_loads) == (0, 3, 3)


def test_what_has_no_room_beside_pinned_prefixes_fails_and_those_behind_load(llama: Any) -> None:
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {name: kv(shape, 5) for name in "abc"}
    refs = refs_of(prefixes)
    engine = make_engine(llama, prefixes, prefix_blocks=2)
    assert engine.residents.preload([refs["a"]])
    engine.residents.pin("a")
    pair = make_sequence(engine, "pair", 6, ((refs["b"],), (refs["c"],)))
    with_pinned = make_sequence(engine, "with pinned", 6, ((refs["a"], refs["c"]),))
    for sequence in (pair, with_pinned):
        engine.add(sequence)
    (failed,) = step(engine)
    assert failed.sequence is pair
    assert isinstance(failed.error, PinnedRoomError)
    finish(engine)
    assert with_pinned.num_generated_tokens == 3


def test_the_count_of_pinned_prefixes_may_be_read_while_they_change(llama: Any) -> None:
    """The server's gauges read it beside the step's thread."""
    shape = measure_shape(llama, "tiny", "none")
    prefixes = {f"p{i}": kv(shape, 1) for i in range(60)}
    residents = make_engine(llama, prefixes).residents
    refs = list(refs_of(prefixes).values())
    assert residents.preload(refs)
    for ref in refs:
        residents.finish_load(residents.get(ref.digest), None)
    is_over = threading.Event()

    def use() -> None:
        while not is_over.is_set():
            residents.evict("p0")
            residents.preload(refs)
            residents.finish_load(residents.get("p0"), None)

    user = threading.Thread(target=use)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    user.start()
    try:
        for _ in range(3000):
            assert residents.num_pinned <= 60
    finally:
        is_over.set()
        user.join()
        sys.setswitchinterval(interval_s)

"""Invariant 1 and 3 on a tiny Llama and a tiny T5, over every kind of artefact: a row's tokens depend on its prompt,
its prefixes and its parameters only."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.attention import NAME
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.kv_blocks import KVBlocks, prefix_blocks, split_pool
from server.engine.model_families import prepare
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from tests.tiny_models import T5, letter_tokenizer, seq2seq_model

VOCAB = 128
LLAMA = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
)
NAMES = {
    "llama": [
        *("kv", "kv-long", "subset", "soft", "soft-long", "soft-infix", "kv-infix", "subset-infix"),
        *("kv+kv-long", "subset+kv", "kv+soft-infix", "soft+kv-infix"),
        *("kv|soft|kv-long", "soft-infix|bare", "kv-infix|subset+kv|soft-long", "bare"),
    ],
    "t5": [
        *("three", "three-long", "encoder", "decoder", "cross", "subset", "soft", "soft-long"),
        *("three+three-long", "encoder+decoder", "three+soft", "subset+cross"),
        *("three|soft|decoder", "soft-long|bare", "three+soft|subset|three-long", "bare"),
    ],
}


@dataclass(frozen=True)
class World:
    """`requests[name]` are the members of an ensemble `a|b`, each a composition `c+d`."""

    model: Any
    shape: ModelShape
    prefixes: dict[str, Prefix]
    requests: dict[str, tuple[Composition, ...]]

    def engine(
        self, *, kv: int = 4000, room: int = 2000, max_rows: int = 16, executor: Executor | None = None
    ) -> Engine:
        num_blocks, num_prefix_blocks = split_pool(kv, room)
        return Engine(
            ModelRunner(self.model, self.shape, KVBlocks(self.shape, num_blocks, torch.device("cpu"))),
            lambda ref: self.prefixes[ref.digest],
            num_prefix_blocks=num_prefix_blocks,
            max_rows=max_rows,
            max_step_tokens=max_rows + 8,
            executor=executor,
        )

    def num_blocks(self, name: str) -> int:
        """Of the request's prefixes, each once."""
        layouts = {ref.digest: ref.layout for prefixes in self.requests[name] for ref in prefixes}
        return sum(prefix_blocks(layout, self.shape) for layout in layouts.values())

    def sequence(
        self, request_id: str, name: str, prompt: list[int], params: SamplingParams, tenant_id: str = ""
    ) -> Sequence:
        start = (0,) if self.shape.is_encoder_decoder else ()
        detokenizer = Detokenizer(letter_tokenizer(VOCAB))
        return Sequence(request_id, prompt, params, detokenizer, self.requests[name], start, tenant_id)

    def sequences(self) -> list[Sequence]:
        """Every kind twice: greedy, sampled, penalised, with prompts of 1 to 60 tokens."""
        choose = random.Random(2)
        made = []
        for i in range(32):
            params = SamplingParams(
                max_new_tokens=24,
                do_sample=i % 5 > 2,
                seed=i,
                temperature=0.8,
                top_k=20,
                top_p=0.9,
                repetition_penalty=1.2 if i % 3 == 1 else 1.0,
            )
            prompt = [choose.randrange(self.shape.vocab_size) for _ in range(choose.randrange(1, 60))]
            made.append(self.sequence(f"r{i}", list(self.requests)[i % 16], prompt, params))
        return made


@pytest.fixture(scope="module", params=list(NAMES))
def world(request: pytest.FixtureRequest) -> World:
    torch.manual_seed(0)
    if request.param == "llama":
        model: Any = AutoModelForCausalLM.from_config(LLAMA, attn_implementation=NAME)
    else:
        model = seq2seq_model(T5Config(**T5, num_layers=2, num_decoder_layers=3, num_heads=4, initializer_factor=1.5))
        model.set_attn_implementation(NAME)
        prepare(model)
    shape = measure_shape(model, "tiny", "none")
    prefixes = make_prefixes(shape)
    refs = {name: PrefixRef(name, prefix.layout) for name, prefix in prefixes.items()}
    requests = {
        name: tuple(tuple(refs[part] for part in member.split("+") if part != "bare") for member in name.split("|"))
        for name in NAMES[request.param]
    }
    return World(model, shape, prefixes, requests)


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    generator = torch.Generator().manual_seed(1)

    def kv(n: int, num_layers: int, *layers: int) -> Layers:
        made = torch.randn(num_layers, 2, shape.num_kv_heads, n, shape.head_dim, generator=generator)
        return {i: (made[i, 0], made[i, 1]) for i in layers or range(num_layers)}

    def soft(n: int, **fields: Any) -> Prefix:
        return Prefix("soft", embeddings=torch.randn(n, shape.hidden_size, generator=generator) * 0.3, **fields)

    infix: dict[str, Any] = {"placement": "infix", "separator": 7}
    depth, encoder_depth = shape.num_layers, shape.num_encoder_layers
    if not shape.is_encoder_decoder:
        return {
            "kv": Prefix("kv", kv(3, depth)),
            "kv-long": Prefix("kv", kv(33, depth)),
            "subset": Prefix("kv", kv(13, depth, 0, 2)),
            "soft": soft(8),
            "soft-long": soft(28),
            "soft-infix": soft(6, placement="infix"),
            "kv-infix": Prefix("kv", kv(17, depth), **infix),
            "subset-infix": Prefix("kv", kv(5, depth, 1), **infix),
        }
    return {
        "three": Prefix("kv", kv(5, depth), encoder=kv(3, encoder_depth), cross=kv(4, depth), is_seq2seq=True),
        "three-long": Prefix("kv", kv(2, depth), encoder=kv(18, encoder_depth), cross=kv(17, depth), is_seq2seq=True),
        "encoder": Prefix("kv", encoder=kv(9, encoder_depth), is_seq2seq=True),
        "decoder": Prefix("kv", kv(19, depth), is_seq2seq=True),
        "cross": Prefix("kv", cross=kv(7, depth), is_seq2seq=True),
        "subset": Prefix("kv", kv(6, depth, 1), encoder=kv(5, encoder_depth, 0), is_seq2seq=True),
        "soft": soft(8, is_seq2seq=True),
        "soft-long": soft(28, is_seq2seq=True),
    }


def run(
    engine: Engine,
    sequences: Iterable[Sequence],
    *,
    stagger: int = 0,
    before_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    sequences = list(sequences)
    arriving = list(sequences)
    while arriving or engine.has_work:
        for sequence in arriving[: stagger or None]:
            engine.add(sequence)
        arriving = arriving[stagger:] if stagger else []
        before_step()
        for output in engine.step():
            assert output.error is None
        engine.check_integrity()
    return [sequence.output_token_ids for sequence in sequences]


@pytest.fixture(scope="module")
def alone(world: World) -> list[list[int]]:
    return [run(world.engine(), [sequence])[0] for sequence in world.sequences()]


def test_answers_are_varied_enough_to_prove_something(alone: list[list[int]]) -> None:
    assert len({token for tokens in alone for token in tokens}) >= 8
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


@pytest.mark.parametrize("stagger", [0, 1, 5])
def test_a_mixed_batch_gives_the_tokens_of_rows_alone(world: World, alone: list[list[int]], stagger: int) -> None:
    engine = world.engine()
    assert run(engine, world.sequences(), stagger=stagger) == alone
    again = world.sequences()
    assert run(engine, again, stagger=stagger) == alone  # warm, the text too
    assert any(sequence.num_cached_tokens for sequence in again) != world.shape.is_encoder_decoder


def test_steps_on_other_numbers_of_threads_give_the_same_tokens(world: World, alone: list[list[int]]) -> None:
    choose = random.Random(5)
    try:
        found = run(
            world.engine(),
            world.sequences(),
            stagger=5,
            before_step=lambda: torch.set_num_threads(choose.choice((1, 2))),
        )
    finally:
        torch.set_num_threads(1)
    assert found == alone


def test_text_that_comes_again_gives_the_tokens_of_a_cold_start(world: World) -> None:
    """Every kind: a template with two ends, the first's answer as a chat's history, and a tenant that shares nothing.
    In a pool that keeps all of it, and in one that evicts and preempts."""
    choose = random.Random(4)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    template = [choose.randrange(world.shape.vocab_size) for _ in range(37)]
    prompts: dict[tuple[str, str], list[int]] = {}
    expected: dict[tuple[str, str], list[int]] = {}

    def cold(name: str, prompt: list[int]) -> list[int]:
        return run(world.engine(), [world.sequence("cold", name, prompt, params)])[0]

    for name in world.requests:
        answer = cold(name, [*template, 1])
        expected[name, "first"] = expected[name, "foreign"] = answer
        prompts[name, "first"] = prompts[name, "foreign"] = [*template, 1]
        for which, prompt in (("second", [*template, 2, 3]), ("history", [*template, 1, *answer, 4])):
            prompts[name, which], expected[name, which] = prompt, cold(name, prompt)
    for kv in (8000, 40 * 16):
        engine = world.engine(kv=kv)
        num_cached: Counter[str] = Counter()
        for round_ in range(2):
            order = choose.sample(list(prompts), len(prompts))
            sequences = [
                world.sequence(f"{round_} {key}", key[0], prompts[key], params, "other" if key[1] == "foreign" else "")
                for key in order
            ]
            answers = run(engine, sequences, stagger=3)
            for key, sequence, tokens in zip(order, sequences, answers, strict=True):
                assert tokens == expected[key], (key, kv, sequence.num_cached_tokens, sequence.num_preemptions)
                num_cached[key[0]] += sequence.num_cached_tokens
        if world.shape.is_encoder_decoder:
            assert not num_cached.total()
        elif kv == 8000:
            assert not engine.scheduler.num_preemptions
            assert min(num_cached[name] for name in world.requests) >= 4 * 32, num_cached
        else:
            assert engine.scheduler.num_preemptions
            assert num_cached.total()


def test_eviction_and_reload_give_the_same_tokens(world: World, alone: list[list[int]]) -> None:
    engine = world.engine(room=max(map(world.num_blocks, world.requests)) * 16)
    for _ in range(3):
        assert run(engine, world.sequences()) == alone
    assert engine.residents.counts.num_evictions > 8


def test_preemption_gives_the_same_tokens(world: World, alone: list[list[int]]) -> None:
    engine = world.engine(kv=24 * 16)
    sequences = world.sequences()
    assert run(engine, sequences) == alone
    assert engine.scheduler.num_preemptions > 3
    assert any(sequence.num_preemptions for sequence in sequences if len(sequence.rows) > 1)


@pytest.mark.parametrize("beside", [False, True])
def test_500_aborts_at_random_moments_leak_nothing(world: World, beside: bool) -> None:
    """Waiting, loading (beside the steps, with an executor), in prefill, decoding, preempted, finished. How far loads
    beside the steps have come is chance: it goes on until every moment was met, for ten times as long at most."""
    reached = {"cold": 10, "held": 10, "prefill": 10, "decode": 10, "finished": 10, "preempted": 3}
    if world.shape.is_encoder_decoder:
        del reached["prefill"]  # the step that encodes gives the first token
    with ThreadPoolExecutor(1) as executor:
        engine = world.engine(kv=22 * 16, room=14 * 16, executor=executor if beside else None)
        choose = random.Random(3)
        moments: Counter[str] = Counter()
        for round_ in range(160):
            if round_ >= 16 and all(moments[name] >= least for name, least in reached.items()):
                break
            sequences = world.sequences()
            for sequence in sequences:
                engine.add(sequence)
            for sequence in choose.sample(sequences, len(sequences)):
                for _ in range(choose.randrange(3)):
                    engine.step()
                    engine.check_integrity()
                moments[moment(sequence)] += 1
                engine.abort(sequence.request_id)
                engine.check_integrity()
            assert not engine.has_work, round_
    engine.step()
    engine.check_integrity()
    assert moments.total() >= 500
    assert all(moments[name] >= least for name, least in reached.items()), moments
    assert engine.own_blocks.num_used == 0
    assert engine.residents.num_references == 0


def moment(sequence: Sequence) -> str:
    if sequence.finish_reason is not None:
        return "finished"
    if any(row.block_table for row in sequence.rows):
        return "decode" if sequence.num_generated_tokens else "prefill"
    if sequence.num_preemptions:
        return "preempted"
    return "held" if any(row.residents for row in sequence.rows) else "cold"


@pytest.mark.parametrize("place", range(16))
def test_64_rows_of_one_task_hold_its_prefixes_once(world: World, place: int) -> None:
    name, members = list(world.requests.items())[place]
    engine = world.engine(kv=8000, max_rows=64)
    for i in range(64 // len(members)):
        engine.add(world.sequence(f"r{i}", name, [1, 2, 3 + i], SamplingParams(max_new_tokens=64)))
    most_running = 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        most_running = max(most_running, engine.scheduler.num_running_rows)
        assert engine.prefix_allocator.num_used == world.num_blocks(name)
    assert most_running == 64 // len(members) * len(members)
    assert engine.residents.counts.num_loads == len({ref.digest for prefixes in members for ref in prefixes})

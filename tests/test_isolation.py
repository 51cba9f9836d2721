"""Invariant 1 and 3 on a tiny Llama: a row's tokens depend on its prompt, prefix and parameters only."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from prefix_store.prefix import Prefix
from server.engine.attention import NAME
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, split_pool
from server.engine.kv_blocks import KVBlocks, num_blocks_for
from server.engine.model_runner import ModelRunner, measure_shape
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import letter_tokenizer

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer(128)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation=NAME)


@pytest.fixture(scope="module")
def prefixes() -> dict[str, Prefix]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for i in range(16):
        n = 3 + 5 * (i % 7)
        if i % 2:
            made[f"d{i}"] = Prefix("soft", embeddings=torch.randn(n, 64, generator=generator) * 0.3)
        else:
            kv = torch.randn(3, 2, 2, n, 16, generator=generator)
            made[f"d{i}"] = Prefix("kv", layers={layer: (kv[layer, 0], kv[layer, 1]) for layer in range(3)})
    return made


def make_engine(
    model: torch.nn.Module,
    prefixes: dict[str, Prefix],
    *,
    kv: int = 4000,
    room: int = 2000,
    max_rows: int = 16,
    executor: Executor | None = None,
) -> Engine:
    shape = measure_shape(model, "tiny", "none")
    num_blocks, num_prefix_blocks = split_pool(kv, room)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu")))
    return Engine(
        runner,
        prefixes.__getitem__,
        num_prefix_blocks=num_prefix_blocks,
        max_rows=max_rows,
        max_step_tokens=max_rows + 8,
        executor=executor,
    )


def make_sequences(tokenizer: PreTrainedTokenizerFast, prefixes: dict[str, Prefix]) -> list[Sequence]:
    choose = random.Random(2)
    sequences = []
    for i in range(32):
        digest = f"d{i % 16}" if i % 5 else None
        members = ((PrefixRef(digest, prefixes[digest].layout),),) if digest else ((),)
        params = SamplingParams(max_new_tokens=24, do_sample=i % 4 == 3, seed=i, temperature=0.8, top_k=20, top_p=0.9)
        prompt = [choose.randrange(128) for _ in range(choose.randrange(1, 60))]
        sequences.append(Sequence(f"r{i}", prompt, params, Detokenizer(tokenizer), members))
    return sequences


def run(engine: Engine, sequences: Iterable[Sequence], *, stagger: int = 0) -> list[list[int]]:
    sequences = list(sequences)
    arriving = list(sequences)
    while arriving or engine.has_work:
        for sequence in arriving[: stagger or None]:
            engine.add(sequence)
        arriving = arriving[stagger:] if stagger else []
        for output in engine.step():
            assert output.error is None
        engine.check_integrity()
    return [sequence.output_token_ids for sequence in sequences]


@pytest.fixture(scope="module")
def alone(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prefixes: dict[str, Prefix]) -> list[list[int]]:
    return [run(make_engine(model, prefixes), [sequence])[0] for sequence in make_sequences(tokenizer, prefixes)]


def test_answers_are_varied_enough_to_prove_something(alone: list[list[int]]) -> None:
    assert len({token for tokens in alone for token in tokens}) >= 8
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


@pytest.mark.parametrize("stagger", [0, 1, 5])
def test_a_mixed_batch_gives_the_tokens_of_rows_alone(model, tokenizer, prefixes, alone, stagger) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(model, prefixes)
    assert run(engine, make_sequences(tokenizer, prefixes), stagger=stagger) == alone
    assert run(engine, make_sequences(tokenizer, prefixes), stagger=stagger) == alone  # warm


def test_eviction_and_reload_give_the_same_tokens(model, tokenizer, prefixes, alone) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(model, prefixes, room=8 * 16)
    assert run(engine, make_sequences(tokenizer, prefixes)) == alone
    assert engine.residents.counts.num_evictions > 8


def test_preemption_gives_the_same_tokens(model, tokenizer, prefixes, alone) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(model, prefixes, kv=12 * 16)
    assert run(engine, make_sequences(tokenizer, prefixes)) == alone
    assert engine.scheduler.num_preemptions > 3


@pytest.mark.parametrize("beside", [False, True])
def test_500_aborts_at_random_moments_leak_nothing(model, tokenizer, prefixes, beside) -> None:  # type: ignore[no-untyped-def]
    """Waiting, loading (beside the steps, with an executor), in prefill, decoding, preempted, finished."""
    with ThreadPoolExecutor(1) as executor:
        engine = make_engine(model, prefixes, kv=400, room=12 * 16, executor=executor if beside else None)
        choose = random.Random(3)
        moments: Counter[str] = Counter()
        for round_ in range(16):
            sequences = make_sequences(tokenizer, prefixes)
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
    assert min(moments[name] for name in ("cold", "held", "prefill", "decode", "finished")) >= 10, moments
    assert engine.own_allocator.num_used == 0
    assert engine.residents.num_references == 0


def moment(sequence: Sequence) -> str:
    if sequence.finish_reason is not None:
        return "finished"
    (row,) = sequence.rows
    if row.block_table:
        return "decode" if sequence.num_generated_tokens else "prefill"
    return "held" if row.residents else "cold"


def test_64_rows_of_one_task_hold_one_prefix(model, tokenizer, prefixes) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(model, prefixes, max_rows=64)
    digest = max(prefixes, key=lambda name: prefixes[name].num_virtual_tokens)
    members = ((PrefixRef(digest, prefixes[digest].layout),),)
    for i in range(64):
        params = SamplingParams(max_new_tokens=12)
        engine.add(Sequence(f"r{i}", [1, 2, 3 + i], params, Detokenizer(tokenizer), members))
    most_running = 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        most_running = max(most_running, len(engine.scheduler.running))
        assert engine.prefix_allocator.num_used == num_blocks_for(prefixes[digest].num_virtual_tokens)
    assert most_running == 64
    assert engine.residents.counts.num_loads == 1

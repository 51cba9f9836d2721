"""Steps beside real busy processes leave them a core; a step gives the same bits on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prefix_store.prefix import Prefix
from server.engine.attention import NAME
from server.engine.cpu_kernels import CpuKernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.fused_modules import fuse_modules
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.quantized_weights import quantize_weights
from server.engine.reordered_weights import can_reorder, reorder_weights
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import letter_tokenizer

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core a step has one thread")
DEADLINE_S = 120  # for what takes a second on a machine of its own

# In processes of their own: the tests' own has one thread for everything.
BESIDE_BUSY = """
import os, subprocess, sys, threading, time
import torch
from server.engine.step_threads import StepThreads

def until(is_reached):
    end_s = time.monotonic() + float(sys.argv[1])
    while not is_reached() and time.monotonic() < end_s:
        start_s = time.monotonic()
        for _ in range(20):
            half @ half
        threads.after_step(time.monotonic() - start_s)
    assert is_reached()

half = torch.ones(600, 600).bfloat16()
threads = StepThreads()
assert threads.num_threads > 1
num_cores = len(os.sched_getaffinity(0))
busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(num_cores)]
try:
    until(lambda: threads.num_threads < num_cores)
finally:
    for process in busy:
        process.kill()
        process.wait()
assert threads.num_threads == torch.get_num_threads()
found = []
other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
other.start()
other.join()
assert found == [num_cores], "it is this thread's number alone"
"""
UNTOLD = """
import pathlib, sys, time
import torch
from server.engine import step_threads

step_threads.TASKS = step_threads.CORES = pathlib.Path("/nowhere")
threads = step_threads.StepThreads()
for _ in range(10):
    threads.after_step(1.0)
assert threads.num_threads == torch.get_num_threads() > 1
"""


def check_script(script: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", script, str(DEADLINE_S)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False, env=env)
    assert done.returncode == 0, done.stderr[-1000:]


@needs_two_cores
def test_steps_beside_busy_processes_use_fewer_threads() -> None:
    check_script(BESIDE_BUSY)


@needs_two_cores
def test_where_the_kernel_counts_nothing_all_threads_stay() -> None:
    check_script(UNTOLD)


CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=320,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    max_position_embeddings=512,
    initializer_range=0.1,
)
WAYS = ["plain", "reordered", "int8"]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """What sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def answers(model: Any, kernels: CpuKernels | None, before_step: Callable[[], None]) -> list[Any]:
    """Tokens and log-probabilities of 20 rows, with and without a prefix, that arrive one a step."""
    shape = measure_shape(model, "wide", "none")
    num_blocks, num_prefix_blocks = split_pool(4096, 1024)
    generator = torch.Generator().manual_seed(1)
    prefix = Prefix("soft", embeddings=torch.randn(150, shape.hidden_size, generator=generator) * 0.3)
    engine = Engine(
        ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"), kernels)),
        lambda _: prefix,
        num_prefix_blocks=num_prefix_blocks,
        max_rows=24,
        max_step_tokens=200,
    )
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    found: dict[str, list[Any]] = {f"r{i}": [] for i in range(20)}
    arriving = list(enumerate(found))
    while arriving or engine.has_work:
        for i, name in arriving[:1]:
            prompt = torch.randint(0, shape.vocab_size, (1 + 9 * i,), generator=generator).tolist()
            refs = (PrefixRef("soft", prefix.layout),) if i % 3 else ()
            engine.add(Sequence(name, prompt, params, Detokenizer(letter_tokenizer(1024)), (refs,)))
        arriving = arriving[1:]
        before_step()
        for output in engine.step():
            assert output.token is not None, output.error
            found[output.sequence.request_id].append((output.token.token_id, output.token.logprob))
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_when_the_number_of_threads_changes(
    way: str, dtype: torch.dtype, kernels: CpuKernels, threads: Callable[[int], None]
) -> None:
    if way == "reordered" and not can_reorder(dtype):
        pytest.skip("the processor does not reorder it")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=NAME, dtype=dtype)
    model.eval().requires_grad_(False)
    used = None if way == "plain" else kernels
    if way == "reordered":
        assert reorder_weights(model)
    elif way == "int8":
        quantize_weights(model, kernels)
    if used is not None:
        fuse_modules(model, used)
    threads(1)
    expected = answers(model, used, lambda: None)
    assert len({tuple(token for token, _ in tokens) for tokens in expected}) > 10
    choose = torch.Generator().manual_seed(3)
    found = answers(model, used, lambda: threads(int(torch.randint(1, 4, (), generator=choose))))
    assert found == expected

"""Mixed tasks over HTTP against PEFT grouped by task, in one run.

64 requests, Zipf(1) over 64 tasks of 20 virtual tokens (prompt tuning), 32 tokens in and 32 out, greedy, EOS ignored;
the default model, bf16 where native. Pairs are interleaved; the end has their medians and the ratio's spread.

    python load_tests/throughput.py [--pairs 7] [--dtype auto]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from served import served, spread
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_store.prefix import Prefix
from server.model_files import find_model

NUM_REQUESTS, NUM_TASKS, NUM_VIRTUAL, NUM_IN, NUM_OUT = 64, 64, 20, 32, 32


def prompts(tokenizer: Any) -> list[str]:
    """Texts of exactly 32 tokens: common words, each one token."""
    words = [" the", " of", " and", " to", " in", " is", " was", " for", " on", " that", " with", " as", " by", " at"]
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in words)
    choose = random.Random(1)
    return ["".join(choose.choices(words, k=NUM_IN)) for _ in range(NUM_REQUESTS)]


@torch.inference_mode()
def ask_peft(model: Any, embeddings: dict[int, torch.Tensor], ids: torch.Tensor, tasks: list[int]) -> float:
    """Seconds for the same requests, one batch a task."""
    groups = defaultdict(list)
    for i, task in enumerate(tasks):
        groups[task].append(i)
    start_s = time.perf_counter()
    for task, rows in groups.items():
        model.prompt_encoder["default"].embedding.weight.data.copy_(embeddings[task])
        batch = ids[rows]
        mask = torch.ones_like(batch)
        model.generate(
            input_ids=batch, attention_mask=mask, max_new_tokens=NUM_OUT, min_new_tokens=NUM_OUT, do_sample=False
        )
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    files = find_model(None)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    texts = prompts(tokenizer)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    tasks = random.Random(0).choices(range(NUM_TASKS), [1 / (i + 1) for i in range(NUM_TASKS)], k=NUM_REQUESTS)
    asked = [(text, f"t{task}") for text, task in zip(texts, tasks, strict=True)]
    with served(files, dtype=arguments.dtype) as server:
        state = server.state
        shape = state.engine.shape
        embeddings = {}
        for task in range(NUM_TASKS):
            generator = torch.Generator().manual_seed(task)
            embeddings[task] = torch.randn(NUM_VIRTUAL, shape.hidden_size, generator=generator) * 0.1
            state.store.publish("default", f"t{task}", Prefix("soft", embeddings=embeddings[task]), base="unverified")
        base = AutoModelForCausalLM.from_pretrained(files.path, dtype=shape.dtype)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_VIRTUAL)
        peft_model = get_peft_model(base, config).eval()
        server.seconds(asked, NUM_OUT)  # every prefix becomes resident
        pairs = []
        for _ in range(arguments.pairs):
            ours = server.seconds(asked, NUM_OUT)
            theirs = ask_peft(peft_model, embeddings, ids, tasks)
            pairs.append((ours, theirs))
            print(f"ours {ours:.2f} s, PEFT {theirs:.2f} s, {theirs / ours:.2f}x", flush=True)
    num_tokens = NUM_REQUESTS * NUM_OUT
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{shape.dtype}, {len(set(tasks))} tasks in {NUM_REQUESTS} requests, median of {len(pairs)} pairs")
    print(f"ours {num_tokens / ours:.0f} tokens/s, PEFT grouped by task {num_tokens / theirs:.0f} tokens/s")
    print(f"ratio {spread([theirs / ours for ours, theirs in pairs])}")


if __name__ == "__main__":
    main()

"""An encoder-decoder: 32 requests of mixed tasks over HTTP against 32 PEFT calls one after another, in one run.

The phonemes example's T5 and its prefixes, words held back, 16 tokens out, greedy, EOS ignored. Pairs are interleaved.

    python load_tests/seq2seq_throughput.py [--pairs 7] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from figures import in_turn
from peft import PeftModel
from served import served
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from workloads import Ask, Task

from server.model_files import find_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "phonemes"
NUM_REQUESTS, NUM_OUT = 32, 16


@torch.inference_mode()
def ask_peft(models: dict[str, Any], tokenizer: Any, asks: list[Ask]) -> float:
    """Seconds, one request after another. PEFT cannot hold prefixes of different types in one model: each task has
    one of its own, so nothing is spent on switching."""
    start_s = time.perf_counter()
    for ask in asks:
        assert ask.task is not None
        encoded = tokenizer(ask.text, return_tensors="pt")
        models[ask.task.name].generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=NUM_OUT,
            min_new_tokens=NUM_OUT,
            do_sample=False,
        )
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    files = find_model(str(EXAMPLE / "model"))
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    tasks = sorted(path.name for path in (EXAMPLE / "prefixes").iterdir())
    words = {task: (EXAMPLE / "held_back" / f"{task}.jsonl").read_text().splitlines() for task in tasks}
    asks = [
        Ask(json.loads(words[task][i])["inputs"], Task(task))
        for i, task in ((i, tasks[i % len(tasks)]) for i in range(NUM_REQUESTS))
    ]
    options = ("--model", str(files.path), "--model-alias", "phonemes-t5", "--dtype", arguments.dtype)
    with served(*options, "--publish-examples", str(EXAMPLE / "prefixes")) as server:
        dtype = getattr(torch, server.get("/info")["model_dtype"])
        models: dict[str, Any] = {}
        for task in tasks:
            base = AutoModelForSeq2SeqLM.from_pretrained(files.path, dtype=dtype)
            models[task] = PeftModel.from_pretrained(base, EXAMPLE / "prefixes" / task).eval()
        measures = {
            "ours": lambda _: server.seconds(asks, NUM_OUT),
            "PEFT": lambda _: ask_peft(models, tokenizer, asks),
        }
        found = in_turn(measures, arguments.pairs)
    print(f"{dtype}, {NUM_REQUESTS} requests, {len(tasks)} tasks, {arguments.pairs} pairs")
    print(f"ours {found['ours']} s, PEFT {found['PEFT']} s, {found['PEFT'].over(found['ours'])}x")


if __name__ == "__main__":
    main()

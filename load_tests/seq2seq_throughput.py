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
from peft import PeftModel
from served import served, spread
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from server.model_files import find_model
from server.start import publish_examples

EXAMPLE = Path(__file__).parents[1] / "examples" / "phonemes"
NUM_REQUESTS, NUM_OUT = 32, 16


@torch.inference_mode()
def ask_peft(models: dict[str, Any], tokenizer: Any, asked: list[tuple[str, str]]) -> float:
    """Seconds, one request after another. PEFT cannot hold prefixes of different types in one model: each task has
    one of its own, so nothing is spent on switching."""
    start_s = time.perf_counter()
    for text, task in asked:
        encoded = tokenizer(text, return_tensors="pt")
        models[task].generate(
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
    asked = [
        (json.loads(words[tasks[i % len(tasks)]][i])["inputs"], tasks[i % len(tasks)]) for i in range(NUM_REQUESTS)
    ]
    with served(files, dtype=arguments.dtype, model_alias=("phonemes-t5",)) as server:
        publish_examples(server.state.store, EXAMPLE / "prefixes")
        dtype = server.state.engine.shape.dtype
        models: dict[str, Any] = {}
        for task in tasks:
            base = AutoModelForSeq2SeqLM.from_pretrained(files.path, dtype=dtype)
            models[task] = PeftModel.from_pretrained(base, EXAMPLE / "prefixes" / task).eval()
        ratios = []
        for turn in range(arguments.pairs + 1):  # the first warms up
            ours = server.seconds(asked, NUM_OUT)
            theirs = ask_peft(models, tokenizer, asked)
            if turn:
                ratios.append(theirs / ours)
                print(f"ours {ours:.2f} s, PEFT {theirs:.2f} s, {theirs / ours:.1f}x", flush=True)
    print(f"{dtype}, {NUM_REQUESTS} requests, {len(tasks)} tasks, {arguments.pairs} pairs")
    print(f"ratio {spread(ratios)}")


if __name__ == "__main__":
    main()

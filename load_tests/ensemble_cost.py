"""What an ensemble of five costs against one request, over HTTP, when the batch has room.

Five members of 10 to 30 virtual tokens on the default model, 32 tokens in and 32 out, greedy, EOS ignored; pairs are
interleaved, the end has the medians of their ratios with the range.

    python load_tests/ensemble_cost.py [--pairs 9] [--dtype auto]
"""

from __future__ import annotations

import argparse

import torch
from served import served, spread
from throughput import NUM_IN, NUM_OUT, prompts
from transformers import AutoTokenizer

from prefix_store.prefix import Prefix
from server.model_files import find_model

NUM_MEMBERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    files = find_model(None)
    text = prompts(AutoTokenizer.from_pretrained(files.path))[0]
    with served(files, dtype=arguments.dtype) as server:
        store, shape = server.state.store, server.state.engine.shape
        generator = torch.Generator().manual_seed(0)
        for i in range(NUM_MEMBERS):
            embeddings = torch.randn(10 + 5 * i, shape.hidden_size, generator=generator) * 0.1
            store.publish("default", f"m{i}", Prefix("soft", embeddings=embeddings), base="unverified")
        members = [f"m{i}@1" for i in range(NUM_MEMBERS)]
        rules = ("mean_probs", "vote")
        for rule in rules:
            store.publish_ensemble("default", rule, store.make_ensemble("default", members, rule))
        ratios: dict[str, list[float]] = {rule: [] for rule in rules}
        for turn in range(arguments.pairs + 2):  # the first two warm up
            one = server.seconds([(text, "m2")], NUM_OUT)
            for rule in rules:
                ratio = server.seconds([(text, rule)], NUM_OUT) / one
                if turn >= 2:
                    ratios[rule].append(ratio)
    print(f"{shape.dtype}, {NUM_MEMBERS} members, {NUM_IN} in, {NUM_OUT} out, {arguments.pairs} pairs")
    for rule, found in ratios.items():
        print(f"{rule}: {spread(found)} times one request")


if __name__ == "__main__":
    main()

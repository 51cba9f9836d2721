"""The first experiment: three forms of decode attention over mixed prefixes, against the step's matrix products.

64 rows of 64 own tokens, Zipf(1) over 64 tasks of 20 virtual tokens, 30 layers of 9 query and 3 KV heads of 64.
Every form sees the same keys; each round runs all forms in turn, and the table shows medians over the rounds.

    python load_tests/attention_forms.py [--dtype bfloat16] [--num-virtual-tokens 20] [--rounds 9]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN, MLP, BLOCK = 30, 9, 3, 64, 576, 1536, 16


def softmax_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q `[rows * kv_heads, group, head_dim]`, k and v `[rows * kv_heads, context, head_dim]`."""
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) + mask, -1), v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype, rows, own, n = getattr(torch, args.dtype), args.rows, args.own, args.num_virtual_tokens
    tasks = random.Random(0).choices(range(64), [1 / (i + 1) for i in range(64)], k=rows)
    used = sorted(set(tasks))
    num_prefix_blocks, num_own_blocks = -(-n // BLOCK), -(-own // BLOCK)
    total_blocks = num_prefix_blocks + num_own_blocks
    pool = torch.randn(
        NUM_LAYERS, 2, 64 * num_prefix_blocks + rows * num_own_blocks, NUM_KV_HEADS, BLOCK * HEAD_DIM, dtype=dtype
    )
    half = pool.shape[2] * NUM_KV_HEADS
    table = torch.tensor(
        [
            [task * num_prefix_blocks + i for i in range(num_prefix_blocks)]
            + [64 * num_prefix_blocks + row * num_own_blocks + i for i in range(num_own_blocks)]
            for row, task in enumerate(tasks)
        ]
    )

    def gather_index(blocks: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(NUM_KV_HEADS)
        one = (blocks[:, None, :] * NUM_KV_HEADS + heads[None, :, None]).reshape(-1)
        return torch.cat([one, one + half])

    index, own_index = gather_index(table), gather_index(table[:, num_prefix_blocks:])
    valid = torch.ones(rows, total_blocks * BLOCK, dtype=torch.bool)
    valid[:, n : num_prefix_blocks * BLOCK] = False
    mask = torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, float("-inf"))
    mask = mask[:, None, None].expand(-1, NUM_KV_HEADS, 1, -1).reshape(rows * NUM_KV_HEADS, 1, -1)
    own_mask = torch.zeros(1, dtype=dtype)
    q = torch.randn(rows * NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
    groups = [torch.tensor([r for r in range(rows) if tasks[r] == task]) for task in used]
    # The copied form keeps prefix and text of each row side by side: one long slab a row, and a prefix many times.
    padded = [
        pool[0].view(-1, BLOCK * HEAD_DIM)[index].view(2, rows * NUM_KV_HEADS, -1, HEAD_DIM).clone()
        for _ in range(NUM_LAYERS)
    ]
    prefix_kv = pool[:, :, : 64 * num_prefix_blocks].view(
        NUM_LAYERS, 2, 64, num_prefix_blocks, NUM_KV_HEADS, BLOCK, HEAD_DIM
    )
    prefix_kv = (
        prefix_kv.transpose(3, 4).reshape(NUM_LAYERS, 2, 64, NUM_KV_HEADS, -1, HEAD_DIM)[..., :n, :].contiguous()
    )

    def gathered() -> None:
        for layer in range(NUM_LAYERS):
            kv = (
                pool[layer].view(-1, BLOCK * HEAD_DIM).index_select(0, index).view(2, rows * NUM_KV_HEADS, -1, HEAD_DIM)
            )
            softmax_product(q, kv[0], kv[1], mask)

    def copied() -> None:
        for layer in range(NUM_LAYERS):
            softmax_product(q, padded[layer][0], padded[layer][1], mask)

    def merged() -> None:
        q4 = q.view(rows, NUM_KV_HEADS, -1, HEAD_DIM)
        for layer in range(NUM_LAYERS):
            kv = (
                pool[layer]
                .view(-1, BLOCK * HEAD_DIM)
                .index_select(0, own_index)
                .view(2, rows * NUM_KV_HEADS, -1, HEAD_DIM)
            )
            own_scores = torch.bmm(q, kv[0].transpose(1, 2)) + own_mask
            own_lse = torch.logsumexp(own_scores.float(), -1).view(rows, NUM_KV_HEADS, -1, 1)
            own_out = torch.bmm(torch.softmax(own_scores, -1), kv[1]).view(rows, NUM_KV_HEADS, -1, HEAD_DIM)
            for task, members in zip(used, groups, strict=True):
                key, value = prefix_kv[layer, 0, task], prefix_kv[layer, 1, task]
                grouped = q4[members].transpose(0, 1).reshape(NUM_KV_HEADS, -1, HEAD_DIM)
                scores = torch.bmm(grouped, key.transpose(1, 2))
                shape = (NUM_KV_HEADS, len(members), -1)
                lse = torch.logsumexp(scores.float(), -1).view(*shape, 1).transpose(0, 1)
                out = torch.bmm(torch.softmax(scores, -1), value).view(*shape, HEAD_DIM).transpose(0, 1)
                own_out[members] = torch.lerp(out, own_out[members], torch.sigmoid(own_lse[members] - lse).to(dtype))

    weights = [
        torch.randn(out, inner, dtype=dtype)
        for _ in range(NUM_LAYERS)
        for out, inner in (
            (HIDDEN, HIDDEN),
            (192, HIDDEN),
            (192, HIDDEN),
            (HIDDEN, HIDDEN),
            (MLP, HIDDEN),
            (MLP, HIDDEN),
            (HIDDEN, MLP),
        )
    ] + [torch.randn(49152, HIDDEN, dtype=dtype)]
    inputs = {inner: torch.randn(rows, inner, dtype=dtype) for inner in (HIDDEN, MLP)}

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    forms: dict[str, Callable[[], None]] = {
        "products": products,
        "gather": gathered,
        "padded copy": copied,
        "group and merge": merged,
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for round_ in range(args.rounds + 2):
            for name, form in forms.items():
                start = time.perf_counter()
                form()
                if round_ >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    floor = statistics.median(times["products"])
    print(f"{rows} rows of {own} own tokens, {n} virtual tokens, {len(used)} tasks, {args.dtype}")
    print(f"largest group {max(Counter(tasks).values())} rows")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:16} {median:7.1f} ms  ({min(values):.1f} to {max(values):.1f})  {median / floor:.2f}x the products"
        )


if __name__ == "__main__":
    main()

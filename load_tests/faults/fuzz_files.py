"""Mutated prefix files against the readers: only typed refusals, each fast and small.

    PYTHONPATH=load_tests python -m faults.fuzz_files [--files 100000] [--seed 0]

Prints refusals by kind, the slowest and the one with the most memory beside its file, and exits 1 beyond the bounds:
50 ms a refusal, and twice the file's size (1 MiB at least) of Python's and numpy's memory.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import save

from prefix_store.errors import PrefixStoreError
from prefix_store.native_format import read_native, write_native
from prefix_store.peft_format import read_peft
from prefix_store.prefix import ModelShape, Prefix

SHAPE = ModelShape(4, 2, 16, 64, 100, 512, torch.float32, "tiny", "f" * 64)
MAX_REFUSAL_S = 0.05
MIN_MEMORY = 2**20  # of a small file the reader's own objects are the most
JUNK = (b"\x00", b"\xff", b"{", b"}", b'"', b"\\", b"NaN", b"-1", b"1e999", b"9" * 30, b"[" * 2000, b"../", b"null")


@dataclass(frozen=True)
class Upload:
    """A native body, or PEFT's two files."""

    body: bytes
    config: bytes | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.config or b"")

    def read(self) -> None:
        if self.config is None:
            read_native(self.body, SHAPE)
        else:
            read_peft(self.config, self.body, SHAPE)


def good_ones() -> list[Upload]:
    generator = torch.Generator().manual_seed(0)

    def kv(num_layers: int, n: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        made = torch.randn(num_layers, 2, 2, n, 16, generator=generator)
        return {i: (made[i, 0], made[i, 1]) for i in range(num_layers)}

    natives = [
        Prefix("kv", layers=kv(4, 5)),
        Prefix("kv", layers={2: kv(4, 7)[2]}),
        Prefix("kv", layers=kv(4, 300)),
        Prefix("kv", layers=kv(4, 3), placement="infix", separator=1),
        Prefix("soft", embeddings=torch.randn(9, 64, generator=generator)),
    ]
    uploads = [Upload(write_native(prefix)) for prefix in natives]
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6, "base_model_name_or_path": "a/tiny"}
    for kind, token_dim, width in (("PROMPT_TUNING", 64, 64), ("PREFIX_TUNING", 32, 2 * 4 * 2 * 16)):
        fields = {"peft_type": kind, "num_layers": 4, "token_dim": token_dim, "num_attention_heads": 2, **common}
        weights = save({"prompt_embeddings": torch.randn(6, width, generator=generator)})
        uploads.append(Upload(weights, json.dumps(fields).encode()))
    for upload in uploads:
        upload.read()  # what is mutated is good
    return uploads


def flip(body: bytes, chance: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def flip_header(body: bytes, chance: random.Random) -> bytes:
    end = min(len(body), 8 + int.from_bytes(body[:8], "little"))
    return flip(body[:end], chance) + body[end:]


def cut(body: bytes, chance: random.Random) -> bytes:
    return body[: chance.randrange(len(body))]


def extend(body: bytes, chance: random.Random) -> bytes:
    return body + chance.randbytes(chance.choice((1, 100, 10_000)))


def insert(body: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(min(len(body), 2000))
    return body[:at] + chance.choice(JUNK) + body[at:]


def resize_header(body: bytes, chance: random.Random) -> bytes:
    size = chance.choice((0, 1, 2**16, 2**31, 2**63, 2**64 - 1, chance.randrange(2**20)))
    return struct.pack("<Q", size) + body[8:]


def edit_header(body: bytes, chance: random.Random) -> bytes:
    """Sound JSON that says something else."""
    end = 8 + int.from_bytes(body[:8], "little")
    try:
        header = json.loads(body[8:end])
    except ValueError:  # mutated before
        return body
    names = [name for name in header if isinstance(header[name], dict)]
    if not names:
        return body
    entry = header[chance.choice(names)]
    match chance.randrange(6):
        case 0:
            entry["shape"] = [chance.choice((0, 1, -1, 2**31, 2**62, 10**30, 1.5, True)) for _ in range(4)]
        case 1:
            entry["dtype"] = chance.choice(("F64", "I64", "BOOL", "F4", "", 7, None, "F8_E4M3"))
        case 2:
            entry["data_offsets"] = [chance.choice((-1, 0, 10, 2**62)), chance.choice((0, 10, 2**63, 10**30))]
        case 3:
            header[chance.choice(("layers.99.key", "", "x" * 5000, "../../etc", "layers.0.key\x00"))] = entry
        case 4:
            header["__metadata__"] = chance.choice(({}, {"format": 1}, {"format": "prefixserve/1", "kind": "x"}, []))
        case _:
            header = {name: entry for name in map(str, range(chance.choice((0, 3000))))} | header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[end:]


def poison(body: bytes, chance: random.Random) -> bytes:
    """NaN, infinities and giants among the values."""
    end = 8 + int.from_bytes(body[:8], "little")
    changed = bytearray(body)
    if len(changed) - end >= 4:
        at = end + 4 * chance.randrange((len(changed) - end) // 4)
        changed[at : at + 4] = chance.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x00\x00\x7f"))
    return bytes(changed)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip_header,
    cut,
    extend,
    insert,
    resize_header,
    edit_header,
    poison,
)


def mutated(upload: Upload, chance: random.Random) -> Upload:
    body, config = upload.body, upload.config
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if config is not None and config and chance.random() < 0.5:
            config = chance.choice((flip, cut, extend, insert))(config, chance)
        elif len(body) > 8:
            body = chance.choice(MUTATIONS)(body, chance)
    return Upload(body, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    uploads = good_ones()
    outcomes: Counter[str] = Counter()
    slowest_s, most_memory, bad = 0.0, 0.0, []
    tracemalloc.start()
    for number in range(arguments.files):
        upload = mutated(chance.choice(uploads), chance)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        start_s = time.perf_counter()
        try:
            upload.read()
            outcome = "accepted"
        except PrefixStoreError as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = f"CRASH {type(error).__name__}: {error}"
            bad.append((number, outcome))
        took_s = time.perf_counter() - start_s
        memory = tracemalloc.get_traced_memory()[1] - before
        outcomes[outcome] += 1
        if outcome != "accepted":
            slowest_s = max(slowest_s, took_s)
            most_memory = max(most_memory, memory / max(2 * upload.num_bytes, MIN_MEMORY))
            if took_s > MAX_REFUSAL_S or memory > max(2 * upload.num_bytes, MIN_MEMORY):
                bad.append((number, f"{outcome} after {took_s * 1e3:.1f} ms with {memory} bytes"))
    for outcome, count in outcomes.most_common():
        print(f"{count:8,} {outcome[:100]}")
    print(f"slowest refusal {slowest_s * 1e3:.1f} ms, most memory {most_memory:.2f} of what is allowed")
    for number, text in bad[:20]:
        print(f"file {number} of seed {arguments.seed}: {text[:300]}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

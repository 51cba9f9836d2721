"""Callers who read nothing and callers who send nothing on: what they cost the others, and what they hold.

    PYTHONPATH=load_tests python -m faults.slow_clients [--model PATH]

Rounds with and without them are interleaved: `NUM_STREAMS` streams of `NUM_OUT` tokens, alone, and beside as many that
nobody reads and uploads that stopped in the middle. Held to: a median time of a round of at most 1.1 times that without
them, no error, and no more resident memory than `MAX_BYTES_EACH` for each of them. Without a model, a tiny random one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from http_client import Connection
from served import Served, served

from tests.byte_model import save_byte_model

NUM_STREAMS, NUM_OUT, NUM_SLOW, NUM_ROUNDS = 8, 200, 50, 7
MAX_RATIO, MAX_BYTES_EACH = 1.1, 512 * 1024
UPLOAD_BYTES = 64 * 1024


def body(number: int) -> dict[str, object]:
    return {"inputs": f"round {number}", "parameters": {"max_new_tokens": NUM_OUT, "ignore_eos": True}}


async def round_s(port: int) -> float:
    """Until the last of the streams has its last token."""

    async def one(number: int) -> None:
        connection = await Connection.open(port)
        found = [event async for event in connection.events("/generate_stream", body(number))]
        assert len(found) == NUM_OUT
        await connection.close()

    start_s = time.perf_counter()
    await asyncio.gather(*map(one, range(NUM_STREAMS)))
    return time.perf_counter() - start_s


def slow_ones(port: int, stack: ExitStack) -> None:
    """Half of them want a long answer and read nothing, half send a part of an upload and no more."""
    wanted = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    wanted |= {"max_tokens": NUM_OUT, "logprobs": True, "top_logprobs": 20}
    asked = json.dumps(wanted).encode()
    for number in range(NUM_SLOW):
        for head, sent, num_bytes in (
            ("POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json", asked, len(asked)),
            (f"PUT /v1/prefixes/slow-{number} HTTP/1.1", b"x" * (UPLOAD_BYTES // 2), UPLOAD_BYTES),
        ):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", port))
            one.sendall(f"{head}\r\nHost: localhost\r\nContent-Length: {num_bytes}\r\n\r\n".encode() + sent)


def measure(server: Served) -> tuple[list[float], list[float], int]:
    """Seconds of rounds without and with them, and bytes that they took."""
    asyncio.run(round_s(server.port))
    quiet, beside, grown = [], [], 0
    for _ in range(NUM_ROUNDS):
        quiet.append(asyncio.run(round_s(server.port)))
        before = server.memory_bytes
        with ExitStack() as stack:
            slow_ones(server.port, stack)
            asyncio.run(round_s(server.port))  # in this one their rows run too
            beside.append(asyncio.run(round_s(server.port)))
            grown = max(grown, server.memory_bytes - before)
        time.sleep(0.5)
    return quiet, beside, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or save_byte_model(Path(folder) / "tiny")
        with served("--model", str(model), "--model-alias", "tiny", "--dtype", "float32") as server:
            quiet, beside, grown = measure(server)
    ratios = [one / other for one, other in zip(beside, quiet, strict=True)]
    ratio, each = statistics.median(ratios), grown / (2 * NUM_SLOW)
    print(f"rounds alone {statistics.median(quiet):.2f} s, beside slow ones {statistics.median(beside):.2f} s")
    print(f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), held to <= {MAX_RATIO}")
    print(f"memory of each slow one {each / 1024:.0f} KiB, held to <= {MAX_BYTES_EACH // 1024} KiB")
    sys.exit(not (ratio <= MAX_RATIO and each <= MAX_BYTES_EACH))


if __name__ == "__main__":
    main()

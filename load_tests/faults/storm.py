"""Callers who connect, ask and hang up, from many threads at once: what another tenant waits for its answers meanwhile.

    PYTHONPATH=load_tests python -m faults.storm [--kind KIND] [--model PATH] [--seconds 10]

Each kind of storm runs for `--seconds` from `NUM_THREADS` threads of a process of its own, over loopback. Another
tenant asks `NUM_ASKED` times meanwhile, each time on a new connection. Held to: every answer within `MAX_ANSWER_S`.
Afterwards refusals alone are counted: a key that is unknown, and a tenant beyond its rate, each asked from
`NUM_REFUSED_THREADS` connections that wait for their answers. Held to: `MIN_REFUSALS_PER_S` a second. Without a model,
a tiny random one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
from faults.keyed import Keyed, keyed

from tests.byte_model import save_byte_model

NUM_THREADS, NUM_ASKED, MAX_ANSWER_S = 16, 20, 1.0
NUM_REFUSED_THREADS, MIN_REFUSALS_PER_S = 4, 2000
NUM_IDLE, HOLD_S = 200, 5.0  # connections of one thread that holds them
GIVE_UP_S = 60.0
JSON = "Content-Type: application/json\r\n"
GENERATE = {"inputs": "a storm", "parameters": {"max_new_tokens": 100, "ignore_eos": True}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a storm"}], "stream": True, "max_tokens": 100}


def request(method: str, target: str, headers: str, body: bytes, length: int | None = None) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def connect(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), timeout=5)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def ask_and_go(port: int, sent: bytes) -> None:
    with connect(port) as one:
        one.sendall(sent)


def ask_and_reset(port: int, sent: bytes) -> None:
    with connect(port) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.sendall(sent)


def ask_and_wait(port: int, sent: bytes, wait_s: float) -> None:
    with connect(port) as one:
        one.sendall(sent)
        time.sleep(wait_s)


def read_some(port: int, sent: bytes) -> None:
    """Until the answer has begun."""
    with connect(port) as one:
        one.sendall(sent)
        one.recv(2048)


def hold(port: int, sent: bytes) -> None:
    """Many connections that say no more than `sent`."""
    held = []
    try:
        for _ in range(NUM_IDLE):
            held.append(connect(port))
            held[-1].sendall(sent)
        time.sleep(HOLD_S)
    finally:
        for one in held:
            one.close()


def storms(loud: str, limited: str, unknown: str) -> dict[str, Callable[[int], None]]:
    """The kinds of storms by name; each function is what one thread does again and again."""

    def generate(key: str) -> bytes:
        return request("POST", "/generate", f"{JSON}Authorization: Bearer {key}\r\n", json.dumps(GENERATE).encode())

    keyed_json = f"{JSON}Authorization: Bearer {loud}\r\n"
    stream = request("POST", "/generate_stream", keyed_json, json.dumps(GENERATE).encode())
    chat = request("POST", "/v1/chat/completions", keyed_json, json.dumps(CHAT).encode())
    binary = f"Content-Type: application/octet-stream\r\nAuthorization: Bearer {loud}\r\n"
    upload = request("PUT", "/v1/prefixes/stormy", binary, b"x" * 65536)
    models = request("GET", "/v1/models", f"Authorization: Bearer {loud}\r\n", b"")
    whole = generate(loud)
    return {
        "hang-up": lambda port: ask_and_go(port, whole),
        "hang-up-limited": lambda port: ask_and_go(port, generate(limited)),
        "hang-up-unknown-key": lambda port: ask_and_go(port, generate(unknown)),
        "hang-up-no-key": lambda port: ask_and_go(port, request("POST", "/generate", JSON, b'{"inputs": "x"}')),
        "hang-up-health": lambda port: ask_and_go(port, request("GET", "/healthz", "", b"")),
        "hang-up-models": lambda port: ask_and_go(port, models),
        "hang-up-chat": lambda port: ask_and_go(port, chat),
        "hang-up-upload": lambda port: ask_and_go(port, upload),
        "reset": lambda port: ask_and_reset(port, whole),
        "half-a-request": lambda port: ask_and_go(port, whole[: len(whole) // 2]),
        "after-headers": lambda port: ask_and_go(port, whole[: whole.index(b"\r\n\r\n") + 4]),
        "nothing": lambda port: ask_and_go(port, b""),
        "in-5-ms": lambda port: ask_and_wait(port, whole, 0.005),
        "in-50-ms": lambda port: ask_and_wait(port, whole, 0.05),
        "mid-stream": lambda port: read_some(port, stream),
        "mid-chat": lambda port: read_some(port, chat),
        "limited": lambda port: read_some(port, generate(limited)),
        "unknown-key": lambda port: read_some(port, generate(unknown)),
        "idle": lambda port: hold(port, b""),
        "slow-headers": lambda port: hold(port, b"POST /generate HTTP/1.1\r\nHost: local"),
        "slow-bodies": lambda port: hold(port, whole[:-5]),
    }


def blow(port: int, kind: str, keys: tuple[str, str, str], going: Event, count: object) -> None:
    """The storm's process."""
    one = storms(*keys)[kind]

    def again() -> None:
        num = 0
        while going.is_set():
            with suppress(OSError):
                one(port)
                num += 1
        with count.get_lock():  # type: ignore[attr-defined]
            count.value += num  # type: ignore[attr-defined]

    threads = [threading.Thread(target=again) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def waits_s(port: int, key: str, seconds: float) -> list[float]:
    """Until each answer of another tenant, spread over the time; infinite for none."""
    found = []
    body = {"inputs": "quiet", "parameters": {"max_new_tokens": 2}}
    for _ in range(NUM_ASKED):
        start_s = time.perf_counter()
        try:
            url = f"http://127.0.0.1:{port}/generate"
            answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=GIVE_UP_S)
            took_s = time.perf_counter() - start_s
            found.append(took_s if answer.status_code == 200 else float("inf"))
        except httpx.HTTPError:
            found.append(float("inf"))
        if time.perf_counter() - start_s > GIVE_UP_S / 2:
            break
        time.sleep(max(0.0, seconds / NUM_ASKED - took_s))
    return found


def measure(server: Keyed, kind: str, keys: tuple[str, str, str], quiet: str, seconds: float) -> bool:
    context = multiprocessing.get_context("fork")  # a new interpreter would import for seconds
    going, count = context.Event(), context.Value("l", 0)
    going.set()
    process = context.Process(target=blow, args=(server.port, kind, keys, going, count), daemon=True)
    process.start()
    time.sleep(1.0)  # until its threads are there
    start_s = time.perf_counter()
    waits = waits_s(server.port, quiet, seconds)
    took_s = time.perf_counter() - start_s + 1.0
    going.clear()
    process.join(GIVE_UP_S)
    if process.is_alive():
        process.kill()
    num_in_time = sum(wait <= MAX_ANSWER_S for wait in waits)
    rate = count.value / took_s
    is_good = num_in_time == NUM_ASKED
    print(
        f"{kind:20} {rate:7.0f} /s  {num_in_time} of {NUM_ASKED} within {MAX_ANSWER_S:g} s, longest {max(waits):.2f} s"
        f"{'' if is_good else '  MISSED'}",
        flush=True,
    )
    return is_good


def refusals_per_s(port: int, key: str, status: int, seconds: float) -> float:
    """Refusals a second, from callers that keep their connection and wait for each answer."""
    sent = request("POST", "/generate", f"{JSON}Authorization: Bearer {key}\r\n", json.dumps(GENERATE).encode())
    counts = [0] * NUM_REFUSED_THREADS
    end_s = time.perf_counter() + seconds

    def ask(number: int) -> None:
        with connect(port) as one:
            while time.perf_counter() < end_s:
                one.sendall(sent)
                received = b""
                while not received.endswith(b"}"):
                    received += one.recv(4096)
                assert received.startswith(b"HTTP/1.1 %d" % status), received[:200]
                counts[number] += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(NUM_REFUSED_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--kind", action="append", choices=sorted(storms("", "", "")), help="none: all")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or save_byte_model(Path(folder) / "tiny")
        with keyed("--model", str(model), "--model-alias", "tiny", "--dtype", "float32") as server:
            quiet, loud = server.tenant("quiet"), server.tenant("loud")
            keys = (loud, server.tenant("limited", requests_per_minute=1), "unknown" * 6)
            for kind in arguments.kind or storms(*keys):
                is_good &= measure(server, kind, keys, quiet, arguments.seconds)
            for name, key, status in (("unknown key", keys[2], 401), ("beyond its rate", keys[1], 429)):
                httpx.post(
                    f"http://127.0.0.1:{server.port}/generate",
                    json=GENERATE,
                    headers={"Authorization": f"Bearer {key}"},
                    timeout=GIVE_UP_S,
                )
                rate = refusals_per_s(server.port, key, status, min(5.0, arguments.seconds))
                print(f"refused, {name}: {rate:.0f} /s, held to >= {MIN_REFUSALS_PER_S}")
                is_good &= rate >= MIN_REFUSALS_PER_S
    sys.exit(not is_good)


if __name__ == "__main__":
    main()

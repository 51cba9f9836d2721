"""A tenant that loops giant prompts: what the requests beside them wait, and what memory is left afterwards.

    PYTHONPATH=load_tests python -m faults.flood [--seconds 60] [--threads 6] [--only NAME] [--model PATH]

For each kind of giant body `--threads` connections of one tenant send it again and again for at most `--seconds`,
while the same tenant and another one ask for one token `NUM_ASKED` times each. Held to: every one of these is answered,
a median under `MAX_MEDIAN_S`, and resident memory after all floods within `MAX_GROWTH` of what it was before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import Counter

import httpx
from faults.keyed import Keyed, keyed

NUM_ASKED, MAX_MEDIAN_S, MAX_GROWTH = 20, 0.2, 1.1
JSON_BYTES = 4 * 2**20 - 1024


def prompt(num_characters: int) -> bytes:
    text = "A fine film and so it goes. " * (num_characters // 28 + 1)
    return json.dumps({"inputs": text[:num_characters], "parameters": {"max_new_tokens": 1}}).encode()


def letters(num_characters: int) -> bytes:
    """A body with a prompt whose tokens are short."""
    text = "".join(chr(97 + i * i % 23) for i in range(1000)) * (num_characters // 1000 + 1)
    return json.dumps({"inputs": text[:num_characters], "parameters": {"max_new_tokens": 1}}).encode()


def chat(model: str, num_messages: int, num_characters: int) -> bytes:
    message = {"role": "user", "content": ("so it goes " * (num_characters // 11 + 1))[:num_characters]}
    return json.dumps({"model": model, "messages": [message] * num_messages, "max_tokens": 1}).encode()


def bound(server: Keyed) -> int:
    """Characters of the shortest prompt that is refused by its length alone: such a refusal says `at least`."""
    fits, refused = 0, JSON_BYTES
    while refused - fits > 1:
        middle = (fits + refused) // 2
        reply = server.http.post("/generate", content=prompt(middle), headers={"Content-Type": "application/json"})
        is_refused = reply.status_code == 422 and "at least" in reply.json()["error"]
        fits, refused = (fits, middle) if is_refused else (middle, refused)
    return refused


def flood(server: Keyed, key: str, path: str, body: bytes, end: threading.Event, statuses: Counter[int]) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=120) as http:
        while not end.is_set():
            statuses[http.post(path, content=body).status_code] += 1


def ask(server: Keyed, key: str, number: int) -> tuple[int, float]:
    headers = {"Authorization": f"Bearer {key}"}
    start_s = time.perf_counter()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=60) as http:
        body = {"inputs": f"Film {number} is", "parameters": {"max_new_tokens": 1}}
        return http.post("/generate", json=body).status_code, time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--only", help="one kind of body")
    parser.add_argument("--model", help="a folder; none: the default model")
    arguments = parser.parse_args()
    is_good = True
    with keyed(*(("--model", arguments.model) if arguments.model else ())) as server:
        loud, quiet = server.tenant("loud"), server.tenant("quiet")
        model = server.http.get("/info").json()["model_id"]
        below = bound(server) - 1
        bodies = {
            "a 4 MB prompt": ("/generate", prompt(JSON_BYTES)),
            "a 4 MB prompt of short tokens": ("/generate", letters(JSON_BYTES)),
            "a prompt just below the bound": ("/generate", prompt(below)),
            "a prompt of short tokens just below the bound": ("/generate", letters(below)),
            "a chat of one message of 4 MB": ("/v1/chat/completions", chat(model, 1, JSON_BYTES)),
            "a chat of 1000 messages in 4 MB": ("/v1/chat/completions", chat(model, 1000, 4000)),
            "a chat of 100,000 messages": ("/v1/chat/completions", chat(model, 70_000, 22)),
            "4 MB of brackets": ("/generate", b"[" + b"[]," * (JSON_BYTES // 3 - 1) + b"[]]"),
        }
        alone_s = statistics.median([ask(server, quiet, number)[1] for number in range(NUM_ASKED)])
        print(f"alone: median {alone_s:.3f} s, refused unread from {below + 1} characters on", flush=True)
        before = server.served.memory_bytes
        for name, (path, body) in bodies.items():
            if arguments.only not in (None, name):
                continue
            end, statuses = threading.Event(), Counter[int]()
            threads = [
                threading.Thread(target=flood, args=(server, loud, path, body, end, statuses))
                for _ in range(arguments.threads)
            ]
            for thread in threads:
                thread.start()
            time.sleep(2)
            asked: dict[str, list[tuple[int, float]]] = {"same tenant": [], "another": []}
            start_s = time.perf_counter()
            for number in range(NUM_ASKED):
                for who, key in (("same tenant", loud), ("another", quiet)):
                    if time.perf_counter() - start_s < arguments.seconds:
                        asked[who].append(ask(server, key, number))
            peak = server.served.memory_bytes
            end.set()
            for thread in threads:
                thread.join()
            print(f"{name}: refused {dict(statuses)}, memory {peak / 2**20:.0f} MiB", flush=True)
            for who, found in asked.items():
                answered = [took_s for status, took_s in found if status == 200]
                median_s = statistics.median(answered) if answered else float("inf")
                is_good &= len(answered) == NUM_ASKED and median_s < MAX_MEDIAN_S
                longest_s = max((took_s for _, took_s in found), default=0)
                print(
                    f"    {who}: {len(answered)} of {NUM_ASKED} answered, median {median_s:.3f} s (< {MAX_MEDIAN_S}), "
                    f"longest {longest_s:.3f} s",
                    flush=True,
                )
        time.sleep(3)
        growth = server.served.memory_bytes / before
        print(f"memory afterwards {growth:.3f}x of {before / 2**20:.0f} MiB, held to <= {MAX_GROWTH}x")
        is_good &= growth <= MAX_GROWTH
    sys.exit(not is_good)


if __name__ == "__main__":
    main()

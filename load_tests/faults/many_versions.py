"""The cost of an upload, a flip and a look-up as a task's versions grow.

    PYTHONPATH=load_tests python -m faults.many_versions [--versions 800]

One tenant without a bound uploads versions of one task, one after another; beside each of the last uploads before a
count of versions it flips the task and asks for one token. Prints the medians in milliseconds at each count. The bound
that tenants have (`max_versions`, 256) stands where these are still small.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from faults.keyed import keyed
from faults.timing import native

from tests.byte_model import save_byte_model

NUM_TIMED = 15
COUNTS = (16, 64, 256, 512, 800, 1600)


def timed_ms(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=800)
    most = parser.parse_args().versions
    counts = [count for count in COUNTS if count <= most]
    with tempfile.TemporaryDirectory() as name, keyed("--model", str(save_byte_model(Path(name) / "many"))) as server:
        key = server.tenant("many", max_versions=None)
        server.http.headers["Authorization"] = f"Bearer {key}"

        def flip(version: int) -> None:
            server.http.post("/v1/prefixes/t/activate", json={"version": version}).raise_for_status()

        def ask() -> None:
            body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
            server.http.post("/generate?task=t@1", json=body).raise_for_status()

        found: dict[str, list[float]] = {"upload": [], "flip": [], "ask": []}
        for version in range(1, max(counts) + 1):
            upload_ms = timed_ms(lambda version=version: server.put(key, "t", native(version)))  # type: ignore[misc]
            if any(count - NUM_TIMED < version <= count for count in counts):
                found["upload"].append(upload_ms)
                found["flip"].append(timed_ms(lambda version=version: flip(1 + version // 2)))  # type: ignore[misc]
                found["ask"].append(timed_ms(ask))
            if version in counts:
                shown = ", ".join(f"{kind} {statistics.median(taken):.1f} ms" for kind, taken in found.items())
                print(f"{version} versions: {shown}", flush=True)
                found = {kind: [] for kind in found}


if __name__ == "__main__":
    main()

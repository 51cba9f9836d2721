"""Requests that schemathesis makes up from the server's OpenAPI schema, right ones and wrong ones: none is a crash.

    pip install -c constraints.txt -e '.[faults]'
    PYTHONPATH=load_tests python -m faults.fuzz_http [--examples 200]

Once for each of: nobody's key on loopback, the operator's, a tenant's. Held to: no answer of 500 and above but 503 and
507, none that contradicts the schema, nothing taken that it forbids, nothing answered without the key, and afterwards a
server that is ready with nothing running, waiting or held.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch
from faults.keyed import OPERATOR_KEY, keyed
from served import served

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS, save_byte_model

CHECKS = (
    "not_a_server_error",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "status_code_conformance",
    "use_after_free",
)
KEYED_CHECKS = ("ignored_auth", "missing_required_header", "negative_data_rejection")  # a key is no wrong header else
HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
OPTIONS = ("--dtype", "float32", "--prefix-bytes", "1MiB", "--max-upload-bytes", "1MiB")
EXPECTED = ["2xx", "3xx", "4xx", "503", "507"]
NATIVE = {"Content-Type": "application/octet-stream"}
SETTLE_S = 30.0


def fuzz(port: int, key: str | None, num_examples: int, folder: Path) -> bool:
    """Whether schemathesis found nothing."""
    settings = folder / "schemathesis.toml"
    settings.write_text(f"[checks]\nnot_a_server_error.expected-statuses = {EXPECTED}\n")
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(settings),
        "run",
        f"http://127.0.0.1:{port}/openapi.json",
    ]
    checks = CHECKS if key is None else CHECKS + KEYED_CHECKS
    command += ["--checks", ",".join(checks), "--max-examples", str(num_examples), "--continue-on-failure"]
    command += ["--request-timeout", "60", "--generation-database", "none", "--seed", "6", "--warnings", "off"]
    command += ["--suppress-health-check", "all", "--no-color"]
    if key is None:
        command += ["--exclude-path-regex", "^/v1/tenants"]  # the first tenant's key would shut the rest
    else:
        command += ["--header", f"Authorization:Bearer {key}"]
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    env = os.environ | {"SCHEMATHESIS_HOOKS": "faults.fuzz_hooks", "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=env, check=False).returncode == 0


def native(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(LAYERS, 2, KV_HEADS, 4, HEAD_DIM, generator=generator)
    return write_native(Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(LAYERS)}))


def is_well(http: httpx.Client) -> bool:
    """Whether the server is ready, and holds nothing once what was asked last has ended."""
    end_s = time.monotonic() + SETTLE_S
    while True:
        lines = http.get("/metrics").raise_for_status().text.splitlines()
        held = [line for line in lines if line.startswith(tuple(f"prefixserve_{name} " for name in HELD))]
        is_free = len(held) == len(HELD) and all(float(line.split()[1]) == 0 for line in held)
        if is_free or time.monotonic() > end_s:
            break
        time.sleep(0.1)
    is_ready = http.get("/readyz").status_code == 200
    print(f"ready afterwards: {is_ready}; {', '.join(held)}", flush=True)
    return is_ready and is_free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="of each operation, in each phase")
    arguments = parser.parse_args()
    found: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--model", str(save_byte_model(folder / "fuzzed")), *OPTIONS)
        with served(*options) as server, httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
            server.put("films", content=native(0), headers=NATIVE)
            found["no key"] = fuzz(server.port, None, arguments.examples, folder) and is_well(http)
        with keyed(*options) as server:
            for whose, key in (("the operator's key", OPERATOR_KEY), ("a tenant's key", server.tenant("fuzzer"))):
                server.put(key, "films", native(1))
                found[whose] = fuzz(server.port, key, arguments.examples, folder) and is_well(server.http)
    for whose, is_good in found.items():
        print(f"{whose}: {'nothing found' if is_good else 'FOUND SOMETHING'}")
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()

"""Stock clients, unmodified, against a served default model with the example tasks: each prints its own summary.

    make test                                    # or pip install -c constraints.txt -e '.[test]'
    python load_tests/clients.py [--only guidellm …]

Clients that the tests do not use get a virtual environment each, in the cache, at the versions below. Ends with 1 if a
client failed or said that one of its requests did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine import ROOT
from served import served

from server.model_files import cache_dir

FILES = Path(__file__).parent / "stock_clients"
MODEL = "smollm2-135m-instruct-q4_1"
CONSTRAINTS = "torch==2.13.0\n"
INSTALL_S, RUN_S = 1800, 600
NUM_REQUESTS, NUM_IN, NUM_OUT = 12, 32, 8
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Place:
    """Where a client runs: the server, the model's folder for its tokenizer, a folder of its own."""

    url: str
    tokenizer: str
    folder: Path


@dataclass(frozen=True)
class StockClient:
    """`package` as pip takes it, none for one of this environment. `failures` reads what the client wrote of failed
    requests; a client without it exits with another code than 0. `is_offline`: it reads a data set or a tokenizer of
    files, and must not ask the hub for them."""

    name: str
    package: str | None
    command: Callable[[Place], list[str]]
    failures: Callable[[Place], int] = lambda _: 0
    is_offline: bool = False


def guidellm(kind: str, model: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return [
            *("guidellm", "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={place.url},model={model},request_format={kind}"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={place.tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={NUM_IN},output_tokens={NUM_OUT}"),
            *("--output", "kind=console", "--output", f"kind=json,path={place.folder / 'guidellm.json'}"),
        ]

    return command


def failed_in_guidellm(place: Place) -> int:
    (benchmark,) = json.loads((place.folder / "guidellm.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return int(totals["errored"]) + (not totals["successful"])


def aiperf(kind: str, model: str, *more: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return [
            *("aiperf", "profile", "-m", model, "--url", place.url, "--endpoint-type", kind, "--streaming"),
            *("--tokenizer", place.tokenizer, "--isl", str(NUM_IN), "--osl", str(NUM_OUT)),
            *("--concurrency", "2", "--request-count", str(NUM_REQUESTS), "--ui", "none"),
            *("--extra-inputs", f"min_tokens:{NUM_OUT}", "--use-server-token-count"),
            *("--artifact-dir", str(place.folder), *more),
        ]

    return command


def failed_in_aiperf(place: Place) -> int:
    found = json.loads((place.folder / "profile_export_aiperf.json").read_text())
    return NUM_REQUESTS - int(found["request_count"]["avg"])


def locust(place: Place) -> list[str]:
    load = ("-u", "4", "-r", "4", "-t", "20s", "--headless", "--only-summary")
    return ["locust", "-f", str(FILES / "locustfile.py"), "--host", place.url, *load]


def lm_eval(kind: str, path: str, *more: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        arguments = f"model=films,base_url={place.url}{path},tokenizer_backend=None,tokenized_requests=False"
        task = ("--tasks", "films_generate", "--include_path", ".", "--output_path", str(place.folder))
        return ["lm_eval", "run", "--model", kind, "--model_args", f"{arguments},num_concurrent=2", *task, *more]

    return command


def script(name: str) -> Callable[[Place], list[str]]:
    return lambda place: ["python", str(FILES / name), place.url, MODEL]


CLIENTS = (
    StockClient("openai, litellm, huggingface_hub, langchain-openai", None, script("talks.py")),
    StockClient(
        "guidellm chat", "guidellm==0.8.1", guidellm("/v1/chat/completions", MODEL), failed_in_guidellm, is_offline=True
    ),
    StockClient(
        "guidellm text", "guidellm==0.8.1", guidellm("/v1/completions", "films"), failed_in_guidellm, is_offline=True
    ),
    StockClient("aiperf chat", "aiperf==0.13.0", aiperf("chat", MODEL, "--per-chunk-usage"), failed_in_aiperf),
    StockClient("aiperf text", "aiperf==0.13.0", aiperf("completions", "films"), failed_in_aiperf),
    StockClient("locust", "locust==2.47.0", locust),
    StockClient(
        "lm-eval text", "lm-eval[api]==0.4.13", lm_eval("local-completions", "/v1/completions"), is_offline=True
    ),
    StockClient(
        "lm-eval chat",
        "lm-eval[api]==0.4.13",
        lm_eval("local-chat-completions", "/v1/chat/completions", "--apply_chat_template"),
        is_offline=True,
    ),
    StockClient("text-generation", "text-generation==0.7.0", script("text_generation_talk.py")),
    StockClient("langchain-huggingface", "langchain-huggingface==1.2.3", script("langchain_huggingface_talk.py")),
    StockClient("llama-index", "llama-index-llms-openai-like==0.8.1", script("llama_index_talk.py")),
)


def programs(package: str | None) -> Path:
    """The folder of an environment's programs; makes the environment if it is not there."""
    if package is None:
        return Path(sys.executable).parent
    folder = cache_dir() / "clients" / package
    if not (folder / "installed").is_file():
        venv.create(folder, with_pip=True, clear=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(CONSTRAINTS)
        install = [str(folder / "bin" / "pip"), "install", "-qq", "-c", str(constraints), package]
        subprocess.run(install, check=True, timeout=INSTALL_S)
        (folder / "installed").touch()
    return folder / "bin"


def run(client: StockClient, place: Place) -> str | None:
    """The failure that the client met or told of; None: no request failed."""
    print(f"\n== {client.name} ({client.package or 'this environment'})", flush=True)
    program, *arguments = client.command(place)
    environment = os.environ | (OFFLINE if client.is_offline else {})
    command = [str(programs(client.package) / program), *arguments]
    try:
        ended = subprocess.run(command, cwd=FILES, env=environment, timeout=RUN_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not done in {RUN_S} s"
    if ended.returncode:
        return f"exit code {ended.returncode}"
    num_failed = client.failures(place)
    return f"{num_failed} requests failed" if num_failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="clients whose names begin so")
    arguments = parser.parse_args()
    chosen = [client for client in CLIENTS if client.name.startswith(tuple(arguments.only))]
    for client in chosen:
        programs(client.package)
    found = {}
    with served("--publish-examples", str(ROOT / "examples" / "prefixes")) as server:
        tokenizer = str(cache_dir() / "models" / MODEL)
        for client in chosen:
            with tempfile.TemporaryDirectory() as folder:
                place = Place(f"http://127.0.0.1:{server.port}", tokenizer, Path(folder))
                found[client.name] = run(client, place)
    print()
    for name, fault in found.items():
        print(f"{name}: {fault or 'no request failed'}")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()

"""The families of models that are served, and why others are not. Every configuration class that transformers
generates text with is made tiny and random, started as the server starts a model, and asked for bare rows, keys and
values and soft prompts, all mixed in one batch, staggered and alone, against PEFT's answers in fp32.

    python load_tests/families.py [--only llama,t5] [--workers 2] [--page docs/models.md]

Fails where a family is answered wrongly or ends in an error that is no refusal.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models on two threads wait for each other

import structlog
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from server.engine.cpu_kernels import load_kernels
from server.engine.errors import one_line
from server.model_files import cache_dir
from tests.random_families import Family, Verdict, families, judge

TIMEOUT_S = 300.0  # for one family
HEAD = """# Families of models

Which models can be served with `--model`, by their `model_type`, and why the others cannot. Made by
`python load_tests/families.py --page docs/models.md` with transformers {version} on {date}: each family's configuration
made tiny and random, started as the server starts a model, and asked for bare rows, keys and values (KV) and soft
prompts, all mixed in one batch, staggered and alone. *Served* means: in fp32 every token was the one that PEFT's
`generate` (without a prefix: transformers') gives to the same request alone.

{counts}

A family that is refused stops the start with one line. The last column says where PEFT makes no prefix of a kind.
Families with attention out of one compressed vector a token (DeepSeek, MiniCPM3, Youtu and kin) keep whole keys and
values here, 11 to 85 times as much memory a token as that vector.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the table here")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else None
    wanted = [family for family in families() if only is None or family.model_type in only]
    started_s = time.monotonic()
    verdicts = []
    for verdict in judge_all(wanted, arguments.workers):
        verdicts.append(verdict)
        print(f"{verdict.family.label:34} {verdict.kind:9} {','.join(verdict.tried):14} {verdict.detail}", flush=True)
    counts = Counter(verdict.kind for verdict in verdicts)
    print(f"{dict(counts)} of {len(wanted)} families in {time.monotonic() - started_s:.0f} s")
    if arguments.page:
        order = {family: index for index, family in enumerate(wanted)}
        arguments.page.write_text(page(sorted(verdicts, key=lambda verdict: order[verdict.family])))
    sys.exit(bool(counts["wrong"] or counts["failed"]))


def judge_all(wanted: list[Family], num_workers: int) -> Iterator[Verdict]:
    """Verdicts in the order in which they are reached. Each family has a process of its own, so that a family that ends
    its process ends no other."""
    context = multiprocessing.get_context("fork")
    running: dict[Family, tuple[BaseProcess, Connection, float]] = {}
    waiting = list(wanted)
    while waiting or running:
        while waiting and len(running) < num_workers:
            family = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_judge_into, args=(family, theirs))
            process.start()
            theirs.close()
            running[family] = (process, ours, time.monotonic())
        for family, (process, ours, started_s) in list(running.items()):
            if ours.poll(0.05):
                try:
                    verdict = ours.recv()
                except EOFError:
                    verdict = Verdict(family, "failed", "its process ended")
            elif time.monotonic() - started_s > TIMEOUT_S:
                process.kill()
                verdict = Verdict(family, "failed", f"no verdict within {TIMEOUT_S:.0f} s")
            else:
                continue
            process.join()
            del running[family]
            yield verdict


def _judge_into(family: Family, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,  # families and PEFT print what they like
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        try:
            kernels = load_kernels(cache_dir() / "kernels")
            verdict = judge(family, Path(folder), kernels)
        except Exception as error:  # what no refusal caught
            verdict = Verdict(family, "failed", one_line(error))
    pipe.send(verdict)


def page(verdicts: list[Verdict]) -> str:
    """The table as Markdown, decoder-only families first."""
    counts = Counter(verdict.kind for verdict in verdicts)
    words = f"{counts['served']} served, {counts['refused']} refused, {counts['untried']} not tried."
    parts = [HEAD.format(version=transformers.__version__, date=datetime.date.today(), counts=words)]
    for title, is_seq2seq in (("Decoder-only", False), ("Encoder-decoder", True)):
        parts.append(f"## {title}\n\n| `model_type` | bare | KV | soft | why not |\n|---|---|---|---|---|\n")
        for verdict in verdicts:
            if verdict.family.is_seq2seq == is_seq2seq:
                cells = ["yes" if kind in verdict.tried and verdict.kind == "served" else "" for kind in KINDS]
                reason = verdict.detail.partition(" cannot be served: ")[2] or verdict.detail
                what = {"refused": reason, "untried": f"not tried: {reason}"}.get(verdict.kind, verdict.detail)
                parts.append(f"| {verdict.family.model_type} | {' | '.join(cells)} | {what.replace('|', '/')} |\n")
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


KINDS = ("bare", "kv", "soft")

if __name__ == "__main__":
    main()

"""What `--quantize int8` does to the example prefixes' answers: 200 held-back texts each, over HTTP, greedy.

    python load_tests/quality.py [--quick]

An answer is good where it is the expected one; in `restore`, by the share of words that are right in their place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

from figures import Series
from http_client import Connection
from machine import ROOT
from results import QUALITY, Run, options
from served import Served, served

EXAMPLES = ROOT / "examples"
NUM_AT_ONCE, MAX_NEW_TOKENS = 32, 48
BY_WORDS = "restore"
FORMS: dict[str, tuple[str, ...]] = {"as trained": (), "--quantize int8": ("--quantize", "int8")}


async def answers(server: Served, task: str, texts: Sequence[str]) -> list[str]:
    waiting = iter(enumerate(texts))
    found = [""] * len(texts)

    async def work() -> None:
        connection = await Connection.open(server.port)
        for i, text in waiting:
            body: dict[str, Any] = {"inputs": text, "parameters": {"max_new_tokens": MAX_NEW_TOKENS}}
            found[i] = json.loads(await connection.request("POST", f"/generate?task={task}", body))["generated_text"]
        await connection.close()

    await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
    return found


def share(task: str, found: str, expected: str) -> float:
    given, wanted = found.split(), expected.split()
    if task != BY_WORDS:
        return float(given[: len(wanted)] == wanted)
    return sum(one == other for one, other in zip(given, wanted, strict=False)) / len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = options(parser, rounds=1)
    run = Run.of(QUALITY, arguments)
    shares: dict[str, dict[str, float]] = {}
    for form, more in FORMS.items():
        with served("--publish-examples", str(EXAMPLES / "prefixes"), "--max-queue-s", "600", *more) as server:
            for path in sorted((EXAMPLES / "held_back").glob("*.jsonl")):
                lines = [json.loads(line) for line in path.read_text().splitlines()][: 8 if run.is_quick else None]
                found = asyncio.run(answers(server, path.stem, [line["inputs"] for line in lines]))
                good = [share(path.stem, one, line["answer"]) for one, line in zip(found, lines, strict=True)]
                shares.setdefault(path.stem, {})[form] = sum(good) / len(good)
    for task, by_form in shares.items():
        series = {form: Series((value,)) for form, value in by_form.items()}
        run.keep(task, f"{task}, {'words in place' if task == BY_WORDS else 'exact answers'}", "share", series)
    run.finish()


if __name__ == "__main__":
    main()

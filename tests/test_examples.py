"""The example prefixes over HTTP, all mixed, answer exactly what PEFT answers one at a time: 200 held back each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.model_files import find_model
from tests.program import ROOT, Program, running

PREFIXES = ROOT / "examples" / "prefixes"
TASKS = sorted(path.name for path in PREFIXES.iterdir())
TIE = 1e-3


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    data_dir = tmp_path_factory.mktemp("examples") / "data"
    with running(data_dir, "--dtype", "float32", "--publish-examples", str(PREFIXES)) as program:
        yield program


def held_back(task: str) -> list[dict[str, str]]:
    lines = (ROOT / "examples" / "held_back" / f"{task}.jsonl").read_text().splitlines()
    assert len(lines) == 200
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(find_model(None).path)


@pytest.fixture(scope="module")
def served(program: Program, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Task -> token ids of its 200 answers, from requests of all tasks in one shuffled stream, 48 at a time."""
    asked = [(task, i, example) for task in TASKS for i, example in enumerate(held_back(task))]
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(48) as clients:
        answers = clients.map(
            lambda a: program.tokens(a[2]["inputs"], a[0], max_new_tokens(tokenizer, a[2]["answer"])), asked
        )
        by_place = {(task, i): tokens for (task, i, _), tokens in zip(asked, answers, strict=True)}
    return {task: [by_place[task, i] for i in range(200)] for task in TASKS}


def max_new_tokens(tokenizer: Any, answer: str) -> int:
    return len(tokenizer(answer)["input_ids"]) + 4


@pytest.mark.parametrize("task", TASKS)
def test_an_example_over_http_answers_as_peft_does(
    task: str, served: dict[str, list[list[int]]], tokenizer: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(find_model(None).path, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, PREFIXES / task).eval()
    wrong, num_ties = [], 0
    for i, (example, ours) in enumerate(zip(held_back(task), served[task], strict=True)):
        encoded = tokenizer(example["inputs"], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **encoded,
                max_new_tokens=max_new_tokens(tokenizer, example["answer"]),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        theirs = out.sequences[0, encoded["input_ids"].shape[1] :].tolist()
        if ours == theirs:
            continue
        at = next(k for k in range(len(theirs)) if ours[k : k + 1] != theirs[k : k + 1])
        best = out.logits[at][0].topk(2).values
        if float(best[0] - best[1]) < TIE:
            num_ties += 1
            print(f"tie: {task} {i} at token {at}")
        else:
            wrong.append((i, at, ours, theirs))
    assert not wrong, wrong[:3]
    assert num_ties <= 1
    assert len({tuple(tokens) for tokens in served[task]}) > 1


def test_the_examples_are_told_apart(program: Program, served: dict[str, list[list[int]]], tokenizer: Any) -> None:
    """Swapped tasks answer otherwise: the equalities above are not those of a model that ignores its prefix."""
    examples = held_back("restore")[:5]
    swapped = [program.tokens(e["inputs"], "films", max_new_tokens(tokenizer, e["answer"])) for e in examples]
    assert all(ours != theirs for ours, theirs in zip(swapped, served["restore"], strict=False))

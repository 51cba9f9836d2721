"""The example prefixes over HTTP, all mixed, answer exactly what PEFT answers one at a time: 200 held back each.

On the default model, and on the phonemes example's encoder-decoder. PEFT generates the first answers token by token;
for the others it is asked for its best token at every place of our answer in one forward pass: where all agree, greedy
generation gives that answer.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from server.model_files import find_model
from tests.program import ROOT, Program, running

pytestmark = pytest.mark.program
TIE, NUM_GENERATED = 1e-3, 20
FOLDERS = {"default": ROOT / "examples", "phonemes": ROOT / "examples" / "phonemes"}
TASKS = [(name, path.name) for name, folder in FOLDERS.items() for path in sorted((folder / "prefixes").iterdir())]


@dataclass
class Served:
    """A model's examples: the program that serves them, and the token ids of each task's 200 answers."""

    folder: Path
    model_path: Path
    model_class: Any
    tokenizer: Any
    program: Program
    answers: dict[str, list[list[int]]]

    def max_new_tokens(self, answer: str) -> int:
        return len(self.tokenizer(answer)["input_ids"]) + 4


def held_back(folder: Path, task: str) -> list[dict[str, str]]:
    lines = (folder / "held_back" / f"{task}.jsonl").read_text().splitlines()
    assert len(lines) == 200
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", autouse=True)
def all_threads(one_thread: None) -> Iterator[None]:
    """PEFT on the default model is most of this module's time, and nothing runs beside it then."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("default", tmp_path_factory)


@pytest.fixture(scope="module")
def phonemes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("phonemes", tmp_path_factory)


def serve(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Requests of all tasks in one shuffled stream, 48 at a time."""
    folder = FOLDERS[name]
    is_default = name == "default"
    model_path = find_model(None).path if is_default else folder / "model"
    options = [] if is_default else ["--model", str(model_path), "--model-alias", "phonemes-t5"]
    options += ["--dtype", "float32", "--max-queue-s", "600", "--publish-examples", str(folder / "prefixes")]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    kind = AutoModelForCausalLM if is_default else AutoModelForSeq2SeqLM
    with running(tmp_path_factory.mktemp(name) / "data", *options) as program:
        found = Served(folder, model_path, kind, tokenizer, program, {})
        tasks = [task for model, task in TASKS if model == name]
        asked = [(task, i, example) for task in tasks for i, example in enumerate(held_back(folder, task))]
        random.Random(0).shuffle(asked)
        with ThreadPoolExecutor(48) as clients:
            answers = clients.map(
                lambda a: program.tokens(a[2]["inputs"], a[0], found.max_new_tokens(a[2]["answer"])), asked
            )
            by_place = {(task, i): tokens for (task, i, _), tokens in zip(asked, answers, strict=True)}
        found.answers.update({task: [by_place[task, i] for i in range(200)] for task in tasks})
        yield found


@torch.inference_mode()
def generated(model: Any, encoded: Any, max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """PEFT's greedy answer and its logits `[num_tokens, vocab_size]`."""
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    num_given = 1 if model.config.is_encoder_decoder else encoded["input_ids"].shape[1]
    return out.sequences[0, num_given:].tolist(), torch.cat(out.logits)


@torch.inference_mode()
def predicted(model: Any, encoded: Any, answer: list[int]) -> tuple[list[int], torch.Tensor]:
    """PEFT's best token after the prompt and each beginning of `answer`, and the logits."""
    ids = encoded["input_ids"]
    if model.config.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        text = {"input_ids": ids, "decoder_input_ids": torch.tensor([[start, *answer[:-1]]])}
    else:
        text = {"input_ids": torch.cat((ids, torch.tensor([answer[:-1]], dtype=ids.dtype)), 1)}
    mask = torch.ones_like(text["input_ids"])
    logits = model(**text, attention_mask=mask).logits[0, -len(answer) :]
    return logits.argmax(-1).tolist(), logits


@pytest.mark.parametrize(("model_name", "task"), TASKS)
def test_an_example_over_http_answers_as_peft_does(model_name: str, task: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(model_name)
    base = served.model_class.from_pretrained(served.model_path, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, served.folder / "prefixes" / task).eval()
    wrong, num_ties = [], 0
    for i, (example, ours) in enumerate(zip(held_back(served.folder, task), served.answers[task], strict=True)):
        encoded = served.tokenizer(example["inputs"], return_tensors="pt")
        most = served.max_new_tokens(example["answer"])
        assert len(ours) == most or ours[-1] == base.generation_config.eos_token_id
        theirs, logits = generated(model, encoded, most) if i < NUM_GENERATED else predicted(model, encoded, ours)
        if ours == theirs:
            continue
        at = next(k for k in range(len(theirs)) if ours[k : k + 1] != theirs[k : k + 1])
        best = logits[at].topk(2).values
        if float(best[0] - best[1]) < TIE:
            num_ties += 1
            print(f"tie: {task} {i} at token {at}")
        else:
            wrong.append((i, at, ours, theirs))
    assert not wrong, wrong[:3]
    assert num_ties <= 1
    assert len({tuple(tokens) for tokens in served.answers[task]}) > 1


@pytest.mark.parametrize(
    ("model_name", "task", "other"),
    [("default", "restore", "films"), ("phonemes", "backwards", "phonemes")],
)
def test_the_examples_are_told_apart(model_name: str, task: str, other: str, request: pytest.FixtureRequest) -> None:
    """Swapped tasks answer otherwise: the equalities above are not those of a model that ignores its prefix."""
    served: Served = request.getfixturevalue(model_name)
    examples = held_back(served.folder, task)[:5]
    swapped = [served.program.tokens(e["inputs"], other, served.max_new_tokens(e["answer"])) for e in examples]
    assert all(ours != theirs for ours, theirs in zip(swapped, served.answers[task], strict=False))

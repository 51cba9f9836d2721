"""Train the phoneme prefixes with PEFT on the model of `train_model.py`, on words without a tag.

    python examples/phonemes/train.py phonemes stress ...

Writes `prefixes/TASK/` as PEFT saves it, with `quality.json` beside, and `held_back/TASK.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup
from words import Example, answer, fetch_words, split

HERE = Path(__file__).parent
MODEL_NAME = "phonemes-t5"
SEQ2SEQ = TaskType.SEQ_2_SEQ_LM


def recipes() -> dict[str, tuple[PeftConfig, float, int]]:
    """Task -> (PEFT config, learning rate, steps)."""
    return {
        "phonemes": (PromptTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=8), 3e-2, 200),
        "stress": (PrefixTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=10), 3e-2, 250),
        "rhyme": (
            PrefixTuningConfig(
                task_type=SEQ2SEQ, num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=192
            ),
            2e-3,
            250,
        ),
        "backwards": (
            PromptEncoderConfig(task_type=SEQ2SEQ, num_virtual_tokens=6, encoder_hidden_size=192),
            2e-3,
            200,
        ),
    }


def load_model() -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()


def collate(batch: list[Example], tokenizer: Any) -> dict[str, torch.Tensor]:
    encoded = tokenizer([example.inputs for example in batch], padding=True, return_tensors="pt")
    labels = tokenizer([example.answer for example in batch], padding=True, return_tensors="pt")
    return {**encoded, "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)}


def train(task: str, examples: list[Example], tokenizer: Any, batch_size: int = 32) -> Any:
    config, learning_rate, num_steps = recipes()[task]
    torch.manual_seed(0)
    choose = random.Random(0)
    model: Any = get_peft_model(load_model(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    started_s, mean_loss = time.monotonic(), 0.0
    for step in range(num_steps):
        loss = model(**collate(choose.sample(examples, batch_size), tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 50 == 49:
            print(f"{task} step {step + 1}: loss {mean_loss:.3f}, {time.monotonic() - started_s:.0f} s", flush=True)
    return model.eval()


def num_edits(given: list[str], wanted: list[str]) -> int:
    """Tokens to insert, drop or change."""
    above = list(range(len(wanted) + 1))
    for i, said in enumerate(given, 1):
        row = [i]
        for j, token in enumerate(wanted, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (said != token)))
        above = row
    return above[-1]


@torch.inference_mode()
def quality(model: Any, tokenizer: Any, examples: list[Example]) -> dict[str, float]:
    """Shares of held-back answers right to the letter, and of their tokens: 1 - edits / tokens, at least 0."""
    num_exact, num_wrong, num_tokens = 0, 0, 0
    for example in examples:
        out = model.generate(**tokenizer(example.inputs, return_tensors="pt"))
        given, wanted = tokenizer.decode(out[0], skip_special_tokens=True).split(), example.answer.split()
        num_exact += given == wanted
        num_wrong += num_edits(given, wanted)
        num_tokens += len(wanted)
    return {
        "exact": round(num_exact / len(examples), 3),
        "tokens": round(max(0.0, 1 - num_wrong / num_tokens), 3),
    }


def measure(task: str, tokenizer: Any, held_back: list[Example]) -> None:
    """Write `quality.json` of the task's folder."""
    folder = HERE / "prefixes" / task
    measured = {
        "num_held_back": len(held_back),
        "bare": quality(load_model(), tokenizer, held_back),
        "prefix": quality(PeftModel.from_pretrained(load_model(), folder).eval(), tokenizer, held_back),
    }
    (folder / "quality.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(task, measured, flush=True)


def save(task: str, model: Any) -> None:
    folder = HERE / "prefixes" / task
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = MODEL_NAME
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(recipes()))
    parser.add_argument("--measure", action="store_true", help="Measure what is there; train nothing.")
    arguments = parser.parse_args()
    words = fetch_words()
    spellings, held_back = split(words)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    if arguments.measure:
        plain = [Example(word, answer("plain", word, words[word])) for word in held_back["plain"]]
        print("plain, bare model:", quality(load_model(), tokenizer, plain), flush=True)
    for task in arguments.tasks:
        kept = [Example(word, answer(task, word, words[word])) for word in held_back[task]]
        if not arguments.measure:
            lines = [json.dumps(example.as_dict()) for example in kept]
            (HERE / "held_back").mkdir(exist_ok=True)
            (HERE / "held_back" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
            examples = [Example(word, answer(task, word, words[word])) for word in spellings]
            save(task, train(task, examples, tokenizer))
        measure(task, tokenizer, kept)


if __name__ == "__main__":
    main()

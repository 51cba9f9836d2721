"""Train the example prefixes with PEFT on the default model.

    prefixserve model fetch && python examples/train.py films products ...

Writes `examples/prefixes/TASK/` as PEFT saves it, with `quality.json` beside, and `examples/held_back/TASK.jsonl`.
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
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from review_data import Example, fetch_snippets, restore_examples, sentiment_examples, split
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from server.model_files import DEFAULT_MODEL_NAME, fetch_model

HERE = Path(__file__).parent
WORDS = "Classify the sentiment of this text as positive or negative. The writer's opinion is"
RESTORE_WORDS = "Rewrite the words as a sentence with correct capital letters and punctuation marks."


def recipes(model_path: str) -> dict[str, tuple[str, PeftConfig, float, int]]:
    """Task -> (domain, PEFT config, learning rate, steps)."""
    causal = TaskType.CAUSAL_LM

    def words(n: int, text: str) -> PromptTuningConfig:
        return PromptTuningConfig(
            task_type=causal,
            num_virtual_tokens=n,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=model_path,
        )

    def projected(n: int) -> PrefixTuningConfig:
        return PrefixTuningConfig(
            task_type=causal, num_virtual_tokens=n, prefix_projection=True, encoder_hidden_size=512
        )

    return {
        "films": ("films", words(20, WORDS), 3e-2, 300),
        "products": ("products", projected(10), 4e-4, 350),
        "tweets": ("tweets", words(16, WORDS), 3e-2, 250),
        "editorials": (
            "editorials",
            PromptEncoderConfig(task_type=causal, num_virtual_tokens=12, encoder_hidden_size=256),
            1e-3,
            300,
        ),
        "restore": ("editorials", words(24, RESTORE_WORDS), 2e-2, 350),
    }


def collate(batch: list[Example], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Right-padded ids; only the answer and the end of text are learned."""
    rows = []
    for example in batch:
        prompt = tokenizer(example.inputs)["input_ids"]
        answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def train(task: str, examples: list[Example], model_path: str, batch_size: int = 8) -> Any:
    _, config, learning_rate, num_steps = recipes(model_path)[task]
    torch.manual_seed(0)
    choose = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    started_s, mean_loss = time.monotonic(), 0.0
    for step in range(num_steps):
        batch = collate(choose.sample(examples, batch_size), tokenizer)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 25 == 24:
            print(f"{task} step {step + 1}: loss {mean_loss:.3f}, {time.monotonic() - started_s:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, example: Example, max_new_tokens: int) -> str:
    encoded = tokenizer(example.inputs, return_tensors="pt")
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def quality(model: Any, tokenizer: Any, examples: list[Example]) -> dict[str, float]:
    """Shares of held-back answers: right to the letter, and (for sentences) of words right in their place."""
    exact, words = 0, 0.0
    for example in examples:
        num_tokens = len(tokenizer(example.answer)["input_ids"]) + 4
        given, wanted = answer(model, tokenizer, example, num_tokens).split(), example.answer.split()
        exact += given == wanted if len(wanted) > 1 else given[:1] == wanted
        words += sum(a == b for a, b in zip(given, wanted, strict=False)) / len(wanted)
    return {"exact": round(exact / len(examples), 3), "words": round(words / len(examples), 3)}


def measure(task: str, model: Any, bare: Any, tokenizer: Any, held_back: list[Example]) -> None:
    """Write `quality.json` of the task's folder."""
    measured = {
        "num_held_back": len(held_back),
        "bare": quality(bare, tokenizer, held_back),
        "prefix": quality(model, tokenizer, held_back),
    }
    (HERE / "prefixes" / task / "quality.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(task, measured, flush=True)


def main() -> None:
    model_path = str(fetch_model(None).path)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(recipes(model_path)))
    parser.add_argument("--measure", action="store_true", help="Measure what is there; train nothing.")
    arguments = parser.parse_args()
    snippets = fetch_snippets()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    bare = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for task in arguments.tasks:
        domain = recipes(model_path)[task][0]
        make = restore_examples if task == "restore" else sentiment_examples
        examples, held_back = split(make(snippets[domain]))
        folder = HERE / "prefixes" / task
        if arguments.measure:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), folder).eval()
            measure(task, model, bare, tokenizer, held_back)
            continue
        lines = [json.dumps(example.as_dict(), ensure_ascii=False) for example in held_back]
        (HERE / "held_back" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
        model = train(task, examples, model_path)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = DEFAULT_MODEL_NAME
        if config.get("tokenizer_name_or_path"):
            config["tokenizer_name_or_path"] = DEFAULT_MODEL_NAME
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        measure(task, model, bare, tokenizer, held_back)


if __name__ == "__main__":
    main()

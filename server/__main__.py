"""`python -m server` and the console script `prefixserve`."""

from __future__ import annotations

import os

from server.cli import app
from server.logs import quiet_libraries


def main() -> None:
    os.umask(os.umask(0) | 0o022)  # whatever is made here, others never write it
    quiet_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # in one pool a short text would wait for a long one
    app()


if __name__ == "__main__":
    main()

"""TGI's own client, streaming. Its other calls expect a list, as TGI's `POST /` answers and ours does not."""

from __future__ import annotations

import sys

from text_generation import Client  # type: ignore[import-not-found]


def main() -> None:
    found = list(Client(sys.argv[1]).generate_stream("A warm, funny and moving film.\nSentiment:", max_new_tokens=4))
    assert found[-1].details.generated_tokens == len(found)
    print(f"generate_stream: {len(found)} tokens, {found[-1].generated_text!r}")


if __name__ == "__main__":
    main()

"""LangChain's client of TGI."""

from __future__ import annotations

import sys

from langchain_huggingface import HuggingFaceEndpoint  # type: ignore[import-not-found]

REVIEW = "A warm, funny and moving film.\nSentiment:"


def main() -> None:
    client = HuggingFaceEndpoint(endpoint_url=f"{sys.argv[1]}/generate?task=films", max_new_tokens=4)
    whole, streamed = client.invoke(REVIEW), "".join(client.stream(REVIEW))
    assert whole == streamed
    print(f"invoke and stream: {whole!r}")


if __name__ == "__main__":
    main()

"""LlamaIndex on OpenAI's routes: a completion, and a chat of three turns."""

from __future__ import annotations

import sys

from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found]
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found]


def main() -> None:
    url, model = sys.argv[1:]
    made = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 8, "temperature": 0, "context_window": 2048}
    task = OpenAILike(model="films", is_chat_model=False, **made)
    print(f"complete: {task.complete('A warm, funny and moving film.' + chr(10) + 'Sentiment:').text!r}")
    client = OpenAILike(model=model, is_chat_model=True, **made)
    messages = []
    for text in ("Hi", "More", "Bye"):
        messages.append(ChatMessage(role="user", content=text))
        messages.append(client.chat(messages).message)
    streamed = "".join(part.delta or "" for part in client.stream_chat(messages[:-1]))
    assert streamed == messages[-1].content
    print(f"chat: {[message.content for message in messages[1::2]]}")


if __name__ == "__main__":
    main()

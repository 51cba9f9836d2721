"""Three turns of a conversation by each stock client, unmodified: it sends back what it was answered as it keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import httpx
import openai
from huggingface_hub import InferenceClient
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the network for prices
import litellm

SYSTEM, TURNS = "Be short.", ("Hi", "More", "Bye")
Talk = Callable[[str, str], list[str]]


def with_openai(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for text in TURNS:
            messages.append({"role": "user", "content": text})
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=6, temperature=0)
            messages.append(answer.choices[0].message)
            texts.append(answer.choices[0].message.content or "")
    return texts


def with_openai_streaming(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for text in TURNS:
            messages.append({"role": "user", "content": text})
            with client.chat.completions.create(
                model=model, messages=messages, max_tokens=6, temperature=0, stream=True
            ) as stream:
                deltas = [chunk.choices[0].delta for chunk in stream]
            texts.append("".join(delta.content or "" for delta in deltas))
            messages.append(deltas[0].model_dump() | {"content": texts[-1]})
    return texts


def with_litellm(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        answer = litellm.completion(
            f"openai/{model}", messages, api_base=f"{url}/v1", api_key="none", max_tokens=6, temperature=0
        )
        messages.append(answer.choices[0].message)
        texts.append(answer.choices[0].message.content or "")
    return texts


def with_litellm_streaming(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        chunks = litellm.completion(
            f"openai/{model}", messages, api_base=f"{url}/v1", api_key="none", max_tokens=6, temperature=0, stream=True
        )
        message = litellm.stream_chunk_builder(list(chunks)).choices[0].message
        messages.append(message.model_dump())
        texts.append(message.content or "")
    return texts


def with_huggingface_hub(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    client = InferenceClient(base_url=url)
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        answer = client.chat_completion(messages, model=model, max_tokens=6, temperature=0)
        messages.append(answer.choices[0].message)
        texts.append(answer.choices[0].message.content or "")
    client.exit_stack.close()
    return texts


def with_huggingface_hub_streaming(url: str, model: str) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    texts = []
    client = InferenceClient(base_url=url)
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        deltas = [
            chunk.choices[0].delta
            for chunk in client.chat_completion(messages, model=model, max_tokens=6, temperature=0, stream=True)
        ]
        texts.append("".join(delta.content or "" for delta in deltas))
        messages.append({**deltas[0], "content": texts[-1]})
    client.exit_stack.close()
    return texts


def langchain(http: httpx.Client, url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=6, http_client=http)


def with_langchain(url: str, model: str) -> list[str]:
    messages: list[BaseMessage] = [SystemMessage(SYSTEM)]
    texts = []
    with httpx.Client() as http:
        client = langchain(http, url, model)
        for text in TURNS:
            messages.append(HumanMessage(text))
            answer = client.invoke(messages)
            messages.append(answer)
            texts.append(str(answer.content))
    return texts


def with_langchain_streaming(url: str, model: str) -> list[str]:
    messages: list[BaseMessage] = [SystemMessage(SYSTEM)]
    texts = []
    with httpx.Client() as http:
        client = langchain(http, url, model)
        for text in TURNS:
            messages.append(HumanMessage(text))
            first, *others = client.stream(messages)
            whole: Any = sum(others, first)
            assert isinstance(whole, AIMessage)
            messages.append(whole)
            texts.append(str(whole.content))
    return texts


CLIENTS = (
    with_openai,
    with_openai_streaming,
    with_litellm,
    with_litellm_streaming,
    with_huggingface_hub,
    with_huggingface_hub_streaming,
    with_langchain,
    with_langchain_streaming,
)

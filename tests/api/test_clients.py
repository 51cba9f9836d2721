"""The stock clients, unmodified."""

from __future__ import annotations

import asyncio

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

from tests.conftest import NAME, Served

PROMPT = "A fine film."


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openai_completions(served: Served, client: openai.OpenAI, films: str) -> None:
    with client:
        whole = client.completions.create(model=films, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
        assert whole.usage is not None
        assert whole.choices[0].logprobs is not None
        with client.completions.create(
            model=films,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            parts = list(stream)
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage


def test_openai_chat(client: openai.OpenAI, films: str) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with client:
        whole = client.chat.completions.create(  # type: ignore[call-overload]
            model=films, messages=messages, max_tokens=12, temperature=0, n=2, logprobs=True, top_logprobs=2
        )
        with client.chat.completions.create(  # type: ignore[call-overload]
            model=films, messages=messages, max_tokens=12, temperature=0, stream=True
        ) as stream:
            parts = list(stream)
    assert whole.choices[0].message.content == whole.choices[1].message.content
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content


def test_openai_models_and_errors(client: openai.OpenAI, films: str) -> None:
    with client:
        assert {NAME, films} <= {model.id for model in client.models.list()}
        assert client.models.retrieve(films).id == films
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="nothing", prompt=PROMPT)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=films, prompt=PROMPT, echo=True)
        assert "echo" in refused.value.message


@pytest.mark.parametrize("path", ["", "/", "/generate", "/generate?task=films", "/?task=films@1"])
def test_inference_client_text_generation(served: Served, films: str, path: str) -> None:
    client = InferenceClient(served.url + path)
    text = client.text_generation(PROMPT, max_new_tokens=16)
    details = client.text_generation(PROMPT, max_new_tokens=16, details=True)
    assert details.generated_text == text
    assert details.details is not None
    assert details.details.generated_tokens == len(details.details.tokens)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=16, stream=True)) == text
    streamed = list(client.text_generation(PROMPT, max_new_tokens=16, stream=True, details=True))
    assert streamed[-1].generated_text == text
    assert streamed[-1].details is not None
    assert streamed[-1].details.finish_reason == details.details.finish_reason
    client.exit_stack.close()


def test_inference_client_with_adapter_id_and_sampling(served: Served, films: str) -> None:
    client = InferenceClient(served.url)
    direct = InferenceClient(f"{served.url}/generate?task={films}")
    kwargs = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 4}
    assert client.text_generation(PROMPT, adapter_id=films, **kwargs) == direct.text_generation(PROMPT, **kwargs)  # type: ignore[call-overload]


def test_inference_client_chat_with_the_bare_url(served: Served, films: str) -> None:
    client = InferenceClient(served.url)
    answer = client.chat_completion([{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    named = InferenceClient(base_url=served.url)
    assert named.chat_completion([{"role": "user", "content": "Hi"}], model=films, max_tokens=4).model == films


def test_inference_client_reads_our_errors(served: Served) -> None:
    client = InferenceClient(served.url)
    with pytest.raises(ValidationError, match="truncate"):
        client.text_generation(PROMPT, truncate=4)
    served.state.is_draining = True
    try:
        with pytest.raises(OverloadedError):
            client.text_generation(PROMPT)
    finally:
        served.state.is_draining = False


def test_async_inference_client_streams(served: Served) -> None:
    async def join() -> str:
        async with AsyncInferenceClient(served.url) as client:
            stream = await client.text_generation(PROMPT, max_new_tokens=16, stream=True)
            return "".join([text async for text in stream])

    assert asyncio.run(join()) == served.generate(PROMPT, max_new_tokens=16).json()["generated_text"]

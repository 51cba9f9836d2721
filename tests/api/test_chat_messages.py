"""Messages as clients and servers keep them: what is taken, what reaches the chat template, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from server.model_files import ModelFiles
from server.start import make_state
from tests.api.test_openai import chat
from tests.byte_model import save_byte_model
from tests.conftest import Served, serve_in_thread, settings_for

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
AGAIN: dict[str, Any] = {"role": "user", "content": "More"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"}
NULLS = dict.fromkeys(
    ("refusal", "tool_calls", "function_call", "audio", "annotations", "name", "reasoning_content", "reasoning")
)
# After tool calls in Qwen's and Llama's: an object of arguments, the answer in a turn of its own.
TEMPLATE_WITH_TOOLS = (
    "{% for m in messages %}<s>{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TEMPLATE_WITHOUT_ROLES = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"


def answered(response: httpx.Response) -> tuple[str, int]:
    """The text of an answer, and how many tokens its prompt had."""
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


def refusal(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def serve_template(folder: Path, template: str) -> Iterator[Served]:
    path = save_byte_model(folder / "templated")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    yield from serve_in_thread(make_state(settings_for(folder / "data"), ModelFiles(path, "tiny")))


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_template(tmp_path_factory.mktemp("tools"), TEMPLATE_WITH_TOOLS)


@pytest.fixture(scope="module")
def without_roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_template(tmp_path_factory.mktemp("roles"), TEMPLATE_WITHOUT_ROLES)


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None},
        NULLS,
        {"tool_calls": [], "annotations": [], "thinking_blocks": [], "images": []},
        {"provider_specific_fields": {"refusal": None}, "reasoning_content": "I think", "unknown": {"deep": [1]}},
        {"annotations": [{"type": "url_citation"}], "id": "msg", "finish_reason": "stop", "index": 0},
        {f"field-{i}": i for i in range(200)},
        {"content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B", "annotations": [], "id": "x"}]},
        {"content": None, "refusal": "AB"},
        {"content": [{"type": "refusal", "refusal": "AB"}]},
    ],
)
def test_what_an_assistants_message_carries_beside_its_text_changes_nothing(
    served: Served, more: dict[str, Any]
) -> None:
    plain = chat(served, messages=[USER, {"role": "assistant", "content": "AB"}, AGAIN])
    carried = chat(served, messages=[USER, {"role": "assistant", "content": "AB"} | more, AGAIN])
    assert answered(carried) == answered(plain)


EMPTY = ({}, {"content": None}, {"content": ""}, {"content": []}, NULLS, {"function_call": {}, "audio": {}})


@pytest.mark.parametrize("empty", EMPTY)
def test_an_assistant_may_have_said_nothing(served: Served, empty: dict[str, Any]) -> None:
    plain = chat(served, messages=[USER, {"role": "assistant", "content": ""}, AGAIN])
    assert answered(chat(served, messages=[USER, {"role": "assistant"} | empty, AGAIN])) == answered(plain)


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_other_roles_may_carry_nulls_and_a_name(served: Served, role: str) -> None:
    plain = answered(chat(served, messages=[{"role": role, "content": "x"}, USER]))
    nulls = dict.fromkeys(("name", "refusal", "tool_calls", "function_call", "audio", "tool_call_id"))
    for more in (nulls, {"name": "Ann"}, {"tool_calls": []}):
        assert answered(chat(served, messages=[{"role": role, "content": "x"} | more, USER])) == plain


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user", "content": None}, "content"),
        ({"role": "system"}, "content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "user", "content": "x", "tool_call_id": "c1"}, "tool_call_id"),
        ({"role": "user", "content": "x", "unknown": 1}, "unknown"),
        ({"role": "function", "content": "x", "name": "f"}, "role"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}, "function_call"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no"}}]}, "arguments"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].type"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_name(served: Served, message: dict[str, Any], field: str) -> None:
    error = refusal(chat(served, messages=[USER, message]))
    assert error["param"].startswith("messages[1].")
    assert error["param"].endswith(field)
    assert error["param"] in error["message"]


def test_tool_calls_are_written_by_a_template_that_knows_them(with_tools: Served) -> None:
    calls = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
    written = "user: Hi|assistant: [f {'x': 1}]|tool(f): 2|"
    assert answered(chat(with_tools, messages=calls))[1] == len(written) + 3 + len("assistant:") + 1
    assert answered(chat(with_tools, messages=calls)) != answered(chat(with_tools, messages=[USER, RESULT]))
    streamed = CALL | {"index": 0, "unknown": None}
    again = [USER, {"role": "assistant", "content": "", "tool_calls": [streamed]}, RESULT]
    assert answered(chat(with_tools, messages=again)) == answered(chat(with_tools, messages=calls))


@pytest.mark.parametrize(
    "arguments",
    [
        r'{"x": "\ud800"}',
        r'{"\udfff": 1}',
        '{"x": NaN}',
        '{"x": 1e999}',
        '{"x": ' * 500 + "1" + "}" * 500,
        '{"x": ' + "[" * 700 + "]" * 700 + "}",
    ],
)
def test_arguments_that_no_template_can_write_are_refused_by_name(with_tools: Served, arguments: str) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    error = refusal(chat(with_tools, messages=[USER, {"role": "assistant", "tool_calls": [call]}, RESULT]))
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_tool_calls_that_the_template_passes_over_are_refused(served: Served, without_roles: Served) -> None:
    for server in (served, without_roles):
        error = refusal(chat(server, messages=[USER, {"role": "assistant", "content": "x", "tool_calls": [CALL]}]))
        assert error["param"] == "messages[1].tool_calls"
        assert "chat template" in error["message"]
    error = refusal(chat(without_roles, messages=[USER, RESULT]))
    assert error["param"] == "messages[1].content"
    assert answered(chat(served, messages=[USER, RESULT]))[1] > answered(chat(served, messages=[USER]))[1]

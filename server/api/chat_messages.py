"""A conversation's messages: what clients and servers put into them, and what the chat template is given of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from prefix_store.bounded_json import shown
from server.api.wire import MAX_PROMPTS, Name, Text, WireModel, refuse, wrong_field

MAX_TOOL_CALLS = 128
MAX_NESTING = 64  # of a call's arguments, which several steps go through by recursion
ASSISTANTS = ("role", "content", "name", "refusal", "tool_calls", "function_call", "audio")


class TextPart(WireModel):
    """In an assistant's message also a refusal, and with fields that are dropped."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True, "required": ["type"]})
    type: Annotated[Literal["text"], WithJsonSchema({"enum": ["text", "refusal"], "type": "string"})]
    text: Text


class FunctionCall(WireModel):
    model_config = ConfigDict(extra="ignore")
    name: Name
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, arguments: str) -> str:
        try:
            found = json.loads(arguments)
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # as a template may write it
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise wrong_field("", f"must be a JSON object as text, got {shown(arguments)}")
        if _nests_beyond(found, MAX_NESTING):
            raise wrong_field("", f"must nest <= {MAX_NESTING} deep, got {shown(arguments)}")
        return arguments


class ToolCall(WireModel):
    model_config = ConfigDict(extra="ignore")
    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def as_template_input(self) -> dict[str, Any]:
        """As transformers' templates expect it: the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(WireModel):
    """An assistant's message may come back as this or another server's client keeps it: fields that its text does not
    depend on are dropped, known or not. Messages of other roles have the fields below and no others."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="May be null in an assistant's message."
    )
    name: Name | None = Field(None, description="Goes to the chat template; most have no place for it.")
    refusal: Text | None = Field(None, description="The text of an assistant's message that has no content.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = Field(
        None, description="An assistant's. Refused where the chat template does not write them."
    )
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _fields_of_role(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("role") == "assistant":
            return refuse(_of_assistant(values), {"function_call": ({},), "audio": ({},)})
        of_assistants: dict[str, tuple[Any, ...]] = {
            "refusal": (),
            "tool_calls": ([],),
            "function_call": (),
            "audio": (),
        }
        return refuse(values, of_assistants if values.get("role") == "tool" else of_assistants | {"tool_call_id": ()})

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise wrong_field("content", "must be a text or a list, got null")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content) or self.refusal or ""
        return self.content or self.refusal or ""

    def as_template_input(self) -> dict[str, Any]:
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            made["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        return made | {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}


def _nests_beyond(value: Any, most: int) -> bool:
    """Whether lists and objects stand within each other more than `most` deep."""
    if not isinstance(value, dict | list):
        return False
    return not most or any(_nests_beyond(e, most - 1) for e in (value.values() if isinstance(value, dict) else value))


def _of_assistant(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that a turn's text may depend on."""
    kept = {name: values[name] for name in ASSISTANTS if name in values}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_text_part(part) if isinstance(part, dict) else part for part in kept["content"]]
    return kept


def _text_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of an answer that OpenAI's clients keep, a refusal too, as a part of text."""
    kind = part.get("type")
    name = "refusal" if kind == "refusal" else "text"
    made = {"type": "text" if kind == "refusal" else kind}
    return made | ({"text": part[name]} if name in part else {})

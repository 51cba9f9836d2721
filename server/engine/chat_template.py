"""A conversation as a model's chat template takes it, and what the template leaves out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]  # texts, and an assistant's calls of tools
Messages = list[Message]


def characters_in(value: Any) -> int:
    """How many there are in all texts of a message or a conversation."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(characters_in(name) + characters_in(each) for name, each in value.items())
    return sum(map(characters_in, value)) if isinstance(value, list) else 1


def passed_over(render: Callable[[Messages], str], messages: Messages, text: str) -> str | None:
    """The first field about tools that `text`, which `render` made of `messages`, does not depend on. Many templates
    know nothing of an assistant's calls of tools, or of what these answered."""
    without_calls = [{name: value for name, value in m.items() if name != "tool_calls"} for m in messages]
    other_answers = [m | {"content": m["content"] + "."} if m["role"] == "tool" else m for m in messages]
    for changed, what in ((without_calls, "tool_calls"), (other_answers, "content")):
        first = next((i for i, (m, other) in enumerate(zip(messages, changed, strict=True)) if m != other), None)
        if first is None:
            continue
        try:
            is_same = render(changed) == text
        except Exception:  # a template that raises has looked
            is_same = False
        if is_same:
            return f"messages[{first}].{what}"
    return None

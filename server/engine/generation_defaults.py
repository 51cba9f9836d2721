"""What holds for a request that does not say it: the model's generation config, read once at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.engine.logit_rules import NO_RULES, LogitRules
from server.engine.stop_strings import StopStrings


@dataclass(frozen=True)
class GenerationDefaults:
    """`rules` hold for every request, the other fields where a request has no value of its own. `in_force` names the
    config's fields that change answers, with their values, for people."""

    rules: LogitRules = NO_RULES
    repetition_penalty: float = 1.0
    min_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: StopStrings | None = None
    in_force: Mapping[str, Any] = field(default_factory=dict)

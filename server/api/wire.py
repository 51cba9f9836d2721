"""What the wire's models share: bounds of their fields, and errors that name a field."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from prefix_store.bounded_json import shown

MAX_STOPS = 16
MAX_CHOICES = 16
MAX_PROMPTS = 1000
MAX_FIELDS = 64
WRONG_FIELD = "wrong_field"


def _no_truth(value: Any) -> Any:
    """Pydantic takes true and false for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


NUMBER = BeforeValidator(_no_truth)
Text = Annotated[str, StringConstraints(max_length=2**22)]  # a bound makes pydantic refuse lone surrogates
Name = Annotated[str, StringConstraints(max_length=512)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Seed = Annotated[int, Field(ge=0, lt=2**64), NUMBER]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
NumTokens = Annotated[int, Field(ge=1, lt=2**31), NUMBER]  # how many fit is the context's business
LeastTokens = Annotated[int, Field(ge=0, lt=2**31), NUMBER]
VersionNumber = Annotated[int, Field(ge=1, lt=10**9)]
VersionText = Annotated[str, StringConstraints(min_length=1, max_length=64)]


def wrong_field(name: str, reason: str) -> PydanticCustomError:
    """An error that concerns the field `name` of a model, which its message begins with; no name: the value itself."""
    return PydanticCustomError(WRONG_FIELD, "{field} {reason}", {"field": name, "reason": reason})


class WireModel(BaseModel):
    """Every text, list and number of a model has a bound: what is refused must cost little."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, values: Any) -> Any:
        """An error is made for each unknown field, of a few million too."""
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            raise wrong_field("", f"must have <= {MAX_FIELDS} fields, got {len(values)}")
        return values


def refuse(values: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """Refuse fields that are not served and have another value than null or a neutral one."""
    if isinstance(values, dict):
        for name, allowed in neutral.items():
            value = values.get(name)
            if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
                raise wrong_field(name, f"is not supported by this server, got {shown(value)}")
        return {name: value for name, value in values.items() if name not in neutral}
    return values

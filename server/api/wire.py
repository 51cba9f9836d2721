"""The base of all that comes over the wire as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELDS = 64


class WireModel(BaseModel):
    """Every text, list and number of a model has a bound: what is refused must cost little."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, values: Any) -> Any:
        """An error is made for each unknown field, of a few million too."""
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "expected <= {most} fields, got {got}", {"most": MAX_FIELDS, "got": len(values)}
            )
        return values

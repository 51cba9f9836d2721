"""What a caller says of the base model of a version, where its file alone does not."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

AcceptBase = Annotated[
    bool,
    Query(
        description="Take it as it is, although its file names another base model, a path or none; the audit has it."
    ),
]
BaseFingerprint = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9a-f]{64}$",
        description="The fingerprint of the model that it was trained for, as `/info` shows the served model's.",
    ),
]

"""What comes over the wire about tenants: limits and keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictInt, StringConstraints

from server.api.wire import WireModel

Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]


class LimitsModel(WireModel):
    """A tenant's limits; null is without one. Sizes are bytes. `weight` is the tenant's share beside others'."""

    weight: float = Field(1.0, ge=0.01, le=1000)
    requests_per_minute: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    tokens_per_minute: Annotated[StrictInt, Field(ge=1, lt=2**53)] | None = None
    uploads_per_minute: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    max_rows: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    max_queued: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    max_prefixes: Count | None = None
    max_stored_bytes: Count | None = None
    max_resident_bytes: Count | None = None
    max_pinned_bytes: Count | None = 0
    max_virtual_tokens: Count | None = None
    max_new_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None


class TenantRequest(WireModel):
    """`PUT /v1/tenants/{name}`: all limits anew, or none to leave them."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"limits": {"weight": 2, "requests_per_minute": 600}}]})
    limits: LimitsModel | None = None


class KeyRequest(WireModel):
    """`POST /v1/tenants/{name}/keys`. `tasks` are patterns as `films-*`; none: all."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"scopes": ["generate"], "tasks": ["films-*"], "expires_in_s": 86400}]}
    )
    scopes: list[Literal["generate", "upload", "publish", "admin", "metrics", "operator"]] | None = Field(
        None, min_length=1, max_length=6
    )
    tasks: list[Annotated[str, StringConstraints(min_length=1, max_length=64)]] | None = Field(None, max_length=32)
    expires_in_s: float | None = Field(None, gt=0, le=10 * 366 * 86400)
    replaces: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")] | None = None
    overlap_s: float = Field(0, ge=0, le=366 * 86400)

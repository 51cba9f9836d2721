"""The OpenAPI page, made true where FastAPI cannot know it: keys are asked for by the gate, before any route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.api.auth import ANY, needed_scope

BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A tenant's key or the operator's. While no key is configured none is needed.",
}


class DescribedAPI(FastAPI):
    """With what each route needs of a key, and what it answers without."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            schema["components"]["securitySchemes"] = {"key": BEARER}
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    scope = needed_scope(method.upper(), path)
                    if scope is not None:
                        _describe(operation, "some scope" if scope == ANY else f"the scope `{scope}`")
        assert self.openapi_schema is not None
        return self.openapi_schema


def _describe(operation: dict[str, Any], scope: str) -> None:
    content = operation["responses"]["default"]["content"]
    operation["security"] = [{"key": []}]
    operation["responses"] |= {
        "401": {"description": "The key is missing, unknown or has expired.", "content": content},
        "403": {"description": f"The key lacks {scope}, or is not for this task.", "content": content},
    }

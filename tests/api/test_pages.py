"""The page that describes every route: for everyone, and whole without any other host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urljoin

import httpx
import pytest

from tests.conftest import Served


@pytest.fixture
def stranger(keyed: Served) -> Iterator[httpx.Client]:
    """Somebody without a key, on a server that has keys."""
    with httpx.Client(base_url=keyed.url) as http:
        yield http


def loaded_by(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="([^"]+)"', page)


def test_docs_and_all_that_they_load_are_public_and_of_this_server(stranger: httpx.Client) -> None:
    page = stranger.get("/docs")
    assert page.status_code == 200
    addresses = [address for address in loaded_by(page.text) if not address.startswith("data:")]
    assert len(addresses) == 3
    for address in addresses:
        assert "//" not in address
        assert not address.startswith("/"), "below a proxy's path it is elsewhere"
        found = stranger.get(urljoin("/docs", address))
        assert (found.status_code, found.headers["X-Content-Type-Options"]) == (200, "nosniff")
        assert found.headers["Content-Type"].split(";")[0] in ("text/css", "text/javascript")
    assert not re.search(r"https?://", page.text)


def test_docs_policy_lets_nothing_in_from_elsewhere(stranger: httpx.Client) -> None:
    page = stranger.get("/docs")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http" not in policy
    assert not re.search(r"<script>|<script [^>]*>[^<]", page.text), "the policy forbids scripts in the page"


def test_docs_take_a_bearer_key(stranger: httpx.Client) -> None:
    described = stranger.get("/openapi.json").json()
    assert described["components"]["securitySchemes"]["key"] == {
        "type": "http",
        "scheme": "bearer",
        "description": "A tenant's key or the operator's. While no key is configured none is needed.",
    }
    assert described["paths"]["/generate"]["post"]["security"] == [{"key": []}]
    assert not any(path.startswith(("/docs", "/openapi")) for path in described["paths"])


def test_docs_show_the_version_of_openapi_that_is_served(stranger: httpx.Client) -> None:
    version = stranger.get("/openapi.json").json()["openapi"]
    script = stranger.get("/docs/swagger-ui-bundle.js").text
    assert version.startswith("3.1.")
    found = re.search(r'PACKAGE_VERSION:"(\d+)\.', script)
    assert found is not None
    assert int(found[1]) >= 5, "Swagger UI 4 knows 3.0 only"


@pytest.mark.parametrize(
    "path", ["/docs/", "/docs/nothing", "/docs/../info", "/redoc", "/openapi.json/x", "/docs/x.map"]
)
def test_nothing_else_is_public(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path).status_code == 401

"""The page that describes every route, for a browser: Swagger UI, all of it from this server."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)
STYLE, SCRIPT, START = "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/docs/start.js"
PAGES = ("/docs", "/openapi.json", STYLE, SCRIPT, START)
VENDOR = files("fastapi_offline") / "static"  # for its files alone
# Nothing from elsewhere, and nothing sent elsewhere. Swagger UI writes styles into its elements, and has icons as data.
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self' 'unsafe-inline'", "img-src 'self' data:"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# Relative addresses, so that the page works below a proxy's path.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>prefixserve</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, queryConfigEnabled: false,
  presets: [SwaggerUIBundle.presets.apis]
});
"""


@router.get("/docs")
async def docs() -> Response:
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get(STYLE)
def style() -> Response:
    return _vendored("swagger-ui.css", "text/css")


@router.get(SCRIPT)
def script() -> Response:
    return _vendored("swagger-ui-bundle.js", "text/javascript")


@router.get(START)
async def start() -> Response:
    return Response(START_SCRIPT, media_type="text/javascript", headers=HEADERS)


def _vendored(name: str, media_type: str) -> Response:
    return Response((VENDOR / name).read_bytes(), media_type=media_type, headers=HEADERS)

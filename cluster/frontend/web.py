"""The web pages: files of the package, served as they are. They hold no data and need no key;
what they show they ask the API for, with the key that somebody types in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from cluster.errors import NotFound, quote

ASSETS = Path(__file__).with_name("assets")
PAGES = {"/": "chat.html", "/experts": "experts.html"}
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # innerHTML takes what DOMPurify made, nothing else
        "trusted-types dompurify",
    )
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # keep it, but ask whether it is still that: see ETag
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    content: bytes
    media_type: str
    etag: str


def read_assets(folder: Path = ASSETS) -> dict[str, Asset]:
    """Files by path below the folder, those that browsers ask for only."""
    return {
        path.relative_to(folder).as_posix(): _read(path)
        for path in folder.rglob("*")
        if path.suffix in _MEDIA_TYPES
    }


def add_web(app: FastAPI) -> None:
    """The pages and what they load. A name is looked up among files read before: none escapes."""
    assets = read_assets()

    @app.api_route("/assets/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        """A file that a page loads."""
        return _answer(request, assets, name)

    for path, name in PAGES.items():
        _add_page(app, assets, path, name)


def _add_page(app: FastAPI, assets: dict[str, Asset], path: str, name: str) -> None:
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        """A page."""
        return _answer(request, assets, name)


def _read(path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(content, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()}"')


def _answer(request: Request, assets: dict[str, Asset], name: str) -> Response:
    """The file, or 304 if the browser has it. Raises NotFound."""
    found = assets.get(name)
    if found is None:
        raise NotFound(f"There is no file {quote(name)}.")
    headers = {**_HEADERS, "ETag": found.etag}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)

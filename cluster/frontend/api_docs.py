"""Request bodies in /openapi.json: they are read by hand, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_BODIES = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_REFERENCE = "#/components/schemas/{model}"


def body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes this body."""
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": True, "content": content}}


class DocumentedApp(FastAPI):
    """A FastAPI whose document holds the schemas of all bodies."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if _BODIES[0].__name__ not in schemas:
            _, definitions = models_json_schema(
                [(body, "validation") for body in _BODIES], ref_template=_REFERENCE
            )
            schemas.update(definitions["$defs"])
        return document

"""Request bodies in /openapi.json: they are read by hand, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

RENORMALISED_HEADER = "X-Shoal-Renormalised"
TIMING_HEADER = "X-Shoal-Timing"
_PARAMETERS = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        "description": "Makes sending the request again safe: the answer has the same tokens, also"
        " from another ingress; a whole answer is given again as it was for some minutes.",
    },
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "required": False,
        "schema": {"type": "number", "minimum": 0},
        "description": "Seconds until the request fails with 504, or 503 while parts are away.",
    },
    {
        "name": "traceparent",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "W3C trace context: the request's spans belong to that trace. A malformed"
        " one is ignored.",
    },
    {
        "name": "tracestate",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "What belongs to `traceparent`: the request's spans have it too.",
    },
]
_ANSWER = {
    "description": "An object of OpenAI's API, or its chunks as server-sent events. Its field"
    " `renormalised` is there, and true, only if experts were away for a token and the weights of"
    " the others were scaled up instead (`router.worker.on_unavailable: renormalise`); a stream has"
    " it in the chunk where that happened and in the last one.",
    "headers": {
        RENORMALISED_HEADER: {
            "description": "`true` if experts were left out before the headers were sent.",
            "schema": {"type": "string"},
        },
        TIMING_HEADER: {
            "description": "Of whole answers, milliseconds in the syntax of Server-Timing:"
            " `queue;dur=0.4, prefill;dur=21.0, decode;dur=180.2, hop;dur=95.1, expert;dur=31.7,"
            " total;dur=202.3`. The field `timing` of the request puts it into the body, also of"
            " streams.",
            "schema": {"type": "string"},
        },
    },
}
_REFERENCE = "#/components/schemas/{model}"


def body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes this body."""
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": True, "content": content}}


def generation_docs(schema: type[BaseModel]) -> dict[str, Any]:
    """The same for a route that generates, with the headers it reads and writes."""
    return {**body_of(schema), "parameters": _PARAMETERS, "responses": {"200": _ANSWER}}


class DocumentedApp(FastAPI):
    """A FastAPI whose document holds the schemas of `bodies`."""

    bodies: tuple[type[BaseModel], ...] = ()

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if not schemas.keys() >= {body.__name__ for body in self.bodies}:
            _, definitions = models_json_schema(
                [(body, "validation") for body in self.bodies], ref_template=_REFERENCE
            )
            schemas.update(definitions["$defs"])
        return document

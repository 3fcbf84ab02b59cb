"""The patch formats other than server-side apply."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch

from tests.k8s.api_server import fields
from tests.k8s.api_server.errors import ApiError, Json, unsupported

JSON = "application/json-patch+json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"


def patched(obj: Json, patch: Any, content_type: str, schema: Json, is_custom: bool) -> Any:
    """`obj` after the patch.

    Raises:
        ApiError: 415 for a format that the kind does not take, 422 for a patch that does not fit.
    """
    if content_type == JSON:
        return _json_patched(obj, patch)
    if content_type == MERGE:
        return merge_patched(obj, patch)
    if content_type == STRATEGIC and not is_custom:
        return strategic_patched(obj, patch, schema)
    raise unsupported(content_type)


def _json_patched(obj: Json, patch: list[Json]) -> Json:
    try:
        changed: Json = jsonpatch.apply_patch(obj, patch)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
        message = f"the server rejected our request due to an error in our request: {error}"
        raise ApiError(422, "Invalid", message) from None
    return changed


def merge_patched(value: Any, patch: Any) -> Any:
    """RFC 7386: null removes, lists are replaced."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(value) if isinstance(value, dict) else {}
    for name, part in patch.items():
        if part is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patched(merged.get(name), part)
    return merged


def strategic_patched(value: Any, patch: Any, schema: Json) -> Any:
    """As a merge patch, but lists with keys are merged by them; directives are not known."""
    if isinstance(patch, dict):
        merged = dict(value) if isinstance(value, dict) else {}
        for name, part in patch.items():
            if part is None:
                merged.pop(name, None)
            else:
                below = fields.child(schema, name)
                merged[name] = strategic_patched(merged.get(name), part, below)
        return merged
    return fields.merge(value, patch, schema) if value is not None else copy.deepcopy(patch)

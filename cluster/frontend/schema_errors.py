"""A pydantic fault as one line with the path of the field, in the words OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.errors import InvalidRequest, one_line

SchemaT = TypeVar("SchemaT", bound=BaseModel)

_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "finite_number": "invalid_value",
}
_WANTED = {
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "finite_number": "a finite number",
}
"""What the field should have been, by pydantic's name of the fault."""


def parse_body(schema: type[SchemaT], data: Any) -> SchemaT:
    """`data` as `schema`. Raises InvalidRequest for the first fault."""
    if not isinstance(data, Mapping):
        raise InvalidRequest(
            f"The request body must be a JSON object, not {_json_type(data)}.", code="invalid_type"
        )
    try:
        return schema.model_validate(dict(data))
    except ValidationError as fault:
        raise _invalid(fault, data) from None


def _invalid(fault: ValidationError, data: Mapping[str, Any]) -> InvalidRequest:
    errors = fault.errors(include_url=False, include_context=False, include_input=False)
    # A union reports every member; the deepest path is the member the client meant.
    first = errors[0]
    same_field = [e for e in errors if e["loc"][:1] == first["loc"][:1]]
    worst = max(same_field, key=lambda e: len(_real_path(e, data)))
    param = _path(_real_path(worst, data))
    code = _CODES.get(worst["type"], "invalid_type")
    if code == "missing_required_parameter":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code=code)
    if worst["type"] == "extra_forbidden":
        return InvalidRequest(
            f"Unrecognized request argument: '{param}'.", param=param, code="unknown_parameter"
        )
    alternatives = {_wanted(e) for e in same_field if e["loc"][:-1] == worst["loc"][:-1]}
    wanted = " or ".join(sorted(alternatives))
    return InvalidRequest(f"Invalid '{param}': it should be {wanted}.", param=param, code=code)


def _wanted(error: Mapping[str, Any]) -> str:
    return _WANTED.get(error["type"]) or str(error["msg"]).replace("Input should be ", "")


def _real_path(error: Mapping[str, Any], data: Any) -> tuple[int | str, ...]:
    """The fault's location without the names of union members that pydantic mixes into it."""
    path: list[int | str] = []
    for part in error["loc"]:
        inside = part in data if isinstance(data, Mapping) else _is_index(part, data)
        if inside:
            path.append(part)
            data = data[part]
        elif error["type"] == "missing":
            path.append(part)
    return tuple(path)


def _is_index(part: int | str, data: Any) -> bool:
    return isinstance(part, int) and isinstance(data, list) and part < len(data)


def _path(path: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{one_line(part, 64)}"
    return text.removeprefix(".")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

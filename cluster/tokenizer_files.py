"""The tokenizer files of a checkpoint: tokenizer.json, tokenizer_config.json, chat templates.

Everything here raises CheckpointError, naming the file, for what cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from experts.errors import CheckpointError

_MARKUP = frozenset("<>[]|{}｜")
"""An added token with one of these in its name is a control token, whatever its `special` says."""


def load_library(
    file: Path, layout: dict[str, Any], control: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """The library's tokenizer, made to read names of control tokens as letters.

    It can do so only for tokens flagged special, and DeepSeek flags <｜User｜> as not special.
    """
    added = [{**t, "special": t["content"] in control} for t in layout.get("added_tokens", [])]
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps({**layout, "added_tokens": added}))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise CheckpointError(file, "a tokenizers file", str(error)) from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library


def read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        if optional:
            return {}
        raise CheckpointError(file, "a tokenizer file", "no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, "JSON", str(error)) from None
    if not isinstance(data, dict):
        raise CheckpointError(file, "a JSON object", type(data).__name__)
    return data


def added_tokens(file: Path, layout: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = {"id": int, "content": str, "special": bool, "lstrip": bool, "rstrip": bool}
    tokens = layout.get("added_tokens", [])
    for token in tokens:
        for name, kind in fields.items():
            if not isinstance(token.get(name), kind):
                raise CheckpointError(file, f"{name} ({kind.__name__}) in added_tokens", token)
    return list(tokens)


def is_control(token: Mapping[str, Any]) -> bool:
    return bool(token["special"]) or not _MARKUP.isdisjoint(token["content"])


def token_text(value: Any) -> str | None:
    """tokenizer_config.json names a token by a string or by {"content": string}."""
    return value.get("content") if isinstance(value, dict) else value


def ends_by_flag(flag: bool | None, token: int | None, otherwise: list[int]) -> list[int]:
    if flag is None:
        return otherwise
    return [token] if flag and token is not None else []


def template_source(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, str | None]:
    """chat_template.jinja wins over tokenizer_config.json, there "default" of a list."""
    file = folder / "chat_template.jinja"
    try:
        return file, file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(file, "a chat template", str(error)) from None
    file = folder / "tokenizer_config.json"
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = [e for e in found if isinstance(e, dict) and e.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str | None):
        raise CheckpointError(file, "a chat_template of text", type(found).__name__)
    return file, found

"""Text to token ids and back, for byte-level tokenizers (every DeepSeek-style model has one).

Control tokens (begin of sentence, <｜User｜>, </think>, ...) come from ids or from the chat
template and never from text, unless a caller allows it: the tokenizer library is told to treat
their names as ordinary letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster.chat_template import ChatTemplate
from cluster.detokenizer import IncrementalDetokenizer, spelled_bytes
from cluster.errors import InvalidRequest
from cluster.tokenizer_files import (
    added_tokens,
    ends_by_flag,
    is_control,
    load_library,
    read_json,
    template_source,
    token_text,
)
from experts.config import ModelConfig
from experts.errors import CheckpointError

_TEMPLATE_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_PROBE_CHARS = 100_000
_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi"),),
    (("system", "Be brief."), ("user", "What is 2 + 2?")),
    (("user", "Hi"), ("assistant", "Hello."), ("user", "Name\n a colour: ")),
)
"""Conversations on which the guarded rendering must give the ids of the trusting one."""


class Tokenizer:
    """The tokenizer.json of a checkpoint with its chat template. Safe from several threads."""

    def __init__(self, folder: Path, vocab_size: int | None = None) -> None:
        """`vocab_size`: of the model, from config.json if not given.

        Raises CheckpointError if a file is missing, damaged or does not fit the model.
        """
        self._file = folder / "tokenizer.json"
        layout = read_json(self._file)
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        added = added_tokens(self._file, layout)
        self.hidden_ids = frozenset(t["id"] for t in added if t["special"])
        """Ids that do not show in text."""
        self._control = {t["content"]: t for t in added if is_control(t)}
        self._library = load_library(self._file, layout, self._control)
        self.vocab_size = vocab_size or ModelConfig.load(folder).vocab_size
        self._check_fits(layout)
        self._control_ids = frozenset(t["id"] for t in self._control.values()) - self._unknown_ids()
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        self._prefix, self._suffix = self._special_ends(settings)
        self.template = self._load_template(folder, settings)

    # ---- text to ids

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text. `add_special_tokens`: with the begin-of-sentence id and the like;
        `allow_special_tokens`: names of control tokens in the text become these tokens."""
        pieces = self._split(text) if allow_special_tokens else [text]
        ids = self._encode_pieces(pieces)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_chars: int,
        max_s: float,
        add_generation_prompt: bool = True,
        switches: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """Ids of a conversation. Raises InvalidRequest, or RenderLimit past `max_chars`."""
        if self.template is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="unsupported_endpoint",
            )
        pieces = self.template.render(
            self._known_roles(messages, self.template),
            max_chars=max_chars,
            max_s=max_s,
            add_generation_prompt=add_generation_prompt,
            switches=switches,
        )
        return self._encode_pieces(pieces)

    def max_chars(self, num_tokens: int) -> int:
        """No text longer than this fits into so many tokens (a normaliser may join characters)."""
        return num_tokens * self._longest_token * (1 if self._library.normalizer is None else 4)

    # ---- ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; what is no UTF-8 shows as U+FFFD."""
        shown = (i for i in ids if not (skip_special_tokens and i in self.hidden_ids))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; b"" for an id of the model that has no token."""
        known = self._bytes[token_id]
        if known is None:
            known = spelled_bytes(self._library.id_to_token(token_id) or "")
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """The token alone as text, U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh one for one answer."""
        if not skip_special_tokens:
            return IncrementalDetokenizer(self.token_bytes)
        return IncrementalDetokenizer(self.visible_bytes)

    def visible_bytes(self, token_id: int) -> bytes:
        """`token_bytes`, b"" for hidden ids."""
        return b"" if token_id in self.hidden_ids else self.token_bytes(token_id)

    # ---- encoding

    def _encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Plain text between control ids, which eat neighbouring spaces if they are made to."""
        trim = {t["id"]: (t["lstrip"], t["rstrip"]) for t in self._control.values()}
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            after = pieces[i + 1] if i + 1 < len(pieces) else None
            before = pieces[i - 1] if i else None
            text = piece.rstrip() if isinstance(after, int) and trim[after][0] else piece
            text = text.lstrip() if isinstance(before, int) and trim[before][1] else text
            ids += self._encode_plain(text)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text that holds no control token, even if the vocabulary would spell one."""
        encoding = self._library.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        bad = next((i for i, token in enumerate(ids) if token in self._control_ids), None)
        if bad is None:
            return ids
        start, end = encoding.offsets[bad]
        middle = (start + end) // 2
        if not 0 < middle < len(text):
            raise InvalidRequest("The text cannot be written in plain tokens.")
        return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])

    def _split(self, text: str) -> list[str | int]:
        pieces: list[str | int] = []
        for part in self._control_names.split(text) if self._control else [text]:
            if part in self._control:
                pieces.append(self._control[part]["id"])
            elif part:
                pieces.append(part)
        return pieces

    @cached_property
    def _control_names(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @staticmethod
    def _known_roles(
        messages: Sequence[Mapping[str, Any]], template: ChatTemplate
    ) -> Sequence[Mapping[str, Any]]:
        """Templates drop turns of roles they do not know, silently: rename or refuse those."""
        turns = []
        for i, message in enumerate(messages):
            role = message["role"]
            if role == "developer" and not template.knows_role("developer"):
                message = {**message, "role": "system"}
            elif role == "tool" and not template.knows_role("tool"):
                raise InvalidRequest(
                    "The model's chat template has no tool messages.", param=f"messages[{i}].role"
                )
            turns.append(message)
        return turns

    # ---- loading

    def _check_fits(self, layout: Mapping[str, Any]) -> None:
        decoder = (layout.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise CheckpointError(self._file, "a ByteLevel decoder", decoder)
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        token, largest = max(vocabulary.items(), key=lambda item: item[1])
        if largest >= self.vocab_size:
            raise CheckpointError(
                self._file,
                f"ids below the model's vocab_size {self.vocab_size}",
                f"{token!r} = {largest}",
                hint="tokenizer.json belongs to another model",
            )
        self._longest_token = max(map(len, vocabulary))

    def _unknown_ids(self) -> set[int]:
        """The unknown-token id may stand for any text, so it is allowed."""
        unknown = getattr(self._library.model, "unk_token", None)
        found = None if unknown is None else self._library.token_to_id(unknown)
        return set() if found is None else {found}

    def _special_ends(self, settings: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids put around a text: by the flags of tokenizer_config.json, else the post-processor."""
        plain: list[int] = self._library.encode("x", add_special_tokens=False).ids
        full: list[int] = self._library.encode("x", add_special_tokens=True).ids
        at = full.index(plain[0])
        ends = full[:at], full[at + len(plain) :]
        bos, eos = (self._named(settings, name) for name in ("bos_token", "eos_token"))
        prefix = ends_by_flag(settings.get("add_bos_token"), bos, ends[0])
        return prefix, ends_by_flag(settings.get("add_eos_token"), eos, ends[1])

    def _named(self, settings: Mapping[str, Any], name: str) -> int | None:
        text = token_text(settings.get(name))
        found: int | None = None if text is None else self._library.token_to_id(text)
        return found

    def _load_template(self, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        file, source = template_source(folder, settings)
        if source is None:
            return None
        variables = {
            name: text for name in _TEMPLATE_VARIABLES if (text := token_text(settings.get(name)))
        }
        ids = {name: int(token["id"]) for name, token in self._control.items()}
        try:
            template = ChatTemplate(source, ids, variables)
        except TemplateError as error:
            raise CheckpointError(file, "a chat template", f"{error}") from None
        self._check_template(file, template)
        return template

    def _check_template(self, file: Path, template: ChatTemplate) -> None:
        """Harmless conversations must give the same ids guarded and unguarded."""
        for probe in _PROBES:
            messages = [{"role": role, "content": text} for role, text in probe]
            try:
                trusting = template.render_plain(messages, _PROBE_CHARS)
            except InvalidRequest:
                continue  # a template may refuse, for example, a system message
            pieces = template.render(messages, max_chars=_PROBE_CHARS, max_s=60.0)
            if self._encode_pieces(pieces) != self._encode_trusting(trusting):
                raise CheckpointError(
                    file,
                    "a chat template that writes its control tokens as whole words",
                    "one whose guarded rendering differs",
                    hint="control tokens put together from parts are not supported",
                )

    def _encode_trusting(self, text: str) -> list[int]:
        self._library.encode_special_tokens = False
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
            return ids
        finally:
            self._library.encode_special_tokens = True

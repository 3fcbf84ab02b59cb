"""A checkpoint's chat template, rendered so that the text of users can never become control tokens.

The danger: a template joins `<｜User｜>` and a user's text into one string, and a tokenizer that
reads this string cannot tell the template's markers from the same letters typed by the user.

The idea: mark the template, not the users. Every name of a control token that stands in the
template's own source is replaced, before compiling, by a mark: a run of Unicode noncharacters that
spells the token's id. Rendering then yields marks wherever the template wrote a control token, and
only there; whatever else looks like one is plain text. Noncharacters in users' texts are escaped.
Text the template only compares with (`'</think>' in content`, `.split('</think>')`) stays as it is.
A template that assembles markers from parts would lose them: the Tokenizer checks for that at load.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from cluster.errors import InvalidRequest, one_line

_ESCAPE, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_DIGIT = 0xFDE0
"""U+FDE0 to U+FDEF are the hexadecimal digits inside marks and escapes."""
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_MARK = re.compile("\ufdd1([\ufde0-\ufdef]+)\ufdd2")
_ESCAPED = re.compile("\ufdd0([\ufde0-\ufdef]{2})")
_BUILDERS = frozenset({"append", "extend", "format", "join", "update"})
"""String and list methods whose arguments end up in the output; of others, they are looked for."""


class RenderLimit(ValueError):
    """The rendered conversation is longer than asked for."""


class ChatTemplate:
    """One compiled template. Rendering is safe from several threads."""

    def __init__(
        self, source: str, control_ids: Mapping[str, int], variables: Mapping[str, str]
    ) -> None:
        """`control_ids`: id of each control token by its name. `variables`: bos_token and so on.

        Raises jinja2.TemplateError if the source does not compile.
        """
        self.source = source
        self._variables = dict(variables)
        self._env = _environment()
        self._plain = self._env.from_string(source)
        self._mark = _marker(control_ids)
        tree = _MarkLiterals(self._mark).visit(self._env.parse(source))
        self._marked = Template.from_code(
            self._env, self._env.compile(tree), self._env.make_globals(None)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_chars: int,
        max_s: float,
        add_generation_prompt: bool = True,
        switches: Mapping[str, bool] | None = None,
    ) -> list[str | int]:
        """The prompt in pieces: an int is a control token of the template, a str is plain text.

        Raises InvalidRequest if the template refuses the conversation or takes longer than
        `max_s`, RenderLimit past `max_chars`.
        """
        context = self._context(add_generation_prompt, switches or {})
        context |= {name: self._mark(text) for name, text in self._variables.items()}
        context["messages"] = _escape(messages)
        return _pieces(_render(self._marked, context, max_chars, max_s))

    def render_plain(self, messages: Sequence[Mapping[str, Any]], max_chars: int) -> str:
        """The same as one string, marks spelled out: what a trusting renderer would produce."""
        context = self._context(True, {}) | self._variables | {"messages": messages}
        return _render(self._plain, context, max_chars, max_s=60.0)

    def knows_role(self, role: str) -> bool:
        """Whether the source mentions a role by name, in quotes."""
        return f"'{role}'" in self.source or f'"{role}"' in self.source

    @staticmethod
    def _context(add_generation_prompt: bool, switches: Mapping[str, bool]) -> dict[str, Any]:
        return {**switches, "tools": None, "add_generation_prompt": add_generation_prompt}


class _MarkLiterals(NodeTransformer):
    """Replaces control tokens in everything the template writes out itself."""

    def __init__(self, mark: Callable[[str], str]) -> None:
        self._mark = mark

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._mark(node.value)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        method = node.node
        if isinstance(method, nodes.Getattr) and method.attr not in _BUILDERS:
            return self._only_subject(node)
        return self.generic_visit(node)

    def _only_subject(self, node: Any) -> nodes.Node:
        if node.node is not None:
            node.node = self.visit(node.node)
        return node  # type: ignore[no-any-return]

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._only_subject(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._only_subject(node)

    def _as_it_is(self, node: nodes.Node) -> nodes.Node:
        return node

    visit_Compare = visit_Test = _as_it_is


def _marker(control_ids: Mapping[str, int]) -> Callable[[str], str]:
    if not control_ids:
        return lambda text: text
    names = re.compile("|".join(re.escape(n) for n in sorted(control_ids, key=len, reverse=True)))

    def mark_one(match: re.Match[str]) -> str:
        return f"{_OPEN}{_to_digits(f'{control_ids[match[0]]:x}')}{_CLOSE}"

    return lambda text: names.sub(mark_one, text)


def _to_digits(number: str) -> str:
    return "".join(chr(_DIGIT + int(digit, 16)) for digit in number)


def _from_digits(digits: str) -> int:
    return int("".join(f"{ord(digit) - _DIGIT:x}" for digit in digits), 16)


def _escape(value: Any) -> Any:
    """Copies of a client's strings, also inside lists and dicts, in which no mark can stand."""
    if isinstance(value, str):
        return _RESERVED.sub(lambda m: _ESCAPE + _to_digits(f"{ord(m[0]) - 0xFDD0:02x}"), value)
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_escape(item) for item in value]
    return value


def _pieces(text: str) -> list[str | int]:
    parts = _MARK.split(text)  # text, digits, text, digits, .., text
    pieces: list[str | int] = []
    for i, part in enumerate(parts):
        if i % 2:
            pieces.append(_from_digits(part))
        elif part:
            pieces.append(_ESCAPED.sub(lambda m: chr(0xFDD0 + _from_digits(m[1])), part))
    return pieces


def _render(template: Template, context: dict[str, Any], max_chars: int, max_s: float) -> str:
    chunks: list[str] = []
    num_chars, started = 0, time.monotonic()
    try:
        for chunk in template.generate(context):
            chunks.append(chunk)
            num_chars += len(chunk)
            if num_chars > max_chars:
                raise RenderLimit(f"more than {max_chars} characters")
            if time.monotonic() - started > max_s:
                raise _refusal(f"it took longer than {max_s:g} s")
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise _refusal(one_line(str(e), 200)) from None
    return "".join(chunks)


def _refusal(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model's chat template cannot render these messages: {reason}.", param="messages"
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that Hugging Face templates are written for."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(value: Any, **options: Any) -> str:
    """Unlike jinja's own: no HTML escapes, non-ASCII as it is."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

"""The domains by name, and what their token counts are kept equal over."""

from __future__ import annotations

from default_model.corpus import arithmetic, chat, code, facts, french, reading, stories
from default_model.corpus.base import Sampler

DOMAINS: dict[str, Sampler] = {
    "stories": stories.sample,
    "arithmetic": arithmetic.sample,
    "facts": facts.sample,
    "code": code.sample,
    "french": french.sample,
    "chat": chat.sample,
    "reading": reading.sample,
}

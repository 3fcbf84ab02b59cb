"""The tokenizer: byte-level BPE trained on the corpus, with DeepSeek-V3's special tokens.

Digits are tokens of their own, so that sums are learnt column by column.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.tiny_tokenizer import SPECIAL_TOKENS
from default_model.corpus.base import Dialogue
from default_model.corpus.domains import DOMAINS

NUM_DIALOGUES = 28_000


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """Ids 0-16 are the special tokens, then the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that `train_tokenizer` made and saved."""
    return Tokenizer.from_file(str(path))


def _texts(seed: int) -> Iterator[str]:
    for number in range(NUM_DIALOGUES):
        rng = Random(f"tokenizer {seed} {number}")
        sample = list(DOMAINS.values())[number % len(DOMAINS)]
        dialogue: Dialogue = sample(rng, False)
        yield from (text for _, text in dialogue.turns)

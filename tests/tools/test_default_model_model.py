"""The attention scores of the model that trains: found, and clipped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from default_model.model import FASTEST_SHRINK, Attention, DeepseekV3, _peaks
from default_model.settings import model_config

pytestmark = pytest.mark.usefixtures("tiny")
HEADS, LENGTH = 2, 12


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def attention() -> Attention:
    """Of two heads, with random weights."""
    torch.manual_seed(0)
    return Attention(model_config().model_copy(update={"num_attention_heads": HEADS}))


@torch.no_grad()
def scores(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The nope and the rope part [B, H, T, T] of a random input's scores."""
    seen: list[tuple[Tensor, Tensor]] = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((q, k))
        return attend(q, k, v, **options)

    config = attention.config
    angles = torch.polar(torch.ones(LENGTH, config.qk_rope_head_dim // 2), random(LENGTH, 1))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        attention.eval()(random(3, LENGTH, config.hidden_size), angles, None)
    nope = config.qk_nope_head_dim
    (q, k) = seen[0]
    return q[..., :nope] @ k[..., :nope].mT, q[..., nope:] @ k[..., nope:].mT


@pytest.mark.parametrize(
    ("peaks", "factors"),
    [
        ([60.0, 15.0], [FASTEST_SHRINK, 1.0]),  # down to 30 at once would be half
        ([30.0, 31.0], [1.0, 30 / 31]),
        ([-5.0, 0.0], [1.0, 1.0]),
    ],
)
def test_only_heads_above_the_limit_shrink(
    peaks: list[float],
    factors: list[float],
    attention: Attention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = scores(attention, monkeypatch)
    attention.peaks = torch.tensor(peaks)
    attention.clip_scores(30.0)
    shrink = torch.tensor(factors).view(HEADS, 1, 1)
    for old, new in zip(before, scores(attention, monkeypatch), strict=True):
        torch.testing.assert_close(new, old * shrink, rtol=1e-4, atol=1e-5)


def peaks_of_a_loop(q: Tensor, k: Tensor, mask: Tensor | None) -> list[float]:
    batch, heads, length, width = q.shape
    peaks = [-torch.inf] * heads
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(length):
                    if j <= i if mask is None else mask[b, 0, i, j]:
                        peaks[h] = max(peaks[h], float(q[b, h, i] @ k[b, h, j]) / width**0.5)
    return peaks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_peaks_are_those_of_a_loop(batch: int, masked: bool) -> None:
    """Masks are as wide as the whole batch, of which only the first rows are looked at."""
    q, k = (random(batch, HEADS, LENGTH, 8, seed=seed) for seed in (2, 3))
    mask = None
    if masked:
        dialogues = torch.arange(LENGTH) // torch.tensor([5, 4, 3, 2])[:, None]  # [4, T]
        mask = (dialogues[:, :, None] == dialogues[:, None]).tril().unsqueeze(1)
    peaks = _peaks(q, k, mask)
    assert peaks.tolist() == pytest.approx(peaks_of_a_loop(q, k, mask), rel=1e-5)


def test_what_a_pass_writes_moves_with_the_model() -> None:
    model = DeepseekV3(model_config()).train()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    hidden = model(torch.arange(40).view(2, 20))
    model.draft_logits(hidden, torch.arange(40).view(2, 20))
    written = [gate.load for gate in model.gates()] + [a.peaks for a in model.attentions()]
    assert all(tensor.any() for tensor in written)
    model.to("meta")
    moved = [gate.load for gate in model.gates()] + [a.peaks for a in model.attentions()]
    assert all(tensor.is_meta for tensor in moved)

"""The engine on a device, played by the CPU: what clients get is what the host's engine gives."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.device_hop import DirectHop, StagedHop, open_hop
from attention.device_sampling import greedy_ids, sample_on_device
from attention.messages import SamplingParams
from attention.sampler import NOT_FINITE, SampleRow, TokenCounts, sample
from experts.staging import Staging
from router.local import LocalMoe
from tests.attention.harness import GREEDY, SEEDED, Answers, Rig, submit
from tests.gpu.device_rig import KERNELS, TWINS, TWINS_BF16
from tests.reference import prompts

RigOf = Callable[[str], Rig]
F32: dict[str, Any] = {"kv_cache_dtype": "float32"}
PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "logprobs": GREEDY.model_copy(update={"logprobs": 2}),
    "penalties": GREEDY.model_copy(update=PENALTIES),
    "min_tokens": GREEDY.model_copy(update={"min_tokens": 5, "stop_token_ids": (7, 300)}),
    "prompt": GREEDY.model_copy(update={"prompt_logprobs": 0, "max_tokens": 3}),
    "nothing": GREEDY.model_copy(update={"max_tokens": 0}),
}


def everything() -> list[Any]:
    """A request of each kind, prompts of 5, 64 and 150 tokens."""
    return [submit(kind, prompts()[1 + i % 3], KINDS[kind]) for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize("preset", ["v2-lite", "v3", "v3fp8"])
def test_the_tokens_are_those_of_the_host(preset: str, rig: RigOf) -> None:
    settings = {"num_kv_blocks": 256, "max_num_batched_tokens": 100}
    host = Answers(rig(preset).engine(**settings), everything()).run()
    device = Answers(rig(preset).engine(TWINS, **F32, **settings), everything()).run()
    assert device.all_tokens() == host.all_tokens()
    for kind in ("logprobs", "prompt"):
        for ours, theirs in zip(device.outputs[kind], host.outputs[kind], strict=True):
            assert_close_logprobs(ours, theirs)


def assert_close_logprobs(ours: Any, theirs: Any) -> None:
    entries = [
        [*(output.logprobs or ()), *(output.prompt_logprobs or ())] for output in (ours, theirs)
    ]
    for a, b in zip(*entries, strict=True):  # None: the first of a prompt follows nothing
        assert (a is None) == (b is None)
        assert a is None or abs(a.logprob - b.logprob) < 1e-3


def test_preempted_and_replayed_requests_go_on_where_they_were(rig: RigOf) -> None:
    """12 blocks of 4 tokens for 4 requests of up to 21: some give theirs up on the way."""
    requests = [submit(f"r{i}", prompts()[2][i : i + 9], (GREEDY, SEEDED)[i % 2]) for i in range(4)]
    wanted = Answers(rig("v3").engine(TWINS, **F32), requests).run().all_tokens()
    tight = rig("v3").engine(TWINS, num_kv_blocks=12, **F32)
    assert Answers(tight, requests).run().all_tokens() == wanted
    assert tight.stats().num_preemptions > 0
    replays = [r.model_copy(update={"emitted_ids": wanted[r.request_id][:5]}) for r in requests]
    again = Answers(rig("v3").engine(TWINS, **F32), replays).run().all_tokens()
    assert again == {name: tokens[5:] for name, tokens in wanted.items()}


def test_deterministic_tokens_do_not_depend_on_the_company(rig: RigOf) -> None:
    requests = [submit(f"r{i}", prompts()[1][: i + 2], SEEDED) for i in range(4)]
    settings: dict[str, Any] = {"deterministic": True, **F32}
    moe = LocalMoe.open(rig("v2-lite").checkpoint, TWINS, deterministic=True)
    engine = rig("v2-lite").engine(TWINS, moe, **settings)
    together = Answers(engine, requests).run().all_tokens()
    for request in requests:
        assert (
            Answers(engine, [request]).run().tokens(request.request_id)
            == (together[request.request_id])
        )


@pytest.mark.parametrize("max_num_seqs", [8, 1])
def test_a_row_that_is_not_finite_ends_its_step_and_no_later_one(
    max_num_seqs: int, rig: RigOf
) -> None:
    """As with a router, which refuses the micro-batch; in recorded steps and in a prompt's."""
    v2lite = rig("v2-lite")
    engine = v2lite.engine(
        TWINS, LocalMoe.open(v2lite.checkpoint, TWINS), max_num_seqs=max_num_seqs, **F32
    )
    wanted = Answers(engine, [submit("good", prompts()[1])]).run().tokens("good")
    embedding = engine._runner._model._weights.embedding
    kept = embedding.clone()
    embedding.fill_(torch.nan)
    bad = Answers(engine, [submit("bad", prompts()[2])]).run()
    assert (bad.last("bad").finish_reason, bad.tokens("bad")) == ("error", [])
    assert bad.last("bad").error == "row 0 of the micro-batch is not finite"
    embedding.copy_(kept)
    assert Answers(engine, [submit("again", prompts()[1])]).run().tokens("again") == wanted


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.parametrize("experts", ["local", "device router", "host router"])
def test_bfloat16_answers(experts: str, dtype: str, rig: RigOf) -> None:
    """All experts on the device; a router there; one on the host, to which rows go as bfloat16.
    Finite and as long as asked; which tokens depends on rounding."""
    v3fp8 = rig("v3fp8")
    moe: Any = None
    if experts == "local":
        moe = LocalMoe.open(v3fp8.checkpoint, TWINS_BF16)
    elif experts == "device router":
        moe = v3fp8.pool.router(device=TWINS_BF16)
    engine = v3fp8.engine(TWINS_BF16, moe, kv_cache_dtype=dtype)
    params = GREEDY.model_copy(update={"max_tokens": 4})
    requests = [submit("a", prompts()[2], params), submit("b", prompts()[1], SEEDED)]
    answers = Answers(engine, requests).run()
    assert [len(tokens) for tokens in answers.all_tokens().values()] == [4, 12]
    assert engine._runner._model._mla._caches[0].dtype == (
        torch.uint8 if dtype == "fp8" else torch.bfloat16
    )


@pytest.fixture
def two_layers(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Iterator[Rig]:
    """V2-Lite's preset less all layers but a dense one and a MoE layer."""
    shutil.copytree(checkpoint_dir("v2-lite"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_triton_kernels_from_prompt_to_token(two_layers: Rig) -> None:
    """In Triton's interpreter: recorded padding, a naive chunk, an absorbed decode."""
    moe = LocalMoe.open(two_layers.checkpoint, KERNELS)
    request = submit("a", prompts()[1], GREEDY.model_copy(update={"max_tokens": 2}))
    settings: dict[str, Any] = {"max_num_seqs": 1, **F32}
    engine = two_layers.engine(KERNELS, moe, **settings)
    assert engine._runner._model.prefers_naive(5, 5)
    wanted = Answers(two_layers.engine(**settings), [request]).run()
    assert Answers(engine, [request]).run().tokens("a") == wanted.tokens("a")


def test_a_cache_that_the_kernels_cannot_read_is_refused(rig: RigOf) -> None:
    with pytest.raises(ValueError, match="bfloat16: this device computes in torch.float32"):
        rig("v2-lite").engine(TWINS, kv_cache_dtype="bfloat16")


def test_progress_is_logged(rig: RigOf, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="attention"):
        rig("v2-lite").engine(TWINS, max_num_seqs=3, **F32)
    said = [record.getMessage() for record in caplog.records]
    assert "weights: 4 of 4 layers" in said[0]
    assert [line for line in said if "rows" in line][-1] == "graphs: 3 of 3 buckets, 1 rows"


# --- greedy rows on the device ---

INF, NAN = float("inf"), float("nan")
ROWS = [
    ([0.0, 2.0, 2.0, 1.0], 1),  # lowest id among equals
    ([-INF, -3.0, -INF, -3.0], 1),
    ([0.0, NAN, 9.0, NAN], NOT_FINITE),
    ([0.0, INF, 1.0, 1.0], NOT_FINITE),
    ([-INF] * 4, NOT_FINITE),
    ([-0.0, 0.0, -0.0, 0.0], 0),
]


def test_the_largest_logit_is_found_as_on_the_host() -> None:
    logits = torch.tensor([row for row, _ in ROWS])
    assert greedy_ids(logits).tolist() == [wanted for _, wanted in ROWS]
    rows = [SampleRow(GREEDY, 0)] * len(ROWS)
    assert sample_on_device(logits, rows, Staging(TWINS)) == sample(logits.numpy(), rows)


def test_only_rows_that_need_it_go_to_the_host() -> None:
    class Counting(Staging):
        sent: list[tuple[int, ...]] = []

        def to_host(self, x: Tensor) -> Any:
            self.sent.append(tuple(x.shape))
            return super().to_host(x)

    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.standard_normal((5, 300)).astype(np.float32))
    penalised = SampleRow(GREEDY.model_copy(update=PENALTIES), 3, TokenCounts([5], [7]))
    rows = [SampleRow(GREEDY, 0), SampleRow(SEEDED, 2), SampleRow(GREEDY, 1), penalised]
    rows.append(SampleRow(SamplingParams(temperature=0.0, logprobs=2), 4))
    staging = Counting(TWINS)
    assert sample_on_device(logits, rows, staging) == sample(logits.numpy(), rows)
    assert staging.sent == [(5,), (3, 300)]
    staging.sent.clear()
    assert sample_on_device(logits, rows[:1] * 5, staging)[4].token_id == logits[4].argmax()
    assert staging.sent == [(5,)]


# --- hops ---


class Told:
    """A MoE client, a staging and a copy that tell what is done with them."""

    num_renormalised = 0

    def __init__(self, accepts_device: bool) -> None:
        self.accepts_device, self.said = accepts_device, []

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Tensor:
        self.said.append("begin")
        return x

    def finish(self, ticket: Tensor) -> Tensor:
        self.said.append("finish")
        return ticket

    def to_host(self, x: Tensor) -> Told:
        self.said.append("to_host")
        self.x = x
        return self

    def wait(self) -> Tensor:
        self.said.append("wait")
        return self.x

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.said.append("to_device")
        return tensors


@pytest.mark.parametrize(
    ("accepts_device", "kind", "wanted"),
    [
        (True, DirectHop, "begin | finish"),
        (False, StagedHop, "to_host | wait begin finish to_device"),
    ],
)
def test_the_shared_expert_is_launched_before_anything_is_waited_for(
    accepts_device: bool, kind: type, wanted: str
) -> None:
    told = Told(accepts_device)
    hop = open_hop(told, told)
    assert isinstance(hop, kind)
    receive = hop.send(3, torch.ones(2, 4), None)
    told.said.append("|")  # here the shared expert is queued
    assert torch.equal(receive(), torch.ones(2, 4))
    assert " ".join(told.said) == wanted

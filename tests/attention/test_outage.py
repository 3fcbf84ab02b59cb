"""Steps that wait for experts in vain, or do without some: who ends, who goes on, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from attention.engine import NOTICE_S
from attention.model import MIN_WAIT_S
from router.errors import ExpertsUnavailable, RemoteUnavailable, RouterUnavailable
from router.times import HopTimes
from tests.attention.harness import SEEDED, Answers, FakeClock, Flaky, Rig, submit
from tests.reference import prompts

RigOf = Callable[[str], Rig]
EXPERTS = ExpertsUnavailable(1, [4], 2.0)


def usual_tokens(rig: RigOf, *names: str) -> dict[str, list[int]]:
    requests = [submit(name, prompts()[1], SEEDED) for name in names]
    return Answers(rig("v3").engine(), requests).run().all_tokens()


@pytest.mark.parametrize(
    "error",
    [EXPERTS, RouterUnavailable(1, 2.0), RemoteUnavailable(1, "DEADLINE", "nobody")],
    ids=["experts", "router", "remote"],
)
def test_a_step_is_done_again_while_its_requests_have_time(error: Exception, rig: RigOf) -> None:
    """In prefill and in decode; no token is lost, doubled or changed."""
    engine = rig("v3").engine()
    engine._clock = FakeClock()
    engine._runner = Flaky(engine._runner, dict.fromkeys((1, 2, 5, 9), error))
    requests = [submit(name, prompts()[1], SEEDED, deadline_s=60.0) for name in "ab"]
    answers = Answers(engine, requests).run()
    assert answers.all_tokens() == usual_tokens(rig, "a", "b")
    assert engine.stats().step_errors == 4
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_only_those_whose_time_is_over_end(rig: RigOf) -> None:
    engine = rig("v3").engine()
    engine._clock = clock = FakeClock()
    engine._runner = flaky = Flaky(engine._runner, {3: EXPERTS})
    requests = [
        submit("short", prompts()[1], SEEDED, deadline_s=5.0),
        submit("long", prompts()[1], SEEDED, deadline_s=50.0),
        submit("none", prompts()[1], SEEDED),
    ]
    answers = Answers(engine, requests)
    answers.step()
    answers.step()
    clock.now_s += 5.0 - NOTICE_S
    answers.run()
    assert flaky.waits[:4] == pytest.approx([clock.now_s] * 3 + [clock.now_s + 45.0])
    assert answers.last("short").finish_reason == "unavailable"
    assert "no answer from any worker" in (answers.last("short").error or "")
    usual = usual_tokens(rig, "long", "none")
    assert {name: answers.tokens(name) for name in usual} == usual


def test_the_limit_of_the_router_is_that_of_requests_without_a_deadline(rig: RigOf) -> None:
    engine = rig("v3").engine()
    engine._clock = FakeClock()
    engine._runner = Flaky(engine._runner, {2: EXPERTS})
    requests = [
        submit("none", prompts()[1], SEEDED),
        submit("long", prompts()[1], SEEDED, deadline_s=50.0),
    ]
    answers = Answers(engine, requests).run()
    assert answers.last("none").finish_reason == "unavailable"
    assert answers.tokens("long") == usual_tokens(rig, "long")["long"]


def test_who_expires_in_the_queue_meanwhile_is_told_the_same(rig: RigOf) -> None:
    engine = rig("v3").engine(max_num_seqs=1)
    engine._clock = clock = FakeClock()
    engine._runner = Flaky(engine._runner, {1: EXPERTS})
    requests = [
        submit("runs", prompts()[1], SEEDED, deadline_s=50.0),
        submit("waits", prompts()[1], SEEDED, deadline_s=5.0),
    ]
    answers = Answers(engine, requests)
    answers.step()
    clock.now_s += 6.0
    answers.step()
    assert answers.last("waits").finish_reason == "unavailable"
    answers.run()
    assert answers.last("runs").finish_reason == "length"


class Moe:
    """Notes the limits that it is given."""

    num_renormalised = 0

    def __init__(self, moe: Any):
        self.moe, self.limits = moe, []

    hop_times = HopTimes()

    def begin(self, layer: int, x: Any, deadline_s: float | None = None) -> Any:
        self.limits.append(deadline_s)
        return self.moe.begin(layer, x, deadline_s)

    def finish(self, ticket: Any) -> Any:
        return self.moe.finish(ticket)


def test_the_experts_are_given_the_time_that_is_left(rig: RigOf) -> None:
    engine = rig("v3").engine()
    model = engine._runner._model
    model._moe = moe = Moe(model._moe)
    Answers(engine, [submit("a", [20], deadline_s=1000.0)]).step()
    assert all(900.0 < limit < 1000.0 for limit in moe.limits)
    moe.limits.clear()
    Answers(engine, [submit("b", [20], deadline_s=0.1)]).step()
    assert all(limit >= MIN_WAIT_S for limit in moe.limits)
    moe.limits.clear()
    Answers(rig("v3").engine(), [submit("c", [20])])
    assert moe.limits == []


class Renormalising:
    """A runner that says of chosen steps, the first is 1, that they went without some experts."""

    def __init__(self, runner: Any, steps: set[int]):
        self.runner, self.steps, self.step = runner, steps, 0

    def run(self, schedule: Any, wait_until_s: float | None = None) -> Any:
        self.step += 1
        results = self.runner.run(schedule, wait_until_s)
        return [replace(result, renormalised=self.step in self.steps) for result in results]


def test_outputs_say_when_experts_were_left_out(rig: RigOf) -> None:
    """Of prefill chunks without an output of their own too."""
    engine = rig("v3").engine(max_num_batched_tokens=16, max_num_seqs=2)
    engine._runner = Renormalising(engine._runner, {2, 6})
    answers = Answers(engine, [submit("a", prompts()[2])]).run()  # 64 tokens: 4 chunks
    told = [output.renormalised for output in answers.outputs["a"]]
    assert told == [True, False, True] + [False] * 9


def test_blocks_computed_without_some_experts_are_not_shared(rig: RigOf) -> None:
    """16 tokens a chunk, 4 a block: the first chunk's 4 blocks are sound, none after it is."""
    engine = rig("v3").engine(max_num_batched_tokens=16, max_num_seqs=2)
    engine._runner = Renormalising(engine._runner, {2})
    first = Answers(engine, [submit("a", prompts()[2])]).run()
    again = Answers(engine, [submit("b", prompts()[2])]).run()
    third = Answers(engine, [submit("c", prompts()[2])]).run()
    cached = [
        a.outputs[n][0].num_cached_tokens for a, n in ((first, "a"), (again, "b"), (third, "c"))
    ]
    assert cached == [0, 16, 60]


def test_a_pool_that_lacks_experts_taints_what_it_computes(rig: RigOf) -> None:
    """From the router's counter to the output."""
    engine = rig("v3").engine()
    moe = engine._runner._model._moe
    moe.config = moe._own_lane._config = moe.config.model_copy(
        update={"on_unavailable": "renormalise", "expert_wait_s": 0.0}
    )
    pool = rig("v3").pool
    claims = dict(pool.claims)
    pool.claims["w0"] = {key for key in claims["w0"] if key[1] % 4}
    pool.publish()
    try:
        answers = Answers(engine, [submit("a", prompts()[1])]).run()
    finally:
        pool.claims.update(claims)
        pool.publish()
    assert answers.outputs["a"][0].renormalised
    assert engine.stats().kv_blocks_cached == 0

"""Tokens of the engine on small models, whatever batches, chunks, preemptions and faults do."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention.engine import Engine
from attention.messages import SamplingParams
from attention.sampler import SampleRow, TokenCounts, sample
from router.errors import ExpertsFailed
from tests.attention.harness import GREEDY, SEEDED, Answers, FakeClock, Flaky, Rig, submit
from tests.reference import Reference, prompts

RigOf = Callable[[str], Rig]


reference_of = cache(Reference)


def reference_tokens(folder: Path, ids: list[int], params: SamplingParams) -> list[int]:
    """Our sampler over the reference model's logits."""
    reference, counts, out = reference_of(folder), TokenCounts(ids), []
    reference.reset()
    logits = reference.forward(ids)[-1]
    while len(out) < (params.max_tokens or 0):
        used = counts if TokenCounts.needed(params) else None
        row = SampleRow(params, len(out), used)
        out.append(sample(logits.numpy()[None], [row])[0].token_id)
        counts.add(out[-1])
        logits = reference.forward(out[-1:])[-1]
    return out


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SEEDED,
        SEEDED.model_copy(update={"top_k": 20, "min_p": 0.01, "top_p": 1.0, "seed": -3}),
        SEEDED.model_copy(
            update={
                "repetition_penalty": 1.3,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.2,
                "logit_bias": {70: 3.0, 71: -100.0},
            }
        ),
    ],
    ids=["greedy", "seeded", "filters", "penalties"],
)
@pytest.mark.parametrize("preset", ["v2-lite", "v3"])
def test_tokens_are_those_of_the_reference(preset: str, params: SamplingParams, rig: RigOf) -> None:
    answers = Answers(
        rig(preset).engine(), [submit(str(i), ids, params) for i, ids in enumerate(prompts())]
    ).run()
    for index, ids in enumerate(prompts()):
        assert answers.tokens(str(index)) == reference_tokens(rig(preset).folder, ids, params)
        assert answers.last(str(index)).finish_reason == "length"


def workload(count: int, seed: int = 0) -> list[Any]:
    """Requests of mixed sizes and parameters, some with a common prefix."""
    rng = random.Random(seed)
    common = [rng.randrange(17, 273) for _ in range(24)]
    found = []
    for index in range(count):
        prompt = [rng.randrange(17, 273) for _ in range(rng.randrange(1, 40))]
        if rng.random() < 0.5:
            prompt = common + prompt
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8]), seed=index, max_tokens=rng.randrange(1, 20),
            top_p=rng.choice([1.0, 0.9]),
        )  # fmt: skip
        found.append(submit(f"r{index}", prompt, params))
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "tiny chunks": {"max_num_batched_tokens": 8},
    "preempting": {"num_kv_blocks": 30, "enable_prefix_caching": False},
    "preempting with prefix cache": {"num_kv_blocks": 30},
    "no prefix cache": {"enable_prefix_caching": False},
}


def run(rig: Rig, **settings: Any) -> tuple[dict[str, list[Any]], Engine]:
    defaults = {"max_model_len": 100, "num_kv_blocks": 200, "max_num_batched_tokens": 64}
    engine = rig.engine(**(defaults | settings))
    answers = Answers(engine, workload(16)).run()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    return {
        name: [answers.tokens(name), answers.last(name).finish_reason] for name in answers.outputs
    }, engine


@pytest.fixture(scope="module")
def usual(rig: RigOf) -> dict[str, list[Any]]:
    return run(rig("v3"))[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_do_not_depend_on_scheduling(
    name: str, rig: RigOf, usual: dict[str, list[Any]]
) -> None:
    found, engine = run(rig("v3"), **SETTINGS[name])
    assert found == usual
    assert (engine.stats().num_preemptions > 0) == name.startswith("preempting")


def logprobs(rig: Rig, **settings: Any) -> dict[str, list[Any]]:
    defaults = {"max_model_len": 100, "num_kv_blocks": 200, "max_num_batched_tokens": 64}
    engine = rig.engine(deterministic=True, **(defaults | settings))
    requests = [
        r.model_copy(update={"params": r.params.model_copy(update={"logprobs": 2})})
        for r in workload(8)
    ]
    answers = Answers(engine, requests).run()
    return {
        name: [(p.logprob, p.top) for output in outputs for p in output.logprobs or ()]
        for name, outputs in answers.outputs.items()
    }


@pytest.fixture(scope="module")
def usual_logprobs(rig: RigOf) -> dict[str, list[Any]]:
    return logprobs(rig("v2-lite"))


@pytest.mark.parametrize("name", SETTINGS)
def test_deterministic_logprobs_have_the_same_bits(
    name: str, rig: RigOf, usual_logprobs: dict[str, list[Any]]
) -> None:
    assert logprobs(rig("v2-lite"), **SETTINGS[name]) == usual_logprobs


def test_a_prefix_hit_changes_no_token(rig: RigOf) -> None:
    engine = rig("v3").engine()
    ids = prompts()[2]
    first = Answers(engine, [submit("a", ids)]).run()
    again = Answers(engine, [submit("b", ids)]).run()
    longer = Answers(engine, [submit("c", ids + first.tokens("a")[:6])]).run()
    salted = Answers(engine, [submit("d", ids, cache_salt="other")]).run()
    assert again.tokens("b") == salted.tokens("d") == first.tokens("a")
    assert longer.tokens("c")[:6] == first.tokens("a")[6:]
    cached = [
        a.outputs[n][0].num_cached_tokens for a, n in ((again, "b"), (longer, "c"), (salted, "d"))
    ]
    assert cached == [60, 68, 0]


def test_a_replay_that_was_over_only_ends(rig: RigOf) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, stop_token_ids=(99,))
    answers = Answers(
        rig("v3").engine(),
        [
            submit("length", [20], params, emitted_ids=[30, 31, 32]),
            submit("stop", [20], params, emitted_ids=[30, 99]),
            submit("eos", [20], params, emitted_ids=[1]),
        ],
    ).run()
    ends = {
        n: (answers.last(n).finish_reason, answers.last(n).stop_reason) for n in answers.outputs
    }
    assert ends == {"length": ("length", None), "stop": ("stop", 99), "eos": ("stop", None)}
    assert not any(answers.all_tokens().values())


def test_stop_ids_end_a_request_and_are_told(rig: RigOf) -> None:
    ids = prompts()[1]
    free = Answers(rig("v3").engine(), [submit("a", ids)]).run().tokens("a")
    stop_id = free[4]
    at = free.index(stop_id)
    params = GREEDY.model_copy(update={"stop_token_ids": (stop_id,)})
    stopped = Answers(rig("v3").engine(), [submit("a", ids, params)]).run()
    assert stopped.tokens("a") == free[: at + 1]
    assert (stopped.last("a").finish_reason, stopped.last("a").stop_reason) == ("stop", stop_id)
    later = params.model_copy(update={"min_tokens": at + 2})
    kept = Answers(rig("v3").engine(), [submit("a", ids, later)]).run()
    assert kept.tokens("a")[:at] == free[:at]
    assert len(kept.tokens("a")) >= at + 2
    assert stop_id not in kept.tokens("a")[: at + 2]


def test_end_of_sequence_unless_ignored(rig: RigOf) -> None:
    forced = {"temperature": 0, "max_tokens": 3, "logit_bias": {1: 1000.0}}
    answers = Answers(
        rig("v3").engine(),
        [
            submit("ends", [20], SamplingParams(**forced)),
            submit("goes on", [20], SamplingParams(ignore_eos=True, **forced)),
            submit("waits", [20], SamplingParams(min_tokens=2, **forced)),
        ],
    ).run()
    assert answers.tokens("ends") == [1]
    assert answers.last("ends").finish_reason == "stop"
    assert answers.last("ends").stop_reason is None
    assert answers.tokens("goes on") == [1, 1, 1]
    assert answers.tokens("waits").index(1) == 2


def test_max_tokens_none_runs_to_the_end_of_the_context(rig: RigOf) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    answers = Answers(rig("v3").engine(max_model_len=20), [submit("a", [20] * 7, params)]).run()
    assert len(answers.tokens("a")) == 13
    assert answers.last("a").finish_reason == "length"


@pytest.mark.parametrize("chunk", [8, 64])
def test_prompt_logprobs_score_the_prompt(chunk: int, rig: RigOf) -> None:
    ids = prompts()[2][:30]
    logits = Reference(rig("v3").folder).forward(ids).double().log_softmax(-1)
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    engine = rig("v3").engine(max_num_batched_tokens=chunk)
    Answers(engine, [submit("warm", ids)]).run()  # its blocks must not be used
    answers = Answers(engine, [submit("a", ids, params)]).run()
    (output,) = answers.outputs["a"]
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for place, found in enumerate(output.prompt_logprobs[1:], 1):
        assert found is not None
        assert found.token_id == ids[place]
        assert found.logprob == pytest.approx(logits[place - 1, ids[place]].item(), abs=2e-4)
        best = logits[place - 1].topk(2)
        assert [i for i, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=2e-4)


def test_prompt_logprobs_come_once_with_the_first_token(rig: RigOf) -> None:
    params = GREEDY.model_copy(update={"prompt_logprobs": 0, "logprobs": 0, "max_tokens": 3})
    answers = Answers(rig("v3").engine(), [submit("a", [20, 21, 22], params)]).run()
    assert [len(o.prompt_logprobs or ()) for o in answers.outputs["a"]] == [3, 0, 0]
    for output in answers.outputs["a"]:
        assert output.logprobs is not None
        assert [p.token_id for p in output.logprobs] == output.token_ids


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_ids": [20, 512]}, "prompt_ids: 512 is not below the vocabulary size 512"),
        ({"params": SamplingParams(logit_bias={600: 1.0})}, "logit_bias: 600"),
        ({"params": SamplingParams(allowed_token_ids=(512,))}, "allowed_token_ids: 512"),
        ({"params": SamplingParams(allowed_token_ids=())}, "allowed_token_ids is empty"),
        ({"prompt_ids": [20] * 300}, "300 prompt tokens exceed the context of 256 tokens"),
    ],
)
def test_what_cannot_run_ends_with_an_error(fields: dict[str, Any], text: str, rig: RigOf) -> None:
    request = submit("bad", [20]).model_copy(update=fields)
    answers = Answers(rig("v3").engine(), [request, submit("good", [20])]).run()
    assert answers.last("bad").finish_reason == "error"
    assert text in (answers.last("bad").error or "")
    assert answers.last("good").finish_reason == "length"


def test_an_id_in_use_is_refused_and_its_owner_goes_on(rig: RigOf) -> None:
    answers = Answers(rig("v3").engine(), [submit("a", [20]), submit("a", [30])]).run()
    reasons = [o.finish_reason for o in answers.outputs["a"] if o.finish_reason]
    assert reasons == ["error", "length"]


def test_aborts_at_random_points_return_all_blocks(rig: RigOf) -> None:
    rng = random.Random(3)
    engine = rig("v2-lite").engine(num_kv_blocks=40, max_model_len=100, max_num_batched_tokens=16)
    waiting = workload(24, seed=1)
    answers = Answers(engine)
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        if rng.random() < 0.3:
            last = engine.abort(f"r{rng.randrange(24)}")
            if last is not None:
                answers.outputs.setdefault(last.request_id, []).append(last)
        answers.step()
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total == 40
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert len(answers.outputs) == 24
    ends = [answers.last(name).finish_reason for name in answers.outputs]
    assert ends.count("abort") == stats.requests_aborted > 0
    assert stats.requests_finished == 24 - stats.requests_aborted


def test_an_aborted_id_is_free_at_once(rig: RigOf) -> None:
    """Of a request that runs, of one that was over when it came, of one that was refused."""
    engine = rig("v2-lite").engine()
    over = submit("a", [20], emitted_ids=[21] * 12)
    for request, reason in ((over, "length"), (submit("a", [10**6]), "error")):
        engine.add(request)
        last = engine.abort("a")
        assert last is not None
        assert last.finish_reason == reason
    engine.add(submit("a", [20]))
    engine.step()
    last = engine.abort("a")
    assert last is not None
    assert last.finish_reason == "abort"
    assert engine.abort("a") is None
    answers = Answers(engine, [submit("a", [20])]).run()
    assert (
        answers.all_tokens()
        == Answers(rig("v2-lite").engine(), [submit("a", [20])]).run().all_tokens()
    )
    assert [o.finish_reason for o in answers.outputs["a"]] == [None] * 11 + ["length"]


def test_a_deadline_ends_running_and_waiting_requests(rig: RigOf) -> None:
    engine = rig("v3").engine(max_num_seqs=1)
    engine._clock = clock = FakeClock()
    answers = Answers(
        engine,
        [
            submit("runs", [20], deadline_s=5.0),
            submit("waits", [21], deadline_s=4.0),
            submit("ok", [22]),
        ],
    )
    answers.step()
    clock.now_s += 4.5
    answers.step()
    answers.step()
    assert answers.last("waits").error == "the request's deadline has passed"
    clock.now_s += 0.5
    answers.run()
    assert answers.last("runs").finish_reason == "error"
    assert answers.last("ok").finish_reason == "length"
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_a_failed_step_ends_its_requests_only(rig: RigOf) -> None:
    engine = rig("v3").engine(max_num_seqs=2)
    engine._runner = Flaky(
        engine._runner,
        {3: ExpertsFailed(1, [4], 2.0), 6: RuntimeError("secret detail of the inside")},
    )
    answers = Answers(engine, [submit(name, prompts()[1]) for name in "abcde"]).run()
    usual = Answers(rig("v3").engine(), [submit("e", prompts()[1])]).run().tokens("e")
    ends = {name: answers.last(name).finish_reason for name in answers.outputs}
    assert ends == {"a": "error", "b": "error", "c": "error", "d": "error", "e": "length"}
    assert "every worker that holds them failed" in (answers.last("a").error or "")
    assert answers.last("c").error == "the model failed"
    assert answers.tokens("e") == usual
    stats = engine.stats()
    assert stats.step_errors == 2
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_logits_that_are_not_finite_end_one_request(rig: RigOf) -> None:
    engine = rig("v3").engine()
    logits = engine._runner._model.logits

    def broken(hidden: Any) -> Any:
        found = logits(hidden).clone()
        found[0] = np.nan
        return found

    engine._runner._model.logits = broken
    answers = Answers(engine, [submit("a", [20]), submit("b", [21])])
    answers.step()
    assert answers.last("a").error == "the model's logits are not finite"
    assert answers.last("b").finish_reason is None


def test_counters(rig: RigOf) -> None:
    engine = rig("v3").engine()
    Answers(engine, [submit("a", prompts()[2])]).run()
    Answers(engine, [submit("b", prompts()[2])]).run()
    stats = engine.stats()
    assert (stats.requests_received, stats.requests_finished) == (2, 2)
    assert (stats.prompt_tokens, stats.cached_tokens) == (64 + 4, 60)
    assert stats.generated_tokens == 24
    assert stats.steps == 24
    assert stats.busy_s > 0

"""A request goes on elsewhere from what its client has, exactly where it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attention.messages import SamplingParams, TokenOutput
from tests.attention.harness import GREEDY, SEEDED, Answers, Rig, submit
from tests.reference import prompts

RigOf = Callable[[str], Rig]
KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "penalties": SEEDED.model_copy(
        update={"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
    ),
    "min_tokens": SEEDED.model_copy(
        update={"min_tokens": 9, "stop_token_ids": tuple(range(0, 512, 2)), "ignore_eos": False}
    ),
    "stop ids": SEEDED.model_copy(update={"stop_token_ids": tuple(range(0, 512, 16))}),
    "logprobs": SEEDED.model_copy(update={"logprobs": 3}),
}


def story(outputs: list[TokenOutput]) -> list[object]:
    """What the client is told: tokens, their most likely rivals, the end."""
    last = outputs[-1]
    said: list[object] = [
        (token, *(() if o.logprobs is None else [t for t, _ in o.logprobs[i].top]))
        for o in outputs
        for i, token in enumerate(o.token_ids)
    ]
    return [*said, (last.finish_reason, last.stop_reason)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["fresh", "cached", "preempted"])
def test_the_continuation_is_the_same(kind: str, where: str, rig: RigOf) -> None:
    """On a fresh worker, on one that has the prompt cached, on one that preempts it."""
    ids, params = prompts()[1], KINDS[kind]
    whole = Answers(rig("v3").engine(), [submit("a", ids, params)]).run()
    tokens, told = whole.tokens("a"), story(whole.outputs["a"])
    for num_emitted in {1, len(tokens) // 2, len(tokens) - 1} - {0}:
        engine = rig("v3").engine(enable_prefix_caching=where == "cached")
        if where == "cached":
            Answers(engine, [submit("before", ids, GREEDY)]).run()
        replay = submit("a", ids, params, emitted_ids=tokens[:num_emitted])
        answers = Answers(engine, [replay])
        answers.step()
        if where == "preempted" and engine.has_work:
            engine._scheduler._preempt(engine._scheduler.running[0])
        answers.run()
        assert story(answers.outputs["a"]) == told[num_emitted:]
        assert all(o.num_cached_tokens == 0 for o in answers.outputs["a"])


def test_cached_tokens_are_told_once(rig: RigOf) -> None:
    engine, ids = rig("v3").engine(), prompts()[2]
    Answers(engine, [submit("a", ids)]).run()
    again = Answers(engine, [submit("b", ids)]).run().outputs["b"]
    assert [o.num_cached_tokens for o in again] == [60] + [0] * 11


def test_the_prompts_logprobs_are_neither_sent_nor_computed_again(rig: RigOf) -> None:
    params = SEEDED.model_copy(update={"prompt_logprobs": 2})
    ids = prompts()[2]
    whole = Answers(rig("v3").engine(), [submit("a", ids, params)]).run()
    told = [o.prompt_logprobs is not None for o in whole.outputs["a"]]
    assert told == [True] + [False] * 11
    engine = rig("v3").engine()
    Answers(engine, [submit("before", ids)]).run()
    replay = submit("a", ids, params, emitted_ids=whole.tokens("a")[:4])
    answers = Answers(engine, [replay]).run()
    assert answers.tokens("a") == whole.tokens("a")[4:]
    assert all(o.prompt_logprobs is None for o in answers.outputs["a"])
    assert engine.stats().cached_tokens > 0  # a prompt that needs them shares no blocks


def test_before_the_first_token_a_replay_is_a_new_request(rig: RigOf) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    answers = Answers(rig("v3").engine(), [submit("a", prompts()[1], params)]).run()
    assert answers.outputs["a"][0].prompt_logprobs is not None

"""The budget holds, nobody overtakes, nobody starves, blocks come back."""

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.config import AttentionConfig
from attention.kv_cache import BlockPool
from attention.messages import SamplingParams, Submit
from attention.request import Request, RequestState
from attention.scheduler import PromptCounters, RequestRefused, Schedule, Scheduler


def scheduler(
    num_blocks: int = 64, block_size: int = 4, max_model_len: int = 1000, **config: Any
) -> Scheduler:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | config
    pool = BlockPool(num_blocks, block_size, settings.get("enable_prefix_caching", True))
    return Scheduler(AttentionConfig(**settings), pool, max_model_len)


def request(
    name: str,
    num_prompt: int,
    max_tokens: int | None = 4,
    first_id: int | None = None,
    **fields: Any,
) -> Request:
    first_id = hash(name) % 10**6 if first_id is None else first_id
    submit = Submit(
        request_id=name,
        prompt_ids=[first_id] + list(range(1, num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        **fields,
    )
    return Request.create(submit, max_model_len=1000)


def work(schedule: Schedule) -> dict[str, int]:
    return {item.request.request_id: item.num_tokens for item in schedule.items}


def run(core: Scheduler, schedule: Schedule) -> list[Request]:
    """What the engine does after a step, with token 7 for everybody; the finished requests."""
    finished = []
    for item in schedule.items:
        samples = item.samples
        core.advance(item)
        if samples:
            item.request.append(7)
            if item.request.finish_reason(frozenset()):
                core.finish(item.request)
                finished.append(item.request)
    return finished


def step(core: Scheduler) -> dict[str, int]:
    schedule = core.schedule()
    run(core, schedule)
    return work(schedule)


def test_a_prompt_is_split_by_the_budget_and_decodes_go_first() -> None:
    core = scheduler()
    core.add(request("a", 20))
    assert step(core) == {"a": 16}
    core.add(request("b", 30))
    assert step(core) == {"a": 4, "b": 12}
    assert step(core) == {"a": 1, "b": 15}
    schedule = core.schedule()
    assert [item.num_tokens for item in schedule.items] == [1, 3]
    assert schedule.num_tokens == 4


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    core = scheduler(num_blocks=8)
    core.add(request("a", 20))
    core.add(request("large", 16))
    core.add(request("small", 1))
    assert step(core) == {"a": 16}
    assert step(core) == {"a": 4}
    assert [r.request_id for r in core.waiting] == ["large", "small"]


def test_max_num_seqs() -> None:
    core = scheduler(max_num_seqs=2)
    for name in "abc":
        core.add(request(name, 2))
    assert work(core.schedule()) == {"a": 2, "b": 2}


def test_the_youngest_is_preempted_waits_first_and_is_computed_again() -> None:
    core = scheduler(num_blocks=4, block_size=4, enable_prefix_caching=False)
    core.add(request("old", 7, max_tokens=9))
    core.add(request("young", 3, max_tokens=9))
    core.add(request("next", 1))
    assert step(core) == {"old": 7, "young": 3}  # 2 + 1 blocks, 1 spare, "next" would need 1 + 2
    assert step(core) == {"old": 1, "young": 1}
    assert step(core) == {"old": 1}  # takes the last block, and "young" has none for its fifth
    assert core.num_preemptions == 1
    assert [r.request_id for r in core.waiting] == ["young", "next"]
    young = core.waiting[0]
    assert (young.num_computed_tokens, young.remaining_tokens, young.block_ids) == (
        0,
        5,
        array("i"),
    )
    for _ in range(6):
        assert step(core) == {"old": 1}
    assert step(core) == {"young": 5, "next": 1}


def test_a_prompt_is_counted_once_and_what_is_computed_again_apart() -> None:
    core = scheduler(num_blocks=4, block_size=4)
    core.add(request("old", 7, max_tokens=9))
    core.add(request("young", 3, max_tokens=9))
    while core.has_work:
        step(core)
    assert core.num_preemptions == 1
    assert core.prompts == PromptCounters(7 + 3, 0, recomputed_tokens=5)
    core.add(request("replayed", 7, max_tokens=4, emitted_ids=[8, 9]))
    assert step(core) == {"replayed": 9}
    assert core.prompts == PromptCounters(7 + 3, 0, recomputed_tokens=5 + 9)


def test_what_the_prefix_cache_has_of_a_prompt_is_counted_once() -> None:
    core = scheduler()
    for name in "ab":
        core.add(request(name, 9, max_tokens=1, first_id=5))
        step(core)
    assert core.prompts == PromptCounters(9 + 9, admitted_cached_tokens=8)


def test_a_prefix_is_shared_and_the_last_token_is_always_computed() -> None:
    core = scheduler()
    first = request("a", 8, first_id=5)
    core.add(first)
    assert step(core) == {"a": 8}
    second, third = request("b", 8, first_id=5), request("c", 9, first_id=5)
    core.add(second)
    core.add(third)
    assert step(core) == {"a": 1, "b": 4, "c": 1}
    assert second.num_cached_tokens == 4
    assert third.num_cached_tokens == 8
    assert second.block_ids[0] == third.block_ids[0] == first.block_ids[0]


def test_another_salt_and_a_wish_for_prompt_logprobs_share_nothing() -> None:
    core = scheduler()
    core.add(request("a", 8, first_id=5))
    step(core)
    salted = request("b", 8, first_id=5, cache_salt="x")
    core.add(salted)
    echo = Request.create(
        Submit(
            request_id="c",
            prompt_ids=salted.submit.prompt_ids,
            params=SamplingParams(prompt_logprobs=0, max_tokens=4),
        ),
        1000,
    )
    core.add(echo)
    core.schedule()
    assert salted.num_cached_tokens == echo.num_cached_tokens == 0


def test_blocks_are_not_shared_before_they_are_written() -> None:
    core = scheduler(max_num_batched_tokens=64)
    core.add(request("a", 8, first_id=5))
    core.add(request("b", 8, first_id=5))
    assert work(core.schedule()) == {"a": 8, "b": 8}


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "text"),
    [
        (1001, 1, "1001 prompt tokens exceed the context of 1000 tokens"),
        (1000, 1, "leave no room for a new one"),
        (30, 12, "up to 42 tokens need 11 cache blocks, there are 10"),
        (30, None, "1000 tokens need 250 cache blocks"),
    ],
)
def test_what_can_never_run_is_refused(num_prompt: int, max_tokens: int | None, text: str) -> None:
    core = scheduler(num_blocks=10)
    with pytest.raises(RequestRefused, match=text):
        core.add(request("a", num_prompt, max_tokens))
    assert not core.has_work


def test_finish_takes_a_request_out_of_either_queue_and_may_be_repeated() -> None:
    core = scheduler(max_num_seqs=1)
    running, waiting = request("a", 4), request("b", 4)
    core.add(running)
    core.add(waiting)
    step(core)
    for _ in range(2):
        core.finish(running)
        core.finish(waiting)
    assert not core.has_work
    assert core.pool.num_free == core.pool.num_blocks


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request), with shared prefixes among them."""
    found, now = [], 0
    for index in range(draw(st.integers(1, 8))):
        now += draw(st.integers(0, 5))
        prompt = draw(st.integers(1, 30))
        tokens = draw(st.integers(1, 40 - prompt)) if prompt < 40 else 1
        new = request(f"r{index}", prompt, tokens, first_id=draw(st.integers(0, 2)))
        found.append((now, new))
    return found


@settings(deadline=None)  # machines are shared
@given(
    arrivals(),
    st.integers(10, 30),
    st.integers(1, 5),
    st.integers(0, 12),
    st.booleans(),
    st.data(),
)
def test_every_request_ends_within_budget_and_blocks_come_back(
    arriving: list[tuple[int, Request]],
    num_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
    prefix_caching: bool,
    data: st.DataObject,
) -> None:
    budget = max_num_seqs + extra_budget
    core = scheduler(
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
    )
    everyone = [new for _, new in arriving]
    for now in range(3000):
        while arriving and arriving[0][0] <= now:
            core.add(arriving.pop(0)[1])
        if not arriving and not core.has_work:
            break
        schedule = core.schedule()
        check_step(core, schedule, budget, max_num_seqs)
        oldest = core.running[0] if core.running else None
        progress = oldest and (oldest.num_computed_tokens, oldest.num_tokens)
        run(core, schedule)
        if oldest is not None:  # so nobody waits for ever
            assert (oldest.num_computed_tokens, oldest.num_tokens) != progress
        if core.running and data.draw(st.integers(0, 30)) == 0:
            core.finish(data.draw(st.sampled_from(core.running)))
    assert all(r.state is RequestState.FINISHED for r in everyone)
    assert core.pool.num_free == num_blocks


def check_step(core: Scheduler, schedule: Schedule, budget: int, max_num_seqs: int) -> None:
    assert schedule.num_tokens <= budget
    assert bool(schedule.items) == core.has_work
    assert len(schedule.items) <= max_num_seqs
    names = [item.request.request_id for item in schedule.items]
    assert len(set(names)) == len(names)
    for item in schedule.items:
        assert item.request.state is RequestState.RUNNING
        assert 1 <= item.num_tokens <= item.request.remaining_tokens
        room = len(item.request.block_ids) * core.pool.block_size
        assert item.request.num_computed_tokens + item.num_tokens <= room
    held = {block for r in core.running for block in r.block_ids}
    assert core.pool.num_free == core.pool.num_blocks - len(held)
    assert all(not r.block_ids for r in core.waiting)
    order = [int(r.request_id[1:]) for r in [*core.running, *core.waiting]]
    assert order == sorted(order)

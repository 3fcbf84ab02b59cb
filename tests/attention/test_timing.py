"""Where a request's time goes: worked out by hand on a clock by hand, and what experts computed
against what their workers counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attention.messages import SamplingParams, TokenOutput
from experts.messages import Snapshot, WorkerInfo
from experts.snapshots import SnapshotBoard
from router.client import RouterClient
from router.times import HopTimes
from tests.attention.harness import Answers, FakeClock, Rig, submit
from tests.reference import prompts
from tests.router.pool import SECRET, Pool, spread

RigOf = Callable[[str], Rig]


class Timed:
    """A MoE client that says what it is told of its hops."""

    hop_times = HopTimes()

    def __init__(self, moe: Any) -> None:
        self.begin, self.finish, self.num_renormalised = moe.begin, moe.finish, 0

    def log_hops(self, log: Any) -> None:
        raise AssertionError("nobody traces")


def timed_engine(rig: Rig, **settings: Any) -> Any:
    """An engine whose every step takes 2 s, of them 1.5 s in hops; experts compute for 0.6 s."""
    moe, clock = Timed(rig.pool.router()), FakeClock()
    engine = rig.engine(moe=moe, **settings)
    engine._clock = engine._meter._clock = clock
    run = engine._runner.run

    def slow(*args: Any) -> Any:
        clock.now_s += 2.0
        moe.hop_times = HopTimes(moe.hop_times.hop_s + 1.5, moe.hop_times.expert_s + 0.6)
        return run(*args)

    engine._runner.run = slow
    return engine


def test_parts_of_two_requests_of_a_batch(rig: RigOf) -> None:
    """Step 1 has 3 + 1 tokens, steps 2 and 3 have 1 + 1."""
    engine = timed_engine(rig("v3"))
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    answers = Answers(engine, [submit("a", [20, 21, 22], params), submit("b", [23], params)])
    engine._clock.now_s += 5.0
    answers.run()
    for name, expert_us in (("a", 450_000 + 2 * 300_000), ("b", 150_000 + 2 * 300_000)):
        first, second, last = answers.outputs[name]
        assert (first.prefill_us, second.prefill_us, last.prefill_us) == (2_000_000, None, None)
        assert (first.step_us, second.step_us, last.step_us) == (2_000_000, 4_000_000, 6_000_000)
        assert (first.hop_us, second.hop_us, last.hop_us) == (1_500_000, 3_000_000, 4_500_000)
        assert last.expert_us == pytest.approx(expert_us, abs=1)
        assert last.num_preemptions is None
    assert engine.step_times.samples("s") and engine.step_times.total == 6.0


def test_a_prompt_in_chunks_is_one_prefill(rig: RigOf) -> None:
    engine = timed_engine(rig("v3"), max_num_batched_tokens=4, max_num_seqs=2)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    answers = Answers(engine, [submit("a", list(range(20, 30)), params)]).run()
    first, last = answers.outputs["a"]
    assert (first.prefill_us, last.step_us) == (6_000_000, 8_000_000)
    assert (last.hop_us, last.expert_us) == (6_000_000, 2_400_000)


def test_a_step_that_fails_has_taken_its_time(rig: RigOf) -> None:
    engine = timed_engine(rig("v3"))
    slow = engine._runner.run

    def fail(*args: Any) -> Any:
        slow(*args)
        raise RuntimeError("broken")

    engine._runner.run = fail
    (output,) = Answers(engine, [submit("a", [20, 21])]).run().outputs["a"]
    assert (output.finish_reason, output.step_us) == ("error", 2_000_000)
    assert (output.hop_us, output.expert_us) == (1_500_000, 600_000)


def test_preemptions_are_told(rig: RigOf) -> None:
    engine = rig("v3").engine(num_kv_blocks=8)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    names = ["a", "b", "c"]
    answers = Answers(engine, [submit(n, [20, 21, 22], params) for n in names]).run()
    told = sum(answers.last(name).num_preemptions or 0 for name in names)
    assert told == engine.stats().num_preemptions > 0


# --- against what the workers counted ---


def busy_us(pool: Pool) -> float:
    return 1e6 * sum(worker.counters.busy_s for worker in pool.workers.values())


def cost_us(outputs: dict[str, list[TokenOutput]]) -> int:
    return sum(told[-1].expert_us for told in outputs.values())


def num_batches(pool: Pool) -> int:
    return sum(worker.counters.batches for worker in pool.workers.values())


def test_requests_pay_for_what_the_experts_computed(rig: RigOf, tmp_path: Path) -> None:
    """An inline router over two workers; requests of several lengths, one step with all of them."""
    pool = Pool(rig("v2-lite").checkpoint, spread(rig("v2-lite").checkpoint, 2))
    try:
        engine = rig("v2-lite").engine(moe=pool.router())
        asked = [submit(f"r{i}", ids) for i, ids in enumerate(prompts()[:3])]
        answers = Answers(engine, asked).run()
        assert cost_us(answers.outputs) == pytest.approx(busy_us(pool), abs=num_batches(pool))
        for told in answers.outputs.values():
            waited = [output.hop_us for output in told]
            assert waited == sorted(waited) and told[-1].expert_us < 2 * told[-1].hop_us
    finally:
        pool.close()


def test_attention_workers_that_share_a_router_pay_once(rig: RigOf, tmp_path: Path) -> None:
    """Three engines in threads over a deployed router with one lane, which merges what waits."""
    tmp_path.chmod(0o700)
    checkpoint = rig("v2-lite").checkpoint
    pool = Pool(checkpoint, spread(checkpoint, 2), tmp_path)
    router = pool.router(lanes=1)
    info = WorkerInfo(
        worker_id="router", role="router", endpoint=router.start(f"unix:{tmp_path}/router", SECRET),
        pid=1, node="",
    )  # fmt: skip
    board = SnapshotBoard()
    board.publish(Snapshot(version=1, epoch=1, ready=True, stage="", workers=(info,)))
    clients = [
        RouterClient(board, SECRET, f"attention-{i}", connect_timeout_s=60.0) for i in range(3)
    ]
    told: list[dict[str, list[TokenOutput]]] = []

    def serve(client: RouterClient) -> None:
        engine = rig("v2-lite").engine(moe=client)
        asked = [submit(f"r{i}", ids) for i, ids in enumerate(prompts()[1:3])]
        told.append(Answers(engine, asked).run().outputs)

    threads = [threading.Thread(target=serve, args=(client,)) for client in clients]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_asked = sum(len(outputs) for outputs in told)
        cost = sum(cost_us(outputs) for outputs in told)
        assert num_asked == 6
        assert cost == pytest.approx(busy_us(pool), abs=2 * num_batches(pool))
        assert sum(c.expert_s for c in router.counters) == pytest.approx(
            busy_us(pool) / 1e6, abs=1e-6 * num_batches(pool)
        )
    finally:
        for client in clients:
            client.close()
        pool.close()

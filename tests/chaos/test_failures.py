"""Processes of a cluster under load are killed and stopped; its clients see a pause at most.

What every trial demands of the streams is the same in both forms. The figures are demanded by
--chaos-long, on a quiet machine; the short form may share the machine with anything, so it only
tells a pause from a timeout that somebody waited for.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.chaos.conftest import NEW_TOKENS, SETTINGS
from tests.chaos.deployment import Worker, send
from tests.chaos.trial import Chaos, Trial

pytestmark = [pytest.mark.chaos, pytest.mark.alone]

KILL_PERIOD_S = 3.0
SHARED_MACHINE_S = 5.0
"""Less than Serve takes to miss a worker that hangs (10 s) or a step to give up on its experts."""
CONTROLLER, PLACEMENT = "ray::ServeController", "ray::ServeReplica:shoal:Placement"


def limit_s(chaos: Chaos, trial: Trial, floor_s: float = 0.4, itls: float = 20) -> float:
    """The gap that is allowed: a time, or so many times what a token takes on this machine.

    Short form: and as long as starting the replacement may keep the cores from everybody.
    """
    allowed_s = max(floor_s, itls * trial.itl_s)
    return allowed_s if chaos.long else allowed_s + SHARED_MACHINE_S


def watch(chaos: Chaos, short_s: float = 5.0, long_s: float = 10.0) -> None:
    """Let the load go on after a disturbance."""
    time.sleep(long_s if chaos.long else short_s)


def kill_one(chaos: Chaos, role: str) -> Trial:
    """kill -9 of a worker of a role under load."""
    victim = chaos.deployment.workers(role)[0]
    with chaos.trial(f"kill {role}") as trial:
        chaos.settle()
        trial.disturbed(send(victim["pid"], signal.SIGKILL))
        watch(chaos)
    return trial


def test_a_killed_expert_worker_whose_experts_have_replicas_costs_a_blink(chaos: Chaos) -> None:
    trial = kill_one(chaos, "experts")
    assert trial.gap_p99_s <= limit_s(chaos, trial)
    if chaos.long:
        assert trial.rate_kept >= 0.9


def test_a_killed_router_costs_a_second(chaos: Chaos) -> None:
    trial = kill_one(chaos, "router")
    assert trial.gap_p99_s <= limit_s(chaos, trial, floor_s=1.0)


def test_a_killed_attention_worker_costs_a_prefill(chaos: Chaos) -> None:
    trial = kill_one(chaos, "attention")
    assert trial.gap_p99_s <= limit_s(chaos, trial, floor_s=5.0)


@pytest.mark.parametrize(
    "title", [PLACEMENT, CONTROLLER], ids=["placement", "the Serve controller"]
)
def test_killing_what_only_steers_has_no_effect(chaos: Chaos, title: str) -> None:
    (victim,) = chaos.deployment.titled(title)
    with chaos.trial(f"kill {title.rpartition(':')[2]}") as trial:
        chaos.settle()
        trial.disturbed(send(victim.pid, signal.SIGKILL))
        watch(chaos, short_s=4.0)
    assert trial.gap_p99_s <= limit_s(chaos, trial)


def test_experts_that_lost_all_holders_come_back_within_five_seconds(chaos: Chaos) -> None:
    """Two of three workers die at once: a third of the experts had no other holder."""
    first, second, _ = chaos.deployment.workers("experts")
    with chaos.trial("kill sole holders") as trial:
        chaos.settle()
        send(second["pid"], signal.SIGKILL)
        trial.disturbed(send(first["pid"], signal.SIGKILL))
        watch(chaos, short_s=8.0)
    assert trial.gap_p99_s <= limit_s(chaos, trial, floor_s=5.0)


def test_a_stopped_expert_worker_is_left_alone_and_its_late_answers_dropped(chaos: Chaos) -> None:
    victim, is_sole_holder = least_alone(chaos)
    stopped_for_s = 30.0 if chaos.long else 8.0
    with chaos.trial("stop and continue an expert worker") as trial:
        chaos.settle()
        trial.disturbed(send(victim["pid"], signal.SIGSTOP))
        try:
            time.sleep(stopped_for_s)
        finally:
            trial.disturbed(send(victim["pid"], signal.SIGCONT))
        watch(chaos, short_s=4.0)
    # What it holds alone comes back when the directory misses it, after 3 s.
    assert trial.gap_p99_s <= limit_s(chaos, trial, floor_s=5.0 if is_sole_holder else 0.4)


def least_alone(chaos: Chaos) -> tuple[Worker, bool]:
    """The expert worker that alone holds the fewest experts; whether there are any."""
    layers = chaos.deployment.server.get("/v1/experts/load")["layers"]
    holders = [expert["holders"] for layer in layers for expert in layer["experts"]]
    workers = chaos.deployment.workers("experts")
    alone = [holders.count([worker["worker_id"]]) for worker in workers]
    fewest = min(range(len(workers)), key=alone.__getitem__)
    return workers[fewest], alone[fewest] > 0


def test_a_stopped_attention_worker_loses_its_streams_to_the_other(chaos: Chaos) -> None:
    """Noticed after 3 s of silence and a probe of 1 s; awake again it finds its requests gone."""
    victim = chaos.deployment.workers("attention")[0]
    with chaos.trial("stop and continue an attention worker") as trial:
        chaos.settle()
        trial.disturbed(send(victim["pid"], signal.SIGSTOP))
        try:
            time.sleep(7.0)
        finally:
            trial.disturbed(send(victim["pid"], signal.SIGCONT))
        watch(chaos, short_s=3.0)
    assert trial.gap_p99_s <= limit_s(chaos, trial, floor_s=8.0)


def test_the_command_line_kills_as_well(chaos: Chaos) -> None:
    before = {worker["pid"] for worker in chaos.deployment.workers("router")}
    with chaos.trial("shoal chaos kill router") as trial:
        chaos.settle()
        command = [sys.executable, "-m", "cluster", "chaos", "kill", "router", "--random"]
        trial.disturbed(time.monotonic())
        done = subprocess.run(
            [*command, "--url", chaos.deployment.server.url], capture_output=True, text=True
        )
        assert done.returncode == 0 and "kill sent to router" in done.stdout, done.stderr
        watch(chaos, short_s=2.0)
    after = {worker["pid"] for worker in chaos.deployment.workers("router")}
    assert len(before & after) == 1 and len(after) == 2


def test_scaling_the_experts_under_load_is_not_felt(chaos: Chaos) -> None:
    deployment = chaos.deployment
    steps = [4, 2] * (5 if chaos.long else 1)
    with chaos.trial("scale experts by command") as trial:
        chaos.settle()
        for workers in steps:
            began_s = time.monotonic()
            deployment.scale_experts(workers)
            deployment.wait_whole()
            trial.disturbed(began_s, lasting_s=time.monotonic() - began_s)
            time.sleep(max(0.0, began_s + 20.0 - time.monotonic()) if chaos.long else 1.0)
        deployment.scale_experts(SETTINGS["experts"]["num_workers"])
    assert trial.gap_p99_s <= limit_s(chaos, trial, itls=5)


def test_demand_for_three_times_the_cache_preempts_and_finishes(chaos: Chaos) -> None:
    engines = chaos.deployment.engines()
    blocks = sum(engine["kv_blocks_total"] for engine in engines)
    blocks_a_stream = NEW_TOKENS / engines[0]["block_size"]  # the least: prompts come on top
    with chaos.trial("KV cache short", num_streams=int(3 * blocks / blocks_a_stream)) as trial:
        watch(chaos, short_s=2.0, long_s=60.0)
    preempted = [engine["num_preemptions"] for engine in chaos.deployment.engines()]
    trial.notes["preemptions"] = sum(preempted) - sum(e["num_preemptions"] for e in engines)
    assert trial.notes["preemptions"] > 0


def kill_at_random(chaos: Chaos, seed: int, kills: int) -> None:
    """Every three seconds another worker, whether the last one has been replaced or not.

    So a tier may be gone altogether until Serve has started a worker: then all wait, and the gaps
    say how long that takes.
    """
    rng = random.Random(seed)
    roles = ["experts", "router", "attention"]
    kills_seen = []
    with chaos.trial(f"random kills, seed {seed}") as trial:
        chaos.settle()
        for _ in range(kills):
            role = rng.choice(roles)
            if alive := chaos.deployment.workers(role):
                trial.disturbed(send(rng.choice(alive)["pid"], signal.SIGKILL))
                kills_seen.append(f"{role} 1/{len(alive)}")
            time.sleep(KILL_PERIOD_S)
        trial.notes["killed"] = kills_seen


def test_random_kills_lose_nothing(chaos: Chaos, seed: int) -> None:
    kill_at_random(chaos, seed, kills=20 if chaos.long else 4)


def test_five_minutes_of_random_kills_lose_nothing(chaos: Chaos) -> None:
    if not chaos.long:
        pytest.skip("only with --chaos-long")
    kill_at_random(chaos, seed=0, kills=int(300 / KILL_PERIOD_S))

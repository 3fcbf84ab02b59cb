"""A deployment to harm, the requests it gets and what they must give."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attention.messages import SamplingParams, Submit, TokenOutput
from cluster.config import parse_config
from cluster.inline import InlineCluster
from tests.chaos.deployment import Deployment, deployed
from tests.chaos.records import Expected
from tests.chaos.trial import Chaos, Trial

NUM_REQUESTS = 16
NEW_TOKENS = 48
FIRST_BYTE_ID, LAST_BYTE_ID = 17, 272  # of the tiny tokenizer: every byte is a token
SETTINGS: dict[str, Any] = {
    "deterministic": True,
    "enable_chaos": True,
    # 48 experts, each on two of three workers; rebalancing would give the hot ones three
    "experts": {"num_workers": 3, "redundancy": 48, "rebalance": {"enabled": False}},
    # A tier that is gone is back when Serve has started a worker: a minute on a busy machine
    "router": {"num_workers": 2, "worker": {"deadline_s": 150.0}},
    # One worker's cache just holds all streams, should the other die
    "attention": {"num_workers": 2, "engine": {"num_kv_blocks": 128, "max_num_seqs": 128}},
}
_trials: list[Trial] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-long", action="store_true", help="longer trials, exact figures demanded"
    )
    parser.addoption("--chaos-report", metavar="FILE", help="write the figures there as JSON")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _trials:
        return
    found = [trial.figures() for trial in _trials]
    terminalreporter.section("chaos")
    for figures in found:
        terminalreporter.write_line("  ".join(f"{k}={v}" for k, v in figures.items()))
    file = terminalreporter.config.getoption("--chaos-report", None)
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        long = metafunc.config.getoption("--chaos-long", False)
        metafunc.parametrize("seed", range(20 if long else 1))


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether there is time."""
    return bool(pytestconfig.getoption("--chaos-long", False))


@pytest.fixture(scope="session")
def trials() -> list[Trial]:
    """All trials of the session; the summary shows their figures."""
    return _trials


@pytest.fixture(scope="session")
def requests_pool() -> list[dict[str, Any]]:
    """Bodies of requests: half greedy, half seeded."""
    rng = random.Random(20261122)
    pool = []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randint(FIRST_BYTE_ID, LAST_BYTE_ID) for _ in range(rng.randint(4, 20))]
        seeded = {"temperature": 0.8, "top_p": 0.9, "seed": number}
        sampling: dict[str, Any] = seeded if number % 2 else {"temperature": 0.0}
        pool.append({"prompt": prompt, "max_tokens": NEW_TOKENS, **sampling})
    return pool


@pytest.fixture(scope="session")
def expected(
    requests_pool: list[dict[str, Any]], checkpoint_dir: Callable[[str], Path]
) -> list[Expected]:
    """What each request gives when nothing is disturbed: one process, no sockets, no Ray."""
    config = parse_config({"model": str(checkpoint_dir("v3")), "deterministic": True})
    with InlineCluster(config) as cluster:
        answers = [_Answer(cluster, request) for request in requests_pool]
        return [answer.wait() for answer in answers]


class _Answer:
    """A request to an inline cluster."""

    def __init__(self, cluster: InlineCluster, request: dict[str, Any]) -> None:
        sampling = {key: value for key, value in request.items() if key != "prompt"}
        self._prompt = request["prompt"]
        self._ids: list[int] = []
        self._done = threading.Event()
        submit = Submit(
            request_id=f"reference-{id(self)}",
            prompt_ids=self._prompt,
            params=SamplingParams(**sampling, ignore_eos=True),
        )
        cluster.ingress.pool.submit(submit, self._take)

    def _take(self, output: TokenOutput) -> None:
        self._ids += output.token_ids
        if output.finish_reason is not None:
            self._done.set()

    def wait(self) -> Expected:
        assert self._done.wait(120) and len(self._ids) == NEW_TOKENS
        return Expected(len(self._prompt), self._ids)


@pytest.fixture(scope="module")
def deployment(checkpoint_dir: Callable[[str], Path]) -> Iterator[Deployment]:
    """Three expert workers, two routers, two attention workers."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with deployed(checkpoint_dir("v3"), SETTINGS, folder) as found:
        yield found
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def chaos(
    expected: list[Expected],
    deployment: Deployment,
    requests_pool: list[dict[str, Any]],
    trials: list[Trial],
    long: bool,
) -> Chaos:
    """The deployment, warmed up."""
    return Chaos(deployment, requests_pool, expected, long=long, trials=trials)

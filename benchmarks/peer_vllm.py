"""Process that measures vLLM's CPU back end; runs in vLLM's own environment.

`bench_serving.py --vllm-python PYTHON` starts it. At level engine it steps vLLM's own engine as its
offline `LLM.generate` does, with a time stamp at each step; at level http it runs its server.
Settings are the fastest ones found: both cores bound to OpenMP threads and none reserved, no prefix
cache, MLA kernels off (they exist for widths 512+64 only), the memory of the cache fixed.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import deque
from typing import Any

from serving.over_http import HttpSystem
from serving.plan import Scenario
from serving.processes import free_port
from serving.session import Spec, System, run_session
from serving.sse import wait_until_ok
from serving.summary import RequestRecord

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
MEMORY_SHARE = 0.4
READY_TIMEOUT_S = 1800.0
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineSystem:
    """vLLM's engine with its processes, stepped from here."""

    def __init__(self, spec: Spec) -> None:
        from vllm import LLM

        llm = LLM(
            model=str(spec.checkpoint),
            dtype=_dtype(spec),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            enable_prefix_caching=False,
            gpu_memory_utilization=MEMORY_SHARE,
            disable_log_stats=True,
        )
        self._engine: Any = llm.llm_engine
        self._numbers = itertools.count()

    def run(self, scenario: Scenario, seed: int) -> list[RequestRecord]:
        """Do a whole scenario: admit what is due, step, note new tokens."""
        begin, prompts = time.perf_counter(), scenario.prompts(seed)
        arrivals_s = scenario.arrivals_s(seed) if scenario.rate_per_s else [0.0] * len(prompts)
        waiting = deque(zip(prompts, arrivals_s, strict=True))
        max_running = len(prompts) if scenario.rate_per_s else scenario.concurrency
        running: dict[str, RequestRecord] = {}
        records: list[RequestRecord] = []
        while waiting or running:
            while waiting and len(running) < max_running:
                prompt_ids, arrival_s = waiting[0]
                due_s = begin + arrival_s if scenario.rate_per_s else time.perf_counter()
                if due_s > time.perf_counter():
                    break
                waiting.popleft()
                records.append(RequestRecord(due_s))
                running[self._add(prompt_ids, scenario.new_tokens)] = records[-1]
            if running:
                self._step(running)
            else:
                time.sleep(max(0.0, begin + waiting[0][1] - time.perf_counter()))
        return records

    def _add(self, prompt_ids: list[int], new_tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"bench-{next(self._numbers)}"
        self._engine.add_request(name, {"prompt_token_ids": prompt_ids}, params)
        return name

    def _step(self, running: dict[str, RequestRecord]) -> None:
        for output in self._engine.step():
            count = len(output.outputs[0].token_ids)
            running[output.request_id].token_times_s.extend([time.perf_counter()] * count)
            if output.finished:
                del running[output.request_id]

    def close(self) -> None:
        """End its processes."""
        self._engine.engine_core.shutdown()


def _dtype(spec: Spec) -> str:
    return spec.system.rpartition("-")[2]


def open_system(spec: Spec) -> System:
    """Start vLLM at the level of the spec."""
    os.environ.update(ENVIRONMENT)
    return _open_server(spec) if spec.level == "http" else EngineSystem(spec)


def _open_server(spec: Spec) -> System:
    port = free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(spec.checkpoint), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", _dtype(spec), "--max-model-len", str(MAX_MODEL_LEN)),
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--no-enable-prefix-caching"),
            *("--gpu-memory-utilization", str(MEMORY_SHARE)),
        ]
    )

    def close() -> None:
        server.terminate()
        server.wait()

    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ok(url, "/health", READY_TIMEOUT_S)
    except BaseException:
        close()
        raise
    return HttpSystem(url, close)


if __name__ == "__main__":
    run_session(open_system)

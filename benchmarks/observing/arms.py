"""What each arm of the benchmark runs: the product's functions, less the lines that observe.

Times of requests and hops cannot be turned off, and two processes differ by more than what is to
be measured. So the baseline is made of the product's own source, in the process that runs it: the
lines below are replaced, and a function gets the code of its arm. A line that is not found exactly
once is an error: this follows the product or fails.

Not removed: counters that scaling, placement or the channels had before (busy seconds, pairs,
waits, bytes), the three numbers' places in frames, and reading a clock that a deadline needs too.
"""

from __future__ import annotations
import __future__

import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType

Edits = Mapping[str, Mapping[str, str]]
"""module:function -> line -> what stands there instead; "" leaves the line out."""

NO_TRACES: Edits = {
    "cluster.frontend.request_span:RequestSpan.__init__": {
        "self._tracer = tracer": "self._tracer = tracer = None",
    },
}
NO_TIMES: Edits = {
    # the engine's books on a step, and what outputs tell of them
    "attention.engine:Engine.add": {"self._meter.arrived(request)": "pass"},
    "attention.engine:Engine._leave": {"self._meter.left(request)": "pass"},
    "attention.engine:Engine._compute": {
        "self._meter.begin_step(schedule)": "pass",
        "self._meter.end_step(schedule, start_s)": "pass",
    },
    "attention.engine:Engine._update": {
        "if samples and request.first_token_s is None:": "if False:",
    },
    "attention.engine:_output": {
        '"step_us": round(request.step_s * 1e6),': "",
        '"hop_us": round(request.hop_s * 1e6),': "",
        '"expert_us": round(request.expert_s * 1e6),': "",
        "if not request.prefill_told and (prefill_s := request.prefill_s) is not None:": (
            "if False:"
        ),
        "if request.num_preemptions:": "if False:",
    },
    # hops: their clock, their parts, their cost
    "router.lane:Lane.begin": {"self.counters.hop_s += self._now() - begun_s": "pass"},
    "router.lane:Lane.finish": {
        "begun_s = self._now()": "pass",
        "self._account(pending, begun_s)": "pass",
    },
    "router.exchange:Exchange.take": {
        "self.expert_us += reply.expert_us": "pass",
        "if is_logged:": "if False:",
    },
    "router.client:RouterClient.begin": {"self._hop_s += self._clock() - now_s": "pass"},
    "router.client:RouterClient.finish": {
        "begun_s = self._clock()": "pass",
        "self._account(ticket, begun_s)": "pass",
    },
    "router.client:RouterClient._take": {
        "if self._hop_log is not None:": "if False:",
        "self._expert_us += frame.expert_us": "pass",
    },
    "router.worker:RouterWorker._serve": {
        "lane.hop_log = log": "pass",
        "us_per_row = pending.expert_us / max(1, x.shape[0])": "pass",
        "waited_s = max(0.0, begun_s - item.frame.received_s) + longest.queue_s": "pass",
        "reply.queue_us = min(int(waited_s * 1e6), _U32)": "pass",
        "reply.compute_us = min(round(longest.compute_s * 1e6), _U32)": "pass",
        "reply.expert_us = min(round(us_per_row * item.num_rows), _U32)": "pass",
    },
    "experts.client:ExpertClient._settle": {
        "self.counters.count_answer(frame, hop.took_s)": "pass",
    },
    "experts.worker:ExpertWorker._answer": {
        "us_per_pair = 1e6 * busy_s / max(1, sum(batch.num_pairs for batch in ready))": "pass",
        "batch.reply.expert_us = min(round(us_per_pair * batch.num_pairs), _U32)": "pass",
        "compute_us = int((time.monotonic() - begun_s) * 1e6)": "pass",
        "batch.reply.compute_us = min(compute_us, _U32)": "pass",
    },
    # the front end: times and records of requests, the header
    "cluster.frontend.observation:Observation.finish": {
        "if request is None or self._finished:": "if True:",
    },
    "cluster.frontend.replay:SequenceRuns._take": {
        "arrived_s = self._clock()": "arrived_s = 0.0",
        "run.note(output, arrived_s)": "pass",
    },
    "cluster.frontend.replay:SequenceRuns.end": {
        "return run.timing(self._clock() if run.last is None else run.last_s)": "return None",
    },
    "cluster.frontend.generation:Generation._end": {
        "timing, num_later = self._runs.end(index), self._choices[index].num_tokens - 1": (
            "self._runs.end(index)"
        ),
        "if num_later > 0:": "if False:",
        "self.timing = timing.beside(self.timing)": "pass",
    },
    "cluster.frontend.generation:Generation._handle": {"self.observation.last_token()": "pass"},
    "cluster.frontend.generation:Generation._count": {"if output.token_ids:": "if False:"},
    "cluster.frontend.http_generation:GeneratingHandlers._whole": {
        "headers = {**_headers_of(generation), TIMING_HEADER: timing_header(generation)}": (
            "headers = _headers_of(generation)"
        ),
    },
}
NO_OBSERVERS: Edits = {
    "cluster.frontend.observation:Observation.admit": {
        "for observer in self._observers:": "for observer in ():",
    },
    "cluster.frontend.observation:Observation.tokens": {
        "for observer in self._observers:": "for observer in ():",
    },
    "cluster.frontend.observation:Observation.finish": {
        "for observer in self._observers:": "for observer in ():",
    },
    # once a second to the directory, every five to Ray
    "experts.directory.client:DirectoryClient._metrics_report": {
        "if self._metrics_source is None:": "if True:",
    },
    "cluster.observability.ray_metrics:RayExport.export": {
        "for sample in self._samples():": "for sample in ():",
    },
}
ARMS: dict[str, Edits] = {
    "without": {**NO_TRACES, **NO_OBSERVERS, **NO_TIMES},
    "times": {**NO_TRACES, **NO_OBSERVERS},
    "observed": NO_TRACES,
    "traces": {},
}


def enter(arm: str) -> int:
    """Give the functions that this process has loaded the code of an arm; how many it has.

    To be called while nothing of them is running.
    """
    functions = [name for name in ARMS["without"] if name.partition(":")[0] in sys.modules]
    for name in functions:
        function_named(name).__code__ = _code(name, arm)
    return len(functions)


def function_named(name: str) -> FunctionType:
    """module:function or module:class.function"""
    module, _, path = name.partition(":")
    found: FunctionType = functools.reduce(
        getattr, path.split("."), importlib.import_module(module)
    )
    return found


@functools.cache
def _original(name: str) -> tuple[CodeType, str]:
    """As it was when an arm was first entered, with its source."""
    function = function_named(name)
    return function.__code__, textwrap.dedent(inspect.getsource(function))


@functools.cache
def _code(name: str, arm: str) -> CodeType:
    original, source = _original(name)
    edits = ARMS[arm].get(name)
    if edits is None:
        return original
    lines = source.splitlines()
    for line, instead in edits.items():
        places = [i for i, text in enumerate(lines) if text.strip() == line]
        if len(places) != 1:
            raise LookupError(f"{name} has {len(places)} times: {line}")
        text = lines[places[0]]
        lines[places[0]] = text.replace(line, instead)
    flags = __future__.annotations.compiler_flag
    compiled = compile("\n".join(lines), original.co_filename, "exec", flags, dont_inherit=True)
    code = next(part for part in compiled.co_consts if isinstance(part, CodeType))
    if code.co_freevars or original.co_freevars:
        raise LookupError(f"{name} is a closure")
    return code

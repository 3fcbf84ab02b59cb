"""Load generator: a process that keeps streams open over HTTP and gRPC and writes down what comes.

    python -m tests.chaos.load < lines of JSON

The first line is the plan; end of file ends it: nothing new is started, open streams go on to their
end, and the records are the one line of output. One event loop, each message is parsed once: the
cluster under test has the same two cores.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.chaos.records import Stream

ROOT = Path(__file__).parents[2]
REQUEST_TIMEOUT_S = 180.0
END_TIMEOUT_S = 240.0
RETRY_S = 0.2


class Load:
    """A running generator, seen from the test."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()

    def finish(self) -> list[Stream]:
        """Let the open streams end; all streams in the order of their start."""
        try:
            output, _ = self._process.communicate(timeout=END_TIMEOUT_S)
        finally:
            self.kill()
        return [Stream.from_json(data) for data in json.loads(output)]

    def kill(self) -> None:
        """Only when the test has failed."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_load(plan: dict[str, Any]) -> Iterator[Load]:
    """A generator that does not outlive the test."""
    load = Load(plan)
    try:
        yield load
    finally:
        load.kill()


class _Generator:
    """`num_streams` slots; every slot sends its next request as soon as its last one has ended."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._stopping = asyncio.Event()
        self.streams: list[Stream] = []

    async def run(self) -> None:
        """Until standard input is closed and every stream has ended."""
        async with grpc.aio.insecure_channel(self._plan["grpc_address"]) as channel:
            self._stub = inference_pb2_grpc.InferenceStub(channel)
            slots = [asyncio.create_task(self._slot(i)) for i in range(self._plan["num_streams"])]
            await asyncio.to_thread(sys.stdin.read)
            self._stopping.set()
            await asyncio.gather(*slots)

    async def _slot(self, slot: int) -> None:
        pool = self._plan["requests"]
        for turn in range(1_000_000):
            number = (slot // 2 + turn * 5) % len(pool)  # both protocols go through the whole pool
            stream = Stream(number, ("sse", "grpc")[slot % 2], time.monotonic())
            self.streams.append(stream)
            await self._follow(stream, pool[number])
            if stream.error is not None:  # a server that refuses is not hammered
                await asyncio.sleep(RETRY_S)
            if self._stopping.is_set():
                return

    async def _follow(self, stream: Stream, request: dict[str, Any]) -> None:
        read = self._read_sse if stream.protocol == "sse" else self._read_grpc
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await read(stream, request)
        except Exception as error:
            stream.error = f"{type(error).__name__}: {error}"[:500]

    async def _read_sse(self, stream: Stream, request: dict[str, Any]) -> None:
        body = {
            **request,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,  # text alone does not tell how many tokens came
        }
        async for data in _events(*self._plan["http_address"], json.dumps(body).encode()):
            if data == b"[DONE]":
                stream.ends.append("done")
                continue
            _take_chunk(stream, json.loads(data))

    async def _read_grpc(self, stream: Stream, request: dict[str, Any]) -> None:
        ids = pb.TokenIds(ids=request["prompt"])
        sampling = {key: value for key, value in request.items() if key != "prompt"}
        call = self._stub.Generate(
            pb.GenerateRequest(
                token_ids=ids, sampling=pb.SamplingParams(**sampling, ignore_eos=True)
            )
        )
        async for message in call:
            _take_message(stream, message)
        stream.ends.append("done")


def _take_chunk(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        stream.ends.append("error")
        stream.error = json.dumps(chunk["error"])
    for choice in chunk.get("choices") or ():
        if choice.get("token_ids"):
            stream.arrivals.append((time.monotonic(), choice["token_ids"]))
        if choice.get("finish_reason"):
            stream.ends.append(choice["finish_reason"])
    if usage := chunk.get("usage"):
        stream.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _take_message(stream: Stream, message: Any) -> None:
    event = message.WhichOneof("event")
    if event == "delta":
        if message.delta.token_ids:
            stream.arrivals.append((time.monotonic(), list(message.delta.token_ids)))
        if message.delta.finish_reason:
            stream.ends.append(message.delta.finish_reason)
    elif event == "usage":
        stream.usage = message.usage.prompt_tokens, message.usage.completion_tokens
    elif event == "error":
        stream.ends.append("error")
        stream.error = f"{message.error.code}: {message.error.message}"


async def _events(host: str, port: int, body: bytes) -> AsyncIterator[bytes]:
    """The data of each server-sent event of a completion. Raises OSError, EOFError, ValueError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\n"
            + f"Host: {host}:{port}\r\n".encode()
            + b"Content-Type: application/json\r\nConnection: close\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise ValueError(f"{head.decode()} {(await reader.read(1000)).decode()}")
        rest = b""
        while size := int(await reader.readline(), 16):  # a chunked body
            part = await reader.readexactly(size + len(b"\r\n"))
            *lines, rest = (rest + part[:-2]).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    yield line[len(b"data: ") :]
    finally:
        writer.close()


def main() -> None:
    generator = _Generator(json.loads(sys.stdin.readline()))
    asyncio.run(generator.run())
    json.dump([stream.as_json() for stream in generator.streams], sys.stdout)


if __name__ == "__main__":
    main()

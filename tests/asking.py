"""How the suite talks to an engine: through the adapter, and in plain HTTP where the adapter has no call."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from rollout_ft.engine.port import Chunk
from rollout_ft.engine.sglang import SGLang

JSON = dict[str, Any]
PROMPT = list(range(40, 60))
LONG = 3000
"""Tokens that take any of the engines ten seconds, or most of them."""


def greedy(tokens: int, **more: Any) -> JSON:
    return {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def body(tokens: int, prompt: list[int] = PROMPT, rid: str = "", stream: bool = False, **sampling: Any) -> JSON:
    asked: JSON = {"input_ids": prompt, "sampling_params": greedy(tokens, **sampling), "return_logprob": True, "stream": stream}
    return {**asked, "rid": rid} if rid else asked


async def call(url: str, path: str, sent: Any = None, method: str = "POST") -> tuple[int, Any]:
    """Status and answer: JSON where it is some, else text."""
    async with aiohttp.ClientSession() as http, http.request(method, url + path, json=sent) as response:
        raw = await response.read()
    try:
        return response.status, orjson.loads(raw)
    except orjson.JSONDecodeError:
        return response.status, raw.decode()


async def whole(url: str, tokens: int, prompt: list[int] = PROMPT, **sampling: Any) -> JSON:
    """A generation without adapter and stream."""
    status, reply = await call(url, "/generate", body(tokens, prompt, **sampling))
    assert status == 200, reply
    return reply


def logprobs(reply: JSON, of: str = "output") -> list[float]:
    return [triple[0] for triple in reply["meta_info"][f"{of}_token_logprobs"]]


@dataclass
class Told:
    """What a stream has told so far."""

    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    chunks: list[Chunk] = field(default_factory=list[Chunk])

    @property
    def ids(self) -> list[int]:
        return [i for chunk in self.chunks for i in chunk.ids]

    @property
    def logprobs(self) -> list[float]:
        return [p for chunk in self.chunks for p in chunk.logprobs]

    @property
    def finish(self) -> str:
        return self.chunks[-1].finish if self.chunks else ""

    async def has(self, tokens: int) -> None:
        await until(lambda: _true(len(self.ids) >= tokens))


async def _true(value: bool) -> bool:
    return value


async def listen(engine: SGLang, told: Told, tokens: int, prompt: list[int] = PROMPT, **sampling: Any) -> Told:
    """Takes a stream to its end."""
    stream: AsyncIterator[Chunk] = engine.generate(told.rid, orjson.dumps(prompt)[1:-1], greedy(tokens, **sampling))
    async for chunk in stream:
        told.chunks.append(chunk)
    return told


@asynccontextmanager
async def in_flight(engine: SGLang, tokens: int = LONG, had: int = 20, **sampling: Any) -> AsyncIterator[tuple[Told, asyncio.Task[Told]]]:
    """A stream in the middle, with `had` tokens at least; one that is left over is closed."""
    told = Told()
    task = asyncio.create_task(listen(engine, told, tokens, **sampling))
    reached = asyncio.create_task(told.has(had))
    try:
        await asyncio.wait((task, reached), return_when=asyncio.FIRST_COMPLETED)
        assert not task.done(), task
        yield told, task
    finally:
        reached.cancel()
        task.cancel()
        await asyncio.gather(task, reached, return_exceptions=True)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks until it holds; the test's time limit is the limit."""
    while not await condition():
        await asyncio.sleep(0.02)


async def load(url: str) -> JSON:
    return (await call(url, "/v1/loads", method="GET"))[1]["loads"][0]


async def until_idle(url: str) -> None:
    async def idle() -> bool:
        now = await load(url)
        return not now["num_running_reqs"] and not now["num_waiting_reqs"]

    await until(idle)


async def version(url: str) -> str:
    return (await call(url, "/model_info", method="GET"))[1]["weight_version"]

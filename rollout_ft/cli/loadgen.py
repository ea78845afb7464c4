"""The load of the benchmarks: many clients in one process of its own, so that its cost is not taken for ours.

Owns the conversations and their latencies: `python -m rollout_ft.cli.loadgen` reads one job as a line from stdin and
writes one result to stdout. Must not know what the figures are for. The subtle invariant: a body is whole before its
clock starts, and what is waited for is the whole reply, so that a latency holds nothing of the client's own work. It
ends when its stdin closes, and so never outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp
import msgspec
import orjson
import uvloop
from tokenizers import Tokenizer

from rollout_ft.clock import monotonic
from rollout_ft.errors import RolloutFTError

JOB_BYTES = 2**24
_TEXTS = 97
_WORDS = """
the a of to and in that it is was for on with as at by from this which when then if file line result value name function
error test return read write call list number string path run search query answer next first last new old same other more
data code tool output input user order change open close between before after every nothing
"""
_TEMPLATE_TOKENS = 12
"""What the chat template puts around a message, about."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Where one session is to be had."""

    base_url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Job:
    """`through`: every chat at once, `turns` each. `direct`: as many conversations as there are chats, straight to the
    engines. `compare`: one chat after the other, each turn followed by one of as many tokens straight to an engine.
    """

    kind: Literal["through", "direct", "compare"]
    chats: list[Chat]
    engines: list[str]
    tokenizer: str
    turns: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Result:
    """Latencies in order of completion; `direct_ms` only where both ways were taken. `prompt_tokens`: of all turns."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    prompt_tokens: int = 0
    latencies_ms: list[float] = field(default_factory=list[float])
    direct_ms: list[float] = field(default_factory=list[float])
    error: str = ""


class LoadFailed(RolloutFTError):
    """A request of the load was not answered with a turn: what was measured means nothing."""


class Conversation(Protocol):
    prompt_tokens: int

    async def turn(self, number: int) -> float:
        """Takes one turn; returns its latency in seconds. Raises LoadFailed."""
        ...


class Texts:
    """User messages of so many tokens each, and their ids; the same in every process."""

    def __init__(self, tokenizer: str, tokens: int):
        encoder: Any = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
        words = _WORDS.split()
        wanted, chance = max(1, tokens - _TEMPLATE_TOKENS), random.Random(0)
        self.texts: list[str] = []
        self.ids: list[list[int]] = []
        for _ in range(_TEXTS):
            text = " ".join(chance.choices(words, k=wanted))
            encoded: Any = encoder.encode(text)
            self.texts.append(text[: encoded.offsets[wanted - 1][1]])
            self.ids.append(encoded.ids[:wanted])


class Through:
    """A chat as an agent has it: the whole history every time, replies put back as they came."""

    def __init__(self, http: aiohttp.ClientSession, chat: Chat, job: Job, texts: Texts, number: int):
        self._http, self._texts, self._number = http, texts.texts, number
        self._url = f"{chat.base_url}/chat/completions"
        self._headers = {"authorization": f"Bearer {chat.api_key}", "content-type": "application/json"}
        self._tail = f'],"model":"bench","max_tokens":{job.tokens_out},"ignore_eos":true}}'.encode()
        self._history: list[bytes] = []
        self.prompt_tokens = self.last_prompt_tokens = 0

    async def turn(self, number: int) -> float:
        text = f"{self._number}.{number} {self._texts[(self._number * 31 + number) % _TEXTS]}"
        self._history.append(orjson.dumps({"role": "user", "content": text}))
        body = b'{"messages":[' + b",".join(self._history) + self._tail
        began = monotonic()
        status, reply = await _post(self._http, self._url, body, self._headers)
        took_s = monotonic() - began
        if status != 200:
            raise LoadFailed(f"turn {number} through the gateway: HTTP {status}: {reply[:300]!r}")
        data: Any = orjson.loads(reply)
        self._history.append(orjson.dumps(data["choices"][0]["message"]))
        self.last_prompt_tokens = int(data["usage"]["prompt_tokens"])
        self.prompt_tokens += self.last_prompt_tokens
        return took_s


class Direct:
    """The same conversation with an engine: all ids so far, logprobs in the reply, no session."""

    def __init__(self, http: aiohttp.ClientSession, engine: str, job: Job, texts: Texts, number: int):
        self._http, self._texts, self._number, self._tokens_in = http, texts.ids, number, job.tokens_in
        self._url = f"{engine}/generate"
        self._head = f'{{"sampling_params":{{"max_new_tokens":{job.tokens_out},"ignore_eos":true}},"return_logprob":true,"input_ids":['
        self._ids: list[int] = []
        self._json: list[bytes] = []
        self.prompt_tokens = 0

    async def turn(self, number: int, prompt_tokens: int = 0) -> float:
        """`prompt_tokens`: make the prompt exactly so long; 0: `tokens_in` more than the turn before ended with."""
        text = self._texts[(self._number * 31 + number) % _TEXTS]
        missing = (prompt_tokens - len(self._ids)) if prompt_tokens else self._tokens_in
        self._add((text * (missing // len(text) + 1))[:missing])
        body = self._head.encode() + b",".join(self._json) + b"]}"
        began = monotonic()
        status, reply = await _post(self._http, self._url, body, {"content-type": "application/json"})
        took_s = monotonic() - began
        if status != 200:
            raise LoadFailed(f"turn {number} straight to the engine: HTTP {status}: {reply[:300]!r}")
        self.prompt_tokens += len(self._ids)
        self._add(orjson.loads(reply)["output_ids"])
        return took_s

    def _add(self, ids: list[int]) -> None:
        self._ids += ids
        self._json.append(orjson.dumps(ids)[1:-1])


async def _post(http: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    try:
        async with http.post(url, data=body, headers=headers) as response:
            return response.status, await response.read()
    except aiohttp.ClientError as e:
        raise LoadFailed(f"{url}: {type(e).__name__}: {e}") from e


async def work(job: Job) -> Result:
    """Does the job. Raises LoadFailed."""
    texts = Texts(job.tokenizer, job.tokens_in)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        through = [Through(http, chat, job, texts, i) for i, chat in enumerate(job.chats)]
        engines = [job.engines[i % len(job.engines)] for i in range(len(job.chats))]
        direct = [Direct(http, engine, job, texts, i) for i, engine in enumerate(engines)]
        began, began_cpu = monotonic(), time.process_time()
        if job.kind == "compare":
            latencies, straight = await _compare(list(zip(through, direct, strict=True)), job.turns)
        else:
            latencies, straight = await _together(through if job.kind == "through" else direct, job.turns), []
        seconds, cpu_s = monotonic() - began, time.process_time() - began_cpu
    asked = sum(each.prompt_tokens for each in (direct if job.kind == "direct" else through))
    return Result(seconds, cpu_s, asked, [s * 1e3 for s in latencies], [s * 1e3 for s in straight])


async def _together(conversations: list[Through] | list[Direct], turns: int) -> list[float]:
    """Every conversation asks its next turn as soon as it has the reply to the last."""
    latencies: list[float] = []

    async def one(conversation: Conversation) -> None:
        for number in range(turns):
            latencies.append(await conversation.turn(number))

    async with asyncio.TaskGroup() as group:
        for each in conversations:
            group.create_task(one(each))
    return latencies


async def _compare(pairs: list[tuple[Through, Direct]], turns: int) -> tuple[list[float], list[float]]:
    """One request at a time; both ways see the same machine in the same moments."""
    latencies: list[float] = []
    straight: list[float] = []
    for through, direct in pairs:
        for number in range(turns):
            latencies.append(await through.turn(number))
            straight.append(await direct.turn(number, through.last_prompt_tokens))
    return latencies, straight


async def main() -> None:
    stdin = asyncio.StreamReader(limit=JOB_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    job = msgspec.json.decode(await stdin.readline(), type=Job)
    working = asyncio.create_task(work(job))
    abandoned = asyncio.create_task(stdin.read())
    await asyncio.wait({working, abandoned}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        return
    try:
        result = working.result()
    except BaseExceptionGroup as failed:
        result = Result(error=str(failed.exceptions[0]))
    except LoadFailed as failed:
        result = Result(error=str(failed))
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    uvloop.run(main())

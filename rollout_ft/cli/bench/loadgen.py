"""The load of the benchmarks: many clients in one process of its own, so that its cost is not taken for ours.

Owns who asks when: `python -m rollout_ft.cli.bench.loadgen` reads a load as a line from stdin, then a line per step,
and writes a result per step to stdout. It ends when its stdin closes, and so never outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import aiohttp
import msgspec
import uvloop

from rollout_ft.cli.bench.conversations import Collector, Conversation, Direct, Texts, Through
from rollout_ft.cli.bench.loads import LINE_BYTES, Load, LoadFailed, Result, Step
from rollout_ft.clock import monotonic


class Clients:
    """Everybody who takes turns; they go on from step to step."""

    def __init__(self, http: aiohttp.ClientSession, load: Load):
        self._load = load
        texts = Texts(load.tokenizer, load.tokens_in)
        engines = [load.engines[i % len(load.engines)] for i in range(len(load.chats))]
        self._through = [Through(http, chat, load, texts, i) for i, chat in enumerate(load.chats)]
        self._direct = [Direct(http, engine, load, texts, i) for i, engine in enumerate(engines)]
        self._collectors = [Collector(http, chat) for chat in load.chats]

    @property
    def _asking(self) -> Sequence[Conversation]:
        return {"direct": self._direct, "collect": self._collectors}.get(self._load.kind, self._through)

    async def take(self, step: Step) -> Result:
        """Raises LoadFailed, alone or in a group."""
        first = self._asking[0].seen
        asked, before = self._prompt_tokens(), replace(first)
        began, began_cpu = monotonic(), time.process_time()
        straight: list[float] = []
        if self._load.kind == "compare":
            latencies, straight = await self._compare(step)
        else:
            latencies = await self._together(step)
        bodies = max(1, first.bodies_read - before.bodies_read)
        return Result(
            seconds=monotonic() - began, cpu_s=time.process_time() - began_cpu, prompt_tokens=self._prompt_tokens() - asked,
            latencies_ms=[s * 1e3 for s in latencies], direct_ms=[s * 1e3 for s in straight],
            reading_ms=(first.reading_s - before.reading_s) * 1e3 / bodies, bytes_out=first.bytes_out, bytes_in=first.bytes_in,
        )  # fmt: skip

    def _prompt_tokens(self) -> int:
        return sum(each.seen.prompt_tokens for each in self._asking)

    async def _together(self, step: Step) -> list[float]:
        """Everybody asks again as soon as the reply is there and the pause is over."""
        latencies: list[float] = []
        until = monotonic() + step.seconds

        async def one(number: int, conversation: Conversation) -> None:
            await asyncio.sleep(self._load.pause_s * number / len(self._asking))
            taken = 0
            while taken < step.turns or monotonic() < until:
                latencies.append(await conversation.turn())
                taken += 1
                await asyncio.sleep(self._load.pause_s)

        async with asyncio.TaskGroup() as group:
            for number, each in enumerate(self._asking):
                group.create_task(one(number, each))
        return latencies

    async def _compare(self, step: Step) -> tuple[list[float], list[float]]:
        """One request at a time; both ways see the same machine in the same moments."""
        latencies: list[float] = []
        straight: list[float] = []
        for through, direct in zip(self._through, self._direct, strict=True):
            for _ in range(step.turns):
                latencies.append(await through.turn())
                straight.append(await direct.turn(through.last_prompt_tokens))
        return latencies, straight


async def main() -> None:
    stdin = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    load = msgspec.json.decode(await stdin.readline(), type=Load)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        clients = Clients(http, load)
        line = await stdin.readline()
        while line:
            working = asyncio.create_task(_take(clients, msgspec.json.decode(line, type=Step)))
            following = asyncio.create_task(stdin.readline())
            await asyncio.wait({working, following}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():  # nobody asks for the next step before this one is answered: stdin was closed
                working.cancel()
                return
            sys.stdout.buffer.write(msgspec.json.encode(working.result()) + b"\n")
            sys.stdout.buffer.flush()
            line = await following


async def _take(clients: Clients, step: Step) -> Result:
    try:
        return await clients.take(step)
    except BaseExceptionGroup as failed:
        return Result(error=str(failed.exceptions[0]))
    except LoadFailed as failed:
        return Result(error=str(failed))


if __name__ == "__main__":
    uvloop.run(main())

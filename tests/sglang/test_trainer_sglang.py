"""A trainer that pushes weights into a real SGLang, in each way that needs no GPU: what is generated afterwards is what the
same weights from a disk generate."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from asking import whole
from commanded import TOKENS, in_flight, played
from model_server import ModelServer, Start
from ports import free_port

GROUP = "trainer"


@dataclass
class Trainer:
    process: asyncio.subprocess.Process
    other: Path
    meta: dict[str, Any]

    async def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        return await self.hear()

    async def hear(self) -> Any:
        assert self.process.stdout is not None
        return orjson.loads(await self.process.stdout.readline())


@contextlib.asynccontextmanager
async def training(python: Path, model: Path, other: Path) -> AsyncIterator[Trainer]:
    child = Path(__file__).with_name("trainer_child.py")
    process = await asyncio.create_subprocess_exec(python, child, model, other, stdin=PIPE, stdout=PIPE, limit=2**24)
    trainer = Trainer(process, other, {})
    try:
        trainer.meta = await trainer.hear()
        yield trainer
    finally:
        process.kill()
        await process.wait()


async def says(server: ModelServer) -> list[int]:
    return (await whole(server.url, 40))["output_ids"]


async def test_weights_as_tensors_or_through_a_group_generate_what_those_from_the_disk_do(
    start_sglang: Start, sglang_python: Path, tmp_path: Path
):
    server = start_sglang()
    async with played(server) as p, training(sglang_python, server.model, tmp_path / "other") as trainer:

        async def update(version: str, **how: Any) -> list[int]:
            done = await p.do("fleet/weights", {"version": version, **how})
            assert (done["ok"], done["stale"], done["version"]) == (True, "", version), done
            return await says(server)

        first = await says(server)
        expected = await update("disk", path=str(trainer.other))
        assert expected != first
        assert await update("back", path=str(server.model)) == first

        tensors = {"serialized_named_tensors": [await trainer.ask("tensors")]}
        assert await update("tensors", how="tensor", body=tensors) == expected
        assert await update("back again", path=str(server.model)) == first

        port = free_port()
        group = {
            "master_address": "127.0.0.1",
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": GROUP,
            "backend": "gloo",
        }
        _, joined = await asyncio.gather(trainer.ask(f"join {port}"), p.do("init_weights_update_group", group))
        assert joined["ok"], joined
        generation, turn = await in_flight(p)
        assert (await p.do("fleet/pause", {"mode": "retract"}))["ok"]
        parts = {**trainer.meta, "group_name": GROUP}
        sent, done = await asyncio.gather(
            trainer.ask("send"), p.do("fleet/weights", {"version": "group", "how": "distributed", "body": parts})
        )
        assert (sent, done["ok"], done["version"]) == ("sent", True, "group"), done
        assert (await p.do("fleet/resume", {}))["ok"]
        await turn
        assert (len(generation.ids), generation.calls, [s.version for s in generation.spans]) == (TOKENS, 1, ["back again", "group"])
        assert await says(server) == expected

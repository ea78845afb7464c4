"""miles' driver at our gateway: its very calls, in its order, with what befalls it elsewhere.

Gateway, sessions and stores are real; where engines die they are processes, else one is played. The driver is written as
miles has it: no key anywhere, `POST /sessions {}`, chat with the sampling parameters that it passes on, one
`POST …/samples` that is not repeated, `DELETE` whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest
from samples_wire import Reply, read
from stack import KEYS, Stack, stack

from rollout_ft.config import Config, load
from rollout_ft.errors import ConfigError
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.types import JSON

pytestmark = pytest.mark.timeout(120)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 24, "skip_special_tokens": False, "no_stop_trim": True}
"""What miles makes of its own defaults for an agent."""


@dataclass
class Driver:
    """One session, by its id alone."""

    http: aiohttp.ClientSession
    url: str
    sid: str = ""

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, str]:
        async with self.http.request(method, self.url + path, json=body, headers=headers) as r:
            return r.status, await r.read(), r.content_type

    async def told(self, method: str, path: str, body: Any = None) -> Any:
        async with self.http.request(method, self.url + path, json=body) as r:
            assert r.status == 200, await r.text()
            return await r.json()

    async def open(self, **body: Any) -> JSON:
        opened = await self.told("POST", "/sessions", body)
        self.sid = opened["session_id"]
        return opened

    async def chat(self, messages: list[JSON], **more: Any) -> JSON:
        """An agent's client repeats what was cut off."""
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                return await self.told("POST", f"/sessions/{self.sid}/v1/chat/completions", {"messages": messages, **SAMPLING, **more})

    async def talk(self, turns: int, messages: list[JSON] | None = None) -> list[JSON]:
        """So many turns; the messages afterwards."""
        messages = messages or [{"role": "user", "content": "start"}]
        for i in range(turns):
            reply = (await self.chat(messages))["choices"][0]["message"]
            messages = [*messages, reply, {"role": "user", "content": f"observed {i}"}]
        return messages

    async def samples(self, max_seq_len: int | None = None, **metadata: Any) -> Reply:
        body = {"max_seq_len": max_seq_len, **({"metadata": metadata} if metadata else {})}
        status, payload, content = await self.call("POST", f"/sessions/{self.sid}/samples", body)
        assert (status, content) == (200, "application/octet-stream"), payload
        return read(payload)


@contextlib.asynccontextmanager
async def driven(version: str = "v2") -> AsyncGenerator[tuple[Driver, Stack]]:
    async with stack(open_sessions=version) as s, aiohttp.ClientSession() as http:
        yield Driver(http, s.url), s


@contextlib.asynccontextmanager
async def running(count: int, tokens_per_s: int) -> AsyncGenerator[tuple[Driver, LocalRun]]:
    args = ["--model", "hash", "--tokens-per-s", str(tokens_per_s)]
    engine = {"count": count, "stream_interval_tokens": 4, "args": args, "partial_flush_s": 0.1}
    config = Config.model_validate({"engine": engine, "gateway": {"open_sessions": "v2", "ping_s": 0.2}})
    async with local_run(config, gateways=2) as run, aiohttp.ClientSession() as http:
        yield Driver(http, run.client._url), run  # pyright: ignore[reportPrivateUsage]


async def test_a_session_from_its_opening_to_its_end():
    async with driven() as (driver, s):
        health = await driver.told("GET", "/health")
        assert health == {"status": "ok", "session_server_instance_id": KEYS.instance}
        opened = await driver.open(evaluation=True)
        assert {"session_id", "trial_id", "attempt", "base_url", "api_key", "turns"} <= opened.keys()
        assert (await s.supervisor.trial(opened["trial_id"]))["mode"] == "eval"
        fresh = await driver.told("GET", f"/sessions/{driver.sid}")
        assert (fresh["session_id"], fresh["records"], fresh["metadata"]["accumulated_token_ids"]) == (driver.sid, [], [])
        await driver.talk(2)
        told = await driver.told("GET", f"/sessions/{driver.sid}")
        (sample,) = (await driver.samples(reward=0.5, note="n")).samples
        assert sample["tokens"].tolist() == told["metadata"]["accumulated_token_ids"]
        assert (sample["reward"], sample["metadata"]["note"], sample["status"]) == (0.5, "n", "completed")
        assert (await driver.call("DELETE", f"/sessions/{driver.sid}"))[:2] == (204, b"")
        gone = ("DELETE", ""), ("GET", ""), ("POST", "/samples"), ("POST", "/v1/chat/completions")
        body = {"messages": [{"role": "user", "content": "late"}]}
        answers = [await driver.call(m, f"/sessions/{driver.sid}{p}", body if m == "POST" else None) for m, p in gone]
        assert [status for status, _, _ in answers] == [404] * 4
        assert answers[0][1] == b'{"error":"session not found: session_id=%s"}' % driver.sid.encode()
        trial = await s.supervisor.trial(opened["trial_id"])
        assert (trial["outcome"], trial["reward"], s.supervisor.released) == ("completed", None, [opened["trial_id"]])


async def test_a_reply_has_what_sglang_says_of_a_generation_where_it_is_asked_for():
    async with driven() as (driver, _):
        await driver.open()
        first = [{"role": "user", "content": "a"}]
        plain = (await driver.chat(first))["choices"][0]
        assert "meta_info" not in plain
        reply = await driver.chat([*first, plain["message"], {"role": "user", "content": "b"}], return_meta_info=True, logprobs=True)
        (choice,) = reply["choices"]
        meta, usage = choice["meta_info"], reply["usage"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
        assert [p for p, _, _ in meta["output_token_logprobs"]] == [c["logprob"] for c in choice["logprobs"]["content"]]
        assert (meta["finish_reason"]["type"], meta["weight_version"]) == (choice["finish_reason"], "v0")


async def test_in_a_stream_it_comes_with_the_end_of_the_reply():
    async with driven() as (driver, _):
        await driver.open()
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "return_meta_info": True, **SAMPLING}
        _, events, _ = await driver.call("POST", f"/sessions/{driver.sid}/v1/chat/completions", body)
        told = [orjson.loads(line[6:])["choices"][0] for line in events.splitlines() if line.startswith(b"data: {")]
        assert ["meta_info" in choice for choice in told] == [False] * (len(told) - 1) + [True]


async def test_a_limit_of_the_trainer_cuts_the_sample():
    async with driven() as (driver, _):
        await driver.open()
        await driver.talk(3)
        (whole,) = (await driver.samples()).samples
        (cut,) = (await driver.samples(len(whole["tokens"]) - 3)).samples
        assert (cut["tokens"].tolist(), cut["status"]) == (whole["tokens"][:-3].tolist(), "truncated")
        assert (await driver.samples(1)).empty_reason == "all_truncated"


async def test_collecting_again_gives_the_same_and_a_session_that_was_not_used_says_so():
    async with driven() as (driver, _):
        await driver.open()
        assert (await driver.samples()).empty_reason == "no_records"
        await driver.talk(2)
        first, again = [await driver.call("POST", f"/sessions/{driver.sid}/samples", {"max_seq_len": None}) for _ in range(2)]
        assert first == again


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"max_seq_len": "10"}', b'{"max_seq_len": 0}', b'{"metadata": 1}'])
async def test_a_body_that_makes_no_sense_is_a_400_that_says_why(body: bytes):
    async with driven() as (driver, _):
        await driver.open()
        async with driver.http.post(f"{driver.url}/sessions/{driver.sid}/samples", data=body) as r:
            assert r.status == 400
            assert (await r.json())["error"]["message"]


@pytest.mark.parametrize(("version", "samples"), [("v1", 1), ("v2", 2)])
async def test_a_conversation_that_began_anew_is_a_sample_of_its_own_for_a_driver_that_takes_several(version: str, samples: int):
    async with driven(version) as (driver, _):
        await driver.open()
        await driver.talk(2)
        await driver.talk(1, [{"role": "user", "content": "what was said so far, in short"}])
        found = (await driver.samples()).samples
        assert len(found) == samples
        assert all(s["loss_mask"][-1] == 1 for s in found)


async def played(driver: Driver, run: LocalRun, faults: bool) -> list[int]:
    """The tokens of a session of a given seed, in whose middle every engine and a gateway are killed once."""
    await driver.open(seed=7)
    messages = await driver.talk(2)
    asking = asyncio.create_task(driver.chat(messages))
    if faults:
        for engine in list(run.crew.engines.values()):
            engine.unit.kill()
    reply = (await asking)["choices"][0]["message"]
    await driver.talk(1, [*messages, reply, {"role": "user", "content": "on"}])
    (sample,) = (await driver.samples()).samples
    return sample["tokens"].tolist()


async def test_engines_and_a_gateway_that_die_in_the_middle_change_nothing_of_the_samples():
    async with running(2, 100) as (driver, run):
        assert await played(driver, run, faults=False) == await played(driver, run, faults=True)


async def test_a_reply_that_its_agent_gave_up_on_is_what_its_retry_gets_and_trained_once():
    async with running(1, 60) as (driver, run):
        await driver.open()
        messages = await driver.talk(1)
        lost = asyncio.create_task(driver.chat(messages))
        host = run.crew.engines["engine-0"].host
        while not host.session(driver.sid).flights:
            await asyncio.sleep(0.01)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        reply = await driver.chat(messages)
        assert len(host.session(driver.sid).tree.nodes) == 2
        (sample,) = (await driver.samples()).samples
        sampled = [len(node.turn.output_ids) // 4 for node in host.session(driver.sid).tree.nodes.values()]
        assert (int(sample["loss_mask"].sum()), reply["usage"]["completion_tokens"]) == (sum(sampled), sampled[-1])


async def test_an_attempt_that_met_a_fault_comes_back_aborted_and_unrewarded():
    async with driven() as (driver, s):
        opened = await driver.open()
        await driver.talk(1)
        await s.host.fault(driver.sid, "played")
        (sample,) = (await driver.samples(reward=1.0)).samples
        assert (sample["status"], sample["reward"], int(sample["loss_mask"].sum())) == ("aborted", None, 0)
        await driver.call("DELETE", f"/sessions/{driver.sid}")
        assert (await s.supervisor.trial(opened["trial_id"]))["outcome"] == "infra_exhausted"


async def test_without_a_key_nobody_comes_anywhere_but_to_what_was_opened_without_one():
    async with driven() as (driver, s):
        theirs, opened = await s.open("theirs"), await driver.open()
        forged = opened["trial_id"][:-1] + ("0" if opened["trial_id"][-1] != "0" else "1") + "~1"
        chat = {"messages": [{"role": "user", "content": "a"}]}
        routes = ("GET", ""), ("DELETE", ""), ("GET", "/trajectory"), ("POST", "/samples"), ("POST", "/v1/chat/completions")
        for sid in (theirs, forged, "open-1~1", "nobody"):
            for method, path in routes:
                status, body, _ = await driver.call(method, f"/sessions/{sid}{path}", chat if method == "POST" else None)
                assert (status, body) == (404, b'{"error":"session not found: session_id=%s"}' % sid.encode())
        operators = ("GET", "/trials"), ("GET", "/fleet"), ("POST", f"/trials/{opened['trial_id']}/restart"), ("POST", "/fleet/pause")
        assert [(await driver.call(m, p, {} if m == "POST" else None))[0] for m, p in operators] == [401] * 4
        for named in ({"trial_id": "theirs"}, {"resume": True}):
            assert (await driver.call("POST", "/sessions", named))[0] == 401
        assert (await driver.call("POST", "/sessions", {}, authorization="Bearer wrong"))[0] == 401
        assert (await s.supervisor.trial("theirs"))["state"] == "running"


async def test_a_session_that_was_opened_without_a_key_is_none_for_a_gateway_that_opens_none():
    async with driven() as (driver, _):
        sid = (await driver.open())["session_id"]
    async with driven("none") as (driver, _):
        assert (await driver.call("GET", f"/sessions/{sid}"))[0] == 401


async def test_an_agent_may_send_any_key_to_a_session_that_was_opened_without_one():
    async with driven() as (driver, _):
        await driver.open()
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
        path = f"/sessions/{driver.sid}/v1/chat/completions"
        assert (await driver.call("POST", path, chat, authorization="Bearer EMPTY"))[0] == 200


async def test_an_opening_that_is_repeated_with_its_idempotency_key_is_the_same_session():
    async with driven() as (driver, _):
        answers = [(await driver.call("POST", "/sessions", {}, **{"idempotency-key": key}))[1] for key in ("a", "a", "b")]
        assert answers[0] == answers[1] != answers[2]


async def test_with_its_own_key_a_session_is_collected_where_nobody_comes_without_one():
    async with driven("none") as (driver, s):
        assert (await driver.call("POST", "/sessions", {}))[0] == 401
        driver.sid = await s.open("t")
        path, key = f"/sessions/{driver.sid}/samples", f"Bearer {KEYS.session(driver.sid)}"
        assert (await driver.call("POST", path, {}))[0] == 401
        status, payload, _ = await driver.call("POST", path, {}, authorization=key)
        assert (status, read(payload).empty_reason) == (200, "no_records")
        assert (await driver.call("DELETE", f"/sessions/{driver.sid}", authorization=key))[0] == 204
        status, payload, _ = await driver.call("POST", path, {}, authorization=key)
        assert (status, orjson.loads(payload)["error"]["code"]) == (404, "session_closed")
        assert (await driver.call("GET", f"/sessions/{driver.sid}", authorization=key))[0] == 200


@pytest.mark.parametrize(
    "overrides", [{"gateway.host": "0.0.0.0"}, {"gateway.host": "gateway.example"}, {"gateway.advertise_url": "http://g.example:1"}]
)
def test_sessions_without_a_key_are_refused_where_others_could_open_them(overrides: dict[str, Any]):
    assert load(None, overrides)
    with pytest.raises(ConfigError, match=r"gateway\.open_sessions .* must be a loopback address"):
        load(None, {**overrides, "gateway.open_sessions": "v1"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_sessions_without_a_key_are_for_this_machine(host: str):
    assert load(None, {"gateway.host": host, "gateway.open_sessions": "v2"})

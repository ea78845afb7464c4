"""The door, over real sockets: owners and the supervisor behind it are played by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest

from rollout_ft import line
from rollout_ft.config import GatewayConfig
from rollout_ft.engine.wire import Call, decode_delivered, received
from rollout_ft.errors import BadRequest, SessionClosed
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.listing import Query
from rollout_ft.gateway.asgi import Exchange, Headers, Server
from rollout_ft.gateway.gateway import Gateway
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import token_of
from rollout_ft.telemetry.tracing import OFF, Tracing
from rollout_ft.types import JSON, Outcome, SessionSpec, Why

KEYS = Keys("secret")
SID = "t1~1"
CHAT = f"/sessions/{SID}/v1/chat/completions"
BODY: JSON = {"messages": [{"role": "user", "content": "a"}]}
NEAR = {"x-stainless-read-timeout": "0.2"}
"""A client that gives up after 0.2 s: the gateway holds it for 0.1 s."""


@dataclass
class Turn:
    headers: Headers
    body: bytes

    @property
    def request_id(self) -> str:
        return self.headers[b"x-request-id"].decode()


@dataclass
class Owner:
    """An engine actor as gateways see it. `answers` are taken in turn; none left: a plain 200."""

    name: str
    answers: list[Callable[[Exchange], Awaitable[None]]] = field(default_factory=list[Any])
    turns: list[Turn] = field(default_factory=list[Turn])
    reports: list[Any] = field(default_factory=list[Any])
    failures: list[tuple[str, bytes]] = field(default_factory=list[Any])
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    log: list[str] = field(default_factory=list[str])
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    frozen: bool = False
    pings: int = 0
    url: str = ""
    server: line.Server | None = None

    async def handle(self, x: Exchange) -> None:
        headers = x.headers()
        what = x.path.split("/")[1]
        if what == "ping":
            self.pings += 1
            if self.frozen:
                await self.release.wait()
            return await x.reply(204, b"")
        body = await x.body(1 << 20)
        self.log.append(what)
        if what == "failed":
            self.failures.append((x.path, body))
            self.failed.set()
            return await x.reply(204, b"")
        if what == "session":
            return await x.reply(200, orjson.dumps({"read": x.path, "from": self.name}))
        self.turns.append(Turn(headers, body))
        self.arrived.set()
        answer = self.answers.pop(0) if self.answers else plain
        await answer(x)

    async def answer(self, what: int, argument: int, payload: bytearray) -> bytes:
        if what == Call.REQUEST:
            exchange, sent = received(argument, payload)
            await self.handle(exchange)
            return sent.encoded()
        self.log.append("reports")
        self.reports.append(decode_delivered(payload))
        self.reported.set()
        return b""

    async def held(self, x: Exchange) -> None:
        """Answers when released; leaves when the gateway does."""
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.log.append("left")
            self.reported.set()
            raise
        await plain(x)

    async def start(self) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{sock.getsockname()[1]}"
        self.server = await line.serve(self.answer, sock, token_of(KEYS.internal), cancels=True)

    async def stop(self) -> None:
        """The process dies: nobody listens, and every connection breaks."""
        assert self.server is not None
        self.server.close()


async def plain(x: Exchange) -> None:
    await x.reply(200, b'{"the": "reply"}', [(b"x-rollout-ft-outcome", b"fresh"), (b"x-rft-depth", b"1")])


async def streamed(x: Exchange) -> None:
    await x.reply(200, b'data: {"the": "reply"}\n\ndata: [DONE]\n\n', content=b"text/event-stream")


async def lost(x: Exchange) -> None:
    await x.reply(503, b"", [(b"x-rft-owner", b"lost")])


async def moved(x: Exchange) -> None:
    await x.reply(503, b"", [(b"x-rft-owner", b"moved")])


async def broken(x: Exchange) -> None:
    await x.send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await x.send({"type": "http.response.body", "body": b'{"the"', "more_body": True})


@dataclass
class Supervisor:
    """Knows where sessions are: at the first of `owners`, until that one has failed."""

    owners: list[Owner]
    closed: str = ""
    unavailable: int = 0
    suspicious: bool = True
    asked: list[Any] = field(default_factory=list[Any])
    suspected: list[str] = field(default_factory=list[str])
    error: Exception | None = None
    queries: list[Query] = field(default_factory=list[Query])

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON:
        self.asked.append((sid, failed))
        if failed is not None and self.owners and self.owners[0].name == failed[0]:
            self.owners.pop(0)
        if self.closed and (failed is not None or not self.owners):
            return {"state": "closed", "message": self.closed}
        if self.unavailable:
            self.unavailable -= 1
            return {"state": "unavailable", "message": "wait"}
        owner = self.owners[0]
        return {"state": "owned", "url": owner.url, "engine_id": owner.name, "incarnation": 1}

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        self.suspected.append(engine_id)
        return self.suspicious

    def _did(self, what: str, *args: Any) -> JSON:
        if self.error is not None:
            raise self.error
        self.asked.append((what, *args))
        return {"did": what}

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON:
        self._did("open", spec, resume)
        return {"session_id": f"{spec.trial_id}~1", "trial_id": spec.trial_id, "attempt": 1, "turns": 0}

    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        self._did("restart", trial_id, from_attempt, resume)
        return {"session_id": f"{trial_id}~{from_attempt + 1}", "trial_id": trial_id, "attempt": from_attempt + 1, "turns": 0}

    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        return self._did("end", trial_id, attempt, outcome.value, reward)

    async def release_trial(self, trial_id: str) -> JSON:
        return self._did("release", trial_id)

    async def trial(self, trial_id: str) -> JSON:
        return self._did("trial", trial_id)

    async def trials(self, query: Query) -> JSON:
        self.queries.append(query)
        return {"trials": [self._did("trials")], "total": 7, "next": "0~t1" if query.limit else ""}

    async def timeline(self, trial_id: str) -> JSON:
        return self._did("timeline", trial_id)

    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes:
        self.queries.append(query)
        return orjson.dumps(self._did("overview", since, events, turns))

    async def events(self, since: str, limit: int) -> JSON:
        return self._did("events", since, limit)

    async def fleet(self) -> JSON:
        return {**self._did("fleet"), "serves": bool(self.owners)}

    async def read_session(self, sid: str, what: str) -> bytes:
        return orjson.dumps({**self._did("read", sid, what), "from": "store"})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> JSON:
        return orjson.loads(self.body)["error"]


@dataclass
class Stage:
    url: str
    http: aiohttp.ClientSession
    gateway: Gateway
    supervisor: Supervisor
    owners: list[Owner]

    async def ask(self, method: str, path: str, body: Any = None, *, key: str = "", headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) or body is None or hasattr(body, "__aiter__") else orjson.dumps(body)
        sent = {**(headers or {}), **({"authorization": f"Bearer {key}"} if key else {})}
        async with self.http.request(method, self.url + path, data=data, headers=sent) as r:
            return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.read())

    async def chat(self, body: Any = BODY, headers: dict[str, str] | None = None, path: str = CHAT) -> Answer:
        return await self.ask("POST", path, body, key=KEYS.session(SID), headers=headers)

    async def operate(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        return await self.ask(method, path, body, key=KEYS.operator, headers=headers)


async def serve(handle: Callable[[Exchange], Awaitable[None]]) -> tuple[str, Server]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(handle, sock)
    await server.ready()
    return f"http://127.0.0.1:{sock.getsockname()[1]}", server


@contextlib.asynccontextmanager
async def stage(owners: int = 1, ping_s: float = 60, tracing: Tracing = OFF, **config: Any) -> AsyncIterator[Stage]:
    played = [Owner(f"e{i}") for i in range(owners)]
    for owner in played:
        await owner.start()
    supervisor = Supervisor(list(played))
    settings = GatewayConfig(**config)
    reached = Owners(supervisor, token_of(KEYS.internal), ping_s)
    gateway = Gateway(settings, KEYS, supervisor, reached, "http://advertised", Inert(), tracing=tracing)
    url, server = await serve(gateway.handle)
    async with aiohttp.ClientSession() as http:
        try:
            yield Stage(url, http, gateway, supervisor, played)
        finally:
            for owner in played:
                owner.release.set()
            await reached.aclose()
            await asyncio.gather(server.aclose(), *(o.stop() for o in played))


def shape(answer: Answer) -> set[str]:
    """The keys of an error; fails for what has not OpenAI's shape."""
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.error["message"], str)
    return set(answer.error)


OPENAI = {"message", "type", "code", "param"}


# Keys.


async def test_a_wrong_key_is_the_same_401_whether_the_session_exists_or_not():
    async with stage() as s:
        answers = [
            await s.ask("POST", f"/sessions/{sid}/v1/chat/completions", BODY, key=key)
            for sid in (SID, "nobody~1", "no-session-id")
            for key in ("", "wrong", KEYS.operator, KEYS.session("t1~2"))
        ]
        assert {(a.status, a.body) for a in answers} == {(401, answers[0].body)}
        assert shape(answers[0]) == OPENAI
        assert (s.owners[0].turns, s.supervisor.asked) == ([], [])


async def test_every_route_of_a_session_takes_its_own_key_only():
    async with stage() as s:
        for method, what in [("GET", ""), ("GET", "/trajectory"), ("GET", "/checkpoint"), ("GET", "/v1/models"), ("DELETE", "")]:
            path = f"/sessions/{SID}{what}"
            for key in (KEYS.session("t2~1"), KEYS.session("t1~2"), KEYS.operator, ""):
                assert (await s.ask(method, path, key=key)).status == 401
            assert ("end", "t1", 1, "cancelled", None) not in s.supervisor.asked
            assert (await s.ask(method, path, key=KEYS.session(SID))).status in (200, 204)


OPERATORS = [
    ("POST", "/sessions"), ("POST", "/trials/t1/restart"), ("POST", "/trials/t1/outcome"), ("GET", "/trials"), ("GET", "/trials/t1"),
    ("POST", f"/sessions/{SID}/steps"), ("GET", "/fleet"), ("GET", "/overview"), ("GET", "/events"), ("GET", "/trials/t1/timeline"),
    ("GET", "/no/such/route"),
]  # fmt: skip


async def test_the_operators_routes_refuse_every_other_key():
    async with stage() as s:
        for method, path in OPERATORS:
            for key in (KEYS.session(SID), "", "wrong", KEYS.internal):
                answer = await s.ask(method, path, {} if method == "POST" else None, key=key)
                assert (answer.status, shape(answer)) == (401, OPENAI), path
        assert s.supervisor.asked == []


async def test_a_key_may_come_in_the_header_of_anthropics_clients():
    async with stage() as s:
        assert (await s.ask("POST", CHAT, BODY, headers={"x-api-key": KEYS.session(SID)})).status == 200


async def test_on_the_route_without_a_session_the_key_tells_it():
    async with stage() as s:
        assert (await s.chat(path="/v1/chat/completions")).status == 200
        assert s.supervisor.asked == [(SID, None)]


async def test_a_session_named_in_a_header_needs_its_own_key():
    async with stage() as s:
        answer = await s.chat(path="/v1/chat/completions", headers={"x-session-id": "t2~1"})
        assert (answer.status, s.supervisor.asked) == (401, [])


# What comes in.


async def test_a_body_over_the_limit_is_413_and_reaches_nobody():
    async with stage(max_body_bytes=1024) as s:
        answer = await s.chat(b"x" * 2000)
        assert (answer.status, answer.error["code"], shape(answer)) == (413, "body_too_large", OPENAI)
        assert (await s.operate("POST", "/sessions", b"x" * 2000)).status == 413
        assert s.owners[0].turns == []


async def test_a_body_that_does_not_say_its_length_has_the_same_limit():
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with stage(max_body_bytes=1024) as s:
        assert (await s.chat(parts())).status == 413
        assert s.owners[0].turns == []


async def test_an_unknown_route_is_a_404_in_openais_shape():
    async with stage() as s:
        for method, path in [("GET", "/no/such/route"), ("POST", "/fleet"), ("PUT", "/sessions"), ("GET", "/sessions/")]:
            answer = await s.operate(method, path)
            assert (answer.status, answer.error["code"], shape(answer)) == (404, "unknown_route", OPENAI), path


async def test_invalid_json_is_a_400_that_changes_nothing():
    async with stage() as s:
        for body in (b"{", b"nonsense", b'{"seed": NaN}', b"[]", b"null", b'"a"', b"[" * 10_000):
            answer = await s.operate("POST", "/sessions", body)
            assert (answer.status, answer.error["code"], shape(answer)) == (400, "invalid_json", OPENAI), body
        assert s.supervisor.asked == []


WRONG: list[tuple[str, JSON, str]] = [
    ("/sessions", {"seed": "1"}, "seed"), ("/sessions", {"mode": "test"}, "mode"), ("/sessions", {"trial_id": 3}, "trial_id"),
    ("/sessions", {"trial_id": "a/b"}, "trial_id"), ("/sessions", {"tral_id": "a"}, "tral_id"), ("/sessions", {"resume": 1}, "resume"),
    ("/sessions", {"metadata": []}, "metadata"), ("/sessions", {"recovery": "no"}, "recovery"), ("/sessions", {"sampling": 1}, "sampling"),
    ("/trials/t1/restart", {}, "from_attempt"), ("/trials/t1/restart", {"from_attempt": 0}, "from_attempt"),
    ("/trials/t1/outcome", {}, "outcome"), ("/trials/t1/outcome", {"outcome": "won"}, "outcome"),
    ("/trials/t1/outcome", {"outcome": "completed", "reward": "1"}, "reward"),
]  # fmt: skip


async def test_a_field_of_the_wrong_type_is_a_400_that_names_it_and_changes_nothing():
    async with stage() as s:
        for path, body, param in WRONG:
            answer = await s.operate("POST", path, body)
            assert (answer.status, answer.error["param"], shape(answer)) == (400, param, OPENAI), body
        assert s.supervisor.asked == []


async def test_a_session_is_opened_with_all_that_was_said_and_its_key_opens_it():
    async with stage() as s:
        said: JSON = {"trial_id": "t9", "task_id": "a", "group_id": "g", "mode": "eval", "pool": "p", "adapter": "l", "seed": 3}
        said |= {"metadata": {"x": 1}, "sampling": {"top_p": 0.5}}
        opened = orjson.loads((await s.operate("POST", "/sessions", {**said, "resume": True})).body)
        ((_, spec, resume),) = s.supervisor.asked
        assert (spec, resume) == (SessionSpec(**said, idempotency_key=spec.idempotency_key), True)
        assert spec.idempotency_key  # by which a call to the supervisor that is repeated is known
        assert opened["base_url"] == "http://advertised/sessions/t9~1/v1"
        assert KEYS.opens_session(opened["api_key"], "t9~1")


async def test_opening_twice_with_one_idempotency_key_names_one_trial():
    async with stage() as s:
        ids = [orjson.loads((await s.operate("POST", "/sessions", {}, {"idempotency-key": k})).body)["trial_id"] for k in ("a", "a", "b")]
        assert ids[0] == ids[1] != ids[2]


async def test_a_restart_and_an_outcome_reach_the_supervisor():
    async with stage() as s:
        opened = orjson.loads((await s.operate("POST", "/trials/t1/restart", {"from_attempt": 2})).body)
        assert KEYS.opens_session(opened["api_key"], "t1~3")
        await s.operate("POST", "/trials/t1/outcome", {"outcome": "completed", "reward": 1.0})
        assert s.supervisor.asked == [("restart", "t1", 2, True), ("end", "t1", None, "completed", 1.0)]


async def test_a_deleted_session_ends_its_trials_attempt():
    async with stage() as s:
        answer = await s.ask("DELETE", f"/sessions/{SID}", key=KEYS.session(SID))
        assert (answer.status, answer.body) == (204, b"")
        assert s.supervisor.asked == [("end", "t1", 1, "cancelled", None)]


async def test_what_the_supervisor_refuses_is_told_with_its_status():
    async with stage() as s:
        s.supervisor.error = BadRequest("it exists", 409, "trial_exists", "trial_id")
        answer = await s.operate("POST", "/sessions", {})
        assert (answer.status, answer.error["code"], answer.error["param"]) == (409, "trial_exists", "trial_id")


async def test_what_nobody_expected_is_told_in_openais_shape_too():
    async with stage() as s:
        s.supervisor.error = RuntimeError("a bug")
        answer = await s.operate("GET", "/fleet")
        assert answer.status == 500
        assert shape(answer) == OPENAI


@pytest.mark.parametrize(("owners", "status"), [(1, 200), (0, 503)])
async def test_it_is_ready_when_an_engine_serves_and_healthy_always(owners: int, status: int):
    async with stage(owners) as s:
        assert ((await s.ask("GET", "/ready")).status, (await s.ask("GET", "/health")).status) == (status, 200)


# A turn.


async def test_the_owners_reply_is_passed_on_as_it_is_without_what_is_internal():
    async with stage() as s:
        answer = await s.chat()
        assert (answer.status, answer.body, answer.headers["x-rollout-ft-outcome"]) == (200, b'{"the": "reply"}', "fresh")
        assert not [k for k in answer.headers if k.startswith("x-rft")]
        assert s.owners[0].turns[0].body == orjson.dumps(BODY)


async def test_an_owners_error_is_passed_on_and_is_no_delivery():
    async def wrong(x: Exchange) -> None:
        await x.reply(400, b'{"error": {"message": "m"}}', [(b"x-should-retry", b"false")])

    async with stage() as s:
        s.owners[0].answers = [wrong]
        answer = await s.chat()
        assert (answer.status, answer.error, answer.headers["x-should-retry"]) == (400, {"message": "m"}, "false")
        await s.chat()
        await s.owners[0].reported.wait()
        assert s.owners[0].reports == [(SID, s.owners[0].turns[1].request_id)]


async def test_a_delivered_reply_is_reported_before_the_next_request_arrives():
    async with stage() as s:
        await s.chat()
        await s.chat()
        assert s.owners[0].log[:3] == ["turn", "reports", "turn"]
        assert s.owners[0].reports[0] == (SID, s.owners[0].turns[0].request_id)


async def test_every_request_has_an_id_of_its_own_whatever_the_client_says():
    async with stage() as s:
        for _ in range(2):
            await s.chat(headers={"x-request-id": "mine", "x-rft-resent": "1", "x-rft-secret": "x", "x-rft-depth": "3"})
        one, other = s.owners[0].turns
        assert len({one.request_id, other.request_id, "mine"}) == 3
        assert not {b"x-rft-resent", b"x-rft-depth"} & (one.headers.keys() | other.headers.keys())


async def test_the_marks_of_a_retry_reach_the_owner():
    async with stage() as s:
        await s.chat(headers={"x-stainless-retry-count": "2", "idempotency-key": "k"})
        headers = s.owners[0].turns[0].headers
        assert (headers[b"x-stainless-retry-count"], headers[b"idempotency-key"]) == (b"2", b"k")


async def test_a_closed_session_is_a_404_that_is_not_retried():
    async with stage(owners=0) as s:
        s.supervisor.closed = "trial t1 has ended"
        answer = await s.chat()
        assert (answer.status, answer.headers["x-should-retry"], answer.error["message"]) == (404, "false", "trial t1 has ended")


async def test_while_nobody_can_serve_a_request_waits():
    async with stage() as s:
        s.supervisor.unavailable = 2
        assert (await s.chat()).status == 200
        assert len(s.supervisor.asked) == 3


async def test_over_the_limit_of_requests_a_client_is_told_when_to_come_again():
    async with stage(max_in_flight=1) as s:
        s.owners[0].answers = [s.owners[0].held]
        first = asyncio.create_task(s.chat())
        await s.owners[0].arrived.wait()
        answer = await s.chat()
        s.owners[0].release.set()
        assert (answer.status, answer.error["code"], (await first).status) == (429, "overloaded", 200)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a_client_that_goes_away_is_not_waited_for():
    async with stage() as s:
        s.owners[0].answers = [s.owners[0].held]
        asking = asyncio.create_task(s.chat())
        await s.owners[0].arrived.wait()
        asking.cancel()
        await s.owners[0].reported.wait()
        assert s.owners[0].log == ["turn", "left"]
        assert s.owners[0].reports == []


# Near the client's deadline.


async def test_a_plain_request_is_told_to_come_again_before_its_client_gives_up():
    async with stage() as s:
        s.owners[0].answers = [s.owners[0].held]
        answer = await s.chat(headers=NEAR)
        told = {k: answer.headers[k] for k in ("x-should-retry", "retry-after-ms")}
        assert (answer.status, told) == (503, {"x-should-retry": "true", "retry-after-ms": "1"})
        assert (answer.error["code"], shape(answer)) == ("still_generating", OPENAI)


async def test_what_was_told_to_come_again_is_reported_with_what_it_asked_for():
    async with stage() as s:
        s.owners[0].answers = [s.owners[0].held]
        await s.chat(headers=NEAR)
        await s.owners[0].failed.wait()
        assert s.owners[0].failures == [(f"/failed/{SID}/chat", orjson.dumps(BODY))]


async def test_a_client_that_names_no_deadline_has_the_configs():
    async with stage(max_hold_s=0.1) as s:
        s.owners[0].answers = [s.owners[0].held]
        assert (await s.chat()).error["code"] == "still_generating"


async def test_a_deadline_that_makes_no_sense_is_as_good_as_none():
    async with stage() as s:
        for nonsense in ("nan", "inf", "-1", "0", "soon", "1e400", "", "\xe9"):
            assert (await s.chat(headers={"x-stainless-read-timeout": nonsense})).status == 200, nonsense


async def test_a_stream_that_is_ready_in_time_is_passed_on_as_it_is():
    async with stage() as s:
        s.owners[0].answers = [streamed]
        answer = await s.chat({**BODY, "stream": True})
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
        assert answer.body == b'data: {"the": "reply"}\n\ndata: [DONE]\n\n'


async def until_kept_alive(response: aiohttp.ClientResponse) -> None:
    assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"


def ask_stream(s: Stage) -> Any:
    """A streamed request whose client is near its deadline, open for reading."""
    headers = {**NEAR, "authorization": f"Bearer {KEYS.session(SID)}"}
    return s.http.post(s.url + CHAT, data=orjson.dumps({**BODY, "stream": True}), headers=headers)


async def test_a_stream_near_the_deadline_is_kept_alive_until_its_reply():
    async with stage(keepalive_s=0.02) as s:
        owner = s.owners[0]

        async def late(x: Exchange) -> None:
            await owner.release.wait()
            await streamed(x)

        owner.answers = [late]
        async with ask_stream(s) as response:
            assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
            for _ in range(3):
                await until_kept_alive(response)
            owner.release.set()
            rest = await response.content.read()
        assert rest.replace(b": keep-alive\n\n", b"") == b'data: {"the": "reply"}\n\ndata: [DONE]\n\n'
        await owner.reported.wait()
        assert owner.reports == [(SID, owner.turns[0].request_id)]


async def test_a_stream_that_has_begun_is_never_silent_for_as_long_as_its_client_waits():
    async with stage(keepalive_s=10) as s:
        s.owners[0].answers = [s.owners[0].held]
        async with asyncio.timeout(5), ask_stream(s) as response:
            for _ in range(3):
                await until_kept_alive(response)


async def test_an_error_in_a_stream_that_has_begun_is_an_event_and_no_delivery():
    async with stage(keepalive_s=0.02) as s:
        owner = s.owners[0]

        async def late(x: Exchange) -> None:
            await owner.release.wait()
            await x.reply(500, b'{"error":{"message":"m"}}')

        owner.answers = [late]
        async with ask_stream(s) as response:
            await until_kept_alive(response)
            owner.release.set()
            rest = (await response.content.read()).replace(b": keep-alive\n\n", b"")
        assert orjson.loads(rest.removeprefix(b"data: ").partition(b"\n\n")[0]) == {"error": {"message": "m"}}
        await s.chat()
        await owner.reported.wait()
        assert owner.reports == [(SID, owner.turns[1].request_id)]


async def test_a_session_that_is_closed_behind_a_stream_that_has_begun_is_an_event_too():
    async with stage(keepalive_s=0.02) as s:
        owner = s.owners[0]
        s.supervisor.closed = "trial t1 was restarted"

        async def late(x: Exchange) -> None:
            await owner.release.wait()
            await lost(x)

        owner.answers = [late]
        async with ask_stream(s) as response:
            await until_kept_alive(response)
            owner.release.set()
            rest = (await response.content.read()).replace(b": keep-alive\n\n", b"")
        assert orjson.loads(rest.removeprefix(b"data: ").partition(b"\n\n")[0])["error"]["message"] == "trial t1 was restarted"


# Dialects.

MESSAGES = f"/sessions/{SID}/v1/messages"
ROUTES = [
    (CHAT, "chat"), ("/v1/chat/completions", "chat"), (MESSAGES, "messages"), ("/v1/messages", "messages"),
    (f"/sessions/{SID}/generate", "generate"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "dialect"), ROUTES)
async def test_what_was_told_to_come_again_is_reported_in_the_dialect_of_its_route(path: str, dialect: str):
    async with stage() as s:
        s.owners[0].answers = [s.owners[0].held]
        answer = await s.chat(headers=NEAR, path=path)
        await s.owners[0].failed.wait()
        assert s.owners[0].failures == [(f"/failed/{SID}/{dialect}", s.owners[0].turns[0].body)]
        assert (answer.status, answer.headers["x-should-retry"]) == (503, "true")
        assert orjson.loads(answer.body).get("type") == ("error" if dialect == "messages" else None)


@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages", "/v1/messages/count_tokens", f"{MESSAGES}/count_tokens"])
async def test_anthropics_routes_answer_in_anthropics_shape_before_anybody_read_the_body(path: str):
    async with stage(max_body_bytes=1024) as s:
        wrong = await s.ask("POST", path, BODY, key="wrong")
        large = await s.chat(b"x" * 2000, path=path)
        assert (wrong.status, wrong.error["type"]) == (401, "authentication_error")
        assert (large.status, large.error["type"]) == (413, "request_too_large")


async def test_a_stream_of_anthropics_is_kept_alive_by_pings_and_fails_in_its_shape():
    async with stage(keepalive_s=0.02) as s:
        owner = s.owners[0]
        s.supervisor.closed = "trial t1 was restarted"

        async def late(x: Exchange) -> None:
            await owner.release.wait()
            await lost(x)

        owner.answers = [late]
        headers = {**NEAR, "x-api-key": KEYS.session(SID)}
        ping = b'event: ping\ndata: {"type":"ping"}\n\n'
        async with s.http.post(s.url + MESSAGES, data=orjson.dumps({**BODY, "stream": True}), headers=headers) as response:
            for _ in range(2):
                assert await response.content.readexactly(len(ping)) == ping
            owner.release.set()
            rest = (await response.content.read()).replace(ping, b"")
        name, data, *_ = rest.split(b"\n")
        assert name == b"event: error"
        told = orjson.loads(data.removeprefix(b"data: "))
        assert (told["type"], told["error"]["message"]) == ("error", "trial t1 was restarted")


async def test_what_is_counted_goes_to_the_next_owner_when_the_first_is_lost():
    async with stage(owners=2) as s:
        await s.owners[0].stop()
        answer = await s.chat(path=f"{MESSAGES}/count_tokens")
        assert (answer.status, answer.body) == (200, b'{"the": "reply"}')


# Owners that are lost.


@pytest.mark.parametrize(("fault", "resent"), [(lost, True), (broken, True), (moved, False)], ids=["lost", "broken", "moved"])
async def test_a_request_whose_owner_is_lost_goes_to_the_next_as_the_same_request(fault: Any, resent: bool):
    async with stage(owners=2) as s:
        first, second = s.owners
        first.answers = [fault]
        assert (await s.chat()).body == b'{"the": "reply"}'
        assert second.turns[0].request_id == first.turns[0].request_id
        assert second.turns[0].body == first.turns[0].body
        assert (b"x-rft-resent" in second.turns[0].headers) == resent
        assert s.supervisor.asked == [(SID, None), (SID, ("e0", 1))]


async def test_an_owner_that_cannot_be_connected_to_never_had_the_request():
    async with stage(owners=2) as s:
        await s.owners[0].stop()
        assert (await s.chat()).status == 200
        assert b"x-rft-resent" not in s.owners[1].turns[0].headers


async def test_once_resent_a_request_stays_marked():
    async with stage(owners=3) as s:
        s.owners[0].answers, s.owners[1].answers = [lost], [moved]
        assert (await s.chat()).status == 200
        assert b"x-rft-resent" in s.owners[2].turns[0].headers
        assert len({o.turns[0].request_id for o in s.owners}) == 1


async def test_the_next_request_goes_to_the_new_owner_at_once():
    async with stage(owners=2) as s:
        s.owners[0].answers = [lost]
        await s.chat()
        await s.chat()
        assert (len(s.owners[0].turns), len(s.owners[1].turns), len(s.supervisor.asked)) == (1, 2, 2)


async def test_the_calls_of_a_frozen_owner_go_elsewhere_when_the_supervisor_agrees():
    async with stage(owners=2, ping_s=0.03) as s:
        s.owners[0].frozen, s.owners[0].answers = True, [s.owners[0].held]
        answer = await s.chat()
        assert (answer.status, s.supervisor.suspected) == (200, ["e0"])
        assert s.owners[0].pings >= 2
        assert s.owners[1].turns[0].request_id == s.owners[0].turns[0].request_id
        assert b"x-rft-resent" in s.owners[1].turns[0].headers


async def test_a_silent_owner_keeps_its_calls_while_the_supervisor_believes_in_it():
    async with stage(owners=2, ping_s=0.03) as s:
        s.supervisor.suspicious = False
        s.owners[0].frozen, s.owners[0].answers = True, [s.owners[0].held]
        asking = asyncio.create_task(s.chat())
        while not s.supervisor.suspected:
            await asyncio.sleep(0.005)
        s.owners[0].release.set()
        assert (await asking).status == 200
        assert s.owners[1].turns == []


async def test_an_owner_without_calls_is_not_pinged():
    async with stage(owners=2, ping_s=0.01) as s:
        await s.chat()
        await s.owners[0].reported.wait()
        s.supervisor.owners[0] = s.owners[1]
        s.owners[1].answers = [s.owners[1].held]
        other = asyncio.create_task(s.ask("POST", "/sessions/t2~1/v1/chat/completions", BODY, key=KEYS.session("t2~1")))
        while s.owners[1].pings < 2:  # what was under way to the first owner has arrived by then
            await asyncio.sleep(0.005)
        s.owners[0].pings = 0
        while s.owners[1].pings < 5:
            await asyncio.sleep(0.005)
        s.owners[1].release.set()
        assert (await other).status == 200
        assert s.owners[0].pings == 0


# Reading.


@pytest.mark.parametrize("what", ["", "/trajectory"])
async def test_a_session_is_read_from_its_owner_and_from_the_store_when_it_has_none(what: str):
    async with stage() as s:
        here = orjson.loads((await s.ask("GET", f"/sessions/{SID}{what}", key=KEYS.session(SID))).body)
        assert here == {"read": f"/session/{SID}{what}", "from": "e0"}
        await s.owners[0].stop()
        there = orjson.loads((await s.ask("GET", f"/sessions/{SID}{what}", key=KEYS.session(SID))).body)
        assert there["from"] == "store"


async def test_a_session_that_the_store_does_not_know_is_a_404():
    async with stage(owners=0) as s:
        s.supervisor.closed = "not known"
        s.supervisor.error = SessionClosed("trial t1 is not known")
        answer = await s.ask("GET", f"/sessions/{SID}", key=KEYS.session(SID))
        assert (answer.status, answer.headers["x-should-retry"]) == (404, "false")

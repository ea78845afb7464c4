"""The door: every request of an agent, an operator or a trainer comes in here.

Owns the routes, the keys and what a client is told when. Holds no state that matters: a gateway that dies loses
connections and nothing else. A reply that begins is complete; a request that cannot be answered in time is told to
come again, and its retry attaches.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import Counter
from hashlib import blake2b
from typing import Any, Protocol

import orjson

from rollout_ft.clock import monotonic
from rollout_ft.config import GatewayConfig, ModelConfig
from rollout_ft.errors import BadRequest, SessionClosed
from rollout_ft.faultpoints import FaultPoints
from rollout_ft.gateway.asgi import Disconnected, Exchange, Headers
from rollout_ft.gateway.bodies import Bodies
from rollout_ft.gateway.body import check_id, load_json
from rollout_ft.gateway.control import Control, ControlRoutes, StepBody
from rollout_ft.gateway.dialects import DIALECTS, dialect_of
from rollout_ft.gateway.dialects.openai_reply import models_body
from rollout_ft.gateway.keys import Keys, session_of
from rollout_ft.gateway.openapi import document
from rollout_ft.gateway.owners import MAX_LOSSES, Owner, OwnerLost, Owners
from rollout_ft.gateway.session_server import NoSession, SessionServer
from rollout_ft.gateway.watching import PAGE, Files, at_page, redirect
from rollout_ft.telemetry.metrics import NO_ENGINE, REQUESTS, SPANS_DROPPED, TURN_SECONDS, TURNS_PARKED, Counts, Readings
from rollout_ft.telemetry.tracing import OFF, Tracing, TurnSpan
from rollout_ft.types import Raw, split_session_id

_log = logging.getLogger("rollout_ft")
MAX_RETRY_AFTER_S = 30.0
KEPT_BYTES = 2**16
"""A smaller body costs less to send again than to keep."""
_PASSED = (b"x-stainless-retry-count", b"idempotency-key")
_RETRY_NOW = [(b"retry-after-ms", b"1"), (b"retry-after", b"1"), (b"x-should-retry", b"true")]
_RETRY = {503: _RETRY_NOW, 429: [(b"retry-after", b"1")]}
_FINAL = [(b"x-should-retry", b"false")]


class Supervisor(Control, Protocol):
    async def locate(self, sid: str, failed: tuple[str, int] | None) -> dict[str, Any]: ...
    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool: ...


class Gateway:
    def __init__(
        self, config: GatewayConfig, keys: Keys, supervisor: Supervisor, owners: Owners, base: str, faults: FaultPoints,
        model: ModelConfig | None = None, counts: Counts | None = None, tracing: Tracing = OFF,
    ):  # fmt: skip
        self._config, self._keys, self._owners, self._faults = config, keys, owners, faults
        self._bodies = Bodies(config.kept_body_bytes)
        self._model = model or ModelConfig()
        self._tracing = tracing
        self._control = ControlRoutes(supervisor, keys, base, config, tracing)
        self._open = SessionServer(config, keys, supervisor, self._control, owners)
        self._document, self._page = orjson.dumps(document(base)), Files()
        self.counts = counts or Counts()
        self.in_flight = 0
        self._by_session: Counter[str] = Counter()

    async def handle(self, x: Exchange) -> None:
        error_body = DIALECTS[dialect_of(x.path)].error
        try:
            await self._route(x)
        except BadRequest as e:
            await x.reply(e.status, error_body(str(e), e.code, e.status, e.param), _RETRY.get(e.status, ()))
        except SessionClosed as e:
            await x.reply(404, error_body(str(e), "session_closed", 404), _FINAL)
        except NoSession as e:
            await x.reply(404, e.body(), _FINAL)
        except Disconnected:
            return
        except Exception:
            _log.exception("%s %s", x.method, x.path)
            if not x.started:
                message = "the gateway failed in a way that nobody expected; its log says where"
                await x.reply(500, error_body(message, "internal_error", 500), _RETRY[503])
        finally:
            self.counts.add(REQUESTS, f"{x.status // 100}xx" if x.status else "gone")

    def readings(self) -> Readings:
        """What was counted here, and what waits here."""
        return Readings({**self.counts.values, (SPANS_DROPPED,): self._tracing.dropped}, {(TURNS_PARKED, NO_ENGINE): self._owners.waiting})

    async def _route(self, x: Exchange) -> None:
        parts = x.path.strip("/").split("/")
        match (x.method, parts):
            case ("GET", ["health"]):
                await x.reply(200, orjson.dumps({"status": "ok", "session_server_instance_id": self._keys.instance}))
            case ("GET", ["openapi.json"]):
                await x.reply(200, self._document)
            case ("GET", [""]):
                await redirect(x)
            case ("GET", [page] | [page, "index.html"]) if page == PAGE:
                await (self._page.reply(x, "index.html") if at_page(x) else redirect(x))
            case ("GET", [page, name]) if page == PAGE:
                await self._page.reply(x, name)
            case ("POST", ["sessions", sid, "v1", "chat", "completions"] | ["sessions", sid, "v1", "messages"]):
                await self._turn(x, self._session(x, sid))
            case ("POST", ["sessions", sid, "generate"]):
                await self._turn(x, self._session(x, sid))
            case ("POST", ["v1", "chat", "completions"] | ["v1", "messages"]):
                await self._turn(x, self._session(x, self._named_session(x)))
            case ("POST", ["sessions", sid, "v1", "messages", "count_tokens"]):
                await self._count(x, self._session(x, sid))
            case ("POST", ["v1", "messages", "count_tokens"]):
                await self._count(x, self._session(x, self._named_session(x)))
            case ("GET", ["sessions", sid, "v1", "models"]):
                self._session(x, sid)
                await x.reply(200, models_body(self._model.name, self._model.context_tokens))
            case ("GET", ["v1", "models"]):
                self._session(x, self._named_session(x))
                await x.reply(200, models_body(self._model.name, self._model.context_tokens))
            case ("POST", ["sessions", sid, "steps"]):
                await self._step(x, self._of_operator(x, sid))
            case ("POST", ["sessions", sid, "checkpoint"]):
                await self._ask_owner(x, f"/begin/{sid}", self._session(x, sid), b"")
            case ("GET", ["sessions", sid] | ["sessions", sid, "trajectory" | "checkpoint"]):
                await self._read(x, self._session(x, sid), parts)
            case ("POST", ["sessions", sid, "samples"]):
                await self._open.samples(x, self._session(x, sid))
            case ("DELETE", ["sessions", sid]) if self._open.opens(sid):
                await self._open.delete(x, sid)
            case ("DELETE", ["sessions", sid]):
                await self._control.delete(x, self._session(x, sid))
            case ("POST", ["sessions"]) if self._open.on and not _bearer(x.headers()):
                await self._open.open(x)
            case _:
                await self._control.route(x, parts, _bearer(x.headers()))

    # -- keys -----------------------------------------------------------------------------------------------------

    def _session(self, x: Exchange, sid: str) -> str:
        """The session's id, once the request's key is its own. A wrong key is 401 whether the session exists or not."""
        key = _bearer(x.headers())
        if self._open.opens(sid):
            return sid
        if self._open.on and not key:
            raise NoSession(sid)
        if not self._keys.opens_session(key, sid) or split_session_id(sid) is None:
            raise BadRequest("the API key does not open this session; use the `api_key` that came with it", 401, "invalid_api_key")
        return sid

    def _of_operator(self, x: Exchange, sid: str) -> str:
        """The session's id, for whoever runs its trial. An agent that could say what its tools did would be believed."""
        if not self._keys.is_operator(_bearer(x.headers())):
            raise BadRequest("this route needs the operator's key", 401, "invalid_api_key")
        if split_session_id(sid) is None:
            raise BadRequest(f"{sid} is no session id", 404, "unknown_session")
        return sid

    def _named_session(self, x: Exchange) -> str:
        headers = x.headers()
        return headers.get(b"x-session-id", b"").decode("latin-1") or session_of(_bearer(headers))

    # -- turns ----------------------------------------------------------------------------------------------------

    async def _turn(self, x: Exchange, sid: str) -> None:
        if self.in_flight >= self._config.max_in_flight:
            raise BadRequest("too many requests in flight (gateway.max_in_flight)", 429, "overloaded")
        if self._by_session[sid] >= self._config.max_in_flight_per_session:
            message = "too many requests of this session in flight (gateway.max_in_flight_per_session)"
            raise BadRequest(message, 429, "too_many_in_flight")
        self.in_flight += 1
        self._by_session[sid] += 1
        try:
            await self._traced_turn(x, sid)
        finally:
            self.in_flight -= 1
            self._by_session[sid] -= 1
            if not self._by_session[sid]:
                del self._by_session[sid]

    async def _traced_turn(self, x: Exchange, sid: str) -> None:
        span = self._tracing.turn(sid, x.scope["headers"], chat=not x.path.endswith("/generate"))
        try:
            await self._held_turn(x, sid, span)
        except BadRequest as e:
            span.refused(e.status, e.code)
            raise
        except SessionClosed:
            span.refused(404, "session_closed")
            raise
        except Exception:
            span.refused(500, "internal_error")
            raise
        finally:
            span.end(x.status)

    async def _held_turn(self, x: Exchange, sid: str, span: TurnSpan) -> None:
        began = monotonic()
        headers = x.headers()
        check_id(headers.get(b"idempotency-key", b"").decode("latin-1"), "idempotency-key", self._config.max_id_chars)
        body = await x.body(self._config.max_body_bytes)
        call = _TurnCall(self._owners, self._bodies, sid, dialect_of(x.path), body, headers, span)
        answer = asyncio.create_task(self._timed(call, began))
        gone = asyncio.create_task(x.disconnected())
        try:
            hold_s = _hold_s(headers, self._config) - (monotonic() - began)
            await asyncio.wait({answer, gone}, timeout=max(0.0, hold_s), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await self._answer(x, call, answer.result(), gone)
            elif not gone.done():
                await self._not_yet(x, call, answer, gone, body)
        except BadRequest as e:
            if e.status >= 500:
                call.report_failed()
            raise
        finally:
            answer.cancel()
            gone.cancel()

    async def _timed(self, call: _TurnCall, began: float) -> _Answer:
        answer = await call.run()
        whose = answer[1].get("x-rft-whose")
        if whose is not None:
            self.counts.observe(TURN_SECONDS, monotonic() - began, *whose.split("/", 1))
        return answer

    async def _answer(self, x: Exchange, call: _TurnCall, answer: _Answer, gone: asyncio.Task[None]) -> None:
        status, headers, body = answer
        depth = int(headers.get("x-rft-depth", "0"))
        parts = split_session_id(call.sid)
        if status == 200 and parts and await self._faults.replying(parts[0], depth):
            return await _cut(x, body)
        content = headers.get("content-type", "application/json").encode()
        await x.reply(status, body, [(k.encode(), v.encode()) for k, v in headers.items() if _outward(k)], content)
        if status == 200 and not gone.done():
            call.report_delivered()

    async def _not_yet(self, x: Exchange, call: _TurnCall, answer: asyncio.Task[_Answer], gone: asyncio.Task[None], body: Raw) -> None:
        """Shortly before the client gives up: a stream begins and is kept alive, a plain request comes again."""
        if load_json(body, self._config.max_json_depth).get("stream") is not True:
            answer.cancel()
            call.report_failed()
            call.span.refused(503, "still_generating")
            message = "still generating; repeat the same request and it is answered when it is done"
            return await x.reply(503, call.dialect.error(message, "still_generating", 503), _come_again(call.still_s))
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        x.began(200)
        every_s = min(self._config.keepalive_s, _hold_s(x.headers(), self._config))  # the client's patience is with each read
        await x.send({"type": "http.response.start", "status": 200, "headers": headers})
        while not answer.done() and not gone.done():
            await x.send({"type": "http.response.body", "body": call.dialect.keep_alive, "more_body": True})
            await asyncio.wait({answer, gone}, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return
        try:
            status, _, reply = answer.result()
        except (BadRequest, SessionClosed) as e:
            call.span.refused(getattr(e, "status", 404), getattr(e, "code", "session_closed"))
            status, reply = 500, call.dialect.error(str(e), getattr(e, "code", "session_closed"), getattr(e, "status", 404))
        if status != 200:
            reply = call.dialect.error_event(reply)
        was_gone = gone.done()
        await x.send({"type": "http.response.body", "body": reply})
        if status == 200 and not was_gone:
            call.report_delivered()

    async def _count(self, x: Exchange, sid: str) -> None:
        """How many tokens a body of Anthropic's has, as the session's owner would render it."""
        await self._ask_owner(x, f"/count/{sid}", sid, await x.body(self._config.max_body_bytes))

    async def _step(self, x: Exchange, sid: str) -> None:
        """A step of the trial's environment, recorded; the answer is what is recorded as this step."""
        given = await self._control.parse(x, StepBody)
        await self._ask_owner(x, f"/step/{sid}", sid, orjson.dumps(given.model_dump()))

    async def _ask_owner(self, x: Exchange, path: str, sid: str, body: Raw) -> None:
        status, _, answer = await self._owners.ask(sid, path, body)
        await x.reply(status, answer)

    async def _read(self, x: Exchange, sid: str, parts: list[str]) -> None:
        what = f"/{parts[-1]}" if len(parts) > 2 else ""
        try:
            owner = await self._owners.of(sid)
            status, _, body = await self._owners.call(owner, "GET", f"/session/{sid}{what}", b"", {})
        except (SessionClosed, OwnerLost) as e:
            if self._open.opens(sid):
                await self._open.owner(sid, e.owner if isinstance(e, OwnerLost) else None)
            return await x.reply(200, await self._control.read(sid, what.strip("/")))
        await x.reply(status, body)


_Answer = tuple[int, dict[str, str], bytes]


class _TurnCall:
    """One request on its way to whoever owns its session, as often as it takes."""

    def __init__(self, owners: Owners, bodies: Bodies, sid: str, dialect: str, body: Raw, headers: Headers, span: TurnSpan):
        self._owners, self._bodies, self.sid, self._body, self.span = owners, bodies, sid, body, span
        self._where = f"{sid}/{dialect}"
        self.dialect = DIALECTS[dialect]
        self._request_id = uuid.uuid4().hex
        self._headers = {k: headers[k] for k in _PASSED if k in headers}
        self._headers[b"x-request-id"] = self._request_id.encode()
        span.pass_on(self._headers)
        self._owner: Owner | None = None

    async def run(self) -> _Answer:
        """The owner's answer. The request id stays the same, so that it resolves to the same turn wherever it arrives."""
        failed: Owner | None = None
        losses = 0
        while True:
            self._owner = owner = await self._owners.of(self.sid, failed)
            self.span.asked(owner.engine_id, owner.incarnation)
            try:
                answer = await self._ask(owner)
                self.span.answered(*answer)
                return answer
            except OwnerLost as e:
                failed = e.owner
                self.span.owner_lost(failed.engine_id, failed.incarnation, e.in_flight)
                if e.in_flight:
                    losses += 1
                    self._headers[b"x-rft-resent"] = b"%d" % losses
                if losses >= MAX_LOSSES:
                    self.report_failed()
                    message = f"{losses} owners were lost over this request; the trial's policy decides"
                    self.span.refused(500, "turn_budget_spent")
                    return 500, {"x-should-retry": "false"}, self.dialect.error(message, "turn_budget_spent", 500)

    @property
    def still_s(self) -> float:
        return self._owner.still_s if self._owner is not None else 0.0

    async def _ask(self, owner: Owner) -> _Answer:
        """What the owner has read already is not sent again, unless it asks for that."""
        route = f"/turn/{self._where}"
        name, known = self._bodies.known(self.sid, self._body)
        answer: _Answer | None = None
        if known:
            headers = {**self._headers, b"x-rft-behind": name}
            answer = await self._owners.call(owner, "POST", route, memoryview(self._body)[known:], headers)
        if answer is None or "x-rft-whole" in answer[1]:
            answer = await self._owners.call(owner, "POST", route, self._body, self._headers)
        read = answer[1].get("x-rft-read", "")
        if read and len(self._body) >= KEPT_BYTES:
            self._bodies.keep(self.sid, read, self._body)
        return answer

    def report_delivered(self) -> None:
        if self._owner is not None:
            self._owners.report(self._owner, self.sid, delivered=self._request_id)

    def report_failed(self) -> None:
        """The client was told 5xx: whoever owns the session is told what it had asked for, as soon as somebody does."""
        self._owners.keep(blake2b(self._where.encode() + b"|" + self._body).digest(), self._tell_failed)

    async def _tell_failed(self) -> None:
        failed: Owner | None = None
        while True:
            owner = await self._owners.of(self.sid, failed)
            try:
                await self._owners.call(owner, "POST", f"/failed/{self._where}", self._body, self._headers)
                return
            except OwnerLost as e:
                failed = e.owner


def _bearer(headers: Headers) -> str:
    value = headers.get(b"authorization", b"").decode("latin-1")
    return value.removeprefix("Bearer ").strip() or headers.get(b"x-api-key", b"").decode("latin-1")


def _hold_s(headers: Headers, config: GatewayConfig) -> float:
    """How long this client may be kept waiting: a little less than it waits itself."""
    told = headers.get(b"x-stainless-read-timeout", b"")
    try:
        own = float(told)
    except ValueError:
        return config.max_hold_s
    return min(config.max_hold_s, max(own * 0.5, own - config.deadline_margin_s)) if own > 0 else config.max_hold_s


def _come_again(still_s: float) -> list[tuple[bytes, bytes]]:
    """When a plain request that was not answered in time comes again: at once, for each try waits as long as its client can.

    Through a pause its few tries have to last longer: the longer it has taken already, the later. Clients heed up to 60 s."""
    if not still_s:
        return _RETRY_NOW
    wait_s = min(MAX_RETRY_AFTER_S, max(1.0, still_s))
    return [(b"retry-after-ms", b"%d" % (wait_s * 1000)), (b"retry-after", b"%d" % math.ceil(wait_s)), (b"x-should-retry", b"true")]


def _outward(name: str) -> bool:
    return name.startswith(("x-rollout-ft-", "x-should-retry", "retry-after"))


async def _cut(x: Exchange, body: bytes) -> None:
    """Breaks the connection in the middle of the reply, as a proxy that dies does."""
    x.began(200)
    await x.send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await x.send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})

"""What an engine actor answers to the gateways: turns, reports and trajectories of the sessions that it holds.

Owns what a call from a gateway means, and the translation of errors into statuses. `OWNER` in a reply's headers tells
a gateway that the session is somebody else's now; `READ` names what was read of a large body, a later one may come as
what stands `BEHIND` that, and `WHOLE` asks for all of it. `WHOSE` says as whose a turn is timed, of one that is.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import orjson

from rollout_ft.config import Config
from rollout_ft.engine.host import Reply, SessionHost
from rollout_ft.engine.wire import Call, decode_delivered, received
from rollout_ft.errors import BadRequest, EngineRefused, MatcherFailed, SessionClosed, SessionMoved, TrialFault
from rollout_ft.gateway.asgi import Disconnected, Exchange, Headers
from rollout_ft.gateway.dialects import COUNT, DIALECTS, Asked, Dialect, Evidence, Rules
from rollout_ft.gateway.dialects.sampling import session_sampling
from rollout_ft.gateway.reading import NotRead, Reading
from rollout_ft.samples.checkpoint import step_body
from rollout_ft.samples.collect import Unassembled, Wanted, samples_body
from rollout_ft.samples.routed import array_json
from rollout_ft.samples.trajectory import max_trim
from rollout_ft.session.freshness import advice, code_of
from rollout_ft.session.render import Renderer
from rollout_ft.session.session import Session
from rollout_ft.telemetry.metrics import whose
from rollout_ft.telemetry.tracing import TRACEPARENT, USAGE
from rollout_ft.types import JSON, Raw, Served, Step, split_session_id

OWNER, REQUEST, RESENT, DEPTH, STILL = b"x-rft-owner", b"x-request-id", b"x-rft-resent", b"x-rft-depth", b"x-rft-still"
READ, BEHIND, WHOLE, WHOSE = b"x-rft-read", b"x-rft-behind", b"x-rft-whole", b"x-rft-whose"
RETRY = [(b"x-should-retry", b"true")]
_log = logging.getLogger("rollout_ft")
ARRAY_STEP = 8192
FINAL = [(b"x-should-retry", b"false")]


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What is kept of a session's requests: its own sampling parameters, the body that was read last, and as whose its turns
    are counted."""

    sampling: JSON
    reading: Reading
    whose: bytes


class OwnerHTTP:
    def __init__(self, host: SessionHost, config: Config, renderer: Renderer):
        self._host, self._config, self._renderer = host, config, renderer
        self._spoken: WeakKeyDictionary[Session, _Spoken] = WeakKeyDictionary()

    async def answer(self, what: int, argument: int, payload: bytearray) -> bytes:
        """A call that came over the line."""
        if what == Call.REQUEST:
            exchange, sent = received(argument, payload)
            del payload
            await self.handle(exchange)
            return sent.encoded()
        self._host.report(*decode_delivered(payload))
        return b""

    async def handle(self, x: Exchange) -> None:
        route, _, rest = x.path.lstrip("/").partition("/")
        sid, _, what = rest.partition("/")
        try:
            if route == "turn":
                await self._turn(x, sid, DIALECTS[what], x.headers())
            elif route == "count":
                await self._count(x, sid)
            elif route == "ping":
                await x.reply(204, b"", [(STILL, b"%.1f" % self._host.still_s())])
            elif route == "failed":
                request = self._parse(sid, DIALECTS[what], await x.body(self._config.gateway.max_body_bytes), Evidence("failed"))
                await self._host.failed(sid, request.turn)
                await x.reply(204, b"")
            elif route == "step":
                await self._step(x, sid)
            elif route == "session":
                assemble = await self._host.assembly(self._host.session(sid), what)
                await x.reply(200, await asyncio.to_thread(lambda: dump(assemble())))
            elif route == "begin":
                assemble = await self._host.begin(sid)
                await x.reply(200, await asyncio.to_thread(lambda: dump(assemble())))
            elif route == "samples":
                await self._samples(x, sid)
        except SessionMoved as e:
            await x.reply(503, b"", [(OWNER, b"lost" if e.in_flight else b"moved")])
        except MatcherFailed:
            await self._host.unreadable(sid)
            await x.reply(204, b"")
        except (SessionClosed, BadRequest):
            await x.reply(204, b"")
        except Disconnected:
            return
        except Exception:
            _log.exception("%s", x.path)  # not the owner's end: it answers, and keeps its sessions
            await x.reply(500, b"", RETRY)

    async def _turn(self, x: Exchange, sid: str, dialect: Dialect, headers: Headers) -> None:
        body = await x.body(self._config.gateway.max_body_bytes)
        retries = headers.get(b"x-stainless-retry-count", b"0")
        evidence = Evidence(
            request_id=headers[REQUEST].decode("latin-1"),
            retry=retries.isdigit() and bool(retries.strip(b"0")),
            idempotency_key=headers.get(b"idempotency-key", b"").decode("latin-1"),
            resent=RESENT in headers,
        )
        error_body = dialect.error
        request: Asked | None = None
        try:
            request = self._parse(sid, dialect, body, evidence, headers.get(BEHIND, b"").decode())
            del body  # it is parsed: several times its size is in hand already
            spoken = self._spoken_by(self._host.session(sid))
            read = spoken.reading.name  # of this body: others may be read while it waits
            with self._host.tracing.under(headers):
                reply = await self._host.serve(sid, request.turn)
        except NotRead:
            return await x.reply(503, b"", [(WHOLE, b"1")])
        except BadRequest as e:
            return await x.reply(e.status, error_body(str(e), e.code, e.status, e.param), _retry_after(e))
        except SessionClosed as e:
            return await x.reply(404, error_body(str(e), "session_closed", 404), FINAL)
        except TrialFault as e:
            await self._host.fault(sid, e.reason)
            trial_id, attempt = split_session_id(sid) or (e.trial_id, 0)
            message = f"{e}: {advice(e.reason, trial_id, attempt)}"
            return await x.reply(500, error_body(message, code_of(e.reason), 500), FINAL)
        except EngineRefused as e:
            if e.status == 400:
                return await x.reply(400, error_body(e.message, _engine_code(e.message), 400))
            if request is not None:
                await self._host.failed(sid, request.turn)
            return await x.reply(500, error_body(f"{e}; the trial's policy decides", "turn_budget_spent", 500), FINAL)
        except MatcherFailed as e:
            await self._host.unreadable(sid)
            return await x.reply(500, error_body(str(e), "matcher_failed", 500), FINAL)
        except (SessionMoved, Disconnected):
            raise
        except Exception:
            _log.exception("turn of session %s", sid)
            if request is not None:
                await self._host.failed(sid, request.turn)
            return await x.reply(500, error_body("the engine's actor failed; its log says where", "internal_error", 500), RETRY)
        await self._send(x, reply, request, read, spoken.whose, traced=TRACEPARENT in headers)

    async def _count(self, x: Exchange, sid: str) -> None:
        """The tokens that a turn of this body would have before its output. Nothing is marked or begun."""
        body = await x.body(self._config.gateway.max_body_bytes)
        try:
            request = self._parse(sid, COUNT, body, Evidence("count"))
            tokens = self._host.session(sid).prompt_tokens(request.turn)
        except BadRequest as e:
            return await x.reply(e.status, COUNT.error(str(e), e.code, e.status, e.param))
        await x.reply(200, orjson.dumps({"input_tokens": tokens}))

    async def _step(self, x: Exchange, sid: str) -> None:
        """What is recorded as this step of the session's attempt."""
        given = orjson.loads(await x.body(self._config.gateway.max_body_bytes))
        action, result = orjson.dumps(given["action"], option=orjson.OPT_SORT_KEYS), orjson.dumps(given["result"])
        step = Step(self._host.session(sid).attempt, given["number"], action, result, given["snapshot"])
        try:
            await x.reply(200, orjson.dumps(step_body(await self._host.record_step(sid, step))))
        except BadRequest as e:
            await x.reply(e.status, DIALECTS["chat"].error(str(e), e.code, e.status, e.param))
        except SessionClosed as e:
            await x.reply(404, DIALECTS["chat"].error(str(e), "session_closed", 404), FINAL)

    async def _samples(self, x: Exchange, sid: str) -> None:
        """The session as training samples; the gateway has checked what is asked for."""
        wanted = Wanted(**orjson.loads(await x.body(self._config.gateway.max_body_bytes)))
        session, text = self._host.session(sid), partial(self._renderer.text, keep_special=True)
        tainted, trim = bool(session.fault or session.unanswered()), max_trim(session)
        assemble = await self._host.assembly(session, "linear" if self._config.gateway.open_sessions == "v1" else "trajectory")
        make = partial(samples_body, wanted=wanted, text=text, tainted=tainted, max_trim_tokens=trim)
        try:
            made = await asyncio.to_thread(lambda: make(assemble()))
        except Unassembled as e:
            return await x.reply(422, str(e).encode(), content=b"text/plain")
        await x.reply(200, made, content=b"application/octet-stream")

    def _parse(self, sid: str, dialect: Dialect, body: Raw, evidence: Evidence, behind: str = "") -> Asked:
        session, config = self._host.session(sid), self._config
        spoken = self._spoken_by(session)
        rules = Rules(
            session_id=sid, sampling=spoken.sampling, force=config.sampling.policy == "force", model=config.model.name,
            form_ignored=config.gateway.open_sessions != "none",
            max_messages=config.session.max_messages, max_output_tokens=config.session.max_output_tokens,
            vocab_size=self._renderer.vocab_size, digests=session.digests, max_tools=config.session.max_tools,
            load=partial(spoken.reading.load_rest, behind) if behind else spoken.reading.load,
        )  # fmt: skip
        return dialect.parse(body, evidence, rules)

    def _spoken_by(self, session: Session) -> _Spoken:
        spoken = self._spoken.get(session)
        if spoken is None:
            mine = "/".join(whose(session.spec)).encode("latin-1", "replace")
            sampling = session_sampling(self._config.sampling.parameters, session.spec.sampling)
            spoken = self._spoken[session] = _Spoken(sampling, Reading(self._config.gateway.max_json_depth), mine)
        return spoken

    async def _send(self, x: Exchange, reply: Reply, request: Asked, read: str, mine: bytes, *, traced: bool) -> None:
        turn, sampled = reply.node.turn, len(reply.node.turn.output_ids) // 4
        content = b"text/event-stream" if request.stream else b"application/json"
        headers = [
            (b"x-rollout-ft-outcome", reply.served.value.encode()),
            (b"x-rollout-ft-turn", turn.key.encode()),
            (b"x-rollout-ft-generations", str(turn.generations).encode()),
            (b"x-rollout-ft-weight-version", (turn.version_spans[-1].version if turn.version_spans else "").encode()),
            (DEPTH, str(turn.depth).encode()),
            *([(WHOSE, mine)] if reply.served is not Served.REPLAYED else []),
            *([(READ, read.encode())] if read else []),
            *([(USAGE, b"%d %d %d" % (reply.node.tokens - sampled, sampled, turn.tokens_reused))] if traced else []),
        ]
        await x.reply(200, request.reply(reply.node, self._renderer), headers, content)


def dump(made: JSON) -> bytes:
    """A trajectory or records as JSON; a long array bit by bit, so that other threads get their turn in between.

    One of several dimensions is `{data, dtype, shape}`, the data in base64."""
    return orjson.dumps(made, default=_array)


def _array(value: Any) -> orjson.Fragment:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} is not for JSON")
    numbers = cast("np.ndarray[Any, Any]", value)
    if numbers.ndim > 1:
        return array_json(numbers)
    parts = [orjson.dumps(numbers[i : i + ARRAY_STEP], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for i in range(0, len(numbers), ARRAY_STEP)]
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


def _engine_code(message: str) -> str:
    """An engine that knows a smaller context than the config is answered as if the session had seen it."""
    return "context_length_exceeded" if "context length" in message else "refused_by_engine"


def _retry_after(e: BadRequest) -> list[tuple[bytes, bytes]]:
    return [(b"retry-after", b"%d" % getattr(e, "retry_after_s", 1))] if e.status == 429 else []

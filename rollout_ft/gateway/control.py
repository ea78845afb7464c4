"""The routes of operators, trainers and harnesses: sessions opened, trials restarted and ended, the fleet seen.

Owns the shapes of these requests and replies. Knows nothing of turns. All of them ask the supervisor; all but
`POST /sessions/…`'s own key need the operator's.
"""

from __future__ import annotations

import uuid
from hashlib import blake2b
from typing import Annotated, Any, Literal, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout_ft.config import GatewayConfig
from rollout_ft.errors import BadRequest
from rollout_ft.fleet.listing import Query
from rollout_ft.fleet.weights import Command
from rollout_ft.gateway import trainer
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.gateway.body import check_id, load_json
from rollout_ft.gateway.dialects.sampling import check_sampling
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.watching import EventsQuery, OverviewQuery, TrialsQuery, asked
from rollout_ft.telemetry.tracing import OFF, Tracing
from rollout_ft.types import JSON, MAX_CAUSE_CHARS, TRIAL_ID, Outcome, Recovery, SessionSpec, Why, split_session_id


class Control(Protocol):
    """The supervisor, as far as these routes are concerned. Each raises BadRequest with its status."""

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON: ...
    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON: ...
    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON: ...
    async def release_trial(self, trial_id: str) -> JSON: ...
    async def trial(self, trial_id: str) -> JSON: ...
    async def trials(self, query: Query) -> JSON: ...
    async def timeline(self, trial_id: str) -> JSON: ...
    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes: ...
    async def events(self, since: str, limit: int) -> JSON: ...
    async def fleet(self) -> JSON: ...
    async def read_session(self, sid: str, what: str) -> bytes: ...
    async def resize_fleet(self, count: int) -> JSON: ...
    async def attach_engines(self, urls: list[str]) -> JSON: ...
    async def drain_engine(self, engine_id: str) -> JSON: ...
    async def command(self, command: Command) -> JSON: ...


MAX_OUTPUT_TOKENS = 2**31
B = TypeVar("B", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OpenBody(_Body):
    trial_id: str | None = None
    task_id: str = Field(default="", max_length=256)
    group_id: str = Field(default="", max_length=256)
    mode: Literal["train", "eval"] = "train"
    pool: str = Field(default="", max_length=256)
    adapter: str = Field(default="", max_length=256)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    metadata: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    resume: bool = False
    recovery: Literal["resume", "restart", "abandon"] = "resume"


_SPEC = OpenBody.model_fields.keys() - {"trial_id", "resume", "recovery"}


class RestartBody(_Body):
    from_attempt: int = Field(ge=1, lt=2**31)
    checkpoint: bool = True
    """False: the new attempt starts from nothing."""
    reason: Literal["infra", "environment", "agent", "versions", "resumed", "asked"] = "asked"
    """What is to blame for the end of the attempt before it, or what else it is for."""
    cause: str = Field(default="", max_length=4096)
    """For people."""


class OutcomeBody(_Body):
    outcome: Literal["completed", "truncated", "agent_failed", "env_failed", "infra_exhausted", "cancelled"]
    reward: float | None = Field(default=None, allow_inf_nan=False)
    cause: str = Field(default="", max_length=4096)
    attempt: int | None = Field(default=None, ge=1, lt=2**31)


Url = Annotated[str, Field(pattern=r"^https?://[^/]+", max_length=2048)]


class EnginesBody(_Body):
    """One of the two."""

    count: int | None = Field(default=None, ge=1, le=4096)
    """How many engines there are to be, where we start them."""
    urls: list[Url] | None = Field(default=None, min_length=1, max_length=4096)
    """Engines of somebody else that are there as well, or again."""


class StepBody(_Body):
    """Step `number` of the environment in this attempt: 1, 2, …"""

    number: int = Field(ge=1, le=2**31)
    action: dict[str, Any]
    result: dict[str, Any]
    snapshot: str = Field(default="", max_length=1024)


class DrainBody(_Body):
    engine_id: str = Field(max_length=2048)


class ControlRoutes:
    def __init__(self, supervisor: Control, keys: Keys, base: str, limits: GatewayConfig, tracing: Tracing = OFF):
        self._supervisor, self._keys, self._base, self._limits, self._tracing = supervisor, keys, base, limits, tracing

    async def route(self, x: Exchange, parts: list[str], key: str) -> None:
        """Everything that needs the operator's key. Raises BadRequest."""
        if parts == ["ready"] and x.method == "GET":
            serves = (await self._supervisor.fleet())["serves"]
            return await x.reply(200 if serves else 503, orjson.dumps({"ready": serves}))
        handler = self._find(x, parts)
        if not self._keys.is_operator(key):
            raise BadRequest("this route needs the operator's key", 401, "invalid_api_key")
        if handler is None:
            raise BadRequest(f"no such route: {x.method} {x.path}", 404, "unknown_route")
        result = await handler
        if not x.started:
            await x.reply(200, result if isinstance(result, bytes) else orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY))

    def _find(self, x: Exchange, parts: list[str]) -> Any:
        """A coroutine function's call is made only by `route`, after the key was checked."""
        match (x.method, parts):
            case ("POST", ["sessions"]):
                return _Later(self._open, x)
            case ("POST", ["trials", trial_id, "restart"]):
                return _Later(self._restart, x, trial_id)
            case ("POST", ["trials", trial_id, "outcome"]):
                return _Later(self._outcome, x, trial_id)
            case ("POST", ["trials", trial_id, "release"]):
                return _Later(self._supervisor.release_trial, trial_id)
            case ("GET", ["trials"]):
                return _Later(self._trials, x)
            case ("GET", ["trials", trial_id]):
                return _Later(self._supervisor.trial, trial_id)
            case ("GET", ["trials", trial_id, "timeline"]):
                return _Later(self._supervisor.timeline, trial_id)
            case ("GET", ["overview"]):
                return _Later(self._overview, x)
            case ("GET", ["events"]):
                return _Later(self._events, x)
            case ("POST", ["fleet", "engines"]):
                return _Later(self._engines, x)
            case ("POST", ["fleet", "drain"]):
                return _Later(self._drain, x)
            case ("GET", ["fleet"]):
                return _Later(self._supervisor.fleet)
            case ("GET", ["model_info"] | ["get_model_info"]):
                return _Later(self._model_info)
            case ("POST", _) | ("GET", ["flush_cache"]) if (route := "/".join(parts)) in trainer.BODIES:
                return _Later(self._command, x, route)
            case _:
                return None

    async def delete(self, x: Exchange, sid: str) -> None:
        """Closes the session; the trial stays readable."""
        trial_id, attempt = split_session_id(sid) or ("", 0)
        await self._supervisor.end_trial(trial_id, attempt, Outcome.CANCELLED, None, "the session was deleted")
        await x.reply(204, b"")

    async def read(self, sid: str, what: str) -> bytes:
        return await self._supervisor.read_session(sid, what)

    async def _open(self, x: Exchange) -> JSON:
        body, key = await self.parse(x, OpenBody), self.idempotency_key(x)
        return await self.open_trial(body, _new_trial_id(key) if body.trial_id is None else body.trial_id, key)

    async def open_trial(self, body: OpenBody, trial_id: str, idempotency: str) -> JSON:
        """A session of this trial, and the key to it."""
        if not TRIAL_ID.fullmatch(trial_id):
            raise BadRequest(f"trial_id must match {TRIAL_ID.pattern}", param="trial_id")
        check_sampling(body.sampling, MAX_OUTPUT_TOKENS)
        given: Any = body.model_dump(include=_SPEC)
        # Without a key of its own it gets one, by which a call to the supervisor that is repeated is known as the same.
        known_by = idempotency or uuid.uuid4().hex
        spec = SessionSpec(trial_id, recovery=Recovery(body.recovery), idempotency_key=known_by, **given)
        return self._session(await self._supervisor.open_session(spec, body.resume))

    def idempotency_key(self, x: Exchange) -> str:
        key = x.headers().get(b"idempotency-key", b"").decode("latin-1")
        return check_id(key, "idempotency-key", self._limits.max_id_chars)

    async def _restart(self, x: Exchange, trial_id: str) -> JSON:
        body = await self.parse(x, RestartBody)
        why = Why(body.reason, body.cause[:MAX_CAUSE_CHARS])
        return self._session(await self._supervisor.restart_trial(trial_id, body.from_attempt, body.checkpoint, why))

    async def _outcome(self, x: Exchange, trial_id: str) -> JSON:
        body = await self.parse(x, OutcomeBody)
        return await self._supervisor.end_trial(trial_id, body.attempt, Outcome(body.outcome), body.reward, body.cause)

    async def _trials(self, x: Exchange) -> None:
        """A list, as it is without any parameter; what is to know of it beside that is in the headers."""
        found = await self._supervisor.trials(asked(x, TrialsQuery).query())
        more = [(b"x-rollout-ft-total", str(found["total"]).encode())]
        if found["next"]:
            more.append((b"x-rollout-ft-next", found["next"].encode()))
        await x.reply(200, orjson.dumps(found["trials"]), more)

    async def _events(self, x: Exchange) -> JSON:
        query = asked(x, EventsQuery)
        return await self._supervisor.events(query.since or "", query.limit)

    async def _overview(self, x: Exchange) -> bytes:
        q = asked(x, OverviewQuery)
        return await self._supervisor.overview(q.query(), q.since or "", q.events, q.turns)

    async def _model_info(self) -> JSON:
        """What a trainer reads of SGLang's own: the version, which is that of the fleet."""
        return {"weight_version": (await self._supervisor.fleet())["weights"]["version"], "is_generation": True}

    async def _command(self, x: Exchange, route: str) -> JSON:
        data = load_json(await x.body(self._limits.max_body_bytes) or b"{}", self._limits.max_json_depth)
        return trainer.reply_of(route, await self._supervisor.command(trainer.command_of(route, data)))

    async def _engines(self, x: Exchange) -> JSON:
        body = await self.parse(x, EnginesBody)
        if (body.count is None) == (body.urls is None):
            raise BadRequest("give count, for engines that we start, or urls, for engines of somebody else", param="count")
        if body.urls is not None:
            return await self._supervisor.attach_engines(body.urls)
        return await self._supervisor.resize_fleet(body.count or 0)

    async def _drain(self, x: Exchange) -> JSON:
        return await self._supervisor.drain_engine((await self.parse(x, DrainBody)).engine_id)

    def _session(self, opened: JSON) -> JSON:
        sid = opened["session_id"]
        traceparent = self._tracing.traceparent(sid)
        traced = {"traceparent": traceparent} if traceparent else {}
        return {**opened, **traced, "base_url": f"{self._base}/sessions/{sid}/v1", "api_key": self._keys.session(sid)}

    async def parse(self, x: Exchange, model: type[B]) -> B:
        """The body; one that is not there is an empty object. Raises BadRequest naming the field."""
        data = load_json(await x.body(self._limits.max_body_bytes) or b"{}", self._limits.max_json_depth)
        try:
            return model.model_validate(data)
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(str(p) for p in first["loc"])
            raise BadRequest(f"{field}: {first['msg']}", param=field) from None


class _Later:
    """A call that is made when it is awaited."""

    def __init__(self, function: Any, *args: Any):
        self._function, self._args = function, args

    def __await__(self) -> Any:
        return self._function(*self._args).__await__()


def _new_trial_id(idempotency_key: str) -> str:
    """The same Idempotency-Key names the same trial."""
    if idempotency_key:
        return "t-" + blake2b(idempotency_key.encode(), digest_size=12).hexdigest()
    return "t-" + uuid.uuid4().hex[:16]

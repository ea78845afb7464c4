"""The wire format of miles' session server, so that its driver may be pointed here.

Owns sessions that are opened without a key, what their driver may do with them by their id alone, and the words of its
errors. Knows nothing of turns. The id of such a session is a capability that only the run can make: nobody who was not told
it can use the session, and by it nobody comes to another session, a trial of somebody else's or a route of the operator's.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from rollout_ft.config import GatewayConfig
from rollout_ft.errors import BadRequest, RolloutFTError, SessionClosed
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.gateway.control import Control, ControlRoutes, OpenBody
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.owners import Owner, Owners
from rollout_ft.types import JSON, Outcome, split_session_id

_log = logging.getLogger("rollout_ft")
CAUSE = "its driver deleted the session"


class NoSession(RolloutFTError):
    """A session without a key is not there, or not any more (HTTP 404)."""

    def body(self) -> bytes:
        return orjson.dumps({"error": f"session not found: session_id={self}"})


class OpenKeylessBody(OpenBody):
    """What a driver without a key may ask for. The trial is a new one, and its name is ours to give."""

    evaluation: bool = False
    """The same as `mode: eval`."""


class SamplesBody(BaseModel):
    model_config = ConfigDict(strict=True)

    max_seq_len: int | None = Field(default=None, ge=1)
    """No sample gets longer, prompts and observations counted."""
    metadata: dict[str, Any] | None = None
    """Of the agent: its `reward`, and what is noted with every sample."""


class SessionServer:
    def __init__(self, config: GatewayConfig, keys: Keys, supervisor: Control, control: ControlRoutes, owners: Owners):
        self.on = config.open_sessions != "none"
        self._keys, self._supervisor, self._control, self._owners = keys, supervisor, control, owners

    def opens(self, sid: str) -> bool:
        """Whether this session was opened without a key, and may be used so."""
        parts = split_session_id(sid)
        return self.on and parts is not None and self._keys.is_open_trial(parts[0])

    async def open(self, x: Exchange) -> None:
        body = await self._control.parse(x, OpenKeylessBody)
        if body.trial_id is not None or body.resume:
            message = "without the operator's key a session is of a new trial, which is named here: leave trial_id and resume out"
            raise BadRequest(message, 401, "invalid_api_key", "resume" if body.trial_id is None else "trial_id")
        body.mode = "eval" if body.evaluation else body.mode
        key = self._control.idempotency_key(x)
        drawn = self._keys.drawn(key) if key else secrets.token_hex(16)
        await x.reply(200, orjson.dumps(await self._control.open_trial(body, self._keys.open_trial(drawn), key)))

    async def samples(self, x: Exchange, sid: str) -> None:
        """What the session's owner makes of it. Raises NoSession or SessionClosed once it is over."""
        asked = await self._control.parse(x, SamplesBody)
        body = orjson.dumps({"max_seq_len": asked.max_seq_len, "metadata": asked.metadata or {}})
        try:
            status, headers, made = await self._owners.ask(sid, f"/samples/{sid}", body)
        except SessionClosed:
            raise self._over(sid) from None
        await x.reply(status, made, content=headers.get("content-type", "application/json").encode())

    async def delete(self, x: Exchange, sid: str) -> None:
        """The driver has what it wants of it: the trial is over, and forgotten but for its summary."""
        trial_id, attempt = split_session_id(sid) or ("", 0)
        try:
            trial = await self._supervisor.trial(trial_id)
            if trial["state"] != "running":
                raise NoSession(sid)
            await self._supervisor.end_trial(trial_id, attempt, _outcome(trial), None, CAUSE)
        except BadRequest as e:
            raise (NoSession(sid) if e.status in (404, 409) else e) from None
        try:
            await self._supervisor.release_trial(trial_id)
        except BadRequest as e:
            _log.warning("trial.not_released trial=%s: %s", trial_id, e)
        await x.reply(204, b"")

    async def owner(self, sid: str, failed: Owner | None) -> Owner:
        """Who has the session; to a driver without a key one that is over is not there. Raises NoSession or SessionClosed."""
        try:
            return await self._owners.of(sid, failed)
        except SessionClosed:
            raise self._over(sid) from None

    def _over(self, sid: str) -> RolloutFTError:
        return NoSession(sid) if self.opens(sid) else SessionClosed(f"session {sid} is closed: its trajectory can be read")


def _outcome(trial: JSON) -> Outcome:
    """A driver does not say how it went; whether anything came of it is known."""
    if trial["tainted"]:
        return Outcome.INFRA_EXHAUSTED
    return Outcome.COMPLETED if trial["turns"] else Outcome.CANCELLED

"""Which turn a request id or an Idempotency-Key stands for.

Owns both indexes. Pure. An id is known once its turn is in flight or committed, never for a request that was refused;
of ids only the newest are kept, since a gateway sends a request again within seconds.
"""

from __future__ import annotations

from rollout_ft.errors import BadRequest

MOST = 65536
MOST_KEYS = 4096
"""Idempotency-Keys of a session that its next owner is told of; a key costs its sender nothing, and us an entry."""


class Known:
    def __init__(self) -> None:
        self._requests: dict[str, str] = {}
        self._idempotent: dict[str, tuple[str, str]] = {}

    def remember(self, key: str, base: str, request_id: str, idempotency_key: str = "") -> None:
        self._requests[request_id] = key
        if len(self._requests) > MOST:
            del self._requests[next(iter(self._requests))]
        if idempotency_key:
            self._idempotent[idempotency_key] = (base, key)
            if len(self._idempotent) > MOST:
                del self._idempotent[next(iter(self._idempotent))]

    @property
    def has_room(self) -> bool:
        return len(self._idempotent) < MOST_KEYS

    def forget(self, request_id: str, idempotency_key: str) -> None:
        self._requests.pop(request_id, None)
        self._idempotent.pop(idempotency_key, None)

    def turn(self, request_id: str) -> str | None:
        return self._requests.get(request_id)

    def same(self, idempotency_key: str, base: str) -> str | None:
        """The turn that was asked for with this key. Raises BadRequest (422) when that was another request."""
        found = self._idempotent.get(idempotency_key) if idempotency_key else None
        if found is None:
            return None
        if found[0] != base:
            raise BadRequest(
                "this Idempotency-Key was used with another request; use a new key for a new request",
                status=422,
                code="idempotency_key_reused",
            )
        return found[1]

"""Who may do what: a key per session, one for the operator, one between our own actors.

Owns the derivation of all keys from the run's secret. Nothing is stored: a key is an HMAC, so that it outlives every
restart, and a session's key says nothing about any other. Compared in constant time. The name of a trial that was opened
without a key is a key itself: it is drawn at random, and ends in an HMAC that nobody else can make.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

_OPEN = "open-"


@dataclass(frozen=True, slots=True)
class Keys:
    secret: str = field(repr=False)

    def _derive(self, purpose: str) -> str:
        return hmac.new(self.secret.encode(), purpose.encode(), "sha256").hexdigest()[:48]

    @property
    def operator(self) -> str:
        return "rft-op-" + self._derive("operator")

    @property
    def internal(self) -> str:
        return self._derive("internal")

    @property
    def instance(self) -> str:
        """Names the run to those who ask whether they still talk to the same: no key."""
        return self._derive("instance")[:32]

    def drawn(self, idempotency_key: str) -> str:
        """What stands for chance where the same request is to name the same trial."""
        return self._derive("drawn:" + idempotency_key)[:32]

    def open_trial(self, drawn: str) -> str:
        """The name of a trial that was opened without a key."""
        return f"{_OPEN}{drawn}-{self._derive(_OPEN + drawn)}"

    def is_open_trial(self, trial_id: str) -> bool:
        drawn = trial_id.removeprefix(_OPEN).rpartition("-")[0]
        return trial_id.startswith(_OPEN) and hmac.compare_digest(trial_id.encode(), self.open_trial(drawn).encode())

    def session(self, session_id: str) -> str:
        """Opens this session, whose id names the trial and the attempt, and nothing else."""
        return f"rft-{session_id}-{self._derive('session:' + session_id)}"

    def opens_session(self, key: str, session_id: str) -> bool:
        return hmac.compare_digest(key.encode(), self.session(session_id).encode())

    def is_operator(self, key: str) -> bool:
        return hmac.compare_digest(key.encode(), self.operator.encode())

    def is_internal(self, key: bytes) -> bool:
        return hmac.compare_digest(key, self.internal.encode())


def session_of(key: str) -> str:
    """The session that a key claims to open, for routes without one in their path; still to be checked."""
    return key.removeprefix("rft-").rpartition("-")[0] if key.startswith("rft-") else ""

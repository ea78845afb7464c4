"""The taxonomy: every failure that crosses a boundary, named by who has to act on it.

Owns the error classes and their data. Each survives pickling (Ray passes errors between processes): a class keeps
all its data in `args`. An error says what happened and what to do; what the client is told is the gateway's affair.
"""

from __future__ import annotations


class RolloutFTError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(RolloutFTError):
    """The config, a file or an option cannot be used; the message names the key and the remedy."""


class BadRequest(RolloutFTError):
    """The request itself is wrong (HTTP 4xx); repeating it cannot help."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request", param: str | None = None):
        super().__init__(message, status, code, param)
        self.message, self.status, self.code, self.param = message, status, code, param

    def __str__(self) -> str:
        return self.message


class Overloaded(BadRequest):
    """As many wait as may: worth another try after `retry_after_s` (HTTP 429)."""

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message, 429, "overloaded")
        self.args = (message, retry_after_s)
        self.retry_after_s = retry_after_s


class BadTask(RolloutFTError):
    """An agent's or an environment's word that the task itself is wrong: no other attempt at it can succeed."""


class Fenced(RolloutFTError):
    """The store has a newer attempt, owner or view: whoever gets this must stop writing.

    `reason` is one of `stale_attempt`, `stale_owner`, `stale_view`.
    """

    def __init__(self, reason: str, trial_id: str = "", current: int = 0):
        super().__init__(reason, trial_id, current)
        self.reason, self.trial_id, self.current = reason, trial_id, current

    def __str__(self) -> str:
        return f"{self.reason}: trial {self.trial_id or '-'} is now at {self.current}"


class CommitRefused(RolloutFTError):
    """The store refused an entry that is not stale: `reason` is `gap`, `conflict` or `closed`."""

    def __init__(self, reason: str, trial_id: str, key: str = ""):
        super().__init__(reason, trial_id, key)
        self.reason, self.trial_id, self.key = reason, trial_id, key

    def __str__(self) -> str:
        return f"commit refused ({self.reason}): trial {self.trial_id}, entry {self.key or '-'}"


class StoreUnavailable(RolloutFTError):
    """The replicas of the current view cannot all be reached; nothing may be acknowledged until they can."""


class DataLost(RolloutFTError):
    """No replica that held every acknowledged turn is left and there is no journal."""


class EngineLost(RolloutFTError):
    """The engine process is dead, hung or unreachable; `reason` names how it was seen."""

    def __init__(self, engine_id: str, reason: str):
        super().__init__(engine_id, reason)
        self.engine_id, self.reason = engine_id, reason

    def __str__(self) -> str:
        return f"engine {self.engine_id} lost: {self.reason}"


class EngineUnfit(RolloutFTError):
    """An engine of somebody else cannot be used as it is; waiting does not help, and the message says what would."""

    def __init__(self, url: str, reason: str):
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}"


class EngineRefused(RolloutFTError):
    """The engine answered, and not with tokens: `status` as in HTTP, None when its owner aborted. `retry_after_s` is what
    it asked for, if it did."""

    def __init__(self, status: int | None, message: str, retry_after_s: float = 0.0):
        super().__init__(status, message, retry_after_s)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s

    def __str__(self) -> str:
        return f"engine refused ({self.status}): {self.message}"


class EngineAborted(EngineRefused):
    """Somebody had the engine end a generation before its time; `version` is that of the weights that it had then."""

    def __init__(self, version: str):
        super().__init__(None, "the generation was aborted at the engine")
        self.args = (version,)
        self.version = version


class SessionMoved(RolloutFTError):
    """This actor does not hold the session (any more); the supervisor knows who does.

    `in_flight`: the request had begun here, so that whoever sends it again sends it for the second time.
    """

    def __init__(self, session_id: str, in_flight: bool = False):
        super().__init__(session_id, in_flight)
        self.session_id, self.in_flight = session_id, in_flight

    def __str__(self) -> str:
        return f"session {self.session_id} is held elsewhere"


class SessionClosed(RolloutFTError):
    """The session is closed or fenced, and the store says so: final."""


class TrialFault(RolloutFTError):
    """An infrastructure fault met a trial whose `recovery` does not survive it; the attempt is over."""

    def __init__(self, trial_id: str, reason: str):
        super().__init__(trial_id, reason)
        self.trial_id, self.reason = trial_id, reason

    def __str__(self) -> str:
        return f"trial {self.trial_id} met a fault ({self.reason})"


class MatcherFailed(RolloutFTError):
    """The function that `session.matcher` names cannot tell messages apart: whoever wrote it has to act."""

    def __init__(self, matcher: str, reason: str):
        super().__init__(matcher, reason)
        self.matcher, self.reason = matcher, reason

    def __str__(self) -> str:
        return f"session.matcher {self.matcher} {self.reason}"


class NormalizerFailed(MatcherFailed):
    """A function that `session.normalizers` names is none: whoever wrote it has to act."""

    def __str__(self) -> str:
        return f"session.normalizers {self.matcher} {self.reason}"

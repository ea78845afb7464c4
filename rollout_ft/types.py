"""The words of the project, as frozen types.

Owns what the parts say to each other: what a turn is, where a session is, what a log entry carries. Knows nothing
of Ray, HTTP, disks or engines. Token ids travel as little-endian int32 bytes, logprobs as float32 bytes: a turn is
copied, hashed and stored as bytes, and becomes numbers only where numbers are needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

JSON = dict[str, Any]
Raw = bytes | bytearray
"""Bytes as they were received; nobody changes them."""
Spelled = bytes | memoryview
"""Ids as JSON without brackets: `5,6,7`."""

TRIAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""What a trial may be called: it becomes a part of URLs, file names and actor calls."""


class Recovery(StrEnum):
    """What a trial does about a fault: go on from its checkpoint, start from nothing, or end."""

    RESUME = "resume"
    RESTART = "restart"
    ABANDON = "abandon"


class Outcome(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    AGENT_FAILED = "agent_failed"
    ENV_FAILED = "env_failed"
    INFRA_EXHAUSTED = "infra_exhausted"
    CANCELLED = "cancelled"


class Served(StrEnum):
    """How a request got its reply (`x-rollout-ft-outcome`)."""

    FRESH = "fresh"
    ATTACHED = "attached"
    REPLAYED = "replayed"
    CONTINUED = "continued"
    REGENERATED = "regenerated"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `start` (inclusive) to `end` (exclusive) of a turn's output were sampled by weights `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Which experts routed the tokens of a turn: rows `start` to `start + rows` of its path, kept beside the log.

    Row i is what routed token i when token i + 1 was made, so that a path has one row less than tokens. The payload that
    `digest` names has `layers` times `topk` ids a row, as `dtype` (uint8 or uint16, little-endian). `substituted` are
    ranges of rows that made a sampled token in one engine call and were captured in another, by a prefill.
    """

    start: int
    rows: int
    layers: int
    topk: int
    dtype: str
    digest: str
    substituted: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One committed turn: what is new since its parent, and nothing that the parent already holds.

    `messages` is the JSON of the request's messages that follow the parent's reply; `prompt_ids` are the token ids
    that follow the parent's tokens (for a root: all). `output_ids` and `logprobs` have one entry per sampled token.
    `tokens_wasted` counts sampled tokens of this turn's generations that are not in `output_ids`. Calls that a pause, an
    update or the engine's owner ended are no failure, and not in `generations`.
    """

    key: str
    parent: str
    sample: int
    depth: int
    request_id: str
    messages: bytes
    tools: bytes
    prompt_ids: bytes
    output_ids: bytes
    logprobs: bytes
    version_spans: tuple[VersionSpan, ...]
    sampling: bytes
    finish_reason: str
    reply: bytes
    created: float
    generations: int
    tokens_wasted: int = 0
    tokens_reused: int = 0
    idempotency_key: str = ""
    also: tuple[tuple[str, str], ...] = ()
    """Request id and Idempotency-Key of callers that attached with a key of their own."""
    acknowledged: tuple[str, ...] = ()
    delivered: tuple[str, ...] = ()
    trim: int = 0
    """How many of the last tokens of the parent's path are not part of this turn's prompt."""
    unheard: bool = False
    """Nobody waited for it any more when it was committed: a phantom until somebody asks for it."""
    order: int = 0
    """Which of the session's requests asked for it: the order of asking, which is not the order of commits."""
    routed: RoutedExperts | None = None
    engine: str = ""
    """Which engine ended it."""
    seconds: float = 0.0
    """From when that engine's owner began with it."""


@dataclass(frozen=True, slots=True)
class Why:
    """Why an attempt follows another: `reason` is one of `RESTARTS`, `cause` is for people."""

    reason: str = ""
    cause: str = ""


UNSAID = Why()
MAX_CAUSE_CHARS = 500
RESTARTS = ("infra", "environment", "agent", "versions", "resumed", "asked")
"""`infra`, `environment`, `agent`: who is to blame. `versions`: its tokens had to be of other weights. `resumed`: another process goes
on with the run. `asked`: whoever asked did not say."""
BY_FAULTS = ("infra", "environment", "resumed")
"""Those that a fault made, not an agent, a trainer or a person."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An attempt began: from the checkpoint (`resume`), or from nothing; then `tokens_dropped` had been sampled in vain since
    the last that did, `tokens_reused_dropped` of them by one engine and gone on from by another. `why` it is there, from the second on."""

    spec: SessionSpec
    attempt: int
    resume: bool
    created: int
    tokens_dropped: int = 0
    tokens_reused_dropped: int = 0
    why: Why = UNSAID


@dataclass(frozen=True, slots=True)
class Divergence:
    """A request of a replay that is none of those recorded at its place, and where it first differs from the most likely.

    `base` is what was asked for, `turn_key` and `turn` (1 for the first of a path) the recorded turn. `message` counts from the
    request's first; -1 where the tools, the sampling or the prompt's tokens differ. `recorded` and `sent` are short.
    """

    base: str
    turn_key: str
    turn: int
    message: int
    role: str
    where: str
    recorded: str
    sent: str
    served: bool = False
    """It gets the recorded reply all the same."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A recorded turn was asked for in this attempt, or evidence about earlier turns has to be kept."""

    turn_key: str = ""
    request_id: str = ""
    acknowledged: tuple[str, ...] = ()
    delivered: tuple[str, ...] = ()
    failed: str = ""
    """What a client asked for and got a 5xx instead of: the attempt is tainted until it is answered."""
    order: int = 0
    idempotency_key: str = ""
    spelled: bytes = b""
    """The digest of the conversation that was sent, where it reads other than the recorded one that it stands for."""
    diverged: Divergence | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The trial is over. `reward` is None unless a verifier spoke; `cause` says why it ended so."""

    outcome: Outcome
    reward: float | None
    cause: str
    created: int


@dataclass(frozen=True, slots=True)
class Step:
    """Step `number` of an attempt's environment, done: the action and its result as JSON, and the `snapshot` that was taken
    behind it, if one was."""

    attempt: int
    number: int
    action: bytes
    result: bytes
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class Partial:
    """What an unfinished generation has so far; `prompt_digest` names the prompt that it continues."""

    turn_key: str
    rid: str
    request_id: str
    prompt_digest: str
    output_ids: bytes
    logprobs: bytes
    version_spans: tuple[VersionSpan, ...]
    generations: int
    tokens_wasted: int = 0


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What `POST /sessions` asked for; recorded with the trial and the same for all its attempts."""

    trial_id: str
    task_id: str = ""
    group_id: str = ""
    mode: str = "train"
    pool: str = ""
    adapter: str = ""
    seed: int | None = None
    metadata: JSON = field(default_factory=dict[str, Any])
    sampling: JSON = field(default_factory=dict[str, Any])
    recovery: Recovery = Recovery.RESUME
    idempotency_key: str = ""


def session_id(trial_id: str, attempt: int) -> str:
    """The id of the server side of one attempt: a function of both, so that nobody has to look it up."""
    return f"{trial_id}~{attempt}"


def split_session_id(value: str) -> tuple[str, int] | None:
    """`(trial_id, attempt)` of a session id; None when it is not one."""
    trial, _, attempt = value.rpartition("~")
    if not TRIAL_ID.fullmatch(trial) or not re.fullmatch(r"[1-9][0-9]{0,8}", attempt):
        return None
    return trial, int(attempt)

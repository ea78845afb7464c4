"""What the owner of an engine does to it, told from outside. A state machine.

Owns whether something may be sent to an engine that is not ours, and whether it is there at all. Pure: what was seen and
when comes in, a state goes out. The owner tells nobody: an abort that was not ours closes the engine until there is proof
that the owner opened it again, for whoever waits until it is idle would wait for ever if it were sent more. What a look
saw that began before the engine was closed proves nothing. An owner that opens and closes between two looks, while
nothing of ours is there, is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Reach(StrEnum):
    ANSWERED = "answered"
    SILENT = "silent"
    """It took the connection and did not answer in time."""
    REFUSED = "refused"
    """Nobody listens."""


class Held(StrEnum):
    """Why the engine is not to be used although it may look ready."""

    ABORTED = "aborted"
    """Its owner aborted what ran."""
    SUSPECTED = "suspected"
    """Another engine's owner did so there: they abort all of them at about the same time."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at an engine, begun at `began`: the version was read first, then whether it is ready, then the load. So an
    engine that was ready was so with this version.

    `load`: requests that it has, ours left out; None where it does not tell. `moved`: when the last token came of a call of
    ours that had been sent long before the engine was suspected. `started` is empty where it was not asked for.
    """

    began: float
    reach: Reach
    ready: bool = False
    version: str = ""
    load: int | None = None
    started: str = ""
    moved: float = -1.0


@dataclass(frozen=True, slots=True)
class Rules:
    """`settle_s`: how long after new weights the rest of the memory is there as well, for an engine whose owner can take its
    memory; None when nobody knows, and only being told or others' requests open it. `reopen_idle_s`: how long an engine
    that was aborted is idle before it counts as open; None for never."""

    spread_s: float
    others_s: float
    reopen_idle_s: float | None = None
    settle_s: float | None = 0.0
    takes_memory: bool = False
    silent_looks: int = 3
    refused_looks: int = 2


@dataclass(frozen=True, slots=True)
class Observed:
    """`version` is that of the last look, `ended` says why the engine is not there any more, once it is not."""

    version: str = ""
    started: str = ""
    paused: bool = False
    held: Held | None = None
    since: float = 0.0
    """When it was closed last."""
    baseline: str = ""
    """Its version then."""
    was_paused: bool = False
    """It was seen paused since then."""
    was_idle: bool = False
    idle_since: float | None = None
    others_since: float | None = None
    proven: float | None = None
    """Since when there is proof of new weights, where the rest of the memory is waited for."""
    missed: int = 0
    refused: int = 0
    ended: str = ""
    spared: bool = False
    """It was suspected, and what ran there goes on: its owner meant others, or one other."""
    why: str = ""
    """What opened or closed it last."""

    @property
    def open(self) -> bool:
        return not self.paused and self.held is None


def aborted(state: Observed, at: float, version: str) -> Observed:
    """A call of ours ended by an abort that was not ours, under this version."""
    return _close(state, Held.ABORTED, at, version, "its owner aborted what ran there")


def suspected(state: Observed, at: float, by: str) -> Observed:
    """An owner's abort was seen at another engine; one that is closed already stays as it is."""
    if state.held is not None:
        return state
    return _close(state, Held.SUSPECTED, at, state.version, f"its owner aborted what ran at {by}")


def cleared(state: Observed, why: str) -> Observed:
    """The engine where the abort was seen is open again, or others were spared: what was only suspected is over."""
    return _opened(state, why) if state.held is Held.SUSPECTED else state


def told(state: Observed) -> Observed:
    """Somebody who knows says that it is open; while it is paused it is not."""
    return _opened(state, "told that it is open")


def looked(state: Observed, look: Look, rules: Rules) -> Observed:
    if look.reach is not Reach.ANSWERED:
        return _unseen(state, look, rules)
    if look.started and state.started and look.started != state.started:
        return replace(state, ended="restarted by its owner")
    before = state
    fresh = look.began >= state.since
    paused_now = not look.ready
    state = replace(
        state, version=look.version, started=look.started or state.started, paused=paused_now, missed=0, refused=0,
        was_paused=state.was_paused or (paused_now and fresh),
    )  # fmt: skip
    if paused_now:
        state = replace(state, idle_since=None, others_since=None, proven=None)
        if rules.takes_memory and state.held is None:
            state = _close(state, Held.ABORTED, look.began, before.version, "paused")
            return replace(state, was_paused=True)
        return state if before.paused else replace(state, why="paused")
    if state.held is None:
        return replace(state, why="ready again") if before.paused else state
    return _proof(_loads(state, look), look, rules) if fresh else state


def _proof(state: Observed, look: Look, rules: Rules) -> Observed:
    """Whether what a look saw of a ready engine says that its owner has opened it."""
    now = look.began
    if state.others_since is not None and now - state.others_since >= rules.others_s:
        return _opened(state, "others send to it again")
    renewed = state.was_paused or look.version != state.baseline
    if renewed and not rules.takes_memory:
        return _opened(state, "ready again" if state.was_paused else "it has other weights")
    if renewed:
        state = replace(state, proven=now if state.proven is None else state.proven)
        if rules.settle_s is not None and now - (state.proven or 0.0) >= rules.settle_s:
            return _opened(state, f"ready for {rules.settle_s:g} s")
        return state
    if state.held is Held.SUSPECTED and look.moved >= state.since + rules.spread_s:
        return replace(_opened(state, "what runs there was spared"), spared=True)
    if rules.reopen_idle_s is not None and state.idle_since is not None and now - state.idle_since >= rules.reopen_idle_s:
        return _opened(state, f"idle for {rules.reopen_idle_s:g} s")
    return state


def _loads(state: Observed, look: Look) -> Observed:
    """Requests of others count once the engine was idle: before that they are what its owner is still aborting."""
    if look.load is None:
        return replace(state, idle_since=look.began if state.idle_since is None else state.idle_since)
    if look.load == 0:
        return replace(state, was_idle=True, others_since=None, idle_since=look.began if state.idle_since is None else state.idle_since)
    others = state.others_since if state.others_since is not None else (look.began if state.was_idle else None)
    return replace(state, others_since=others, idle_since=None)


def _unseen(state: Observed, look: Look, rules: Rules) -> Observed:
    """Nobody listening is an end, whatever its owner does; silence is one only while it should serve."""
    refused = state.refused + 1 if look.reach is Reach.REFUSED else 0
    missed = state.missed + 1 if look.reach is Reach.SILENT and state.open else 0
    state = replace(state, refused=refused, missed=missed, idle_since=None, others_since=None)
    if refused >= rules.refused_looks:
        return replace(state, ended="connection refused")
    if missed >= rules.silent_looks:
        return replace(state, ended=f"does not answer ({missed} times)")
    return state


def _close(state: Observed, held: Held, at: float, version: str, why: str) -> Observed:
    return replace(
        state, held=held, since=at, baseline=version, was_paused=False, was_idle=False, idle_since=None, others_since=None,
        proven=None, spared=False, why=why,
    )  # fmt: skip


def _opened(state: Observed, why: str) -> Observed:
    return replace(state, held=None, why=why, proven=None) if state.held is not None else state

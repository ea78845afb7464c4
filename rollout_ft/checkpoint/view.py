"""Views: which replicas every commit must reach, and how the supervisor moves from one set to the next.

Owns the order of a change: freeze, copy, verify, install. Knows nothing of writers (they learn by being refused), nor
of how replicas are started or watched. Only one supervisor may run this at a time.

The subtle invariant: a new view is drawn only from members of the last opened one that are still alive, plus learners
verified against them. An append is acknowledged by *all* members, so one survivor has every acknowledged entry, and
one frozen survivor is enough to stop the old view. Anything else that is alive may be behind, and never counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout_ft.errors import DataLost, Fenced, StoreUnavailable

if TYPE_CHECKING:
    from rollout_ft.checkpoint.ports import StorePort

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class View:
    """A numbered set of replicas; with fewer than `min_replicas` members it can be read and not written."""

    number: int
    members: tuple[str, ...]
    min_replicas: int

    @property
    def writable(self) -> bool:
        return len(self.members) >= max(1, self.min_replicas)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica says of itself: the last view opened on it, and the highest number it was frozen for."""

    name: str
    incarnation: str
    view: View | None
    promised: int
    trials: int

    @property
    def blank(self) -> bool:
        return self.view is None and self.trials == 0


def latest_view(standings: Iterable[Standing]) -> View | None:
    """The highest view opened on any of them; None when none ever was."""
    return max((each.view for each in standings if each.view), key=lambda view: view.number, default=None)


def survivors(view: View, standings: Mapping[str, Standing]) -> tuple[str, ...]:
    """The members of `view` on which it was opened. A member that never opened it may miss what it acknowledged."""
    return tuple(name for name in view.members if name in standings and standings[name].view == view)


def next_number(last: View, standings: Iterable[Standing]) -> int:
    """A number that no replica has promised to anybody."""
    return 1 + max([last.number, *(each.promised for each in standings)])


async def recover_view(
    ports: Mapping[str, StorePort],
    *,
    at_least: int = 0,
    min_replicas: int | None = None,
    call_timeout_s: float = 10.0,
) -> View:
    """What a rebuilt supervisor calls: find the last opened view among live stores and open the next from its members.

    `at_least` is the highest view number known from elsewhere: a store that was dropped cannot know that others went
    on without it. Without that number every one of `ports` has to answer.
    """
    from rollout_ft.checkpoint.sync import Control

    standings = await Control(ports, call_timeout_s).standings()
    last = latest_view(standings.values())
    silent = [name for name in ports if name not in standings]
    if silent and (last is None or last.number < at_least or not at_least):
        raise StoreUnavailable(f"{', '.join(silent)} may know a later view and does not answer: wait, or leave it out")
    if last is None or last.number < at_least:
        raise DataLost(f"no live store has opened view {max(1, at_least)} (asked: {', '.join(standings) or 'none'})")
    return await reconfigure(last, ports, min_replicas=min_replicas, call_timeout_s=call_timeout_s)


async def reconfigure(
    last: View,
    ports: Mapping[str, StorePort],
    learner: str | None = None,
    *,
    min_replicas: int | None = None,
    call_timeout_s: float = 10.0,
) -> View:
    """Open the next view: the survivors of the last among `ports`, and `learner` when it could be brought up to date.

    Commits go on while a learner copies the bulk; they pause from the freeze to the install. A replica that stops
    answering is left out, a learner that fails is left out: look at the members of what is returned. Repeat it after
    `StoreUnavailable`: every step is idempotent. `DataLost` means that `ports` lacks every member of the last view.
    """
    from rollout_ft.checkpoint.sync import Control, catch_up, freeze, synchronise

    control = Control(ports, call_timeout_s)
    standings = await control.standings()
    base = latest_view(standings.values())
    if base is None or base.number < last.number:
        # Silence is not death: whoever passes the port of a replica still counts on it.
        if silent := [name for name in last.members if name in ports and name not in standings]:
            raise StoreUnavailable(f"{', '.join(silent)} of view {last.number} does not answer, and no other has it")
        raise DataLost(f"no replica of view {last.number} ({', '.join(last.members)}) is left")
    number = next_number(base, standings.values())
    members = survivors(base, standings)
    if learner is not None and not (learner in standings and standings[learner].blank):
        raise ValueError(f"store {learner} cannot join: a learner answers and is empty")
    if learner is not None and not await catch_up(control, members, learner, number):
        learner = None
    members = await freeze(control, members, number)
    members, learner = await synchronise(control, members, learner, number)
    joined = (learner,) if learner is not None else ()
    view = View(number, members + joined, base.min_replicas if min_replicas is None else min_replicas)
    opened = await control.each(view.members, lambda port: port.install(view))
    if any(refused is not None for refused in opened.values()):
        raise Fenced("stale_view", current=max(refused.current for refused in opened.values() if refused))
    if not opened:
        raise StoreUnavailable(f"view {number} could not be installed on any of {', '.join(view.members)}")
    if len(opened) < len(view.members):
        # Its missing members may have opened it or not; either way it cannot commit, and the next one can.
        return await reconfigure(view, {name: ports[name] for name in opened}, call_timeout_s=call_timeout_s)
    _log.info("view.opened number=%d members=%s", number, ",".join(view.members))
    return view

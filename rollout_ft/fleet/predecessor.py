"""The run's supervisor, when an earlier process of the same run may have left one behind.

Owns the choice between the two: adopt what lives, or end it and start anew. Knows nothing of trials. Actors are ended only
by who holds the run's secret, and only when a journal has what they know; there is never a second supervisor, because
the name is taken until the first one is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from enum import StrEnum
from typing import Any

from rollout_ft.clock import monotonic
from rollout_ft.config import Config, journalled
from rollout_ft.errors import ConfigError, DataLost, RolloutFTError
from rollout_ft.fleet.crew import Crew, Setup, actor_name
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.nodes import alive, node_of, preferred
from rollout_ft.fleet.spread import for_supervisor
from rollout_ft.rayapi import ray

ENDING_S = 30.0
CLAIM_TIMEOUT_S = 60.0
PAUSE_S = 0.2


class Claim(StrEnum):
    """What a living supervisor answers to who wants to go on with its run."""

    ADOPTED = "adopted"
    OTHER_RUN = "other_run"
    OTHER_CONFIG = "other_config"
    ENDING = "ending"


def judge(mine: Setup, theirs: Setup, *, ending: bool) -> Claim:
    """Pure. The trials' own settings are the runner's affair: no actor was told of them."""
    if not hmac.compare_digest(mine.secret.encode(), theirs.secret.encode()):
        return Claim.OTHER_RUN
    if ending:
        return Claim.ENDING
    return Claim.ADOPTED if _of_actors(mine.config) == _of_actors(theirs.config) else Claim.OTHER_CONFIG


def _of_actors(config: Config) -> dict[str, Any]:
    return config.model_dump(exclude={"trial"})


async def supervisor(setup: Setup, *, resume: bool) -> Member:
    """A new supervisor; with `resume` the run's own where it lives under the same config. Raises ConfigError, DataLost."""
    until = monotonic() + setup.config.orphan_s + ENDING_S
    refusal = ConfigError(f"run: a run called {setup.config.run} is up in this cluster already; choose another name")
    if resume and not journalled(setup.config) and not await asyncio.to_thread(_named, setup):
        raise DataLost(
            "the actors that held this run's turns are gone, and it has no journal (store.journal_dir is none): "
            "its unfinished trials cannot go on; start them in another directory"
        )
    while True:
        with contextlib.suppress(ValueError):  # the name is taken
            return await asyncio.to_thread(_create, setup)
        old = await asyncio.to_thread(_named, setup)
        if old is not None and not resume:
            raise refusal
        if old is not None:
            match await _claim(old, setup):
                case Claim.ADOPTED:
                    return old
                case Claim.OTHER_RUN:
                    raise refusal
                case Claim.OTHER_CONFIG | Claim.ENDING as found:
                    await _end(old, setup, found)
                case None:
                    pass  # it is going, or hangs
        if monotonic() > until:
            raise ConfigError(f"run: the supervisor of {setup.config.run} neither answers nor ends; kill its process, or wait")
        await asyncio.sleep(PAUSE_S)


def _create(setup: Setup) -> Member:
    from rollout_ft.fleet.supervisor import Supervisor

    name = actor_name(setup.config.run, "supervisor", 1)
    node = for_supervisor([node_of(each) for each in alive()])
    options: Any = {"name": name, "namespace": setup.namespace, "lifetime": "detached", **preferred(node.node_id if node else "")}
    handle: Any = Supervisor.options(**options).remote(setup)  # pyright: ignore
    return Member("supervisor", 1, name, handle)


def _named(setup: Setup) -> Member | None:
    name = actor_name(setup.config.run, "supervisor", 1)
    try:
        return Member("supervisor", 1, name, ray.get_actor(name, setup.namespace))
    except ValueError:
        return None


async def _claim(old: Member, setup: Setup) -> Claim | None:
    """None when it does not answer."""
    try:
        return await old.ask("claim", setup, timeout_s=CLAIM_TIMEOUT_S)
    except Gone:
        return None
    except RolloutFTError:
        return Claim.ENDING  # ours, and what it tried to start failed


async def _end(old: Member, setup: Setup, found: Claim) -> None:
    """Ends every actor of the run, so that nobody writes its journal any more."""
    if not journalled(setup.config):
        raise DataLost(
            "the run is up with its turns in memory alone (store.journal_dir is none) and "
            + ("is ending" if found is Claim.ENDING else "under another config: go on with the same one")
        )
    with contextlib.suppress(Exception):
        await old.ask("stop", timeout_s=ENDING_S)
    await asyncio.to_thread(old.kill)
    until = monotonic() + ENDING_S
    while left := await Crew(setup).existing():
        if monotonic() > until:
            raise ConfigError(f"run: {', '.join(m.name for m in left)} of {setup.config.run} could not be ended")
        await asyncio.gather(*(asyncio.to_thread(member.kill) for member in left))
        await asyncio.sleep(PAUSE_S)

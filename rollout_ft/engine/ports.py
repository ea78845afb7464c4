"""Ports of a node that belong to one engine.

Owns the claim on them: a name that the kernel gives to one process of the network that the ports belong to, and takes back
when that process ends. A port that is tried and let go of would be anybody's again until the engine listens; two engines
that start at the same moment claim different ones. Programs that know nothing of claims are seen by trying, and kept out
by staying below what the kernel hands out by itself; one that comes in between costs a start, and another is made.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from rollout_ft.errors import RolloutFTError

WIDTH = 32
"""SGLang derives up to 20 ports from the one where its processes meet, and one for each copy of the model."""
_RANGES = (range(20_000, 22_000 - WIDTH, WIDTH), range(30_000, 32_768 - WIDTH, WIDTH))
"""Above those of Ray's workers, and not where SGLang looks for ports by itself."""
FIRSTS = tuple(first for each in _RANGES for first in each)
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class NoPorts(RolloutFTError):
    """All ports of the node that engines may have are taken."""


class Ports:
    """Consecutive ports, ours until `close` or the end of this process."""

    def __init__(self, first: int, claim: socket.socket | None = None):
        self._claim = claim
        self.server, self.nccl, self.rendezvous = first, first + 1, first + 4

    def close(self) -> None:
        if self._claim is not None:
            self._claim.close()


def claim(rng: random.Random, host: str = "0.0.0.0") -> Ports:
    """Claims ports that nobody listens on, anywhere in the range, so that those of the last engine rest for a while.

    Raises NoPorts when there are none.
    """
    below = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 2**16
    firsts = [first for first in FIRSTS if first + WIDTH <= below] or list(FIRSTS)
    for first in rng.sample(firsts, len(firsts)):
        held = _claimed(first)
        if held is not None:
            if all(_free(host, port) for port in range(first, first + WIDTH)):
                return Ports(first, held)
            held.close()
    raise NoPorts(f"no {WIDTH} free ports in a row are left between {firsts[0]} and {firsts[-1] + WIDTH} on this node")


def _claimed(first: int) -> socket.socket | None:
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0rollout_ft/ports/{first}")  # no file: it is gone with its last holder, and engines do not inherit it
    except OSError:
        held.close()
        return None
    return held


def _free(host: str, port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True

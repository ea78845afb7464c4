"""A group's rewards as advantages, as GRPO has them.

Owns that a reward of None never counts: it is in no mean and no deviation, and has no advantage. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float | None]) -> list[float | None]:
    """`(reward - mean) / (deviation + EPSILON)`, with the sample's deviation; 0 where all that have a reward have the same."""
    known = [reward for reward in rewards if reward is not None]
    if not known or min(known) == max(known):
        return [None if reward is None else 0.0 for reward in rewards]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    return [None if reward is None else (reward - mean) / (deviation + EPSILON) for reward in rewards]

"""What is sampled with, and which samples are given to the trainer.

Owns the keys `sampling.…` and `samples.…`. Does not know which parameters an engine has: they are passed on as they stand.
"""

from __future__ import annotations

from typing import Any, Literal

from rollout_ft.config.base import Settings


class SamplingConfig(Settings):
    parameters: dict[str, Any] = {}
    """Sampling parameters of every session, under what a session itself is opened with."""
    policy: Literal["force", "default"] = "force"
    """Whether they win over the agent's, or hold only for what the agent does not say."""


class SamplesConfig(Settings):
    resampled: Literal["drop", "export"] = "drop"
    """Samples that a harness received, threw away and asked for again; exported paths say `"resampled": true`."""
    routed_experts: bool = False
    """Engines are asked which experts routed each token (SGLang: it is started with --enable-return-routed-experts), and
    paths say it. In memory and on the wire it is the largest part of a turn: layers times topk bytes a token."""

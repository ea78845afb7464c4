"""The model: where it is, what it is called, and how its conversations are written and read.

Owns the keys `model.…`. Does not look into the model's directory: whether a template drifts and a parser exists is found
out at start. A prompt and its output have fewer tokens than the context has.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rollout_ft.config.base import Settings


class ExpertsConfig(Settings):
    """What routes a token: in each of `layers` layers `topk` of `count` experts."""

    layers: int = Field(ge=1)
    topk: int = Field(ge=1)
    count: int = Field(ge=1, le=2**16)


class ModelConfig(Settings):
    path: str = "small"
    """Directory with tokenizer, chat template and weights; `small` is the shipped small model."""
    weight_version: str = ""
    """What the version of these weights is called; empty: as the engine calls it."""
    name: str = Field(default="default", min_length=1)
    """What `GET …/v1/models` calls it, and replies to requests that name no model."""
    context_tokens: int = Field(default=32768, ge=16)
    tool_parser: str = "hermes"
    """`none`, or the name of one of SGLang's tool call parsers."""
    reasoning_parser: str = "none"
    """`none`, or the name of one of SGLang's reasoning parsers; reasoning becomes `reasoning_content`."""
    chat_template: str = ""
    """File with a chat template that stands in for the model's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Given to the chat template with every request; a request's own win."""
    experts: ExpertsConfig | None = None
    """For `samples.routed_experts`, where the model's config.json does not tell."""
    on_template_drift: Literal["refuse", "splice", "rerender"] = "refuse"
    """What to do at start about a template that changes what it wrote before when messages are appended: `splice` keeps
    the tokens as they were, `rerender` renders the whole conversation for every turn and trains on what stayed."""

    @property
    def usable_tokens(self) -> int:
        """What a prompt and its output may have together: SGLang takes no prompt that comes within six tokens of the end of
        the context, and that of a continued generation has the output so far in it."""
        return self.context_tokens - 6

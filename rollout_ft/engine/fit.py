"""Whether an engine of somebody else can be used as the config says, and what will be different.

Owns the reading of `/server_info`, `/model_info` and `/v1/models`, and the judgement. Pure. A refusal is final for this
start of the engine and names the key or the option to change; a warning says what it costs. Weights' paths are not compared:
an update from disk changes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import orjson

from rollout_ft.types import JSON

OLDEST = (0, 5, 20)
BYTES_PER_TOKEN = 36
"""Of an id and its logprob in a chunk."""
PROBE = "<|im_start|>user\nDas ist: naïve 中文, 12345 + 'tabs'\t\n\n  {\"a\": [1.5e-3]}<|im_end|>\n"


@dataclass(frozen=True, slots=True)
class Facts:
    """`ranks`: how many data-parallel ranks it has; `started`: the same for as long as it is the same start."""

    router: bool = False
    version: str = ""
    context_tokens: int = 0
    disaggregation: str = "null"
    incremental: bool = True
    memory_saver: bool = False
    routed_experts: bool = True
    ranks: int = 1
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    tokenizer_path: str = ""
    started: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the config and the model's directory ask for."""

    context_tokens: int
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    tokenizer_path: str = ""
    routed_experts: bool = False
    output_tokens: int = 8192
    stream_interval: int = 16


@dataclass(frozen=True, slots=True)
class Fit:
    refused: str = ""
    warnings: tuple[str, ...] = ()


def facts_of(server: JSON, model: JSON, models: JSON) -> Facts:
    """What an engine's own answers say; what they leave out is taken to be fine."""
    cards: Any = models.get("data") or [{}]
    states: Any = server.get("internal_states") or []
    ranks = int(server.get("dp_size") or 1) * int(server.get("attn_dp_size") or 1)
    return Facts(
        version=str(server.get("version", "")), context_tokens=int(cards[0].get("max_model_len") or server.get("context_length") or 0),
        disaggregation=str(server.get("disaggregation_mode") or "null"),
        incremental=bool(server.get("incremental_streaming_output", True)), memory_saver=bool(server.get("enable_memory_saver", False)),
        routed_experts=bool(server.get("enable_return_routed_experts", True)), ranks=max(ranks, len(states), 1),
        model_type=str(model.get("model_type") or ""), architectures=tuple(map(str, model.get("architectures") or ())),
        tokenizer_path=str(model.get("tokenizer_path") or ""), started=started_of(server),
    )  # fmt: skip


def started_of(server: JSON) -> str:
    """SGLang's `startup_time` is how long each part took: other starts differ in the last digits."""
    told = server.get("startup_time")
    return orjson.dumps(told, option=orjson.OPT_SORT_KEYS).decode() if told is not None else ""


def wanted_model(config_json: JSON) -> tuple[str, tuple[str, ...]]:
    """`(model_type, architectures)` of a model's own config.json."""
    return str(config_json.get("model_type") or ""), tuple(map(str, config_json.get("architectures") or ()))


def judge(facts: Facts, wanted: Wanted, tokens: tuple[list[int], list[int]] | None = None) -> Fit:
    """`tokens`: the probe's ids as the engine has them and as we do, where both are known."""
    refused = _refusal(facts, wanted) or _other_tokenizer(facts, wanted, tokens)
    return Fit(refused, () if refused else tuple(_warnings(facts, wanted)))


def _refusal(facts: Facts, wanted: Wanted) -> str:
    if facts.disaggregation != "null":
        return (
            f"it is a {facts.disaggregation} worker of a disaggregated pair, which is no engine by itself: attach their router as one "
            "engine (engine.attach.urls: its URL)"
        )
    if (version := _numbers(facts.version)) and version < OLDEST:
        return f"it runs SGLang {facts.version}; {'.'.join(map(str, OLDEST))} or later is needed (/ready, spans of weight versions)"
    if 0 < facts.context_tokens < wanted.context_tokens:
        return (
            f"its context has {facts.context_tokens} tokens, model.context_tokens is {wanted.context_tokens}: set model.context_tokens to "
            f"{facts.context_tokens}, or start it with --context-length {wanted.context_tokens}"
        )
    if _differ(facts.model_type, wanted.model_type) or _differ(facts.architectures, wanted.architectures):
        there, here = (", ".join(filter(None, (x.model_type, *x.architectures))) for x in (facts, wanted))
        return f"it serves another model ({there}) than model.path has ({here}): set model.path to the model that it serves"
    if wanted.routed_experts and not facts.routed_experts:
        return "samples.routed_experts needs engines that were started with --enable-return-routed-experts"
    return ""


def _other_tokenizer(facts: Facts, wanted: Wanted, tokens: tuple[list[int], list[int]] | None) -> str:
    if tokens is None or tokens[0] == tokens[1]:
        return ""
    return (
        f"its tokenizer ({facts.tokenizer_path or 'unknown'}) makes other tokens than ours ({wanted.tokenizer_path}): set model.path to "
        "the directory whose tokenizer it has"
    )


def _warnings(facts: Facts, wanted: Wanted) -> list[str]:
    found: list[str] = []
    if facts.router:
        found.append(
            "it is a router: its engines are used as one. Turns, continuation and weight versions work; an abort reaches an engine only by "
            "closing the stream (the router has no /abort_request), pauses and loads cannot be seen, and no session stays where its prefix "
            "is cached unless the router does so. Attach its workers (engine.attach.router_url) unless they are prefill and decode workers"
        )
    if not facts.incremental:
        tokens, every = wanted.output_tokens, wanted.stream_interval
        sent = BYTES_PER_TOKEN * tokens * (tokens // every + 1) // 2
        found.append(
            "it was started without --incremental-streaming-output: every chunk repeats all tokens before it, "
            f"{sent / 2**20:.0f} MiB for a turn of {tokens} tokens instead of {BYTES_PER_TOKEN * tokens / 2**20:.1f}"
        )
    if facts.memory_saver:
        found.append(
            "it was started with --enable-memory-saver: no GET tells whether its owner has its memory, and a request then kills it. Say so "
            "(POST /fleet/offload before, POST /fleet/resume after): after an abort or a pause it opens only by that, or as "
            "engine.attach.memory_settle_s says"
        )
    return found


def _differ(there: object, here: object) -> bool:
    return bool(there) and bool(here) and there != here


def _numbers(version: str) -> tuple[int, ...]:
    """Empty for what is no release, such as a build of one's own."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def router_facts(model: JSON) -> Facts:
    """A router passes on what one of its workers says of the model."""
    made = facts_of({}, model, {})
    return replace(made, router=True)

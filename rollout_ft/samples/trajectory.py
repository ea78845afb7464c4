"""Committed turns to what is trained on, and to what people read.

Owns how a path becomes arrays, and the figures of a session. Pure. Each sampled token of a turn that is in the
trajectory has a loss mask of 1 in exactly one path, and none where no path has it: a stop token that the next prompt
leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import orjson

from rollout_ft.gateway.dialects.turns import finish_reason, logprob_triples, meta_info, usage
from rollout_ft.samples.routed import Rows, routed_fields
from rollout_ft.samples.selection import Selection, evidence, last_answered, select
from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node, path, path_ids, pieces
from rollout_ft.types import JSON, RoutedExperts

Assembly = Callable[[], JSON]
"""The long part of the work, on what was chosen and does not change any more: to be done beside a session that goes on."""


class TrajectoryAssembly(Protocol):
    """An `Assembly`; `rows` are the routed experts of the turns that `routed_of` names, where they are wanted. Who cannot
    have them, as from a journal alone, finds all of them missing."""

    def __call__(self, rows: Rows | None = None) -> JSON: ...


def trajectory(session: Session) -> JSON:
    return trajectory_of(session)()


def records(session: Session) -> JSON:
    return records_of(session)()


def routed_of(session: Session) -> dict[str, RoutedExperts]:
    """What the turns of the trajectory say of their routed experts, by turn."""
    found = {node.turn.key: node.turn.routed for end in select(session).ends for node in path(end)}
    return {key: routed for key, routed in found.items() if routed is not None}


def trajectory_of(session: Session, *, linear: bool = False) -> TrajectoryAssembly:
    """`{session_id, trial_id, attempt, paths}`; each path has, over its tokens, `token_ids` (int32), `loss_mask`
    (int8) and `logprobs` (float32, 0 where not sampled), its `evidence` and whether it was `resampled`, per turn
    its key, span, version spans and sampling, and where routed experts are wanted those (`samples.routed`). `linear`: of the
    one path to the turn asked for last."""
    selected, spec, attempt, about = select(session), session.spec, session.attempt, metadata(session)
    if linear:
        last = last_answered(session)
        selected = replace(selected, ends=[last] if last is not None else [])

    def assemble(rows: Rows | None = None) -> JSON:
        trained: dict[str, int] = {}
        return {
            "session_id": session.id, "trial_id": spec.trial_id, "task_id": spec.task_id, "group_id": spec.group_id,
            "attempt": attempt, "paths": [_path(session, selected, end, trained, rows) for end in selected.ends], "metadata": about,
        }  # fmt: skip

    return assemble


def _path(session: Session, selected: Selection, end: Node, trained: dict[str, int], rows: Rows | None) -> JSON:
    """`trained` counts, for each turn, its tokens that an earlier path trains."""
    routed: list[tuple[str, int, RoutedExperts | None]] = []
    ids: list[Any] = []
    masks: list[Any] = []
    logprobs: list[Any] = []
    turns: list[JSON] = []
    spans: list[JSON] = []
    at = 0
    for node, kept in reversed(list(pieces(end))):
        turn = node.turn
        prompt = np.frombuffer(turn.prompt_ids, "<i4")[:kept]
        output = np.frombuffer(turn.output_ids, "<i4")[: kept - len(prompt)]
        before = trained.get(turn.key, 0)
        trained[turn.key] = max(before, len(output))
        ids += [prompt, output]
        masks += [np.zeros(len(prompt), np.int8), (np.arange(len(output)) >= before).astype(np.int8)]
        logprobs += [np.zeros(len(prompt), np.float32), np.frombuffer(turn.logprobs, "<f4")[: len(output)]]
        start = at + len(prompt)
        at = start + len(output)
        spans += [
            {"version": s.version, "start": start + s.start, "end": min(start + s.end, at)}
            for s in turn.version_spans
            if start + s.start < at
        ]
        turns.append(_turn(session, node, start, at))
        routed.append((turn.key, at, turn.routed))
    return {
        "token_ids": np.concatenate(ids), "loss_mask": np.concatenate(masks), "logprobs": np.concatenate(logprobs),
        "version_spans": spans, "finish_reason": end.turn.finish_reason, "sampling": orjson.loads(end.turn.sampling),
        "evidence": evidence(session, end), "resampled": end.turn.key in selected.resampled, "turns": turns,
        **(routed_fields(routed, rows or {}) if rows is not None or any(r for _, _, r in routed) else {}),
    }  # fmt: skip


def _turn(session: Session, node: Node, start: int, end: int) -> JSON:
    turn = node.turn
    return {
        "turn": turn.key, "start": start, "end": end, "evidence": evidence(session, node), "finish_reason": turn.finish_reason,
        "sampling": orjson.loads(turn.sampling), "generations": turn.generations, "created": turn.created, "engine": turn.engine,
        "seconds": turn.seconds, "tokens_reused": turn.tokens_reused, "tokens_wasted": turn.tokens_wasted,
    }  # fmt: skip


def metadata(session: Session) -> JSON:
    """What became of all turns of the session: nothing is left out in silence.

    `attached`, `leniencies` and unrecorded replays are counted since the session's owner took it over. `tokens_wasted_by`:
    `regenerated`, sampled again in the same turn; `scratch`, of attempts that a later one did not go on from; `left_out`, of
    turns that are in no path, and stop tokens that the next prompt leaves out.
    """
    nodes, selected = session.tree.nodes, select(session)
    total, trained = session.tokens_dropped + session.tokens, _trained(selected)
    again = sum(node.turn.tokens_wasted for node in nodes.values())
    return {
        **{name: session.counts[name] for name in ("turns_served", "replayed", "attached", "branched", "unparsed", "normalized")},
        "turns_committed": len(nodes),
        "version_restarts": session.version_restarts,
        "fault_restarts": session.fault_restarts,
        "generations": sum(node.turn.generations for node in nodes.values()),
        "turns_in_trajectory": len(selected.keys),
        "phantoms": len(selected.phantoms),
        "resampled": len(selected.resampled),
        "retokenized": sum(session.retokenized(node) for node in nodes.values()),
        "leniencies": dict(sorted(session.leniencies.items())),
        "divergences": session.diverged,
        "first_divergence": asdict(session.first_divergence) if session.first_divergence else None,
        "tokens_generated": total,
        "tokens_wasted": total - trained,
        "tokens_wasted_by": {"regenerated": again, "scratch": session.tokens_dropped, "left_out": session.tokens - again - trained},
        "tokens_reused": session.tokens_reused_dropped + session.tokens_reused,
        "unanswered": len(session.unanswered()),
    }


def _trained(selected: Selection) -> int:
    """How many sampled tokens are in a path."""
    longest: dict[str, int] = {}
    for end in selected.ends:
        for node, kept in pieces(end):
            said = max(0, kept - len(node.turn.prompt_ids) // 4)
            longest[node.turn.key] = max(longest.get(node.turn.key, 0), said)
    return sum(longest.values())


def max_trim(session: Session) -> int:
    """How many of the last sampled tokens of a turn the prompt behind it leaves out at most."""
    return max((node.turn.trim for node in session.tree.nodes.values()), default=0)


def records_of(session: Session) -> Assembly:
    """`{session_id, records, metadata}`: every turn on the way to the newest answered one, as request and response, with all
    that was generated for it and, in `accumulated_token_ids`, all tokens of the path."""
    last = last_answered(session)
    found, about = list(path(last))[::-1], {**metadata(session), "max_trim_tokens": max_trim(session)}

    def assemble() -> JSON:
        tokens = {"accumulated_token_ids": np.frombuffer(path_ids(last), "<i4")}
        return {"session_id": session.id, "records": _records(found), "metadata": {**about, **tokens}}

    return assemble


def _records(found: list[Node]) -> list[JSON]:
    made: list[JSON] = []
    messages: list[Any] = []
    for node in found:
        messages = [*messages, *orjson.loads(node.turn.messages or b"[]")]
        reply = orjson.loads(node.turn.reply)
        made.append(
            {
                "turn": node.turn.key, "method": "POST", "path": "/v1/chat/completions", "status_code": 200, "timestamp": node.turn.created,
                "request": {"messages": messages, "sampling": orjson.loads(node.turn.sampling), **_given(node)},
                "response": {"message": reply, "finish_reason": node.turn.finish_reason, **_completion(node, reply)},
            }
        )  # fmt: skip
        messages = [*messages, reply]
    return made


def _given(node: Node) -> JSON:
    """What the engine was given: miles' driver reads the prompt's ids of each turn."""
    ids = np.frombuffer(path_ids(node), "<i4")
    tools = {"tools": orjson.loads(node.turn.tools)} if node.turn.tools else {}
    return {"input_ids": ids[: len(ids) - len(node.turn.output_ids) // 4], **tools}


def _completion(node: Node, message: JSON) -> JSON:
    """The reply as a chat completion, with what SGLang says of a generation: miles' driver reads its samples off that."""
    prompt, completion = usage(node)
    meta = meta_info(node, {"type": node.turn.finish_reason}) | {"output_token_logprobs": logprob_triples(node)}
    about = {"id": f"chatcmpl-{node.turn.key}", "object": "chat.completion", "created": int(node.turn.created)}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason(node, message), "meta_info": meta}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**about, "choices": [choice], "usage": counts}

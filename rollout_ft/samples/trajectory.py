"""Committed turns to what is trained on, and to what people read.

Owns which turns are in the trajectory and how a path becomes arrays. Pure. A turn is in it when a client showed that
it has it; the last answered one counts too, marked `uncertain` where its delivery is unproven; phantoms never. Each
sampled token has a loss mask of 1 in exactly one path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node, path
from rollout_ft.types import JSON


def kept_leaves(session: Session) -> list[Node]:
    """The ends of all paths of the trajectory, oldest first."""
    ev, nodes = session.evidence, session.tree.nodes
    kept = {key for key in ev.acknowledged if key in nodes}
    kept |= {node.turn.key for node in path(last_answered(session))}
    inner = {nodes[key].turn.parent for key in kept}
    return [node for key, node in nodes.items() if key in kept and key not in inner]


def last_answered(session: Session) -> Node | None:
    """The newest turn that this attempt's agent has, or has in all likelihood: no other sample of it was delivered."""
    ev, nodes = session.evidence, session.tree.nodes
    for key in reversed(ev.asked):
        node = nodes.get(key)
        if node is None or (key in ev.unheard and not ev.answered(key)):
            continue
        if ev.answered(key) or not any(ev.answered(n.turn.key) for n in session.tree.samples(node.base)):
            return node
    return None


def trajectory(session: Session) -> JSON:
    """`{session_id, trial_id, attempt, paths}`; each path has, over its tokens, `token_ids` (int32), `loss_mask`
    (int8) and `logprobs` (float32, 0 where not sampled), and per turn its key, span, version spans and sampling."""
    trained: set[str] = set()
    paths = [_path(session, leaf, trained) for leaf in kept_leaves(session)]
    spec = session.spec
    return {
        "session_id": session.id, "trial_id": spec.trial_id, "task_id": spec.task_id, "group_id": spec.group_id,
        "attempt": session.attempt, "paths": paths, "metadata": metadata(session),
    }  # fmt: skip


def _path(session: Session, leaf: Node, trained: set[str]) -> JSON:
    ids: list[Any] = []
    masks: list[Any] = []
    logprobs: list[Any] = []
    turns: list[JSON] = []
    spans: list[JSON] = []
    at = 0
    for node in reversed(list(path(leaf))):
        turn = node.turn
        prompt, output = np.frombuffer(turn.prompt_ids, "<i4"), np.frombuffer(turn.output_ids, "<i4")
        first = turn.key not in trained
        trained.add(turn.key)
        ids += [prompt, output]
        masks += [np.zeros(len(prompt), np.int8), np.full(len(output), first, np.int8)]
        logprobs += [np.zeros(len(prompt), np.float32), np.frombuffer(turn.logprobs, "<f4")]
        start = at + len(prompt)
        at = start + len(output)
        spans += [{"version": s.version, "start": start + s.start, "end": start + s.end} for s in turn.version_spans]
        turns.append(_turn(session, node, start, at))
    return {
        "token_ids": np.concatenate(ids), "loss_mask": np.concatenate(masks), "logprobs": np.concatenate(logprobs),
        "version_spans": spans, "finish_reason": leaf.turn.finish_reason, "sampling": orjson.loads(leaf.turn.sampling),
        "turns": turns,
    }  # fmt: skip


def _turn(session: Session, node: Node, start: int, end: int) -> JSON:
    ev, turn = session.evidence, node.turn
    evidence = "acknowledged" if turn.key in ev.acknowledged else "delivered" if turn.key in ev.delivered else "uncertain"
    return {
        "turn": turn.key, "start": start, "end": end, "evidence": evidence, "finish_reason": turn.finish_reason,
        "sampling": orjson.loads(turn.sampling), "generations": turn.generations,
    }  # fmt: skip


def metadata(session: Session) -> JSON:
    """What became of all turns of the session: nothing is left out in silence."""
    ev, nodes = session.evidence, session.tree.nodes
    included = {node.turn.key for leaf in kept_leaves(session) for node in path(leaf)}
    sampled = sum(len(nodes[key].turn.output_ids) // 4 for key in included)
    total = sum(len(node.turn.output_ids) // 4 for node in nodes.values())
    wasted = sum(node.turn.tokens_wasted for node in nodes.values())
    return {
        **{name: session.counts[name] for name in ("turns_served", "replayed", "attached", "branched", "unparsed")},
        "turns_committed": len(nodes),
        "generations": sum(node.turn.generations for node in nodes.values()),
        "turns_in_trajectory": len(included),
        "phantoms": sum(not ev.answered(key) and key not in included for key in nodes),
        "tokens_generated": total + wasted,
        "tokens_wasted": total + wasted - sampled,
        "tokens_reused": sum(node.turn.tokens_reused for node in nodes.values()),
        "unanswered": len(session.unanswered()),
    }


def records(session: Session) -> JSON:
    """`{session_id, records, metadata}`: every turn on the way to the newest answered one, as request and response."""
    found = reversed(list(path(last_answered(session))))
    made: list[JSON] = []
    messages: list[Any] = []
    for node in found:
        messages = [*messages, *orjson.loads(node.turn.messages)]
        reply = orjson.loads(node.turn.reply)
        made.append(
            {
                "turn": node.turn.key, "path": "/v1/chat/completions", "status_code": 200, "timestamp": node.turn.created,
                "request": {"messages": messages, "sampling": orjson.loads(node.turn.sampling)},
                "response": {"message": reply, "finish_reason": node.turn.finish_reason},
            }
        )  # fmt: skip
        messages = [*messages, reply]
    return {"session_id": session.id, "records": made, "metadata": metadata(session)}

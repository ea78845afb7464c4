"""Which of a session's turns are in its trajectory, and which paths hold them.

Owns that choice. Pure. Evidence of delivery decides, never the order of commits: a turn is in when a client showed that
it has it, or its reply was delivered whole; the one asked for last is in as well, as `uncertain`, unless it is known
that nobody waited for it or another sample of it arrived; phantoms never are. Every turn is in a path, a phantom, or
resampled: nothing is left out without being counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node, path


@dataclass(frozen=True, slots=True)
class Selection:
    """`ends` are the ends of the paths, the strongest evidence first: it is they that train what several share.

    `resampled` are turns that arrived and were asked for again, in a path or not; `keys` are those in a path.
    """

    ends: list[Node]
    keys: set[str]
    resampled: set[str]
    phantoms: set[str]


def select(session: Session) -> Selection:
    ev, nodes = session.evidence, session.tree.nodes
    last = last_answered(session)
    resampled = {key for key, node in nodes.items() if node is not last and _resampled(session, node)}
    kept = {key for key in nodes if ev.answered(key) and key not in resampled}
    kept |= {node.turn.key for node in path(last)}
    phantoms = nodes.keys() - kept - resampled
    if session.resampled == "export":
        kept |= resampled
    inner = {nodes[key].turn.parent for key in kept}
    cut = {nodes[key].turn.parent for key in kept if session.retokenized(nodes[key])}
    ends = [node for key, node in nodes.items() if key in kept and (key not in inner or key in cut)]
    ends.sort(key=lambda node: (node.turn.key in resampled, ("acknowledged", "delivered", "uncertain").index(evidence(session, node))))
    return Selection(ends, kept, resampled, set(phantoms))


def evidence(session: Session, node: Node) -> str:
    """What shows that a client has a turn; for a path it is that of its end, whose request contained the others."""
    key = node.turn.key
    if key in session.evidence.acknowledged:
        return "acknowledged"
    return "delivered" if key in session.evidence.delivered else "uncertain"


def last_answered(session: Session) -> Node | None:
    """The turn asked for last that this attempt's agent has, or has in all likelihood: no other sample of it was
    delivered. What was asked for before it and never arrived has been given up by now."""
    ev, nodes = session.evidence, session.tree.nodes
    for key in reversed(sorted(ev.asked, key=lambda k: ev.asked[k])):
        node = nodes.get(key)
        if node is None or (key in ev.unheard and not ev.answered(key)):
            continue
        if ev.answered(key) or not any(ev.answered(n.turn.key) for n in session.tree.samples(node.base)):
            return node
    return None


def _resampled(session: Session, node: Node) -> bool:
    """It arrived, nobody built upon it, and the same request, or the same with more words behind it, got another reply
    that was built upon, or was asked for later and arrived."""
    ev, key = session.evidence, node.turn.key
    if key not in ev.delivered or key in ev.acknowledged:
        return False
    others = [n.turn.key for n in session.tree.beside(node) if n.base == node.base or _with_a_note(node, n)]
    return any(k in ev.acknowledged or (k in ev.delivered and _order(session, k) > _order(session, key)) for k in others)


def _with_a_note(node: Node, other: Node) -> bool:
    """`other` asks what `node` asks and more, and what comes first behind it is no reply: that would be this one, altered."""
    asked, more = node.turn.messages, other.turn.messages
    if not more.startswith(asked[:-1] + b","):
        return False
    return orjson.loads(more)[len(orjson.loads(asked))]["role"] != "assistant"


def _order(session: Session, key: str) -> tuple[int, int]:
    return session.evidence.asked.get(key, 0), session.tree.nodes[key].turn.sample

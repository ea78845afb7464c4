"""What this attempt's agent is known to have received.

Owns the marks asked, delivered, acknowledged and failed. Pure. Marks only grow within an attempt and start anew with
the next; what is not yet in the store waits in `take_unsaved` and rides the next commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_ft.session.tree import Node, path


@dataclass(slots=True)
class Evidence:
    asked: dict[str, int] = field(default_factory=dict[str, int])
    """Turns that this attempt asked for, each with the number of the request; 0: contained in a request."""
    delivered: set[str] = field(default_factory=set[str])
    acknowledged: set[str] = field(default_factory=set[str])
    failed: dict[str, bool] = field(default_factory=dict[str, bool])
    """Bodies that were answered with a 5xx; True once the store knows."""
    unheard: set[str] = field(default_factory=set[str])
    """Turns that were committed while nobody waited, and that nobody was given since."""
    replays: dict[str, int] = field(default_factory=dict[str, int])
    """How often a turn was given again: since it is known to have arrived, or so far without arriving. What this owner saw."""
    _unsaved_acks: list[str] = field(default_factory=list[str])
    _unsaved_deliveries: list[str] = field(default_factory=list[str])

    def answered(self, key: str) -> bool:
        return key in self.delivered or key in self.acknowledged

    def rank(self, node: Node) -> int:
        """Which of two turns with equal text a client means: the one that it is known to have."""
        key = node.turn.key
        return 2 * self.answered(key) + (key in self.asked)

    def acknowledge(self, node: Node | None) -> list[Node]:
        """A request contained this turn, and with it all before it. Those of which it is news, the deepest first."""
        news: list[Node] = []
        for each in path(node):
            if each.turn.key in self.acknowledged:
                break
            self._arrive(each.turn.key)
            self.acknowledged.add(each.turn.key)
            self.asked.setdefault(each.turn.key, 0)
            self._unsaved_acks.append(each.turn.key)
            news.append(each)
        return news

    def replay(self, key: str, order: int) -> None:
        """The recorded reply goes out again."""
        self.asked.setdefault(key, order)
        self.unheard.discard(key)
        self.replays[key] = self.replays.get(key, 0) + 1

    def deliver(self, key: str) -> None:
        if key not in self.delivered:
            self._arrive(key)
            self.delivered.add(key)
            self._unsaved_deliveries.append(key)

    def _arrive(self, key: str) -> None:
        if not self.answered(key):
            self.replays.pop(key, None)

    def take_unsaved(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`(acknowledged, delivered)` that the next commit must carry."""
        taken = tuple(self._unsaved_acks), tuple(self._unsaved_deliveries)
        self._unsaved_acks, self._unsaved_deliveries = [], []
        return taken

    def give_back(self, acknowledged: tuple[str, ...], delivered: tuple[str, ...]) -> None:
        """The commit that carried them failed."""
        self._unsaved_acks[:0] = acknowledged
        self._unsaved_deliveries[:0] = delivered

    def restore(self, acknowledged: tuple[str, ...], delivered: tuple[str, ...]) -> None:
        """What a committed entry carried."""
        for key in acknowledged:
            self.acknowledged.add(key)
            self.asked.setdefault(key, 0)
        self.delivered.update(delivered)

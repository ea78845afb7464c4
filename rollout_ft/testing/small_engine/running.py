"""One request from its arrival to its end, and what its replies look like.

Owns the tokens, logprobs, weight spans and text of a request. Must not know of the other requests. The subtle
invariant: a reply holds finished chunks only, and is built when it is sent, from all of them there are: a slow reader
gets fewer and larger replies, whole chunks still, and nothing piles up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rollout_ft.testing.small_engine.model import Generation
from rollout_ft.testing.small_engine.pacing import Pace
from rollout_ft.testing.small_engine.protocol import JSON, Request
from rollout_ft.testing.small_engine.vocabulary import TextStream, Vocabulary

ABORTED: JSON = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
ABORTED_WAITING: JSON = {"type": "abort", "message": "Abort in waiting queue"}
"""Also of one that ran and was sent back to wait; SGLang builds its last event elsewhere, and that tells the two apart."""


def unavailable(message: str) -> JSON:
    """The end of a request that found no room or no time."""
    return {"type": "abort", "message": message, "status_code": 503}


@dataclass(slots=True)
class Span:
    """Output tokens `start` to `end` were sampled by weights `version`."""

    version: str
    start: int
    end: int


class Running:
    """A request in progress; only the scheduler changes it."""

    def __init__(self, request: Request, vocabulary: Vocabulary, arrived: float) -> None:
        self.request = request
        self.arrived = arrived
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.spans: list[Span] = []
        self.published = 0
        self.finish: JSON | None = None
        self.finished_at: float | None = None
        self.cached_tokens: int | None = None
        self.retractions = 0
        self.routed = ""
        self.input_logprobs: list[float | None] = []
        self.ended_waiting = False
        self.abort_sent = False
        """An abort of its rid is on its way; SGLang sends no other."""
        self.changed = asyncio.Event()
        # Of the scheduler: the sequence, when it is due, and the token that its present chunk ends with.
        self.generation: Generation | None = None
        self.queued_at = self.began_at = 0.0
        self.pace: Pace | None = None
        self.target = 0
        self.due = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self._text = TextStream(vocabulary, request.skip_special_tokens)
        self._decoded = 0

    def record(self, tokens: list[int], logprobs: list[float], version: str) -> None:
        if not self.spans or self.spans[-1].version != version:
            self.spans.append(Span(version, len(self.ids), len(self.ids)))
        self.ids += tokens
        self.logprobs += logprobs
        self.spans[-1].end = len(self.ids)

    def publish(self) -> None:
        """What there is makes a chunk, or the end: replies may have it."""
        self.published = len(self.ids)
        self.changed.set()

    def end(self, finish: JSON, now: float) -> None:
        self.finish, self.finished_at = finish, now
        self.publish()

    def matched_stop_string(self) -> str | None:
        text = self._text_of(len(self.ids))
        return next((stop for stop in self.request.stop if stop in text), None)

    def text(self) -> str:
        """The text of what is published, without what stopped it (unless the request wants that too)."""
        matched = None if self.finish is None or self.request.no_stop_trim else self.finish.get("matched")
        text = self._text_of(self.published - isinstance(matched, int))
        return text[: text.index(matched)] if isinstance(matched, str) else text

    def _text_of(self, end: int) -> str:
        if self._decoded < end or self.finish is not None:
            self._text.feed(self.ids[self._decoded : end], final=self.finish is not None)
            self._decoded = max(end, self._decoded)
        return self._text.text

    def reply(self, weight_version: str, ids_from: int = 0, text_from: int = 0) -> JSON:
        """SGLang's reply: everything, or what follows the first `ids_from` tokens and `text_from` characters."""
        request, end = self.request, self.published
        ids = self.ids[ids_from:end]
        meta: JSON = {
            "id": request.rid,
            "finish_reason": self.finish,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": end,
            "reasoning_tokens": 0,
            "cached_tokens": self.cached_tokens or 0,
            "weight_version": weight_version,
            "weight_versions": [Span(s.version, s.start, min(s.end, end)) for s in self.spans if s.start < end],
            "num_retractions": self.retractions,
        }
        if self.finished_at is not None:
            meta["e2e_latency"] = self.finished_at - self.arrived
        if self.routed:
            meta["routed_experts"] = self.routed
        if request.return_logprob:
            meta |= self._logprobs(ids_from)
        return {"text": self.text()[text_from:], "output_ids": ids, "meta_info": meta}

    def last_of_a_waiting_one(self, weight_version: str, incremental: bool) -> JSON:
        """SGLang's last event for a request that did not run when it ended: all text and logprobs again, and of the ids the
        last one only where the others were deltas."""
        whole = self.reply(weight_version)
        kept = ("id", "finish_reason", "weight_version", "weight_versions", "e2e_latency", "completion_tokens")
        meta: JSON = {key: value for key, value in whole["meta_info"].items() if key in kept or "logprobs" in key}
        return {**whole, "output_ids": whole["output_ids"][-1:] if incremental else whole["output_ids"], "meta_info": meta}

    def _logprobs(self, start: int) -> JSON:
        end, asked = self.published, self.request.logprob_start
        pairs = zip(self.logprobs[start:end], self.ids[start:end], strict=True)
        scored = zip(self.input_logprobs, self.request.prompt[asked:].tolist(), strict=True) if self.input_logprobs else ()
        return {
            "input_token_logprobs": [(logprob, token, None) for logprob, token in scored],
            "output_token_logprobs": [(logprob, token, None) for logprob, token in pairs],
            "output_token_logprobs_length": end,
        }

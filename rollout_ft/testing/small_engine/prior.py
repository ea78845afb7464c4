"""What makes random weights sound like an agent: a bias on the logits, from the shape of the assistant's turn.

Owns the grammar of a turn (text, then perhaps one tool call, then the end) and its lengths. Must not know of weights,
sampling or requests. The subtle invariant: the state is a pure function of the token ids before a position, found
from the last `<|im_start|>` on, so it is the same whether those tokens were a prompt or sampled here.

    HEADER --newline--> TEXT --<tool_call>--> OPENING (forced) --> QUERY --quote--> CLOSING (forced: to the end)
                         ^ any <|im_end|> comes back to here
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout_ft.testing.small_engine.vocabulary import Vocabulary

OPENING_TEXT = '\n{"name": "look_up", "arguments": {"query": "'
CLOSING_TEXT = "}}\n</tool_call>"

_TEXT_MIN, _TEXT_MAX = 20, 60
_QUERY_MIN, _QUERY_MAX = 4, 12
_SURELY = 40.0

Bias = NDArray[np.float32]


# The modes, as plain numbers: they are compared for every token, and a member of an enum costs ten times as much.
_HEADER, _TEXT, _OPENING, _QUERY, _CLOSING = range(5)


@dataclass(frozen=True, slots=True)
class State:
    """Where in a turn a position is: tokens since the mode began, and whether tools were offered."""

    mode: int
    count: int
    tools: bool


class Prior:
    """The bias of every state over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids = vocabulary.ids
        self._start = ids.get("<|im_start|>", -1)
        self._end = vocabulary.eos_id
        self._tools = ids.get("<tools>", -1)
        self._call = ids.get("<tool_call>", -1)
        self._newlines = frozenset(i for i, token in enumerate(vocabulary.tokens) if token.startswith(b"\n"))
        self._quote = vocabulary.tokens.index(b'"')
        self._opening = _spell(vocabulary, OPENING_TEXT)
        self._closing = (*_spell(vocabulary, CLOSING_TEXT), self._end)
        plain, with_tools = _text_biases(vocabulary, -1), _text_biases(vocabulary, self._call)
        self._text_begin = (0, len(plain))
        self._query_begin = len(plain) + len(with_tools)
        self.biases = [*plain, *with_tools, *_query_biases(vocabulary)]
        """One row for each count of each mode that samples freely."""

    def start(self, ids: list[int]) -> State:
        """The state after `ids`."""
        begin = len(ids) - ids[::-1].index(self._start) - 1 if self._start in ids else 0
        state = State(_TEXT, 0, self._tools in ids[:begin])
        for token in ids[begin:]:
            state = self.advance(state, token)
        return state

    def advance(self, state: State, token: int) -> State:
        """The state one token later. Anything may come, since a prompt may hold anything."""
        mode, count, tools = state.mode, state.count + 1, state.tools or token == self._tools
        if token == self._start:
            return State(_HEADER, 0, tools)
        if token == self._end or (mode == _HEADER and token in self._newlines):
            return State(_TEXT, 0, tools)
        if mode == _TEXT and token == self._call and tools:
            return State(_OPENING, 0, tools)
        if mode == _OPENING and count == len(self._opening):
            return State(_QUERY, 0, tools)
        if mode == _QUERY and token == self._quote:
            return State(_CLOSING, 0, tools)
        return State(mode, count, tools)

    def forced(self, state: State) -> int | None:
        """The only token that may follow, where there is only one."""
        if state.mode == _OPENING:
            return self._opening[state.count]
        if state.mode == _CLOSING:
            return self._closing[min(state.count, len(self._closing) - 1)]
        return None

    def bias(self, state: State) -> int:
        """Which of `biases` to add to the logits, where the token is not forced."""
        if state.mode == _QUERY:
            return self._query_begin + min(state.count, _QUERY_MAX)
        return self._text_begin[state.tools] + min(state.count, _TEXT_MAX)


def _text_biases(vocabulary: Vocabulary, call: int) -> list[Bias]:
    """Words; after a while the end, and the token `call` more often than that (-1: no tools)."""
    allowed = np.full(vocabulary.size, -np.inf, dtype=np.float32)
    for token in vocabulary.printable:
        content = vocabulary.tokens[token]
        # Whole words read better than letters and signs, which are most of a small vocabulary.
        is_word = content.startswith(b" ") and len(content) > 2 and content.strip().isalpha()
        allowed[token] = 0.0 if is_word else -2.0 if content.isalpha() else -4.0
    rows: list[Bias] = []
    for count in range(_TEXT_MAX + 1):
        row = allowed.copy()
        if count >= _TEXT_MIN:
            ending = _SURELY if count >= _TEXT_MAX else 1.5 + 0.12 * (count - _TEXT_MIN)
            row[vocabulary.eos_id] = ending - 2.0 if call >= 0 else ending
            if call >= 0:
                row[call] = ending
        rows.append(row)
    return rows


def _query_biases(vocabulary: Vocabulary) -> list[Bias]:
    """Lowercase letters and spaces; after a while the quote that ends them."""
    rows: list[Bias] = []
    for count in range(_QUERY_MAX + 1):
        row = np.full(vocabulary.size, -np.inf, dtype=np.float32)
        for token in vocabulary.printable:
            letters = vocabulary.tokens[token].lstrip(b" ")
            if letters.isalpha() and letters.islower() and (count or vocabulary.tokens[token] == letters):
                row[token] = 0.0
        if count >= _QUERY_MIN:
            row[vocabulary.tokens.index(b'"')] = _SURELY if count >= _QUERY_MAX else 3.0
        rows.append(row)
    return rows


def _spell(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """`text` in the longest tokens that fit, from the left: no tokenizer needed, and always the same."""
    tokens = {content: token for token, content in enumerate(vocabulary.tokens) if content}
    content, spelled, longest = text.encode(), list[int](), max(map(len, tokens))
    while content:
        size = next(size for size in range(min(longest, len(content)), 0, -1) if content[:size] in tokens)
        spelled.append(tokens[content[:size]])
        content = content[size:]
    return tuple(spelled)

"""The clients of the benchmarks: an agent's conversation, the same straight to an engine, a trainer that collects.

Owns the requests and their latencies. Must not know what the figures are for. The subtle invariant: a body is whole
before its clock starts, and what is waited for is the whole reply, so that a latency holds nothing of the client's own
work.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson
from tokenizers import Tokenizer

from rollout_ft.cli.bench.loads import Chat, Load, LoadFailed
from rollout_ft.clock import monotonic

_TEXT_TOKENS = 65_536
"""Of all texts together: enough of them that no two sessions say the same, and few enough to be made in a second."""
_WORDS = """
the a of to and in that it is was for on with as at by from this which when then if file line result value name function
error test return read write call list number string path run search query answer next first last new old same other more
data code tool output input user order change open close between before after every nothing
"""
_TEMPLATE_TOKENS = 12
"""What the chat template puts around a message, about."""
_JSON = {"content-type": "application/json"}


@dataclass(slots=True)
class Seen:
    """What a conversation has seen so far; the bytes are those of its last request and reply."""

    prompt_tokens: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    bodies_read: int = 0
    reading_s: float = 0.0


class Conversation(Protocol):
    seen: Seen

    async def turn(self) -> float:
        """Takes one turn; returns its latency in seconds. Raises LoadFailed."""
        ...


class Texts:
    """User messages of so many tokens each, and their ids; the same in every process."""

    def __init__(self, tokenizer: str, tokens: int):
        encoder: Any = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
        words = _WORDS.split()
        wanted, chance = max(1, tokens - _TEMPLATE_TOKENS), random.Random(0)
        self.texts: list[str] = []
        self.ids: list[list[int]] = []
        for _ in range(min(97, max(7, _TEXT_TOKENS // wanted))):
            text = " ".join(chance.choices(words, k=wanted))
            encoded: Any = encoder.encode(text)
            self.texts.append(text[: encoded.offsets[wanted - 1][1]])
            self.ids.append(encoded.ids[:wanted])

    def pick(self, conversation: int, turn: int) -> int:
        return (conversation * 31 + turn) % len(self.texts)


class Through:
    """A chat as an agent has it: the whole history every time, replies put back as they came."""

    def __init__(self, http: aiohttp.ClientSession, chat: Chat, load: Load, texts: Texts, number: int):
        self._http, self._texts, self._number = http, texts, number
        self._url = f"{chat.base_url}/chat/completions"
        self._headers = {"authorization": f"Bearer {chat.api_key}", **_JSON}
        self._tail = f'],"model":"bench","max_tokens":{load.tokens_out},"ignore_eos":true}}'.encode()
        self._history: list[bytes] = []
        self._turns = self.last_prompt_tokens = 0
        self.seen = Seen()

    async def turn(self) -> float:
        text = f"{self._number}.{self._turns} {self._texts.texts[self._texts.pick(self._number, self._turns)]}"
        self._turns += 1
        self._history.append(orjson.dumps({"role": "user", "content": text}))
        body = b'{"messages":[' + b",".join(self._history) + self._tail
        began = monotonic()
        status, reply = await _ask(self._http, "POST", self._url, body, self._headers)
        took_s = monotonic() - began
        if status != 200:
            raise LoadFailed(f"turn {self._turns} through the gateway: HTTP {status}: {reply[:300]!r}")
        data: Any = orjson.loads(reply)
        self._history.append(orjson.dumps(data["choices"][0]["message"]))
        self.last_prompt_tokens = int(data["usage"]["prompt_tokens"])
        self.seen.prompt_tokens += self.last_prompt_tokens
        self.seen.bytes_out, self.seen.bytes_in = len(body), len(reply)
        if self._number == 0:
            self.seen.bodies_read += 1
            self.seen.reading_s += _reading_s(body)
        return took_s


class Direct:
    """The same conversation with an engine: all ids so far, logprobs in the reply, no session."""

    def __init__(self, http: aiohttp.ClientSession, engine: str, load: Load, texts: Texts, number: int):
        self._http, self._texts, self._number, self._tokens_in = http, texts, number, load.tokens_in
        self._url = f"{engine}/generate"
        self._head = f'{{"sampling_params":{{"max_new_tokens":{load.tokens_out},"ignore_eos":true}},"return_logprob":true,"input_ids":['
        self._length = self._turns = 0
        self._json: list[bytes] = []
        self.seen = Seen()

    async def turn(self, prompt_tokens: int = 0) -> float:
        """`prompt_tokens`: make the prompt exactly so long; 0: `tokens_in` more than the turn before ended with."""
        text = self._texts.ids[self._texts.pick(self._number, self._turns)]
        self._turns += 1
        missing = (prompt_tokens - self._length) if prompt_tokens else self._tokens_in
        self._add((text * (missing // len(text) + 1))[:missing])
        body = self._head.encode() + b",".join(self._json) + b"]}"
        began = monotonic()
        status, reply = await _ask(self._http, "POST", self._url, body, _JSON)
        took_s = monotonic() - began
        if status != 200:
            raise LoadFailed(f"turn {self._turns} straight to the engine: HTTP {status}: {reply[:300]!r}")
        self.seen.prompt_tokens += self._length
        self._add(orjson.loads(reply)["output_ids"])
        return took_s

    def _add(self, ids: list[int]) -> None:
        self._length += len(ids)
        self._json.append(orjson.dumps(ids)[1:-1])


class Collector:
    """A trainer that reads a session's trajectory."""

    def __init__(self, http: aiohttp.ClientSession, chat: Chat):
        self._http, self._url = http, chat.base_url.removesuffix("/v1") + "/trajectory"
        self._headers = {"authorization": f"Bearer {chat.api_key}"}
        self.seen = Seen()

    async def turn(self) -> float:
        began = monotonic()
        status, reply = await _ask(self._http, "GET", self._url, b"", self._headers)
        took_s = monotonic() - began
        if status != 200:
            raise LoadFailed(f"the trajectory: HTTP {status}: {reply[:300]!r}")
        self.seen.bytes_in = len(reply)
        return took_s


def _reading_s(body: bytes) -> float:
    """CPU seconds that reading a request costs anybody who wants to know what is in it."""
    began = time.thread_time()
    orjson.loads(body)
    return time.thread_time() - began


async def _ask(http: aiohttp.ClientSession, method: str, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    try:
        async with http.request(method, url, data=body, headers=headers) as response:
            return response.status, await response.read()
    except aiohttp.ClientError as e:
        raise LoadFailed(f"{url}: {type(e).__name__}: {e}") from e

"""The adapter for SGLang's native HTTP protocol (0.5.20 and later; facts of `/generate`, streaming).

Owns the wire format. Knows nothing of turns or recovery. Only `completion_tokens` tells how many tokens a chunk adds:
chunks may be cumulative or deltas, and an abort chunk may repeat an id that was already sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter

from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.types import JSON, Spelled, VersionSpan

_LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)
LARGE_BYTES = 2**16
_ROUTED = b'"routed_experts":"'
_CONTROL_TIMEOUT_S = aiohttp.ClientTimeout(total=10)


class SGLang:
    def __init__(self, engine_id: str, url: str):
        self.engine_id, self.url = engine_id, url
        # The server closes idle connections after 5 s unless told otherwise; ours are let go before that.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._http = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
        )

    async def generate(
        self, rid: str, input_json: Spelled, sampling: JSON, routed_from: int | None = None, rank: int | None = None
    ) -> AsyncIterator[Chunk]:
        asked: JSON = {"rid": rid, "sampling_params": sampling, "return_logprob": True, "stream": True}
        if rank is not None:
            asked["routed_dp_rank"] = rank
        if routed_from is not None:
            asked |= {"return_routed_experts": True, "routed_experts_start_len": routed_from}
        head = orjson.dumps(asked)
        body = _Body(head[:-1] + b',"input_ids":[', input_json, b"]}")
        try:
            async with self._http.post(f"{self.url}/generate", data=body) as response:
                if response.status != 200:
                    raise EngineRefused(response.status, (await response.text())[:500], _retry_after_s(response.headers))
                seen = 0
                async for events in _events(response.content):
                    chunk, error = _joined(events, seen)
                    seen += len(chunk.ids)
                    if chunk.ids or chunk.finish:
                        yield chunk
                    if error is not None:
                        raise error
                    if chunk.finish:
                        return
        except _LOST as e:
            raise EngineLost(self.engine_id, f"connection: {type(e).__name__}") from e
        raise EngineLost(self.engine_id, "connection: the stream ended without a finish reason")

    async def function_calls(self, text: str, tools: list[Any], parser: str) -> tuple[str, list[tuple[str, str]]]:
        made = await self._parse("/parse_function_call", {"text": text, "tools": tools, "tool_call_parser": parser})
        try:
            return str(made["normal_text"]), [(str(call["name"] or ""), str(call["parameters"])) for call in made["calls"]]
        except (KeyError, TypeError) as e:
            raise EngineRefused(502, f"/parse_function_call made no sense: {e!r}") from None

    async def separate_reasoning(self, text: str, parser: str) -> tuple[str, str]:
        made = await self._parse("/separate_reasoning", {"text": text, "reasoning_parser": parser})
        try:
            return str(made["reasoning_text"] or ""), str(made["text"] or "")
        except (KeyError, TypeError) as e:
            raise EngineRefused(502, f"/separate_reasoning made no sense: {e!r}") from None

    async def abort(self, rid: str) -> None:
        """Asks the engine to stop; its 200 proves nothing."""
        await self._post("/abort_request", {"rid": rid})

    async def load(self) -> int | None:
        data = await self._told("/v1/loads")
        try:
            return sum(int(rank["num_running_reqs"]) + int(rank["num_waiting_reqs"]) for rank in data["loads"])
        except (KeyError, TypeError, ValueError):
            return None

    async def capacity(self) -> int | None:
        """How many requests it can run at once, as its ranks say or else as it was started; None when it does not say."""
        info = await self._told("/server_info")
        try:
            ranks = [int(state.get("effective_max_running_requests_per_dp") or 0) for state in info.get("internal_states") or ()]
            return sum(ranks) or int(info.get("max_running_requests") or 0) or None
        except (AttributeError, TypeError, ValueError):
            return None

    async def alive(self) -> bool:
        try:
            async with self._http.get(f"{self.url}/ready", timeout=_CONTROL_TIMEOUT_S) as response:
                await response.read()
                return True
        except (*_LOST, TimeoutError):
            return False

    async def scheduler_answers(self) -> None:
        """Of all that can be read, /server_info alone makes the round through the scheduler, which answers while it is paused."""
        try:
            async with self._http.get(f"{self.url}/server_info", timeout=_CONTROL_TIMEOUT_S) as response:
                await response.read()
        except (*_LOST, TimeoutError) as e:
            raise EngineLost(self.engine_id, f"connection: /server_info: {type(e).__name__}") from e
        if response.status != 200:
            raise EngineRefused(response.status, "/server_info")

    async def ready(self) -> bool:
        try:
            async with self._http.get(f"{self.url}/ready", timeout=_CONTROL_TIMEOUT_S) as response:
                if response.status == 404:
                    async with self._http.get(f"{self.url}/health", timeout=_CONTROL_TIMEOUT_S) as health:
                        return health.status == 200
                return response.status == 200
        except (*_LOST, TimeoutError):
            return False

    async def info(self) -> EngineInfo:
        try:
            async with self._http.get(f"{self.url}/model_info", timeout=_CONTROL_TIMEOUT_S) as response:
                data: Any = orjson.loads(await response.read())
        except (*_LOST, TimeoutError, orjson.JSONDecodeError) as e:
            raise EngineLost(self.engine_id, f"connection: /model_info: {type(e).__name__}") from e
        return EngineInfo(str(data.get("weight_version", "")), str(data.get("model_path", "")))

    async def ranks(self) -> int:
        """How many data-parallel ranks it has."""
        try:
            async with self._http.get(f"{self.url}/v1/loads?include=core", timeout=_CONTROL_TIMEOUT_S) as response:
                data: Any = orjson.loads(await response.read()) if response.status == 200 else {}
        except (*_LOST, TimeoutError, orjson.JSONDecodeError):
            return 1
        return max(1, len(data.get("loads") or ()))

    async def aclose(self) -> None:
        await self._http.close()

    async def _told(self, path: str) -> Any:
        """What it says of itself; nothing when it says nothing."""
        try:
            async with self._http.get(self.url + path, timeout=_CONTROL_TIMEOUT_S) as response:
                return orjson.loads(await response.read()) if response.status == 200 else {}
        except (*_LOST, TimeoutError, orjson.JSONDecodeError):
            return {}

    async def _parse(self, path: str, body: JSON) -> Any:
        try:
            async with self._http.post(self.url + path, data=orjson.dumps(body), headers=_JSON, timeout=_CONTROL_TIMEOUT_S) as response:
                data = await response.read()
        except TimeoutError:
            raise EngineRefused(504, f"{path} took longer than {_CONTROL_TIMEOUT_S.total:g} s") from None
        except _LOST as e:
            raise EngineLost(self.engine_id, f"connection: {path}: {type(e).__name__}") from e
        if response.status != 200:
            raise EngineRefused(response.status, data[:500].decode(errors="replace"))
        return _parsed(data)

    async def _post(self, path: str, body: JSON) -> None:
        try:
            async with self._http.post(self.url + path, json=body, timeout=_CONTROL_TIMEOUT_S) as response:
                await response.read()
        except (*_LOST, TimeoutError):
            return


_JSON = {"content-type": "application/json"}


class _Body(aiohttp.Payload):
    """JSON in pieces, which are not joined to be sent: the ids of a long prompt are most of it."""

    def __init__(self, *pieces: Spelled):
        super().__init__(pieces, content_type="application/json")
        self._pieces, self._size = pieces, sum(map(len, pieces))

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._pieces).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in self._pieces:
            await writer.write(piece)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[list[Any]]:
    """The JSON of the server-sent events that came together, up to `[DONE]`."""
    begun: list[bytes] = []  # of an event that is not whole: it may have hundreds of megabytes, and is looked through once
    async for data in content.iter_any():
        if begun and data.startswith(b"\n") and begun[-1].endswith(b"\n"):
            data, begun[-1] = b"\n" + data, begun[-1][:-1]  # an end that came in two
        first, *more = data.split(b"\n\n")
        begun += [first] if first else []
        if not more:
            continue
        events, begun = [b"".join(begun), *more[:-1]], [more[-1]]
        payloads = [_payload(event) for event in events if event.startswith(b"data:")]
        done = b"[DONE]" in payloads
        parsed = [_parsed(payload) for payload in (payloads[: payloads.index(b"[DONE]")] if done else payloads)]
        if parsed:
            yield parsed
        if done:
            return


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds; a date is not read."""
    told = headers.get("retry-after", "")
    return float(told) if told.isascii() and told.isdigit() else 0.0


def _payload(event: bytes) -> bytes:
    """Copied once: it may be large."""
    return event[6 if event.startswith(b"data: ") else 5 :].strip()


def _parsed(payload: bytes) -> Any:
    at = payload.find(_ROUTED) if len(payload) > LARGE_BYTES else -1
    try:
        return orjson.loads(payload) if at < 0 else _beside(payload, at + len(_ROUTED))
    except orjson.JSONDecodeError as e:
        raise EngineRefused(502, f"the engine sent what is not JSON: {e}") from None


def _beside(payload: bytes, start: int) -> Any:
    """An event without reading its routed experts, which begin at `start`: so much text takes long, and nobody needs it
    as text. Inside of a string their name would have other characters around it."""
    end = payload.find(b'"', start)
    event: Any = orjson.loads(payload[:start] + payload[end:])
    if isinstance(event, dict) and isinstance(meta := cast(JSON, event).get("meta_info"), dict):
        meta["routed_experts"] = memoryview(payload)[start:end]
    return cast(Any, event)


def _joined(events: list[Any], seen: int) -> tuple[Chunk, EngineRefused | None]:
    """Several events as one chunk, and the error that ended them: the tokens before it count."""
    chunk = Chunk([], [], ())
    for event in events:
        try:
            more = _chunk(event, seen + len(chunk.ids))
        except EngineRefused as e:
            return chunk, e
        ids, logprobs = chunk.ids + more.ids, chunk.logprobs + more.logprobs
        chunk = Chunk(ids, logprobs, more.spans, more.finish, more.routed, more.recaptured, more.cached, more.version)
        if chunk.finish:
            break
    return chunk, None


def _chunk(event: Any, seen: int) -> Chunk:
    """One event as a chunk; `seen` tokens came before it. Raises EngineRefused for an error inside the stream."""
    fields = cast(JSON, event) if isinstance(event, dict) else {}
    meta, error = fields.get("meta_info"), fields.get("error")
    if isinstance(error, dict):
        told = cast(JSON, error)
        raise EngineRefused(told.get("code"), str(told.get("message", ""))[:500])
    if error or not isinstance(meta, dict):
        raise EngineRefused(502, f"the engine sent an event that makes no sense: {str(error or fields)[:500]}")
    return _tokens(fields, cast(JSON, meta), seen)


def _tokens(event: JSON, meta: JSON, seen: int) -> Chunk:
    reason: JSON = meta.get("finish_reason") or {}
    finish = str(reason.get("type", ""))
    if finish == "abort" and reason.get("status_code"):
        raise EngineRefused(int(reason["status_code"]), str(reason.get("message", ""))[:500])
    new = int(meta.get("completion_tokens") or 0) - seen
    ids: list[int] = event.get("output_ids", [])
    triples: list[list[Any]] = meta.get("output_token_logprobs") or []
    if new > min(len(ids), len(triples)):
        new = 0  # tokens are missing in front of these (an abort's last chunk): what follows a hole is worth nothing
    new = max(0, new)
    take = slice(len(ids) - new, None)
    spans = tuple(VersionSpan(str(s["version"]), int(s["start"]), int(s["end"])) for s in meta.get("weight_versions") or ())
    if not spans:
        spans = (VersionSpan(str(meta.get("weight_version", "")), 0, seen + new),)
    routed: Any = meta.get("routed_experts") if finish else None
    if not isinstance(routed, memoryview):  # what a large event was read without
        routed = routed.encode(errors="replace") if isinstance(routed, str) else b""
    recaptured = bool(meta.get("num_retractions"))
    logprobs, cached = [t[0] for t in triples[len(triples) - new :]], int(meta.get("cached_tokens") or 0)
    version = str(meta.get("weight_version", "")) if finish == "abort" else ""
    return Chunk(ids[take], logprobs, spans, finish, cast("bytes | memoryview", routed), recaptured, cached, version)

"""Clients that mean harm, over raw sockets: each gets a clear 4xx or a closed connection, and nothing else happens."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from stack import KEYS, Stack, stack

from rollout_ft.config import Config
from rollout_ft.errors import BadRequest
from rollout_ft.session.special import refuse_special_tokens
from rollout_ft.types import JSON

QUICK: dict[str, Any] = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "send_timeout_s": 0.3}
SID, OTHER = "mine~1", "other~1"
PATH = f"/sessions/{SID}/v1/chat/completions"


def body_of(*texts: str, **fields: Any) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": t} for t in texts], **fields})


def request(
    body: bytes = b"", *, method: str = "POST", path: str = PATH, key: str | None = None, length: int | None = None, headers: bytes = b""
) -> bytes:
    key = KEYS.session(SID) if key is None else key
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode()
    if length != -1:
        head += b"content-length: %d\r\n" % (len(body) if length is None else length)
    return head + headers + b"\r\n" + body


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> JSON:
        return orjson.loads(self.body)["error"]


class Client:
    """One connection, of which every byte is ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # whoever is refused in mid-body is told before it has sent all
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self) -> Answer | None:
        """The next reply; None when the connection is closed instead."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return Answer(int(lines[0].split()[1]), headers, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def closed(self) -> None:
        """Returns when the server has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """Goes away with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def client(s: Stack) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def ask(s: Stack, data: bytes) -> Answer | None:
    async with client(s) as c:
        await c.send(data)
        return await c.answer()


async def chat(s: Stack, text: str, sid: str = SID, **fields: Any) -> Answer:
    data = request(body_of(text, **fields), path=f"/sessions/{sid}/v1/chat/completions", key=KEYS.session(sid))
    answer = await ask(s, data)
    assert answer is not None
    return answer


@contextlib.asynccontextmanager
async def unmoved(config: Config | None = None, **gateway: Any) -> AsyncIterator[Stack]:
    """Two sessions with a turn each. After what is done inside nothing is stored, and both go on."""
    async with stack(config, **gateway) as s:
        for trial in ("mine", "other"):
            await s.open(trial)
        for sid in (SID, OTHER):
            assert (await chat(s, "first", sid)).status == 200
        before, calls = await s.state(), s.engine.calls
        yield s
        assert (await s.state(), s.engine.calls) == (before, calls)
        for sid in (SID, OTHER):
            assert (await chat(s, "second", sid)).status == 200
        assert s.gateway.in_flight == 0


async def refused(s: Stack, data: bytes) -> Answer:
    answer = await ask(s, data)
    assert answer is not None
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.error) == {"message", "type", "code", "param"}
    return answer


# What a body says.

DEEP = b"[" * 10_000 + b"]" * 10_000
BODIES: dict[str, tuple[bytes, str]] = {
    "10,000 nested arrays": (b'{"messages":' + DEEP + b"}", "invalid_json"),
    "300 nested arrays": (b'{"messages":' + b"[" * 300 + b"]" * 300 + b"}", "too_deep"),
    "100 nested objects in a tool": (body_of("a", tools=[{"x": json.loads('{"a":' * 100 + "1" + "}" * 100)}]), "too_deep"),
    "a number beyond a double": (b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}', "invalid_json"),
    "NaN": (b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}', "invalid_json"),
    "Infinity": (b'{"messages":[{"role":"user","content":"a"}],"temperature":-Infinity}', "invalid_json"),
    "a lone surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json"),
    "a raw control character": (b'{"messages":[{"role":"user","content":"\x00"}]}', "invalid_json"),
    "bytes that are no UTF-8": (b'{"messages":[{"role":"user","content":"\xff"}]}', "invalid_json"),
    "a key twice": (b'{"messages":[{"role":"user","content":"a"}],"messages":[{"role":"user","content":"b"}]}', "duplicate_key"),
    "a key twice in a message": (b'{"messages":[{"role":"user","content":"a","content":"b"}]}', "duplicate_key"),
    "a key twice, written differently": (b'{"messages":[{"role":"user","content":"a","\\u0063ontent" :"b"}]}', "duplicate_key"),
    "nothing": (b"", "invalid_json"),
    "half a body": (body_of("a")[:-3], "invalid_json"),
    "gzip without saying so": (gzip.compress(body_of("a")), "invalid_json"),
    "ids of tokens": (body_of("a", input_ids=[10**9]), "unknown_field"),
    "an engine's field": (body_of("a", custom_logit_processor="x"), "unknown_field"),
    "no text": (b'{"messages":[{"role":"user","content":1e308}]}', "invalid_request"),
    "a role nobody knows": (b'{"messages":[{"role":"\\u0000","content":"a"}]}', "invalid_request"),
    "a number of 5,000 digits": (body_of("a")[:-1] + b',"seed":' + b"9" * 5000 + b"}", "invalid_json"),
    "a number of 300 digits": (body_of("a")[:-1] + b',"seed":' + b"9" * 300 + b"}", "invalid_request"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_what_a_session_cannot_use_is_a_400_that_says_so(name: str):
    body, code = BODIES[name]
    async with unmoved() as s:
        answer = await refused(s, request(body))
        assert (answer.status, answer.error["code"]) == (400, code)


LIMITS: list[tuple[str, JSON, bytes, int]] = [
    ("gateway.max_body_bytes", {"gateway": {"max_body_bytes": 1024}}, body_of("a" * 2000), 413),
    ("gateway.max_json_depth", {"gateway": {"max_json_depth": 8}}, body_of("a", tools=[{"x": [[[[[[[]]]]]]]}]), 400),
    ("session.max_messages", {"session": {"max_messages": 3}}, body_of(*"abcd"), 400),
    ("session.max_tools", {"session": {"max_tools": 1}}, body_of("a", tools=[{"function": {"name": "f"}}] * 2), 400),
    ("session.max_turns", {"session": {"max_turns": 1}}, body_of("new"), 400),
    ("session.max_tokens", {"session": {"max_tokens": 1}}, body_of("new"), 400),
]  # fmt: skip


@pytest.mark.parametrize(("key", "settings", "body", "status"), LIMITS, ids=[limit[0] for limit in LIMITS])
async def test_every_limit_is_told_with_its_key(key: str, settings: JSON, body: bytes, status: int):
    sections = {"session": {"max_output_tokens": 64, **settings.get("session", {})}, "gateway": settings.get("gateway", {})}
    async with stack(Config.model_validate(sections)) as s:
        await s.open("mine")
        assert (await chat(s, "first")).status == 200
        before = await s.state()
        answer = await refused(s, request(body))
        assert (answer.status, key in answer.error["message"]) == (status, True), answer.error
        assert await s.state() == before
        assert (await chat(s, "first", seed=None)).status == 200 or "max_t" in key


async def test_a_million_tiny_messages_are_refused():
    async with unmoved() as s:
        answer = await refused(s, request(b'{"messages":[' + b",".join([b"{}"] * 1_000_000) + b"]}"))
        assert (answer.status, "session.max_messages" in answer.error["message"]) == (400, True)


async def test_a_session_with_too_many_requests_in_flight_leaves_room_for_others():
    async with stack(max_in_flight_per_session=2) as s:
        for trial in ("mine", "other"):
            await s.open(trial)
        s.engine.go.clear()
        async with client(s) as a, client(s) as b:
            for i, c in enumerate((a, b)):
                await c.send(request(body_of(f"held {i}")))
            await until(lambda: s.engine.calls == 2)
            answer = await refused(s, request(body_of("third")))
            assert (answer.status, "gateway.max_in_flight_per_session" in answer.error["message"]) == (429, True)
            s.engine.go.set()
            assert (await chat(s, "free", OTHER)).status == 200
            assert [(await answered(c)).status for c in (a, b)] == [200, 200]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def answered(c: Client) -> Answer:
    answer = await c.answer()
    assert answer is not None
    return answer


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "GZIP", "gzip, identity"])
async def test_a_compressed_body_is_refused_before_it_is_read(encoding: str):
    async with unmoved() as s, client(s) as c:
        await c.send(request(length=10_000_000, headers=f"content-encoding: {encoding}\r\n".encode()))
        answer = await answered(c)
        assert (answer.status, answer.error["code"], encoding.lower() in answer.error["message"]) == (415, "unsupported_encoding", True)


@pytest.mark.parametrize("text", ["\x00\x01\x1b[2J\x7f", "\r\n\r\ndata: [DONE]\n\n", "\u2028\u2029\x85", "\ufffe\U0010ffff", "<|im_end|>"])
async def test_control_characters_in_a_text_are_text(text: str):
    async with stack() as s:
        await s.open("mine")
        for stream in (False, True):
            answer = await chat(s, text, stream=stream)
            assert answer.status == 200, answer.body
            events = answer.body.split(b"\n\n") if stream else [b"data: " + answer.body]
            assert all(orjson.loads(e.removeprefix(b"data: ")) for e in events if e not in (b"", b"data: [DONE]"))


IDS = {
    "a long Idempotency-Key": b"idempotency-key: " + b"k" * 300,
    "an Idempotency-Key with control characters": b"idempotency-key: a\x85b",
    "an Idempotency-Key with letters beyond ASCII": b"idempotency-key: caf\xe9",
}


@pytest.mark.parametrize("name", IDS)
async def test_an_id_that_is_none_is_refused(name: str):
    async with unmoved() as s:
        answer = await refused(s, request(body_of("a"), headers=IDS[name] + b"\r\n"))
        assert (answer.status, answer.error["param"]) == (400, "idempotency-key")


@pytest.mark.parametrize("value", [b"9" * 5000, b"-1", b"\xb2", b"1e9", b"NaN"])
async def test_numbers_in_headers_that_are_none_change_nothing(value: bytes):
    async with stack() as s:
        await s.open("mine")
        headers = b"".join(name + b": " + value + b"\r\n" for name in (b"x-stainless-retry-count", b"x-stainless-read-timeout"))
        answer = await ask(s, request(body_of("a"), headers=headers))
        assert answer is not None
        assert answer.status == 200, answer.body


async def test_a_special_token_in_a_text_is_refused_where_that_is_wanted():
    messages = [{"role": "user", "content": "a<|im_end|>"}, {"role": "user", "content": "b"}]
    refuse_special_tokens(messages, ())
    refuse_special_tokens(messages, ("<|im_start|>",))
    for token, given in (("<|im_end|>", messages), ('<|"|>', [{"role": "user", "content": 'x<|"|>'}])):
        with pytest.raises(BadRequest, match="special_tokens_in_text") as refusal:
            refuse_special_tokens(given, (token,))
        assert refusal.value.status == 400


# How it arrives.

HEADS = {
    "a header without an end": b"POST / HTTP/1.1\r\nx: " + b"a" * 300_000,
    "a name without an end": b"POST / HTTP/1.1\r\n" + b"a" * 300_000,
    "many small headers": b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    "a large header": b"POST / HTTP/1.1\r\na: " + b"b" * 40_000 + b"\r\n\r\n",
    "a long path": b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
async def test_headers_over_the_limit_are_refused(name: str):
    async with unmoved() as s:
        answer = await refused(s, HEADS[name])
        assert (answer.status, "gateway.max_header" in answer.error["message"]) == (431, True)


NO_HTTP = {
    "noise": b"\x16\x03\x01\x02\x00 what is this\r\n\r\n",
    "two lengths": request(body_of("a"), headers=b"content-length: 3\r\n"),
    "a length and chunks": request(body_of("a"), headers=b"transfer-encoding: chunked\r\n"),
    "a length that is none": request(body_of("a"), length=-1, headers=b"content-length: -5\r\n"),
    "a chunk that is none": request(b"zzz\r\n", length=-1, headers=b"transfer-encoding: chunked\r\n"),
    "a header split by a newline": request(body_of("a"), headers=b"x: a\r\n b\x00c\r\n"),
    "a method nobody knows": request(method="BREW"),
    "a tunnel": b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
async def test_what_is_no_http_is_a_400_and_a_closed_connection(name: str):
    async with unmoved() as s, client(s) as c:
        await c.send(NO_HTTP[name])
        answer = await answered(c)
        assert (answer.status, answer.headers["connection"], answer.error["code"]) == (400, "close", "invalid_http")
        await c.closed()


async def test_a_chunked_body_has_the_same_limit():
    async with unmoved(max_body_bytes=1024) as s, client(s) as c:
        await c.send(request(length=-1, headers=b"transfer-encoding: chunked\r\n") + (b"64\r\n" + b"x" * 100 + b"\r\n") * 20)
        assert (await answered(c)).status == 413


async def test_a_chunked_body_within_the_limit_is_served_whatever_follows_its_chunks():
    async with stack() as s:
        await s.open("mine")
        body = body_of("a")
        sent = b"%x;name=value\r\n%b\r\n0\r\nauthorization: Bearer x\r\n\r\n" % (len(body), body)
        answer = await ask(s, request(sent, length=-1, headers=b"transfer-encoding: chunked\r\n"))
        assert answer is not None
        assert answer.status == 200, answer.body


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
async def test_an_offer_to_speak_another_protocol_is_passed_over_or_refused(protocol: bytes):
    async with unmoved() as s:
        offer = b"connection: upgrade\r\nupgrade: " + protocol + b"\r\n"
        answer = await ask(s, request(method="GET", path="/health", length=-1, headers=offer))
        assert answer is not None
        assert answer.status == 200
        answer = await refused(s, request(body_of("a"), headers=offer))
        assert (answer.status, answer.error["code"]) == (400, "upgrade_not_supported")


async def test_a_body_shorter_than_it_says_is_a_408_after_a_time():
    async with unmoved(**QUICK) as s, client(s) as c:
        await c.send(request(body_of("a"), length=1000))
        answer = await answered(c)
        assert (answer.status, "gateway.body_timeout_s" in answer.error["message"], answer.headers["connection"]) == (408, True, "close")
        await c.closed()


async def test_a_body_longer_than_it_says_is_refused():
    async with unmoved() as s, client(s) as c:
        await c.send(request(body_of("a" * 50), length=20))
        answer = await c.answer()
        assert answer is None or answer.status == 400
        await c.closed()


@pytest.mark.parametrize("start", [b"POST / HT", request()[:60], b"\r\n", b""], ids=["a line", "half a head", "newlines", "nothing"])
async def test_a_head_that_does_not_end_is_closed_after_a_time(start: bytes):
    async with unmoved(**QUICK) as s, client(s) as c:
        await c.send(start)
        answer = await c.answer()
        assert (answer is None) == (start in (b"", b"\r\n"))
        if answer is not None:
            assert (answer.status, "gateway.header_timeout_s" in answer.error["message"]) == (408, True)
        await c.closed()


async def test_a_head_that_arrives_byte_by_byte_has_the_same_time():
    async with unmoved(**QUICK) as s, client(s) as c:

        async def drip() -> None:
            for byte in request(body_of("a")):
                await c.send(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert (await answered(c)).status == 408
        await c.closed()
        dripping.cancel()


async def test_newlines_do_not_keep_an_idle_connection_open():
    async with unmoved(**QUICK) as s, client(s) as c:
        await c.send(request(method="GET", path="/health"))
        assert (await answered(c)).status == 200
        await c.send(b"\r\n")
        await c.closed()


async def test_a_body_that_goes_on_after_the_refusal_is_not_read_for_ever():
    async with unmoved(**QUICK) as s, client(s) as c:
        await c.send(request(b"x" * 100, length=1_000_000, key="wrong"))
        assert (await answered(c)).status == 401
        await c.closed()


@pytest.mark.parametrize("key", ["wrong", ""])
async def test_whoever_waits_to_be_asked_for_the_body_is_refused_without_it(key: str):
    async with unmoved() as s, client(s) as c:
        await c.send(request(length=1000, key=key, headers=b"expect: 100-continue\r\n"))
        assert (await answered(c)).status == 401


async def test_whoever_waits_to_be_asked_for_the_body_is_asked():
    async with stack() as s, client(s) as c:
        await s.open("mine")
        body = body_of("a")
        await c.send(request(length=len(body), headers=b"expect: 100-continue\r\n"))
        assert (await answered(c)).status == 100
        await c.send(body)
        assert (await answered(c)).status == 200


async def test_a_client_that_resets_in_mid_body_changes_nothing():
    async with unmoved() as s, client(s) as c:
        await c.send(request(body_of("a")[:10], length=100))
        await until(lambda: s.gateway.in_flight == 1)
        c.reset()
        await until(lambda: s.gateway.in_flight == 0)


async def test_a_half_closed_connection_is_closed_and_its_retry_attaches():
    async with stack() as s:
        await s.open("mine")
        s.engine.go.clear()
        async with client(s) as c:
            await c.send(request(body_of("a")))
            await until(lambda: s.engine.calls == 1)
            c.writer.write_eof()
            assert await c.answer() is None
        s.engine.go.set()
        answer = await chat(s, "a")
        assert (answer.status, answer.headers["x-rollout-ft-outcome"], s.engine.calls) in [(200, "attached", 1), (200, "replayed", 1)]


async def test_requests_sent_at_once_are_answered_in_order():
    async with stack() as s, client(s) as c:
        await s.open("mine")
        await c.send(request(method="GET", path="/health") + request(body_of("a")) + request(key="wrong") + request(body_of("a")))
        assert [(await answered(c)).status for _ in range(4)] == [200, 200, 401, 200]


async def test_a_flood_of_requests_on_one_connection_is_cut_off():
    async with unmoved() as s, client(s) as c:
        await c.send(request(method="GET", path="/health") * 5000)
        await c.closed()


async def test_noise_behind_a_request_ends_the_connection_and_not_the_turn():
    async with stack() as s:
        await s.open("mine")
        s.engine.go.clear()
        async with client(s) as c:
            await c.send(request(body_of("a")))
            await until(lambda: s.engine.calls == 1)
            await c.send(b"\x00\x00")
            answer = await c.answer()
            assert answer is None or answer.status == 400
        s.engine.go.set()
        assert ((await chat(s, "a")).status, s.engine.calls) == (200, 1)


async def test_a_connection_too_many_is_refused_and_the_others_stay():
    async with stack(max_connections=2) as s, client(s) as a, client(s) as b:
        for c in (a, b):
            await c.send(request(method="GET", path="/health"))
            assert (await answered(c)).status == 200
        async with client(s) as third:
            answer = await answered(third)
            assert (answer.status, "gateway.max_connections" in answer.error["message"], answer.headers["retry-after"]) == (503, True, "1")
        await a.send(request(method="GET", path="/health"))
        assert (await answered(a)).status == 200
        b.reset()
        await until(lambda: s.server.connections < 2)
        assert (await answered_by_new(s)).status == 200


async def answered_by_new(s: Stack) -> Answer:
    answer = await ask(s, request(method="GET", path="/health"))
    assert answer is not None
    return answer


async def test_a_client_that_does_not_read_its_reply_is_cut_off():
    async with stack(Config.model_validate({"gateway": QUICK, "model": {"context_tokens": 2**24}})) as s:
        for trial in ("mine", "other"):
            await s.open(trial)
        assert (await chat(s, "x" * 8_000_000)).status == 200
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", s.port))
            await loop.sock_sendall(sock, request(method="GET", path=f"/sessions/{SID}"))
            await until(lambda: bool(s.server.connections))
            await until(lambda: not s.server.connections)
        assert (await chat(s, "free", OTHER)).status == 200


# Keys.

ROUTES = [
    ("GET", "/sessions/{}"), ("DELETE", "/sessions/{}"), ("GET", "/sessions/{}/trajectory"), ("GET", "/sessions/{}/v1/models"),
    ("POST", "/sessions/{}/v1/chat/completions"), ("POST", "/sessions/{}/v1/messages"), ("POST", "/sessions/{}/generate"),
    ("POST", "/sessions/{}/v1/messages/count_tokens"),
]  # fmt: skip
OPERATORS = [
    ("POST", "/sessions"), ("GET", "/trials"), ("GET", "/trials/{}"), ("POST", "/trials/{}/restart"), ("POST", "/trials/{}/outcome"),
    ("GET", "/fleet"), ("POST", "/no/such/route"),
]  # fmt: skip
STRANGE = ["", "\xe9", "\xff\xfe", "rft-", "rft-~1-", "Bearer", "a" * 5000, "%00", "rft-mine~1-" + "0" * 48]


async def test_a_foreign_key_gets_the_same_bytes_whatever_there_is():
    async with unmoved() as s:
        for method, route in ROUTES:
            keys = [KEYS.session(OTHER), KEYS.session("mine~2"), KEYS.operator, KEYS.internal, *STRANGE]
            told = set[tuple[int, str, bytes]]()
            for sid in (SID, "nobody~1", "mine~2", "no-id"):
                for key in keys if sid == SID else keys[2:]:
                    answer = await asked_as(s, method, route.format(sid), key)
                    told.add((answer.status, str(sorted(answer.headers.items())), answer.body))
            assert [status for status, _, _ in told] == [401], (method, route, told)


async def test_a_sessions_key_is_no_operators_and_tells_nothing_of_trials():
    async with unmoved() as s:
        told = set[tuple[int, str, bytes]]()
        for method, route in OPERATORS:
            for trial in ("mine", "nobody"):
                for key in (KEYS.session(SID), KEYS.internal, *STRANGE):
                    answer = await asked_as(s, method, route.format(trial), key)
                    told.add((answer.status, str(sorted(answer.headers.items())), answer.body))
        assert [status for status, _, _ in told] == [401], told


async def test_two_sessions_cannot_be_named_at_once():
    async with unmoved() as s:
        named = request(body_of("a"), path="/v1/chat/completions", headers=f"x-session-id: {OTHER}\r\n".encode())
        assert (await refused(s, named)).status == 401


async def asked_as(s: Stack, method: str, path: str, key: str) -> Answer:
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nauthorization: Bearer ".encode()
        + key.encode("latin-1")
        + b"\r\n\r\n{}"
    )
    answer = await ask(s, head)
    assert answer is not None
    return answer

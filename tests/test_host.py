"""The host of sessions with a real checkpoint and an engine that waits to be told, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import orjson
import pytest
from conftest import ask, ask_tokens, assistant, user
from test_checkpoint_fakes import Cluster, run

from rollout_ft.config import Config, load
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import Reply, SessionHost
from rollout_ft.engine.http import OwnerHTTP
from rollout_ft.engine.parsers import Own, TextParser
from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.errors import EngineRefused, MatcherFailed, SessionClosed, SessionMoved
from rollout_ft.faultpoints import Inert
from rollout_ft.samples.trajectory import metadata, trajectory
from rollout_ft.session.known import MOST_KEYS
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Replay
from rollout_ft.telemetry.events import Events
from rollout_ft.testing.plain import STOP, PlainTemplate
from rollout_ft.types import JSON, Ended, Outcome, Served, SessionSpec, VersionSpan

SID = "t1~1"


@dataclass
class Call:
    rid: str
    input_json: bytes
    go: asyncio.Event = field(default_factory=asyncio.Event)
    says: str = "x"
    finish: str = "stop"
    logprob: float = -0.5
    aborted: bool = False


@dataclass
class Engine:
    """Says what it is told, when it is told; every call waits for `go`."""

    calls: list[Call] = field(default_factory=list[Call])
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        call = Call(rid, input_json)
        self.calls.append(call)
        async with self.arrived:
            self.arrived.notify_all()
        await call.go.wait()
        ids = [*call.says.encode(), *([STOP] if call.finish == "stop" else [])]
        yield Chunk(ids, [call.logprob] * len(ids), (VersionSpan("v0", 0, len(ids)),), call.finish)

    async def call(self, number: int) -> Call:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.calls) > number)
        return self.calls[number]

    async def abort(self, rid: str) -> None:
        for call in self.calls:
            call.aborted = call.aborted or call.rid == rid

    async def load(self) -> int | None:
        return 0

    async def alive(self) -> bool:
        return True

    async def ready(self) -> bool:
        return True

    async def info(self) -> EngineInfo:
        return EngineInfo("v0", "told")

    async def aclose(self) -> None:
        return None


@dataclass
class World:
    config: Config
    cluster: Cluster
    engine: Engine
    host: SessionHost

    def ask(self, request: TurnRequest) -> asyncio.Task[Reply]:
        return asyncio.create_task(self.host.serve(SID, request))

    async def answered(self, request: TurnRequest, says: str = "x", *, delivered: bool = True) -> Reply:
        number = len(self.engine.calls)
        task = self.ask(request)
        call = await self.engine.call(number)
        call.says = says
        call.go.set()
        reply = await task
        if delivered:
            self.host.report(SID, request.request_id)
        return reply

    def another_host(self) -> SessionHost:
        return host_of(self.config, self.engine, self.cluster)


def host_of(config: Config, engine: Engine, cluster: Cluster) -> SessionHost:
    async def lose(reason: str) -> None:
        raise AssertionError(reason)

    return SessionHost(
        "e0",
        config,
        PlainTemplate(),
        Driver(engine, config.engine),
        TextParser(config.model, Own(), None),
        cluster.mirror(),
        lose,
        Events("test"),
        Inert(),
    )


def played(play: Callable[[World], Awaitable[None]], **settings: object) -> None:
    """Runs a test with an open session."""

    async def main() -> None:
        known = {
            "engine.first_token_timeout_s": 10_000,
            "engine.token_timeout_s": 10_000,
            "engine.max_timeout_s": 10_000,
            "session.grace_s": 60,
        }
        config = load(None, {**known, **{k.replace("__", "."): v for k, v in settings.items()}})
        cluster, engine = Cluster("a", "b"), Engine()
        world = World(config, cluster, engine, host_of(config, engine, cluster))
        await world.host.open("t1", 1, 1, SessionSpec("t1"), False)
        try:
            await play(world)
        finally:
            await world.host.aclose()

    run(main())


def test_a_retry_while_the_first_runs_attaches_and_both_get_the_same_turn():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        second = w.ask(ask(user("a"), retry=True))
        await asyncio.sleep(1)
        call.go.set()
        one, two = await first, await second
        assert one.node is two.node
        assert (one.served, two.served, len(w.engine.calls)) == (Served.FRESH, Served.ATTACHED, 1)
        assert metadata(w.host.session(SID))["attached"] == 1

    played(play)


def test_one_of_two_callers_leaving_changes_nothing():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        second = w.ask(ask(user("a"), retry=True))
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.sleep(1000)
        assert not call.aborted
        call.go.set()
        assert (await second).served == Served.ATTACHED

    played(play)


def test_all_leaving_starts_the_grace_and_a_retry_within_it_attaches():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        first.cancel()
        await asyncio.sleep(59)
        assert not call.aborted
        second = w.ask(ask(user("a")))
        await asyncio.sleep(1000)
        assert not call.aborted
        call.go.set()
        assert (await second).served == Served.ATTACHED
        assert len(w.engine.calls) == 1

    played(play)


def test_after_the_grace_the_engine_stops_and_a_later_retry_generates():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        first.cancel()
        await asyncio.sleep(61)
        assert call.aborted
        reply = await w.answered(ask(user("a"), retry=True), "later")
        assert orjson.loads(reply.node.turn.reply)["content"] == "later"
        assert len(w.host.session(SID).tree.nodes) == 1

    played(play)


def test_a_reply_that_nobody_waited_for_is_served_to_the_retry_and_trained_only_then():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        first.cancel()
        await asyncio.sleep(1)
        call.go.set()
        await asyncio.sleep(1)
        session = w.host.session(SID)
        assert (trajectory(session)["paths"], metadata(session)["phantoms"]) == ([], 1)
        assert (await w.host.serve(SID, ask(user("a")))).served == Served.REPLAYED
        assert len(trajectory(session)["paths"]) == 1

    played(play)


def test_a_request_after_the_end_is_final_and_what_was_in_flight_is_aborted():
    async def play(w: World) -> None:
        await w.answered(ask(user("a")))
        flying = w.ask(ask(user("b")))
        call = await w.engine.call(1)
        await w.host.end(SID, Ended(Outcome.CANCELLED, None, "", 1))
        await asyncio.sleep(1)
        assert call.aborted
        with pytest.raises(Exception, match="held elsewhere"):
            await flying
        with pytest.raises(SessionClosed):
            await w.another_host().adopt(SID, 2)

    played(play)


def test_the_next_owner_knows_what_was_asked_delivered_and_built_upon():
    async def play(w: World) -> None:
        history = [user("a")]
        for i in range(3):
            await w.answered(ask(*history), f"r{i}")
            history += [assistant(f"r{i}"), user(f"u{i}")]
        await w.answered(ask(user("lost")), "phantom", delivered=False)
        before = w.host.session(SID)
        await w.host._get(SID).save_evidence()
        after = await w.another_host().adopt(SID, 2)
        one, two = metadata(before), metadata(after)
        assert one == two
        assert [p["evidence"] for p in trajectory(after)["paths"]] == ["delivered", "uncertain"]

    played(play)


def test_a_session_in_tokens_and_messages_is_the_same_for_its_next_owner():
    async def play(w: World) -> None:
        first = await w.answered(ask_tokens([1, 2, 3]), "xy")
        second = await w.answered(ask_tokens([1, 2, 3, *b"xy", 7]), "z")
        assert (second.node.parent, second.node.turn.trim) == (first.node, 1)
        assert w.engine.calls[1].input_json == b"1,2,3,120,121,7"
        after = await w.another_host().adopt(SID, 2)
        assert after.tree.nodes[second.node.turn.key].token_digest == second.node.token_digest
        (only,) = trajectory(after)["paths"]
        assert only["token_ids"].tolist() == [1, 2, 3, *b"xy", 7, *b"z", STOP]

    played(play)


def test_a_logprob_that_is_no_number_never_reaches_the_store():
    async def play(w: World) -> None:
        task = w.ask(ask(user("a")))
        for number in range(2):
            call = await w.engine.call(number)
            call.logprob = float("nan")
            call.go.set()
        with pytest.raises(EngineRefused):
            await task
        assert not w.host.session(SID).tree.nodes

    played(play, engine__max_generations_per_turn=2)


def cannot_read_replies(message: JSON) -> bytes:
    if message["role"] == "assistant":
        raise ValueError("an assistant")
    return message["content"].encode()


def test_a_matcher_that_cannot_read_a_reply_fails_before_the_commit():
    async def play(w: World) -> None:
        session = w.host.session(SID)
        with pytest.raises(MatcherFailed, match="an assistant"):
            await w.answered(ask(user("a"), digests=session.digests(b"", [user("a")])))
        assert not session.tree.nodes
        after = await w.another_host().adopt(SID, 2)
        assert not after.tree.nodes

    played(play, session__matcher="test_host:cannot_read_replies")


def test_a_reply_that_no_matcher_could_read_taints_the_attempt():
    async def play(w: World) -> None:
        await w.host.unreadable(SID)
        after = await w.another_host().adopt(SID, 2)
        assert w.host.session(SID).unanswered() == after.unanswered() == ["unreadable"]

    played(play)


# Over the wire between gateway and owner.


@dataclass
class Asked:
    """One exchange with a gateway, written by hand."""

    path: str
    content: bytes
    request_id: bytes = b"r1"
    status: int = 0
    answer: bytes = b""
    answer_headers: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])

    def headers(self) -> dict[bytes, bytes]:
        return {b"x-request-id": self.request_id}

    async def body(self, limit: int) -> bytes:
        return self.content

    async def disconnected(self) -> None:
        await asyncio.Event().wait()

    async def reply(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None, content: bytes = b"") -> None:
        self.status, self.answer, self.answer_headers = status, body, dict(headers or [])


def fails(message: JSON) -> bytes:
    raise ValueError("on purpose")


def test_a_matcher_that_raises_is_a_500_that_names_it_and_is_not_retried():
    async def play(w: World) -> None:
        door = OwnerHTTP(w.host, w.config, PlainTemplate())
        x = Asked(f"/turn/{SID}/chat", orjson.dumps({"messages": [user("a")]}))
        await door.handle(x)  # type: ignore[arg-type]
        error = orjson.loads(x.answer)["error"]
        assert (x.status, error["code"], x.answer_headers[b"x-should-retry"]) == (500, "matcher_failed", b"false")
        assert "test_host:fails raised ValueError: on purpose" in error["message"]
        assert w.host.session(SID).unanswered() == ["unreadable"]

    played(play, session__matcher="test_host:fails")


def test_a_request_over_the_wire_is_matched_by_the_sessions_matcher():
    async def play(w: World) -> None:
        door = OwnerHTTP(w.host, w.config, PlainTemplate())
        history = [user("a")]
        for number in range(3):
            x = Asked(f"/turn/{SID}/chat", orjson.dumps({"messages": history}), b"r%d" % number)
            task = asyncio.create_task(door.handle(x))  # type: ignore[arg-type]
            (await w.engine.call(number)).go.set()
            await task
            said = orjson.loads(x.answer)["choices"][0]["message"]
            history += [{**said, "content": f" {said['content']} "}, user(f"{number}")]
        session = w.host.session(SID)
        assert [n.turn.depth for n in session.tree.nodes.values()] == [1, 2, 3]
        assert metadata(session)["leniencies"] == {"whitespace": 2}

    played(play)


def test_a_parser_that_fails_costs_a_turn_its_tool_calls_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    async def fails(*_: object, **__: object) -> None:
        raise OSError("the parser's process is gone")

    async def play(w: World) -> None:
        monkeypatch.setattr(TextParser, "parse", fails)
        reply = await w.answered(ask(user("a")), "said")
        assert orjson.loads(reply.node.turn.reply) == {"role": "assistant", "content": "said"}
        assert (len(w.engine.calls), metadata(w.host.session(SID))["unparsed"]) == (1, 1)

    played(play)


def test_a_replay_whose_caller_leaves_is_known_here_as_it_is_in_the_store():
    async def play(w: World) -> None:
        one, two = await w.answered(ask(user("a")), "x"), await w.answered(ask(user("b")), "y")
        await w.host.open("t1", 2, 2, None, True)
        sid = "t1~2"
        caller = asyncio.create_task(w.host.serve(sid, ask(user("a"))))
        await asyncio.sleep(0)  # its commit has begun
        caller.cancel()
        await asyncio.sleep(1)
        await w.host.serve(sid, ask(user("b")))
        live = w.host.session(sid)
        stored = await w.another_host().adopt(sid, 3)
        assert dict(live.evidence.asked) == dict(stored.evidence.asked) == {one.node.turn.key: 3, two.node.turn.key: 4}

    played(play)


def test_the_next_owner_knows_the_idempotency_keys_of_all_who_got_a_turn():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a"), idempotency_key="one"))
        call = await w.engine.call(0)
        attached = w.ask(ask(user("a"), idempotency_key="two", retry=False))
        await asyncio.sleep(1)
        call.go.set()
        assert (await first).node is (await attached).node
        phantom = await w.answered(ask(user("b")), "y", delivered=False)
        assert (await w.host.serve(SID, ask(user("b"), idempotency_key="three"))).served == Served.REPLAYED
        session = await w.another_host().adopt(SID, 2)
        for key, text, node in (("one", "a", (await first).node), ("two", "a", (await first).node), ("three", "b", phantom.node)):
            decision = session.decide(ask(user(text), idempotency_key=key))
            assert isinstance(decision, Replay)
            assert decision.node.turn.key == node.turn.key

    played(play, session__on_concurrent="attach")


def test_a_failure_is_recorded_once_however_often_and_by_however_many_it_is_met():
    async def play(w: World) -> None:
        request = ask(user("a"))
        await asyncio.gather(*(w.host.failed(SID, request) for _ in range(5)))
        await w.host.failed(SID, request)
        await w.answered(ask(user("b")))
        after = await w.another_host().adopt(SID, 2)
        assert list(after.evidence.failed.values()) == [True]
        assert len(await w.cluster.stores["a"].read("t1")) == 3, "opened, failed, one turn"

    played(play)


def test_an_adoption_that_is_repeated_leaves_the_session_and_what_runs_in_it_alone():
    async def play(w: World) -> None:
        running = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        session = w.host.session(SID)
        assert await w.host.adopt(SID, 1) is session
        call.go.set()
        assert (await running).served == Served.FRESH

    played(play)


def test_more_idempotency_keys_than_are_kept_do_not_make_the_log_grow():
    async def play(w: World) -> None:
        reply = await w.answered(ask(user("a")), delivered=False)
        for i in range(MOST_KEYS + 10):
            await w.host.serve(SID, ask(user("a"), idempotency_key=f"k{i}"))
        assert (await w.host.serve(SID, ask(user("a"), idempotency_key="one more"))).node is reply.node
        assert len(await w.cluster.stores["a"].read("t1")) <= MOST_KEYS + 3

    played(play, session__max_vain_replays=10**6)


def test_a_turn_that_an_engine_fails_again_and_again_while_it_serves_others_is_handed_to_another():
    async def play(w: World) -> None:
        async def fails(rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
            if sampling["max_new_tokens"]:
                raise EngineRefused(500, "out of memory")
            yield Chunk([], [], (), "length")

        w.engine.generate = fails
        with pytest.raises(SessionMoved):
            await w.ask(ask(user("a")))
        assert w.host.sessions() == {}
        assert not w.host._driver.lost
        adopted = await w.another_host().adopt(SID, 2)
        assert [p.generations for p in adopted.partials.values()] == [w.config.engine.dead_after]

    played(play, engine__max_generations_per_turn=9)

"""A replay that leaves its record at a host, with a real checkpoint: what the store, the events and the client are told."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from conftest import ask, assistant, user
from test_host import Asked, World, played

from rollout_ft.cli.report import figures, read, tables, write
from rollout_ft.cli.transcript import text, transcript
from rollout_ft.engine.host import Reply
from rollout_ft.engine.http import OwnerHTTP
from rollout_ft.errors import SessionMoved, TrialFault
from rollout_ft.samples.summary import summary
from rollout_ft.samples.trajectory import metadata, trajectory
from rollout_ft.session.entries import decode_entry
from rollout_ft.telemetry.divergences import divergences, rows_diverged
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import JSON, Served

SECOND = "t1~2"
HISTORY = [user("a"), assistant("r0"), user("at 10:00:00"), assistant("r1"), user("end")]
AGAIN = [user("a"), assistant("r0"), user("at 11:11:11"), assistant("r1"), user("end")]


async def recorded(w: World) -> None:
    """Three turns, and an agent that begins again."""
    for turn in range(3):
        await w.answered(ask(*HISTORY[: 2 * turn + 1]), f"r{turn}")
    await w.host.retire("t1~1")
    await w.host.open("t1", 2, 1, None, True)


def of_second(w: World, *messages: JSON, **fields: Any) -> asyncio.Task[Reply]:
    digests = w.host.session(SECOND).digests(b"", list(messages))
    return asyncio.create_task(w.host.serve(SECOND, ask(*messages, digests=digests, **fields)))


async def generated(w: World, *messages: JSON, says: str = "x") -> Reply:
    number = len(w.engine.calls)
    task = of_second(w, *messages)
    call = await w.engine.call(number)
    call.says = says
    call.go.set()
    return await task


def diverged(w: World) -> list[JSON]:
    return [event for event in w.host._events.take() if event["event"] == "trial.diverged"]


def test_a_branch_is_told_once_to_the_store_and_once_to_who_reads_events():
    async def play(w: World) -> None:
        await recorded(w)
        await of_second(w, *AGAIN[:1])
        one, two = of_second(w, *AGAIN[:3]), of_second(w, *AGAIN[:3], retry=True)
        (await w.engine.call(3)).go.set()
        assert {(await one).served, (await two).served} == {Served.FRESH, Served.ATTACHED}
        (event,) = diverged(w)
        assert {k: event[k] for k in ("trial", "attempt", "turn", "message", "role", "where", "recorded", "sent", "served")} == {
            "trial": "t1", "attempt": 2, "turn": 2, "message": 2, "role": "user", "where": "content", "recorded": "at 10:00:00",
            "sent": "at 11:11:11", "served": False,
        }  # fmt: skip
        after = await w.another_host().adopt(SECOND, 2)
        assert metadata(after)["divergences"] == 1
        assert summary(after)["metadata"]["first_divergence"]["sent"] == "at 11:11:11"

    played(play)


def test_a_replay_that_must_not_diverge_ends_with_a_final_error_that_says_where():
    async def play(w: World) -> None:
        await recorded(w)
        door = OwnerHTTP(w.host, w.config, PlainTemplate())
        x = Asked(f"/turn/{SECOND}/chat", orjson.dumps({"messages": [user("b")]}), b"other")
        await door.handle(x)  # type: ignore[arg-type]
        error = orjson.loads(x.answer)["error"]
        assert (x.status, error["code"], x.answer_headers[b"x-should-retry"]) == (500, "replay_diverged", b"false")
        assert "turn 1: message 0 (user), content: recorded 'a', sent 'b'" in error["message"]
        assert "POST /trials/t1/restart" in error["message"]
        after = await w.another_host().adopt(SECOND, 2)
        assert after.fault == w.host._get(SECOND).session.fault != ""
        with pytest.raises(TrialFault, match="sent 'b'"):
            after.decide(ask(user("a")))

    played(play, trial__on_divergence="fail")


@pytest.mark.parametrize(("settings", "events"), [({"trial__on_divergence": "serve"}, 1), ({"session__normalizers": ["timestamps"]}, 0)])
def test_what_is_served_from_the_record_is_known_to_the_next_owner(settings: Any, events: int):
    async def play(w: World) -> None:
        await recorded(w)
        assert (await of_second(w, *AGAIN[:1])).served is Served.REPLAYED
        assert (await of_second(w, *AGAIN[:3])).served is Served.REPLAYED
        assert len(diverged(w)) == events
        w.host = w.another_host()
        await w.host.adopt(SECOND, 2)
        assert (await of_second(w, *AGAIN)).served is Served.REPLAYED
        more = [*AGAIN, assistant("r2"), user("more")]
        reply = await generated(w, *more)
        assert reply.node.turn.depth == 4
        assert diverged(w) == []
        (only,) = trajectory(w.host.session(SECOND))["paths"]
        said = bytes(i for i in only["token_ids"].tolist() if i < 256)
        assert b"10:00:00" in said
        assert b"11:11:11" not in said

    played(play, **settings)


def test_an_owner_that_was_replaced_meanwhile_begins_nothing():
    async def play(w: World) -> None:
        await recorded(w)
        other = w.another_host()
        await other.adopt(SECOND, 2)
        with pytest.raises(SessionMoved):
            await of_second(w, user("b"))
        assert len(w.engine.calls) == 3
        assert metadata(await other.adopt(SECOND, 2))["divergences"] == 0

    played(play)


def test_a_trial_that_is_shown_says_where_its_replay_left_the_record():
    async def play(w: World) -> None:
        await recorded(w)
        await of_second(w, *AGAIN[:1])
        await generated(w, *AGAIN[:3], says="else")
        entries = [decode_entry(e.kind, e.payload) for e in await w.cluster.mirror().read("t1")]
        shown = transcript(entries)
        assert [turn["how"] for turn in shown[1]["turns"]] == ["replayed", "diverged", "generated"]
        words = "  the replay left the record: turn 2: message 2 (user), content: recorded 'at 10:00:00', sent 'at 11:11:11'"
        assert words in list(text(shown))

    played(play)


EVENT = {
    "event": "trial.diverged", "trial": "q1", "attempt": 2, "turn": 3, "message": 5, "role": "tool", "where": "content",
    "recorded": "[at] <b>1</b>", "sent": "2", "served": False,
}  # fmt: skip


def test_the_report_has_the_first_divergence_of_each_attempt_and_counts_the_others():
    events = [EVENT, {**EVENT, "turn": 4}, {"event": "engine.up"}, {**EVENT, "attempt": 3, "message": -1, "where": "tools", "role": ""}]
    met = divergences(events)
    assert [(d["attempt"], d["turn"], d["more"]) for d in met] == [(2, 3, 1), (3, 3, 0)]
    assert rows_diverged(met) == [
        ["q1", "2", "3 and 1 more", "5 (tool)", "content", "[at] <b>1</b>", "2"],
        ["q1", "3", "3", "", "tools", "[at] <b>1</b>", "2"],
    ]
    assert rows_diverged(met * 11)[-1][0] == "and 2 more attempts"


def test_rollout_ft_report_reads_them_from_the_events(tmp_path: Any):
    line = {"trial_id": "q1", "task_id": "q1", "outcome": "completed", "reward": 1.0, "cause": "", "attempts": 2, "turns": 4}
    line |= {"faults_survived": 1, "tokens_generated": 9, "tokens_reused": 0, "tokens_wasted": 0, "seconds": 1.0}
    (tmp_path / "trials.jsonl").write_bytes(orjson.dumps(line) + b"\n")
    before = tables(figures(read([tmp_path])))
    assert "left their record" not in write(read([tmp_path])).read_text()
    (tmp_path / "events.jsonl").write_bytes(orjson.dumps(EVENT) + b"\n")
    found = figures(read([tmp_path]))
    assert found["diverged"][str(tmp_path)][0]["where"] == "content"
    made = tables(found)
    assert len(made) == len(before) + 1
    assert list(made[-1].columns[5].cells) == ["\\[at] <b>1</b>"]
    page = write(read([tmp_path])).read_text()
    assert "left their record" in page
    assert "&lt;b&gt;1" in page

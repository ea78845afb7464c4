"""The status page of a real run in a real browser, through faults and with thousands of sessions: `make test-page`.

Runs in an environment of its own; the run and all behind it run in the project's. The checks share one run and go on where the one
before them stopped, as somebody does who looks at it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from browser import Stage, browser, shoot, stage
from playwright.sync_api import Browser, Page, expect

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
WIDTHS = (1280, 800, 380)
PATIENCE_MS = 60_000
SESSIONS = 5000
WATCHED_S = 20
MAX_ANSWER_BYTES = 150_000
MAX_NODES = 3000
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run() -> Iterator[Stage]:
    with stage() as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as made:
        yield made


class Seen:
    """What the browser said and asked for while a page was looked at."""

    def __init__(self, page: Page):
        self.said: list[str] = []
        self.asked: list[str] = []
        self.sizes: list[int] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))

    @property
    def looks(self) -> int:
        return sum("/overview" in url for url in self.asked)


@pytest.fixture
def page(run: Stage, chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    made = context.new_page()
    made.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield made
    context.close()


@pytest.fixture
def seen(run: Stage, page: Page) -> Iterator[Seen]:
    """Nothing may have gone wrong unseen, and nobody but the gateway may have been asked."""
    made = Seen(page)
    yield made
    assert made.said == []
    assert [url for url in made.asked if not url.startswith(run.url)] == []
    assert not any(run.key in url for url in made.asked)


def opened(page: Page, run: Stage, **more: str) -> None:
    page.goto(run.link(**more))
    expect(page.locator("#one h2" if more else "#problems li").first).to_be_visible()


def test_the_page_asks_for_the_key_and_refuses_another(run: Stage, page: Page) -> None:
    page.goto(run.url)
    expect(page.get_by_label("Key")).to_be_focused()
    shoot(page, "door")
    page.keyboard.type("not-the-key")
    page.keyboard.press("Enter")
    expect(page.locator("#refused")).to_contain_text("does not know this key")
    expect(page.locator("#main")).to_be_hidden()
    page.keyboard.type(run.key)
    page.keyboard.press("Enter")
    expect(page.locator("#headline")).to_contain_text("serves")
    assert page.evaluate("Object.values(sessionStorage)") == [run.key]
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    expect(page.locator("#headline")).to_contain_text("serves")


def test_a_key_in_the_links_fragment_is_taken_out_of_the_address(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    assert page.url == f"{run.url}/status"
    assert page.evaluate("history.length") <= 2
    expect(page).to_have_title("page · rollout_ft" if page.locator("#problems li.good").count() else page.title())


def test_a_trial_that_there_is_not_is_said_to_be_none_and_the_run_is_a_link_away(run: Stage, page: Page) -> None:
    page.goto(run.link(trial="nobody"))
    expect(page.locator("#one-failed")).to_contain_text("unknown_trial")
    expect(page.locator("#one-told")).to_be_hidden()
    expect(page.locator("#whole")).to_be_hidden()
    shoot(page, "no-such-trial")
    page.get_by_role("link", name="All of the run").click()
    expect(page.locator("#problems li").first).to_be_visible()
    expect(page.locator("#one")).to_be_hidden()


def test_nothing_is_said_of_a_run_that_has_not_answered_yet(run: Stage, page: Page) -> None:
    page.route("**/overview*", lambda route: route.fulfill(status=503, json={"error": {"message": "it starts", "code": "no_supervisor"}}))
    page.goto(run.link())
    expect(page.locator("#broken")).to_contain_text("it starts")
    expect(page.locator("#whole")).to_be_hidden()
    page.unroute("**/overview*")
    expect(page.locator("#problems li").first).to_be_visible()


def test_what_agents_and_trainers_say_is_text(run: Stage, page: Page, seen: Seen) -> None:
    run.do("play", prefix="calm", count=6, turns=4, tokens=60)
    run.do("open", prefix="idle", count=30)
    run.do("end", trial_id="idle-00003", outcome="infra_exhausted", reward=None, cause=f"{HOSTILE}`{HOSTILE}`")
    run.do("restart", trial_id="idle-00007")
    opened(page, run)
    expect(page.locator("#trials")).to_contain_text(HOSTILE)
    assert page.locator("#main img, #main script").count() == 0
    page.get_by_role("link", name="idle-00003").click()
    expect(page.locator("#one-what")).to_contain_text(HOSTILE)
    assert page.locator("#main img, #main script").count() == 0
    page.go_back()
    expect(page.locator("#whole")).to_be_visible()


def test_a_lost_trial_comes_before_one_that_runs_and_says_what_to_do(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    rows = page.locator("#trials tbody tr")
    lost = rows.filter(has_text="idle-00003")
    expect(lost).to_contain_text("lost")
    expect(lost).to_contain_text("trial.max_restarts")
    order = rows.locator("td.id a").all_inner_texts()
    assert order.index("idle-00003") < order.index("idle-00007") < order.index("idle-00009")


def test_filters_and_search_ask_for_what_they_name(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    page.get_by_label("Search").fill("IDLE-0000")
    expect(page.locator("#place")).to_have_text("1 to 10 of 10")
    page.get_by_label("Outcome").select_option("infra_exhausted")
    expect(page.locator("#place")).to_have_text("1 to 1 of 1")
    page.get_by_label("Search").fill("nothing has this name")
    expect(page.locator("#trials")).to_contain_text("No trial matches")


def test_a_killed_engine_is_seen_recovered_from_and_said_in_the_timeline(run: Stage, page: Page, seen: Seen) -> None:
    run.do("play", prefix="long", count=9, turns=60, tokens=160, ended=False)
    opened(page, run)
    expect(page.locator("#turns tbody tr").first).to_be_visible()
    engine = page.locator("#turns tbody tr").first.locator("td").last.inner_text()
    run.do("kill", engine=engine)
    expect(page.locator("#problems li").filter(has_text=engine)).to_contain_text("Do:")
    recovery = page.locator("#recoveries tbody tr").first
    expect(recovery).to_contain_text("killed by SIGKILL")
    shoot(page, "killed-1280")
    expect(page.locator("#events")).to_contain_text("session.resumed")
    moved = page.locator("#events li").filter(has_text="session.resumed").first.inner_text()
    trial = moved.split("session ")[1].split("~")[0]
    page.goto(run.link(trial=trial))
    for kind in ("fault", "moved", "resumed"):
        expect(page.locator(f"#one-moments li.{kind}").first).to_be_visible()
    expect(page.locator("#one-moments")).to_contain_text(engine)
    page.get_by_label("Only faults").check()
    expect(page.locator("#one-moments li.turn")).to_have_count(0)
    run.do("whole")
    page.get_by_role("link", name="All of the run").click()
    expect(recovery.locator("td").last).to_contain_text("after")
    expect(page.locator("#problems")).to_contain_text("serves again")


def test_a_frozen_engine_is_seen_and_its_turns_go_on(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    busy = page.locator("#turns tbody tr").first.locator("td").last.inner_text()
    run.do("freeze", engine=busy)
    expect(page.locator("#recoveries tbody tr").first).to_contain_text("stalled")
    shoot(page, "frozen-1280")
    run.do("whole")


def test_a_pause_is_said_with_what_waits_and_what_ends_it(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    run.do("pause")
    expect(page.locator("#problems")).to_contain_text("Every turn waits for the trainer: paused")
    expect(page.locator("#problems")).to_contain_text("/fleet/resume")
    expect(page.locator("#turns")).to_contain_text("the trainer (paused)")
    expect(page.locator("#trials tbody tr").first).to_contain_text("waits")
    run.do("resume")
    expect(page.locator("#problems")).not_to_contain_text("paused")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["whole", "one"])
def test_it_is_legible_reachable_and_as_wide_as_its_window(run: Stage, page: Page, seen: Seen, scheme: Any, view: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    opened(page, run, **({"trial": "long-0001"} if view == "one" else {}))
    page.get_by_role("button", name="Hold still").click()
    page.evaluate(AXE)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        shoot(page, f"{view}-{scheme}-{width}")
        shoot(page, f"{view}-{scheme}-{width}-top", whole=False)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wanted = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}
        found = page.evaluate("async (wanted) => (await axe.run(document, wanted)).violations", wanted)
        assert [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found] == []


def test_every_control_is_reached_by_keyboard_and_seen_to_be(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    page.get_by_role("button", name="Hold still").click()
    controls = page.evaluate(
        "[...document.querySelectorAll('a[href],button,input,select')].filter(e => e.checkVisibility() && !e.disabled).length"
    )
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(controls + 5):
        page.keyboard.press("Tab")
        told = page.evaluate(
            "(() => { const e = document.activeElement; if (e === document.body) return null;"
            " if (!e.dataset.n) e.dataset.n = String(Math.random()); return [e.dataset.n, getComputedStyle(e).outlineStyle]; })()"
        )
        if told is not None:
            reached.add(told[0])
            assert told[1] != "none"
    assert len(reached) >= controls


def test_focus_and_scrolling_stay_where_they_are_when_the_page_looks_again(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    link = page.locator("#trials tbody tr a").first
    link.focus()
    name, looks = link.inner_text(), seen.looks
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while seen.looks < looks + 3 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert page.evaluate("document.activeElement.textContent") == name


def test_a_hidden_tab_and_one_that_is_held_still_ask_for_nothing(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    page.get_by_role("button", name="Hold still").click()
    page.wait_for_load_state("networkidle")
    looks = seen.looks
    page.wait_for_timeout(5000)
    assert seen.looks == looks
    page.get_by_role("button", name="Go on").click()
    page.wait_for_timeout(500)
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_load_state("networkidle")
    looks = seen.looks
    page.wait_for_timeout(6000)
    assert seen.looks == looks
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(1500)
    assert seen.looks > looks


DRAW_TWICE = """async () => {
  const { Table } = await import(new URL("status/dom.js", location));
  const home = document.createElement("div");
  const table = new Table(home, "t", [["a", ""], ["b", ""]], "none");
  const link = (title, second) => ({ text: "x", href: "#x", title, second });
  table.update([["k", [link("one", "first"), "1"]], ["k", ["y", "2"]], ["k", ["z", "3"]]]);
  const kept = home.querySelector("a");
  table.update([["k", [link("two", "second"), "4"]], ["k", ["y", "5"]]]);
  const rows = [...home.querySelectorAll("tbody tr")].map((tr) => tr.textContent);
  return { rows, title: kept.title, same: kept === home.querySelector("a") };
}"""


def test_rows_of_one_key_are_distinct_and_go_and_a_kept_link_is_brought_up_to_date(run: Stage, page: Page, seen: Seen) -> None:
    opened(page, run)
    assert page.evaluate(DRAW_TWICE) == {"rows": ["xsecond4", "y5"], "title": "two", "same": True}


def test_a_silent_store_is_something_that_is_wrong(run: Stage, page: Page) -> None:
    def silent(route: Any) -> None:
        told = route.fetch().json()
        route.fulfill(json={**told, "problems": [], "store_silent": "the checkpoint store does not answer: in time"})

    page.route("**/overview*", silent)
    opened(page, run)
    expect(page.locator("#headline")).to_contain_text("1 thing to look at")
    expect(page.locator("#headline")).to_have_class("bad")
    expect(page).to_have_title("(1) page · rollout_ft")


def test_a_run_that_counts_nothing_does_not_say_that_there_was_nothing(run: Stage, page: Page) -> None:
    def uncounted(route: Any) -> None:
        told = route.fetch().json()
        route.fulfill(json={**told, "fleet": {**told["fleet"], "metrics": {}}})

    page.route("**/overview*", uncounted)
    opened(page, run)
    expect(page.locator("#tokens-words")).to_have_text("Tokens are not counted (telemetry.metrics).")


def test_a_run_that_does_not_answer_is_told_of_and_asked_less_and_less(run: Stage, page: Page) -> None:
    opened(page, run)
    tries: list[float] = []

    def refuse(route: Any) -> None:
        tries.append(time.monotonic())
        route.abort()

    page.route("**/overview*", refuse)
    expect(page.locator("#broken")).to_contain_text("does not answer")
    expect(page.locator("#broken")).to_contain_text("old")
    expect(page.locator("#trials tbody tr").first).to_be_visible()
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while len(tries) < 4 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[-1] > 1.5 * pauses[0]
    shoot(page, "silent")
    page.unroute("**/overview*")
    expect(page.locator("#broken")).to_be_hidden()


def test_five_thousand_sessions_are_as_quick_to_look_at(run: Stage, page: Page, seen: Seen) -> None:
    run.do("open", prefix="many", count=SESSIONS)
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(len(answer.body())) if "/overview" in answer.url else None)
    opened(page, run)
    expect(page.locator("#place")).to_contain_text("of 5,0")
    page.get_by_role("button", name="Hold still").click()
    held = cost(run)
    page.get_by_role("button", name="Go on").click()
    page.wait_for_timeout(500)
    looks = seen.looks
    watched = cost(run)
    page.wait_for_timeout(500)  # what was asked meanwhile is heard of now
    polls = seen.looks - looks
    assert polls >= 5
    assert max(sizes) < MAX_ANSWER_BYTES
    assert page.evaluate("document.querySelectorAll('*').length") < MAX_NODES
    page.get_by_role("button", name="More").click()
    expect(page.locator("#place")).to_contain_text("26 to 50")
    page.get_by_label("Search").fill("many-04321")
    expect(page.locator("#place")).to_have_text("1 to 1 of 1")
    shoot(page, "many-1280")
    added = {name: round((watched["cpu_ms"][name] - held["cpu_ms"][name]) / polls, 1) for name in held["cpu_ms"]}
    print("\n" + json.dumps({"sessions": SESSIONS, "polls": polls, "cpu_ms_per_poll": added, "answer_bytes": max(sizes),
                             "held": held["turn_ms"], "watched": watched["turn_ms"]}))  # fmt: skip


def cost(run: Stage) -> dict[str, Any]:
    """CPU of each actor, and how long turns of one token take, over some seconds."""
    before = run.do("cpu")
    turn_ms = run.do("turns", seconds=WATCHED_S)
    after = run.do("cpu")
    return {
        "cpu_ms": {name.split("/")[-2] if "/" in name else name: 1000 * (after[name] - before[name]) for name in before},
        "turn_ms": turn_ms,
    }

"""The routes by which a run is looked at: the page's files, and the parameters of lists."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gateway import KEYS, stage

import rollout_ft.gateway
from rollout_ft.errors import BadRequest
from rollout_ft.fleet.listing import Query
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.gateway.watching import EventsQuery, OverviewQuery, TrialsQuery, asked, parameters

PAGE = Path(rollout_ft.gateway.__file__).parent / "page"
FILES = {path.name: path.read_text() for path in PAGE.iterdir()}
CURSOR = "0123abcd-17"


async def test_the_page_is_served_without_a_key_and_may_run_nothing_but_its_own_files():
    async with stage() as s:
        for name in ("", *(f"/{name}" for name in FILES if name != "index.html")):
            answer = await s.ask("GET", f"/status{name}", key="")
            assert answer.status == 200, name
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
        assert (await s.ask("GET", "/status", key="")).body == FILES["index.html"].encode()
        assert s.supervisor.asked == []


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
@pytest.mark.parametrize("path", ["/", "/status/", "/status/index.html"])
async def test_where_the_pages_links_would_not_lead_to_its_files_it_is_a_redirect(path: str, prefix: str):
    async with stage() as s, aiohttp.ClientSession() as http, http.get(s.url + path, allow_redirects=False) as answer:
        assert answer.status == 303
        assert urljoin(f"http://g{prefix}{path}", answer.headers["location"]) == f"http://g{prefix}/status"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fgateway.py", "watching.py", "__init__.py"])
async def test_no_other_file_can_be_had(name: str):
    async with stage() as s:
        answer = await s.ask("GET", f"/status/{name}", key="")
        assert (answer.status, answer.error["code"]) in [(404, "unknown_route"), (401, "invalid_api_key")]


def test_the_page_needs_nothing_from_anywhere_else():
    for name, text in FILES.items():
        links = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r'xmlns="[^"]+"', "", text))
        assert not links, name


def test_what_comes_from_a_run_is_never_more_than_text():
    for name, text in FILES.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text), name
        assert not re.search(r"\son\w+=|style=|<style|javascript:", text), name


async def test_the_key_is_taken_from_a_header_alone():
    async with stage() as s:
        for path in ("/overview", "/events", "/trials", "/trials/t1/timeline"):
            assert (await s.ask("GET", f"{path}?key={KEYS.operator}&operator_key={KEYS.operator}", key="")).status == 401


async def test_a_list_without_parameters_is_whole_and_with_them_says_where_it_goes_on():
    async with stage() as s:
        answer = await s.operate("GET", "/trials")
        assert (orjson.loads(answer.body), answer.headers["x-rollout-ft-total"]) == ([{"did": "trials"}], "7")
        assert "x-rollout-ft-next" not in answer.headers
        answer = await s.operate("GET", "/trials?state=held&group_id=g%201&task_id=&outcome=env_failed&order=attention&after=3~t0&limit=5")
        assert answer.headers["x-rollout-ft-next"] == "0~t1"
        assert s.supervisor.queries == [Query(), Query("held", "env_failed", "g 1", "", "", True, "3~t0", 5)]


async def test_the_other_looks_pass_on_what_they_were_asked():
    async with stage() as s:
        await s.operate("GET", f"/overview?since={CURSOR}&events=7&turns=3&search=q")
        await s.operate("GET", f"/events?since={CURSOR}&limit=9")
        await s.operate("GET", "/trials/t1/timeline")
        assert s.supervisor.asked == [("overview", CURSOR, 7, 3), ("events", CURSOR, 9), ("timeline", "t1")]
        assert s.supervisor.queries == [Query(search="q", attention=True, limit=50)]


@pytest.mark.parametrize(("path", "named"), [
    ("/trials?limit=0", "limit"), ("/trials?limit=x", "limit"), ("/trials?limit=10001", "limit"), ("/trials?state=happy", "state"),
    ("/trials?outcome=won", "outcome"), ("/trials?order=random", "order"), ("/trials?after=t1", "after"), ("/trials?after=0~../x", "after"),
    ("/trials?group=g1", "group"), ("/trials?limit=1&limit=2", "limit"), (f"/trials?search={'x' * 257}", "search"),
    ("/overview?limit=501", "limit"), ("/overview?since=1", "since"), ("/overview?turns=-1", "turns"), ("/events?since=zz-1", "since"),
    ("/events?limit=2001", "limit"), ("/events?limit=1.5", "limit"), ("/events?%00=1", "\0"),
])  # fmt: skip
async def test_a_bad_parameter_is_a_400_that_names_it(path: str, named: str):
    async with stage() as s:
        answer = await s.operate("GET", path)
        assert (answer.status, answer.error["param"]) == (400, named)
        assert s.supervisor.asked == []


async def test_a_parameter_that_there_is_not_is_answered_with_those_there_are():
    async with stage() as s:
        assert "group_id" in (await s.operate("GET", "/trials?group=g1")).error["message"]


@given(st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_query_is_read_or_refused(given_query: bytes):
    with contextlib.suppress(BadRequest):
        asked(Exchange({"query_string": given_query}, None, None), TrialsQuery)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [TrialsQuery, OverviewQuery, EventsQuery])
def test_every_parameter_is_in_the_document(model: type):
    told = parameters(model)
    assert [each["name"] for each in told] == list(model.model_fields)
    assert all(each["in"] == "query" and "null" not in orjson.dumps(each["schema"]).decode() for each in told)

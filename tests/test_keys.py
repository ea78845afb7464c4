"""Who may do what: P8."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.gateway.keys import Keys, session_of
from rollout_ft.types import session_id

few = settings(max_examples=50, deadline=None)

KEYS = Keys("a secret")
SESSIONS = st.builds(session_id, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True), st.integers(1, 99))


@few
@given(SESSIONS)
def test_a_sessions_key_opens_it_and_names_it(sid: str):
    key = KEYS.session(sid)
    assert KEYS.opens_session(key, sid)
    assert session_of(key) == sid


@few
@given(SESSIONS, SESSIONS)
def test_a_sessions_key_opens_no_other_session(one: str, other: str):
    assert KEYS.opens_session(KEYS.session(one), other) == (one == other)


def test_the_key_of_an_attempt_does_not_open_the_next():
    assert not KEYS.opens_session(KEYS.session(session_id("t", 1)), session_id("t", 2))


@few
@given(SESSIONS)
def test_a_key_is_the_same_after_every_restart_and_another_under_another_secret(sid: str):
    assert Keys("a secret").session(sid) == KEYS.session(sid)
    assert not Keys("another").opens_session(KEYS.session(sid), sid)


@few
@given(SESSIONS)
def test_no_key_is_good_for_what_another_is_good_for(sid: str):
    keys = {KEYS.operator, KEYS.internal, KEYS.session(sid)}
    assert len(keys) == 3
    assert [k for k in keys if KEYS.is_operator(k)] == [KEYS.operator]
    assert [k for k in keys if KEYS.is_internal(k.encode())] == [KEYS.internal]
    assert [k for k in keys if KEYS.opens_session(k, sid)] == [KEYS.session(sid)]


@few
@given(st.text(), SESSIONS)
def test_what_is_no_key_opens_nothing_and_breaks_nothing(key: str, sid: str):
    key = key.encode("utf-8", "replace").decode()
    assert not KEYS.opens_session(key, sid)
    assert not KEYS.is_operator(key)
    assert isinstance(session_of(key), str)


@few
@given(SESSIONS, st.data())
def test_a_key_with_one_character_changed_opens_nothing(sid: str, data: st.DataObject):
    key = KEYS.session(sid)
    at = data.draw(st.integers(0, len(key) - 1))
    assert not KEYS.opens_session(key[:at] + ("0" if key[at] != "0" else "1") + key[at + 1 :], sid)


def test_the_secret_is_not_shown():
    assert "a secret" not in repr(KEYS)
    assert "a secret" not in KEYS.session("t~1") + KEYS.operator + KEYS.internal

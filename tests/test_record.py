"""A history read back from journals."""

from __future__ import annotations

from pathlib import Path

from test_checkpoint_fakes import turn

from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.checkpoint.wire import encode_append, join
from rollout_ft.testing.history import judge
from rollout_ft.testing.record import history_of


async def test_what_stores_journalled_is_their_history(tmp_path: Path):
    view = View(1, ("a", "b"), 1)
    stores = [Store(name, view, str(tmp_path)) for name in view.members]
    for store in stores:
        await store.append_many(1, join([encode_append(turn(0)), encode_append(turn(1))]))
    await stores[0].fence(1, "trial", 1, 2)
    for store in stores:
        store.close()
    history = await history_of(tmp_path, [])
    assert history.last == ("a", "b")
    assert [w.owner_epoch for w in history.written["a"]] == [1, 1, 2]
    assert history.log("a", "trial") == history.log("b", "trial")
    assert judge(history, lambda log: {}) == []

"""The replicas of the current view, as a writer calls them.

Owns the view a writer believes in, the ports of its members, one call to all of them, and what their answers mean
together. Must not queue, order or remember commits; `mirror` does.

The subtle invariant: an answer counts only for the view under which it was asked. All members of *one* view have to
accept in one round; acceptances of different rounds are never added up, since the set may have changed between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Refused
from rollout_ft.checkpoint.ports import StorePort
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import CommitRefused, Fenced, RolloutFTError
from rollout_ft.types import Raw

T = TypeVar("T")
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5


class Retry(Exception):
    """Not now, and not in this view; the text says why."""


def is_view_trouble(refused: Refused) -> bool:
    """Whether the same request may succeed later or elsewhere."""
    return refused.reason in ("stale_view", "frozen", "under_replicated")


def refusal(refused: Refused, trial_id: str, key: str = "") -> RolloutFTError:
    if refused.reason in ("stale_attempt", "stale_owner"):
        return Fenced(refused.reason, trial_id, refused.current)
    return CommitRefused(refused.reason, trial_id, key)


def worse(a: Refused | None, b: Refused | None) -> Refused | None:
    """The verdict of two replicas together: a final refusal outweighs silence, silence an acceptance."""

    def rank(verdict: Refused | None) -> int:
        if verdict is None:
            return 0
        if is_view_trouble(verdict):
            return 1
        return 3 if verdict.reason in ("stale_attempt", "stale_owner") else 2

    return a if rank(a) >= rank(b) else b


def _seen(task: asyncio.Task[Any]) -> None:
    """Look at a result that nobody waits for any more, or asyncio reports it as forgotten."""
    if not task.cancelled():
        task.exception()


class Replicas:
    """`view`, and in `trouble` the last thing that went wrong, in words."""

    def __init__(
        self,
        view: View,
        resolve: Callable[[str], StorePort],
        refresh: Callable[[], Awaitable[View]],
        call_timeout_s: float,
    ) -> None:
        self.view = view
        self._trouble = "no replica has complained"
        self._no_news = ""
        self._resolve, self._refresh = resolve, refresh
        self._call_timeout_s = call_timeout_s
        self._ports: dict[str, StorePort] = {}
        self._changed: asyncio.Future[None] | None = None

    @property
    def trouble(self) -> str:
        return self._trouble + self._no_news

    def set_view(self, view: View) -> None:
        if view.number <= self.view.number:
            return
        self.view = view
        self._ports = {name: port for name, port in self._ports.items() if name in view.members}
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)

    async def call(
        self, names: Sequence[str], call: Callable[[StorePort], Awaitable[T]], *, timeout_s: float | None = None
    ) -> dict[str, T | BaseException]:
        """Ask all at once. It ends at the timeout, or at once when a newer view makes the answers worthless."""
        tasks = {name: asyncio.ensure_future(self._ask(name, call)) for name in names}
        changed, ends = self._change(), asyncio.get_running_loop().time() + (timeout_s or self._call_timeout_s)
        open_ = set(tasks.values())
        try:
            while open_ and not changed.done():
                left = ends - asyncio.get_running_loop().time()
                waited = {*open_, changed}
                done, _ = await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                open_ -= done
                if not done:
                    break
        finally:
            for task in open_:
                task.add_done_callback(_seen)
                task.cancel()
        silent = TimeoutError(f"no answer within {timeout_s or self._call_timeout_s} s")
        return {name: silent if task in open_ else task.exception() or task.result() for name, task in tasks.items()}

    async def renew(self, pause_s: float) -> None:
        """Ask for the view; when there is no news, wait a little, or until a newer view is pushed."""
        seen, changed = self.view.number, self._change()
        asked = asyncio.ensure_future(self._refreshed())
        try:
            await asyncio.wait({asked, changed}, timeout=self._call_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if self.view.number == seen:
            await asyncio.wait({changed}, timeout=pause_s)

    @staticmethod
    def pauses() -> Iterator[float]:
        pause = FIRST_PAUSE_S
        while True:
            yield pause
            pause = min(2 * pause, LAST_PAUSE_S)

    def judge(self, answers: Mapping[str, Raw | BaseException], count: int) -> list[Refused | None]:
        """What the replicas together say of each append of a batch; None where all accepted."""
        together: list[Refused | None] = [None] * count
        for name, answer in answers.items():
            if isinstance(answer, BaseException):
                self._note(f"{name}: {answer!r}")
                verdicts: list[Refused | None] = [Refused("stale_view", self.view.number)] * count
            else:
                verdicts = wire.decode_results(answer)
                self._explain(name, verdicts)
            together = [worse(mine, theirs) for mine, theirs in zip(together, verdicts, strict=True)]
        return together

    def require(self, answers: Mapping[str, T | Refused | BaseException], trial_id: str) -> dict[str, T]:
        """What all answered; raises the gravest refusal, or `Retry`."""
        got: dict[str, T] = {}
        gravest: Refused | None = None
        silent = False
        for name, answer in answers.items():
            if isinstance(answer, Refused):
                self._explain(name, [answer])
                gravest = worse(gravest, answer)
            elif isinstance(answer, BaseException):
                self._note(f"{name}: {answer!r}")
                silent = True
            else:
                got[name] = answer
        if gravest is not None and not is_view_trouble(gravest):
            raise refusal(gravest, trial_id)
        if gravest is not None or silent:
            raise Retry(self.trouble)
        return got

    def require_writable(self, view: View) -> None:
        if not view.writable:
            self._note(
                f"view {view.number} has {len(view.members)} replicas and min_replicas is {view.min_replicas}: "
                "commits wait until another replica has joined"
            )
            raise Retry(self.trouble)

    def _explain(self, name: str, verdicts: Sequence[Refused | None]) -> None:
        for verdict in verdicts:
            if verdict is not None and is_view_trouble(verdict):
                what = "min_replicas" if verdict.reason == "under_replicated" else "view"
                self._note(f"{name} refused: {verdict.reason} ({what} {verdict.current})")
                return

    def _note(self, trouble: str) -> None:
        self._trouble = trouble

    def _change(self) -> asyncio.Future[None]:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        return self._changed

    async def _ask(self, name: str, call: Callable[[StorePort], Awaitable[T]]) -> T:
        port = self._ports.get(name)
        if port is None:
            port = self._ports[name] = self._resolve(name)
        return await call(port)

    async def _refreshed(self) -> None:
        self._no_news = ""
        try:
            self.set_view(await self._refresh())
        except Exception as error:
            # Whoever knows the view may be away as well. That is no reason to stop repeating.
            self._no_news = f"; the view could not be asked for: {error!r}"

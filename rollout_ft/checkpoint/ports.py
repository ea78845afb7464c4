"""How a store replica is reached: the port that writers and the supervisor see; behind it Ray and the store's own line.

Owns the mapping of Ray's errors to ours, and which calls take the line. Must not retry: whether to call again is the
caller's decision, and every method is idempotent so that it may.

The subtle invariant: a failed call says nothing about whether it ran. `StoreUnavailable` from here means "in doubt".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, cast

from rollout_ft.errors import RolloutFTError, StoreUnavailable
from rollout_ft.line import CallFailed, Door, Line, LineBroken, NobodyThere

if TYPE_CHECKING:
    from rollout_ft.checkpoint.log import Entry, Head, Refused
    from rollout_ft.checkpoint.state import Export
    from rollout_ft.checkpoint.view import Standing, View
    from rollout_ft.types import Partial, Raw


class Call(IntEnum):
    """What goes over the line; the argument is the view's number."""

    APPEND = 1
    PARTIALS = 2
    PAYLOAD = 3
    """The argument is the length of the label in front of it."""


@dataclass(frozen=True, slots=True)
class Outline:
    """The ends of a trial's log, for lists: its first entry, its last where that is the outcome, and the note of a released one."""

    first: bytes = b""
    outcome: bytes = b""
    note: bytes = b""


class StorePort(Protocol):
    """One store replica. `append_many` and `put_partials` take and give what `wire` encodes."""

    async def append_many(self, view_number: int, batch: Raw) -> Raw: ...
    async def fence(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int) -> Head | Refused: ...
    async def read(self, trial_id: str, from_seq: int = 0) -> list[Entry]: ...
    async def partials(self, trial_id: str) -> list[Partial]: ...
    async def put_partials(self, view_number: int, batch: Raw) -> int: ...
    async def lookup(self, trial_id: str) -> Head | None: ...
    async def trials(self) -> list[str]: ...
    async def heads(self) -> dict[str, Head]: ...
    async def outlines(self, trial_ids: Sequence[str]) -> dict[str, Outline]: ...
    async def export(self, wanted: list[tuple[str, int]]) -> list[Export | None]: ...
    async def load(self, number: int, exports: list[Export]) -> Refused | None: ...
    async def freeze(self, number: int) -> Refused | None: ...
    async def install(self, view: View) -> Refused | None: ...
    async def put_payload(self, label: bytes, payload: bytes) -> bool: ...
    async def payload(self, trial_id: str, key: str, digest: str) -> bytes | None: ...
    async def release(self, trial_id: str, note: bytes = b"") -> bool: ...
    async def note(self, trial_id: str) -> bytes | None: ...
    async def standing(self) -> Standing: ...
    async def describe(self) -> dict[str, Any]: ...
    async def ping(self) -> int: ...


class RayStore:
    """A store actor, found by `find` at the first call, because a lookup asks the cluster and may block.

    What every turn pays for goes over its line, everything else through Ray.
    """

    def __init__(self, name: str, find: Callable[[], Any]) -> None:
        self.name = name
        self._find = find
        self._handle: Any = None
        self._line: Line | None = None
        self._connecting = asyncio.Lock()
        self._broad: Line | None = None

    async def append_many(self, view_number: int, batch: Raw) -> Raw:
        return await self._send(Call.APPEND, view_number, batch)

    async def fence(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int) -> Head | Refused:
        return await self._call("fence", view_number, trial_id, attempt, owner_epoch)

    async def read(self, trial_id: str, from_seq: int = 0) -> list[Entry]:
        return await self._call("read", trial_id, from_seq)

    async def partials(self, trial_id: str) -> list[Partial]:
        return await self._call("partials", trial_id)

    async def put_partials(self, view_number: int, batch: Raw) -> int:
        return int(await self._send(Call.PARTIALS, view_number, batch))

    async def lookup(self, trial_id: str) -> Head | None:
        return await self._call("lookup", trial_id)

    async def trials(self) -> list[str]:
        return await self._call("trials")

    async def heads(self) -> dict[str, Head]:
        return await self._call("heads")

    async def outlines(self, trial_ids: Sequence[str]) -> dict[str, Outline]:
        return await self._call("outlines", trial_ids)

    async def export(self, wanted: list[tuple[str, int]]) -> list[Export | None]:
        return await self._call("export", wanted)

    async def load(self, number: int, exports: list[Export]) -> Refused | None:
        return await self._call("load", number, exports)

    async def freeze(self, number: int) -> Refused | None:
        return await self._call("freeze", number)

    async def install(self, view: View) -> Refused | None:
        return await self._call("install", view)

    async def put_payload(self, label: bytes, payload: bytes) -> bool:
        """Over a line of its own: no commit waits behind it. To be called once at a time: that bounds what is not sent yet."""
        try:
            if self._broad is None or not self._broad.open:
                self._broad = await Line.to(await self._call("door"))
            answer = await self._broad.call(Call.PAYLOAD, len(label), label, payload)
        except (CallFailed, LineBroken, NobodyThere) as error:
            raise StoreUnavailable(f"store {self.name} does not answer payload: {error}") from error
        except asyncio.CancelledError:
            if self._broad is not None:
                self._broad.close()  # what is not sent yet is of no use to anybody
                self._broad = None
            raise
        return bytes(answer) == b"1"

    async def payload(self, trial_id: str, key: str, digest: str) -> bytes | None:
        return await self._call("payload", trial_id, key, digest)

    async def release(self, trial_id: str, note: bytes = b"") -> bool:
        return await self._call("release", trial_id, note)

    async def note(self, trial_id: str) -> bytes | None:
        return await self._call("note", trial_id)

    async def standing(self) -> Standing:
        return await self._call("standing")

    async def describe(self) -> dict[str, Any]:
        return await self._call("describe")

    async def ping(self) -> int:
        return await self._call("ping")

    async def _send(self, what: Call, view_number: int, batch: Raw) -> Raw:
        try:
            return await (await self._open_line()).call(what, view_number, batch)
        except (CallFailed, LineBroken, NobodyThere) as error:
            raise StoreUnavailable(f"store {self.name} does not answer {what.name.lower()}: {error}") from error

    async def _open_line(self) -> Line:
        if self._line is not None and self._line.open:
            return self._line
        async with self._connecting:
            if self._line is None or not self._line.open:
                door: Door = await self._call("door")
                self._line = await Line.to(door)
            return self._line

    async def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(self._find)
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            if isinstance(error.cause, RolloutFTError):
                raise error.cause from None
            raise
        except (RayError, ValueError) as error:
            self._handle = None  # another actor may have its name, with what its journal has
            raise StoreUnavailable(f"store {self.name} does not answer {method}: {error}") from error


def resolve(name: str, namespace: str | None = None) -> RayStore:
    """The port of the store actor called `name`; asks nothing yet."""

    def find() -> Any:
        import ray

        return cast("Any", ray).get_actor(name, namespace)

    return RayStore(name, find)

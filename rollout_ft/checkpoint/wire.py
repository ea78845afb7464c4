"""How batches travel: one bytes object a call, encoded once and sent to every replica.

Owns the encoding of appends, partials and results, and the size of a call. Knows nothing of what is decided about them.
Pickling one bytes object costs the same for one record as for fifty, and an argument below 100 kB travels inside the
call instead of through the object store, which costs five times as much.

The subtle invariant: a batch keeps its order, and so does its answer: result `i` belongs to append `i`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec

from rollout_ft.checkpoint.log import Append, Entry, Reason, Refused
from rollout_ft.types import Partial, Raw

CALL_BYTES = 96_000

PartialItem = tuple[str, int, int, Partial]
_Flat = tuple[str, int, int, int, str, str, bytes]

_encoder = msgspec.msgpack.Encoder()
_appends = msgspec.msgpack.Decoder(list[_Flat])
_partials = msgspec.msgpack.Decoder(list[PartialItem])
_results = msgspec.msgpack.Decoder(list[tuple[str, int] | None])


def encode_append(append: Append) -> bytes:
    entry = append.entry
    return _encoder.encode((append.trial_id, append.attempt, append.owner_epoch, append.seq, entry.kind, entry.key, entry.payload))


def encode_partial(item: PartialItem) -> bytes:
    return _encoder.encode(item)


def join(encoded: Iterable[bytes]) -> bytes:
    """A batch of records that are encoded already."""
    return _encoder.encode([msgspec.Raw(each) for each in encoded])


def split(encoded: Sequence[bytes], limit: int = CALL_BYTES) -> Iterable[list[bytes]]:
    """Runs of records that fit a call each; one that is larger than the limit goes alone."""
    run: list[bytes] = []
    size = 0
    for each in encoded:
        if run and size + len(each) > limit:
            yield run
            run, size = [], 0
        run.append(each)
        size += len(each)
    if run:
        yield run


def decode_appends(batch: Raw) -> list[Append]:
    return [
        Append(trial_id, attempt, owner_epoch, seq, Entry(kind, key, payload))
        for trial_id, attempt, owner_epoch, seq, kind, key, payload in _appends.decode(batch)
    ]


def decode_partials(batch: Raw) -> list[PartialItem]:
    return _partials.decode(batch)


def encode_results(results: Iterable[Refused | None]) -> bytes:
    """None stands for accepted."""
    return _encoder.encode([None if each is None else (each.reason, each.current) for each in results])


def decode_results(answer: Raw) -> list[Refused | None]:
    return [None if each is None else Refused(cast("Reason", each[0]), each[1]) for each in _results.decode(answer)]

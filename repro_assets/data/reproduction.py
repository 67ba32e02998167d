"""Sample reproduction: records drawn by keyed hash, read again from the raw files, cleaned, rendered and tokenised again, and compared.

The comparison is of token digests. Its verdict is one rule of `validation.py`.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import msgspec

from repro_assets.data import Progress, leaves, readers
from repro_assets.data import records as intake
from repro_assets.data.tokenizing import Codec
from repro_assets.documents import RawFile, RawSnapshot, Records, Reproduction
from repro_assets.recipe import RecordsSection, ShardingSection
from repro_assets.trust.blob import BlobStore

NAMED = 10


class Difference(msgspec.Struct, frozen=True):
    """A drawn record that did not come out the same: where it was read and what differs."""

    record: str
    where: str
    what: str


def draw(records: Iterable[str], count: int) -> list[str]:
    """The `count` records (hexadecimal SHA-256) with the lowest keyed hash, sorted; all of them when there are fewer."""
    return sorted(heapq.nsmallest(count, set(records), key=lambda name: (hashlib.sha256(f"reproduction|{name}".encode()).digest(), name)))


def reproduce(
    drawn: Iterable[str],
    expected: Mapping[str, bytes],
    snapshot: RawSnapshot,
    open_raw: Callable[[RawFile], BinaryIO],
    records: Records,
    codec: Codec,
    cleaning: RecordsSection,
    sharding: ShardingSection,
    store: BlobStore,
    progress: Progress | None = None,
) -> tuple[Reproduction, list[Difference]]:
    """Rebuild the drawn records from raw. `expected`: record to its 32-byte token digest in the shards.

    A record that the index does not lead to, or whose row is no longer it, counts as different, and is named.
    """
    waiting = set(drawn)
    total, equal = len(waiting), 0
    differences: list[Difference] = []
    for file in snapshot.files_listed:
        if not waiting or file.path not in records.index:
            continue
        places = [place for place in intake.places(store, records, file.path) if place.id in waiting]
        wanted = {place.line: place.id for place in places}
        # With duplicates kept, a record has several places: the first one is enough.
        first = {name: line for line, name in sorted(wanted.items(), reverse=True)}
        chosen = [(place.line, place.offset, place.length) for place in places if first[place.id] == place.line]
        if not chosen:
            continue
        source = readers.source_for(file.path, cleaning.sources)
        rebuilt = []
        for row in readers.again(file.path, file.format, lambda file=file: open_raw(file), source, chosen):  # type: ignore[misc]
            name, where = wanted[row.line], f"{file.path}:{row.line}"
            waiting.discard(name)
            if isinstance(row, readers.Bad):
                differences.append(Difference(name, where, f"the row is bad now: {row.reason}: {row.detail}"))
                continue
            record = intake.record_of(row, cleaning)
            if record.id != name:
                differences.append(Difference(name, where, f"the row is record {record.id} now"))
            else:
                rebuilt.append((where, record))
        tokens = codec.tokens([record for _where, record in rebuilt], sharding.max_tokens, sharding.train_on)
        for (where, record), now in zip(rebuilt, tokens, strict=True):
            if leaves.token_digest(now.ids, now.spans) == expected[record.id]:
                equal += 1
            else:
                differences.append(Difference(record.id, where, "its tokens came out differently"))
        if progress:
            progress("records rebuilt from raw", total - len(waiting), total)
    differences += [Difference(name, "", "no index leads to it") for name in sorted(waiting)]
    differences.sort(key=lambda difference: difference.record)
    named = tuple(f"{difference.record} ({difference.where or 'raw'}): {difference.what}" for difference in differences[:NAMED])
    return Reproduction(drawn=total, equal=equal, differing=named), differences

"""Sample reproduction: records drawn by keyed hash, read again from the raw files, cleaned, rendered and tokenised again, and compared.

The comparison is of token digests. Its verdict is one rule of `validation.py`.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import msgspec

from repro_assets.data import Progress, leaves, readers
from repro_assets.data import records as index
from repro_assets.data.lines import Record
from repro_assets.data.parts import Intake
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
    intake = Intake(cleaning)
    differences: list[Difference] = []
    for file in snapshot.files_listed:
        if not waiting or file.path not in records.index:
            continue
        # With duplicates kept, a record has several places: the first one is enough.
        wanted: dict[str, index.Place] = {}
        for place in index.places(store, records, file.path):
            if place.id in waiting:
                wanted.setdefault(place.id, place)
        if not wanted:
            continue
        source = readers.source_for(file.path, cleaning.sources)
        at_line: dict[int, list[index.Place]] = {}
        for place in wanted.values():
            at_line.setdefault(place.line, []).append(place)
        chosen = [(here[0].line, here[0].offset, here[0].length) for here in at_line.values()]
        rebuilt = []
        for row in readers.again(file.path, file.format, lambda file=file: open_raw(file), source, chosen):  # type: ignore[misc]
            for place in at_line[row.line]:
                waiting.discard(place.id)
                where = f"{file.path}:{row.line}"
                found = _rebuilt(row, place.by, intake)
                if isinstance(found, str):
                    differences.append(Difference(place.id, where, found))
                elif found.id != place.id:
                    differences.append(Difference(place.id, where, f"the row is record {found.id} now"))
                else:
                    rebuilt.append((where, found))
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


def _rebuilt(row: readers.Row | readers.Bad, by: int, intake: Intake) -> Record | str:
    """The record of the row, or of its augmentation `by`, or why there is none."""
    if isinstance(row, readers.Bad):
        return f"the row is bad now: {row.reason}: {row.detail}"
    try:
        return intake.record(row, by)
    except readers.Unfit as unfit:
        return f"the row is no record now: {unfit}"

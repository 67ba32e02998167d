"""The difference of two states of a million records: edits of 0.1 % in one run, and scattered. Only leaves that differ may be read.

Run by hand: `python -m repro_assets_tests.benchmarks.diffing`. Prints seconds and reads; exits 1 when the run of edits takes above 5 s.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from repro_assets.data import diff, lines
from repro_assets.data.chunking import boundaries
from repro_assets.data.lines import Message
from repro_assets.data.places import PLACE
from repro_assets.documents import RecordLeaf, Records
from repro_assets.trust.blob import Blob, FolderStore
from repro_assets.trust.canonical import sha256

COUNT, EDITS, TARGET, LIMIT = 1_000_000, 1_000, 256, 5.0
WORDS = " ".join(f"word{n}" for n in range(40))


class Counting(FolderStore):
    """A folder store that counts what is read."""

    reads = 0
    bytes_read = 0

    def get_bytes(self, digest: str) -> bytes:
        data = super().get_bytes(digest)
        self.reads += 1
        self.bytes_read += len(data)
        return data


def record(number: int, version: int, keys: bool) -> lines.Record:
    messages = (Message(content=f"question {number} {version} {WORDS}", role="user"), Message(content=f"answer {number}", role="assistant"))
    return lines.make(messages, f"k{number}" if keys else None, {"kind": str(number % 5)})


def state(store: FolderStore, edited: set[int], keys: bool, known: dict[int, tuple[bytes, bytes]]) -> Records:
    """A state of COUNT records in one file. `known`: id and leaf line of the records without edits, made once."""
    names, rows = [], []
    for number in range(COUNT):
        if number in edited:
            made = record(number, 1, keys)
            name, row = bytes.fromhex(made.id), lines.encode(made)
        else:
            if number not in known:
                made = record(number, 0, keys)
                known[number] = bytes.fromhex(made.id), lines.encode(made)
            name, row = known[number]
        names.append(name)
        rows.append(row)
    leaves, start = [], 0
    for end in boundaries(names, TARGET):
        data = b"".join(rows[start:end])
        leaves.append(RecordLeaf("train", Blob(sha256(data), len(data)), end - start, ""))
        store.put_bytes(data)
        start = end
    index = np.zeros(COUNT, PLACE)
    index["id"] = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32)
    index["line"] = np.arange(1, COUNT + 1)
    nothing = store.put_bytes(b"")
    return Records(
        sources=(),
        reasons={},
        cleaned={},
        sensitive={},
        leaves=tuple(leaves),
        index={"data.jsonl": store.put_bytes(index.tobytes())},
        quarantine=nothing,
        flagged=nothing,
        clusters=nothing,
        splits={"train": COUNT},
        slices={},
    )


def main() -> int:
    worst = 0.0
    print(f"{COUNT:,} records, {EDITS:,} edited")
    print(f"{'edits':<24}{'seconds':>8}{'CPU s':>7}{'leaves':>8}{'differ':>8}{'reads':>7}{'MB read':>9}")
    for keys in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            store = Counting(Path(folder))
            known: dict[int, tuple[bytes, bytes]] = {}
            before = state(store, set(), keys, known)
            ways = {"one run": set(range(500_000, 500_000 + EDITS)), "scattered": set(range(0, COUNT, COUNT // EDITS))}
            for name, edited in ways.items():
                now = state(store, edited, keys, known)
                store.reads = store.bytes_read = 0
                began, cpu = time.perf_counter(), time.process_time()
                found = diff.records(before, now, store)
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                assert len(found.edits) == len(edited), (len(found.edits), found.records)
                assert not found.records.added
                assert not found.records.removed
                label = f"{name}, {'keys' if keys else 'no keys'}"
                differ = found.leaves_added + found.leaves_removed
                print(
                    f"{label:<24}{seconds:>8.2f}{cpu:>7.2f}{len(now.leaves):>8}{differ:>8}{store.reads:>7}{store.bytes_read / 1e6:>9.1f}",
                    flush=True,
                )
                assert store.reads == differ + (0 if keys else 2)
                worst = max(worst, seconds if name == "one run" else 0.0)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

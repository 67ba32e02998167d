"""Megabytes of raw data that `records` takes in a second on one core, with and without each cleaning step; and hashing against hashlib.

    .venv/bin/python -m repro_assets_tests.benchmarks.cleaned [--megabytes 100]

Limits: 80 MB/s a core with secrets, personal data and near duplicates off; hashing at least 80 % of hashlib over the page cache. Each row
is a process of its own; seconds are CPU seconds of the build (imports left out), so that a busy neighbour shows less. The last row is the
library calls that the work cannot do without, in a bare loop: what this machine leaves to any program around them.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from repro_assets.data import readers, records
from repro_assets.data.lines import Message
from repro_assets.data.parts import _Verified
from repro_assets.documents import RawFile
from repro_assets.recipe import RecordsSection
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.benchmarks import corpus
from repro_assets_tests.benchmarks.incremental import SECTION, snapshot
from repro_assets_tests.data.test_parts import Folder

LIMIT = 80.0
HASHING = 0.8
STEPS: dict[str, dict[str, Any]] = {
    "none of them": {},
    "white space collapsed": {"whitespace": "collapse"},
    "near duplicates": {"near_duplicates": {}},
    "secrets flagged": {"secrets": "flag"},
    "personal data flagged": {"personal": "flag"},
    "contamination by n-grams": {"contamination": "ngram"},
    "augmentation of 10 %": {"augment": [{"kind": "typos"}]},
    "all of them": {
        "whitespace": "collapse",
        "near_duplicates": {},
        "secrets": "flag",
        "personal": "flag",
        "contamination": "ngram",
        "augment": [{"kind": "typos"}],
    },
}
BARE = "the library calls alone"


def prompts(paths: list[Path]) -> bytes:
    """A thousand evaluation items that are not in the corpus."""
    rows = (json.loads(line) for _number, line in zip(range(1000), paths[0].open("rb"), strict=False))
    items = (" ".join(reversed(row["messages"][0]["content"].lower().split())) for row in rows)
    return b"".join(msgspec.json.encode({"item": str(n), "suite": "bench", "text": text}) + b"\n" for n, text in enumerate(items))


def one(name: str, paths: list[Path]) -> None:
    section = msgspec.convert({**msgspec.to_builtins(SECTION), **STEPS[name]}, RecordsSection)
    with tempfile.TemporaryDirectory() as scratch:
        store = FolderStore(Path(scratch))
        raw = snapshot(paths[0].parent, store)
        items = prompts(paths)
        wall, cpu = time.perf_counter(), time.process_time()
        result, _observed = records.build(raw, Folder(str(paths[0].parent)), items, section, store)
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "megabytes": raw.size / 1e6}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**spent, "peak": peak, "kept": sum(count.kept for count in result.sources)}))


def hashing(paths: list[Path]) -> float:
    """Our speed over hashlib's, best of five in turns, on the same file in the page cache. By the clock, since ours hashes in a thread."""
    path = paths[0]
    file = RawFile(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, "jsonl")
    ours, theirs = [], []
    for _round in range(5):
        with path.open("rb") as stream:
            started = time.perf_counter()
            hashlib.file_digest(stream, "sha256")
            theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        with _Verified(path.open("rb"), file) as verified:
            while verified.read(readers.BLOCK):
                pass
            verified.finish()
        ours.append(time.perf_counter() - started)
    return min(theirs) / min(ours)


class _Row(msgspec.Struct):
    id: str
    messages: tuple[Message, ...]


def bare(paths: list[Path]) -> None:
    """Hash each file and row, decode the row, encode its messages, hash them and the leaf line, hash and write leaves; nothing is decided."""
    decode, encode = msgspec.json.Decoder(_Row).decode, msgspec.json.Encoder().encode
    with tempfile.TemporaryDirectory() as scratch:
        wall, cpu, size = time.perf_counter(), time.process_time(), 0
        held: list[bytes] = []
        for path in paths:
            data = path.read_bytes()
            size += len(data)
            hashlib.sha256(data).digest()
            for line in data.split(b"\n")[:-1]:
                hashlib.sha256(line).digest()
                row = decode(line)
                said = encode(row.messages)
                name = hashlib.sha256(said).hexdigest()
                held.append(b"".join((b'{"id":"', name.encode(), b'","messages":', said, b"}\n")))
                hashlib.sha256(held[-1]).digest()
                if len(held) == 256:
                    leaf = b"".join(held)
                    (Path(scratch) / hashlib.sha256(leaf).hexdigest()).write_bytes(leaf)
                    held.clear()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "megabytes": size / 1e6}
    print(json.dumps({**spent, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "kept": 0}))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "repro-assets" / "benchmarks", help="keeps the corpus")
    parser.add_argument("--step")
    how = parser.parse_args()
    how.folder.mkdir(parents=True, exist_ok=True)
    paths = corpus.write(how.folder, how.megabytes)
    if how.step:
        bare(paths) if how.step == BARE else one(how.step, paths)
        return 0
    print("| steps beside the standard ones | MB/s a core (CPU) | MB/s wall | peak MB | records kept |\n|---|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for name in (*STEPS, BARE):
        argv = [sys.executable, "-m", "repro_assets_tests.benchmarks.cleaned", "--megabytes", str(how.megabytes), "--step", name]
        found[name] = json.loads(subprocess.run([*argv, "--folder", str(how.folder)], check=True, stdout=subprocess.PIPE).stdout)
        row = found[name]
        speed, wall = row["megabytes"] / row["cpu"], row["megabytes"] / row["wall"]
        print(f"| {name} | {speed:.0f} | {wall:.0f} | {row['peak']:.0f} | {row['kept']:,.0f} |", flush=True)
    ratio = hashing(paths)
    work = found[BARE]["cpu"] / found["none of them"]["cpu"]
    print(f"of the time without costly steps, {work:.0%} is what the library calls alone take")
    print(f"hashing: {ratio:.0%} of hashlib over the page cache (limit {HASHING:.0%})")
    first = found["none of them"]
    return 0 if first["megabytes"] / first["cpu"] >= LIMIT and ratio >= HASHING else 1


if __name__ == "__main__":
    sys.exit(main())

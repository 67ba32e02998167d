"""What a change costs: records and shards of a generated chat corpus, whole and again after small changes, in one process tree.

    .venv/bin/python -m repro_assets_tests.benchmarks.incremental [--megabytes 300] [--workers 2] [--engine tokenizers]

Limits: 0.1 % scattered edits at most 10 % of the full run and only the edited records tokenised, 1 % appended at most 5 %, unchanged at most
2 %. Process start-up and imports are outside the clock: workers are started once and kept.
"""

import argparse
import hashlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from repro_assets.data import manifest, records, sharding
from repro_assets.data.workers import Serial, Spawn
from repro_assets.documents import RawFile, RawSnapshot
from repro_assets.recipe import RecordsSection, ShardingSection, Source
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.benchmarks import corpus
from repro_assets_tests.data.material import CHATML, base_model_of
from repro_assets_tests.data.test_parts import Folder

LIMITS = {"unchanged": 0.02, "0.1 % edited, scattered": 0.10, "1 % appended": 0.05}
SECTION = RecordsSection(sources=(Source(match="**", shape="messages", fields={"id": "id"}),))


def snapshot(folder: Path, store: FolderStore) -> RawSnapshot:
    files = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append(RawFile(path.name, digest, path.stat().st_size, manifest.format_of(path.name)))
    return manifest.build(files, store)


def edited(folder: Path, other: Path) -> int:
    """A copy of the corpus with 0.1 % of its rows altered, drawn by hash over all files; how many were."""
    other.mkdir()
    count = 0
    for path in sorted(folder.iterdir()):
        with path.open("rb") as old, (other / path.name).open("wb") as new:
            for number, line in enumerate(old):
                if int.from_bytes(hashlib.sha256(f"{path.name}|{number}".encode()).digest()[:4], "big") < (1 << 32) // 1000:
                    row = json.loads(line)
                    row["messages"][-1]["content"] += f" edited {number}"
                    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                    count += 1
                new.write(line)
    return count


def appended(folder: Path, other: Path, made: corpus.Rows, rows: int, first: int) -> int:
    """A copy with 1 % more rows in a file of their own, as new data arrives."""
    shutil.copytree(folder, other)
    with (other / "zz-new.jsonl").open("wb") as new:
        for number in range(rows // 100):
            new.write(made.line(first + number))
    return rows // 100


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", default="tokenizers")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "repro-assets" / "benchmarks", help="keeps the corpus")
    how = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        how.folder.mkdir(parents=True, exist_ok=True)
        paths = corpus.write(how.folder, how.megabytes)
        raw = paths[0].parent
        store = FolderStore(root / "store")
        tokenizer = corpus.tokenizer(how.folder, paths[0])["tokenizer.json"]
        model = msgspec.structs.replace(base_model_of(store, tokenizer, CHATML), vocabulary=corpus.VOCABULARY)
        section = ShardingSection(max_tokens=2048, engine=how.engine)
        rows = sum(sum(1 for _ in path.open("rb")) for path in paths)

        def run(folder: Path, previous: Any = (None, None)) -> tuple[float, Any, Any]:
            workers = Spawn(how.workers) if how.workers > 1 else Serial()
            taken = snapshot(folder, store)
            started = time.perf_counter()
            cleaned = records.build(taken, Folder(str(folder)), b"", SECTION, store, previous=previous[0], workers=workers)
            middle = time.perf_counter()
            shards = sharding.build(cleaned[0], model, section, store, previous[1], workers=workers)
            ended = time.perf_counter()
            print(f"    records {middle - started:.2f} s, shards {ended - middle:.2f} s", file=sys.stderr)
            return ended - started, cleaned, shards

        full, *first = run(raw)
        tokens = sum(first[1][0].tokens.values())
        print(
            f"{rows:,} records, {sum(p.stat().st_size for p in paths) / 1e6:.0f} MB, {tokens:,} tokens, {how.workers} workers, {how.engine}"
        )
        print("| change | seconds | share of the full run | limit | records tokenised | leaves new |\n|---|---|---|---|---|---|")
        print(
            f"| everything new | {full:.2f} | 100 % | | {first[1][1].records_new:,} | {first[1][1].leaves_new} of {len(first[1][0].leaves)} |"
        )
        made = corpus.Rows()
        changes: dict[str, Callable[[], tuple[Path, int]]] = {
            "unchanged": lambda: (raw, 0),
            "0.1 % edited, scattered": lambda: (root / "edited", edited(raw, root / "edited")),
            "1 % appended": lambda: (root / "appended", appended(raw, root / "appended", made, rows, rows)),
        }
        missed = 0
        for name, make in changes.items():
            folder, expected = make()
            seconds, _cleaned, shards = run(folder, (first[0], first[1]))
            share, new = seconds / full, shards[1].records_new
            missed += share > LIMITS[name] or new > expected
            print(
                f"| {name} | {seconds:.2f} | {share:.1%} | {LIMITS[name]:.0%} | {new:,} of {expected:,} changed | "
                f"{shards[1].leaves_new} of {len(shards[0].leaves)} |"
            )
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        print(f"peak memory: driver {peak[0] / 1024:.0f} MB, largest worker {peak[1] / 1024:.0f} MB")
        return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of `records` over one file of 2 GB: JSONL, the same as zst, and CSV. By hand; needs 4 GB of disk in the temporary folder.

    .venv/bin/python -m repro_assets_tests.benchmarks.large [--megabytes 2000] [--only jsonl csv zst]

Limit: 600 MB above the imports. Each file is read in a process of its own.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

from repro_assets.data import manifest, near, records
from repro_assets.documents import RawFile
from repro_assets.recipe import RecordsSection, Source
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.benchmarks import corpus
from repro_assets_tests.data.test_parts import Folder

LIMIT = 600
NAMES = {"jsonl": "a.jsonl", "zst": "a.jsonl.zst", "csv": "a.csv"}


def rows(paths: list[Path], size: int, csv: bool) -> Iterator[bytes]:
    """The corpus over and over until `size` bytes, each text with a number of its own, so that no row repeats another."""
    number = written = 0
    while True:
        for path in paths:
            for line in path.open("rb"):
                number += 1
                if csv:
                    asked, said = (message["content"].replace('"', "'") for message in json.loads(line)["messages"])
                    out = f'"{number} {asked}","{said}"\r\n'.encode()
                else:
                    out = line.replace(b'"content": "', b'"content": "%d ' % number, 1)
                written += len(out)
                yield out
                if written > size:
                    return


def write(path: Path, kind: str, paths: list[Path], size: int) -> None:
    with path.open("wb") as file:
        if kind == "csv":
            file.write(b"prompt,completion\r\n")
        if kind == "zst":
            with zstandard.ZstdCompressor(level=1).stream_writer(file) as packed:
                for row in rows(paths, size, False):
                    packed.write(row)
        else:
            file.writelines(rows(paths, size, kind == "csv"))


def read(path: Path, kind: str) -> dict[str, float]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source = Source(match="**", shape="prompt_completion" if kind == "csv" else "messages")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        store = FolderStore(Path(folder))
        snapshot = manifest.build([RawFile(path.name, digest, path.stat().st_size, manifest.format_of(path.name))], store)
        assert near.signature  # numpy and its like are imports, not work
        before, started = peak(), time.perf_counter()
        result, _observed = records.build(snapshot, Folder(str(path.parent)), b"", RecordsSection(sources=(source,)), store)
        seconds = time.perf_counter() - started
    return {"rows": result.sources[0].read, "kept": result.sources[0].kept, "seconds": seconds, "peak": peak(), "above": peak() - before}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--only", nargs="*", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "repro-assets" / "benchmarks", help="keeps the corpus")
    parser.add_argument("--read", type=Path)
    how = parser.parse_args()
    if how.read:
        print(json.dumps(read(how.read, how.only[0])))
        return 0
    paths = corpus.write(how.folder, 300)
    missed = 0
    print("| file | rows | s | peak MB | above imports MB |\n|---|---|---|---|---|")
    for kind in how.only:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / NAMES[kind]
            write(path, kind, paths, how.megabytes * 1_000_000)
            argv = [sys.executable, "-m", "repro_assets_tests.benchmarks.large", "--only", kind, "--read", str(path)]
            found = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
            size = path.stat().st_size / 1e6
        missed += found["above"] > LIMIT
        print(
            f"| {kind}, {size:.0f} MB | {found['rows']:,} | {found['seconds']:.0f} | {found['peak']:.0f} | {found['above']:.0f} |",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

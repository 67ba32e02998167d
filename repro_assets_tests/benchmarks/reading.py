"""Speed and peak memory of reading raw rows: a generated file of each format, each read in a process of its own.

Run by hand: `python -m repro_assets_tests.benchmarks.reading [MB] [FORMAT ...]` (2,000 MB of jsonl, csv and jsonl.zst by default). Prints
MB/s of uncompressed bytes, per wall and CPU second, and the peak above the imports; exits 1 above the limit.
"""

import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

LIMIT = 600  # MB above the imports
DEFAULT = ("jsonl", "csv", "jsonl.zst")
WORDS = [f"w{number * 7919 % 65521:x}" for number in range(4096)]
ROWS = 4000  # generated rows, repeated

CHILD = """
import sys, time
from repro_assets.data import manifest
from repro_assets.data.readers import Bad, read
from repro_assets.recipe import Source
import msgspec, zlib, zstandard
path, shape, record = sys.argv[1:]
format = manifest.format_of(path)
if format == "parquet":
    import pyarrow.parquet
fields = {"id": "id"} if shape == "prompt_completion" else {}
source = Source(match="**", shape=shape, record=record, fields=fields)

def peak_kilobytes():
    # ru_maxrss would count the parent before exec
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak_kilobytes()
began, cpu = time.perf_counter(), time.process_time()
rows = texts = 0
with open(path, "rb") as stream:
    for row in read(path, format, stream, source):
        if isinstance(row, Bad):
            raise SystemExit(str(row))
        rows += 1
        texts += sum(len(message.content) for message in row.messages)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
peak = peak_kilobytes()
print(rows, texts, seconds, cpu, peak / 1024, (peak - before) / 1024)
"""


def rows() -> list[dict[str, str]]:
    """Rows of about 2 KB, the same in every run."""
    made = []
    for number in range(ROWS):
        words = [WORDS[(number * 131 + at * at * 17 + at) % 4096] for at in range(340)]
        made.append({"id": str(number), "prompt": " ".join(words[:60]), "completion": " ".join(words[60:])})
    return made


def _block(base: str, made: list[dict[str, str]]) -> bytes:
    if base == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in made)
    if base == "json":
        return b",\n".join(json.dumps(row).encode() for row in made)
    if base == "txt":
        return b"".join(f"{row['prompt']}\n{row['completion']}\n\n".encode() for row in made)
    import io

    out = io.StringIO()
    csv.writer(out, delimiter="\t" if base == "tsv" else ",", quoting=csv.QUOTE_ALL).writerows(row.values() for row in made)
    return out.getvalue().encode()


def write(path: Path, base: str, size: int) -> int:
    """A file of about `size` uncompressed bytes; how many they are."""
    import zstandard

    made = rows()
    if base == "parquet":
        return _parquet(path, made, size)
    block, total = _block(base, made), 0
    plain = path.open("wb")
    out: BinaryIO = plain
    if path.suffix == ".gz":
        out = cast(BinaryIO, gzip.GzipFile(fileobj=plain, mode="wb", compresslevel=1, mtime=0))
    elif path.suffix == ".zst":
        out = cast(BinaryIO, zstandard.ZstdCompressor(level=1).stream_writer(plain, closefd=False))
    with plain, out:
        opening = {"json": b"[", "csv": b"id,prompt,completion\r\n", "tsv": b"id\tprompt\tcompletion\r\n"}.get(base, b"")
        total += out.write(opening) and len(opening)
        while total < size:
            out.write(block)
            total += len(block)
            if base == "json":
                out.write(b",\n" if total + 2 < size else b"]")
                total += 2
    return total


def _parquet(path: Path, made: list[dict[str, str]], size: int) -> int:
    import pyarrow
    import pyarrow.parquet

    table, total = pyarrow.Table.from_pylist(made), 0
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        while total < size:
            writer.write_table(pyarrow.concat_tables([table] * 8), row_group_size=len(made) * 8)
            total += table.nbytes * 8
    return total


def measure(path: Path) -> tuple[int, int, float, float, float, float]:
    """Rows, characters, wall and CPU seconds, peak MB, and peak MB above the imports, of reading the file in a process of its own."""
    shape, record = ("text", "paragraph") if ".txt" in path.name else ("prompt_completion", "line")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), shape, record], capture_output=True, text=True, check=False, env=environment
    )
    if found.returncode:
        raise SystemExit(found.stderr)
    counted, characters, *figures = found.stdout.split()
    wall, cpu, peak, above = (float(figure) for figure in figures)
    return int(counted), int(characters), wall, cpu, peak, above


def main() -> int:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    worst = 0.0
    for name in sys.argv[2:] or DEFAULT:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rows.{name}"
            total = write(path, name.partition(".")[0], size * 1_000_000) / 1e6
            counted, _characters, wall, cpu, peak, above = measure(path)
            print(
                f"{name:<10} {total:7.0f} MB ({path.stat().st_size / 1e6:.0f} on disk) {counted:>9,} rows  {total / wall:5.0f} MB/s  "
                f"{total / cpu:5.0f} MB a CPU second  peak {peak:4.0f} MB, {above:4.0f} above the imports (at most {LIMIT})",
                flush=True,
            )
            worst = max(worst, above)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

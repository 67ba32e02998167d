"""How fast records become ids and spans with either engine, beside the bare library on the same texts, one thread, pairs in one run.

Run by hand: `python -m repro_assets_tests.benchmarks.tokenizing [--megabytes 30] [--folder DIR]`. Prints a Markdown table.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # read when the libraries load

import msgspec

from repro_assets.data import lines, packing, tokenizing
from repro_assets.data.lines import Message, Record
from repro_assets_tests.benchmarks import corpus

ROUNDS = 3


def records(paths: list[Path]) -> list[Record]:
    rows = (msgspec.json.decode(line) for path in paths for line in path.open("rb"))
    return [lines.make([Message(turn["content"], turn["role"]) for turn in row["messages"]], row["id"], {}) for row in rows]


def clocked(function, *arguments):  # type: ignore[no-untyped-def]
    """The result, and the least wall and CPU seconds of some rounds."""
    spent = []
    for _round in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        spent.append((time.perf_counter() - wall, time.process_time() - cpu))
    return result, min(wall for wall, _cpu in spent), min(cpu for _wall, cpu in spent)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "repro-benchmarks")
    chosen = parser.parse_args()
    paths = corpus.write(chosen.folder, chosen.megabytes)
    files = corpus.tokenizer(chosen.folder, paths[0])
    held = records(paths)
    print(f"{len(held):,} records, {sum(path.stat().st_size for path in paths) / 1e6:.0f} MB, 1 thread, best of {ROUNDS}\n")
    print("| step | engine | Mtok/s | Mtok per CPU-s | µs a record |\n|---|---|---|---|---|")
    for engine in ("tokenizers", "fastokens"):
        codec = tokenizing.Codec(files, engine)
        if codec.engine().name != engine:
            raise SystemExit(str(codec.engine().gate))
        part = held[: len(held) // 10] if engine == "tokenizers" else held
        texts = [codec.renderer.render(record.messages).text for record in part]
        whole, wall, cpu = clocked(codec.tokens, part, 1 << 20)
        count = sum(len(tokens.ids) for tokens in whole)

        def bare(codec: tokenizing.Codec = codec, texts: list[str] = texts) -> None:
            for start in range(0, len(texts), tokenizing.BATCH):
                codec._backend.encode(texts[start : start + tokenizing.BATCH])

        _none, bare_wall, bare_cpu = clocked(bare)
        for step, one, two in (("records → ids and spans", wall, cpu), ("bare library", bare_wall, bare_cpu)):
            print(f"| {step} | {engine} | {count / one / 1e6:.2f} | {count / two / 1e6:.2f} | {two / len(part) * 1e6:.0f} |")
        start = time.perf_counter()
        tokenizing.Codec(files, engine)
        print(f"| load and gate | {engine} | | | {(time.perf_counter() - start) * 1e6:.0f} in all |")
    names = [record.id for record in held]
    lengths = [1 + int(name[:6], 16) % 2048 for name in names]
    many = range(-(-200_000 // len(names)))
    ids, sizes = [f"{turn:04x}{name[4:]}" for turn in many for name in names], lengths * len(many)
    plan, wall, _cpu = clocked(packing.plan, sizes, ids, 4096, 7, 0)
    print(f"\npacking: {len(ids) / wall / 1e6:.2f} M records/s, padding {plan.padding:.2%}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()

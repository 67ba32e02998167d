"""JSONL to token shards on disk: ours beside datasets, datatrove, litData and MosaicML streaming. Same corpus, tokenizer and 2 workers.

Run by hand on a quiet machine: `python -m repro_assets_tests.benchmarks.peers [--megabytes 30|300] [--corpus generated|gsm8k]
[--rounds 3] [--only TOOL ...]`. Each peer has a throw-away environment made by uv. Prints a Markdown table; exits 1 below the ratios that the project promises.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from repro_assets_tests.benchmarks import corpus, peer_tasks
from repro_assets_tests.benchmarks.environments import clean, environment

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "datasets": ["datasets==5.2.0", "tokenizers==0.23.3"],
    "datatrove": ["datatrove==0.10.1", "tokenizers==0.23.3", "orjson", "numpy"],
    "litdata": ["litdata==0.2.76", "tokenizers==0.23.3"],
    "streaming": ["mosaicml-streaming==0.13.0", "tokenizers"],  # asks for an older one than ours,
}
PROMISED = {"ours, tokenizers": 1.2, "ours, fastokens": 8.0}


def tree_memory(process: psutil.Process) -> int:
    """Bytes that the process and its children hold now; what they share counts once for each."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def run(tool: str, python: Path, paths: list[Path], tokenizer: Path, workers: int) -> dict[str, Any]:
    """Seconds, tokens, peak bytes of the process tree, bytes on disk, of one run into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        surroundings = clean(
            HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", HF_HOME=f"{folder}/hf", TMPDIR=folder
        )
        if tool.startswith("ours"):
            surroundings["PYTHONPATH"] = str(ROOT)
        script = str(Path(peer_tasks.__file__))
        out = Path(folder) / "out"
        out.mkdir()
        argv = [str(python), script, tool, str(paths[0].parent), str(tokenizer), str(out), str(workers)]
        with (Path(folder) / "said").open("w+") as said, (Path(folder) / "errors").open("w+") as errors:
            process = subprocess.Popen(argv, stdout=said, stderr=errors, env=surroundings, cwd=folder)
            peak = 0
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    peak = max(peak, tree_memory(watched))
                except psutil.NoSuchProcess:
                    break
                time.sleep(0.1)
            said.seek(0), errors.seek(0)
            if process.wait():
                raise SystemExit(f"{tool} failed:\n{errors.read()[-4000:]}")
            found = json.loads(said.read().strip().splitlines()[-1])
        shutil.rmtree(out / "cache", ignore_errors=True)
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {**found, "peak": peak, "stored": stored}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--corpus", choices=["generated", "gsm8k"], default="generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(peer_tasks.TOOLS), default=list(peer_tasks.TOOLS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "repro-benchmarks")
    chosen = parser.parse_args()
    paths = corpus.write(chosen.folder, chosen.megabytes) if chosen.corpus == "generated" else corpus.gsm8k(chosen.folder)
    tokenizer = chosen.folder / f"tokenizer-of-{paths[0].parent.name}" / "tokenizer.json"
    tokenizer.parent.mkdir(exist_ok=True)
    tokenizer.write_bytes(corpus.tokenizer(chosen.folder, paths[0])["tokenizer.json"])
    pythons = {tool: environment(chosen.folder, PACKAGES[tool]) if tool in PACKAGES else Path(sys.executable) for tool in chosen.only}
    found: dict[str, list[dict[str, Any]]] = {tool: [] for tool in chosen.only}
    for turn in range(chosen.rounds):
        # Alternating order: nobody always meets the warmer machine.
        for tool in chosen.only if turn % 2 == 0 else reversed(chosen.only):
            found[tool].append(run(tool, pythons[tool], paths, tokenizer, chosen.workers))
    return report(found, sum(path.stat().st_size for path in paths), chosen.workers)


def report(found: dict[str, list[dict[str, Any]]], size: int, workers: int) -> int:
    """Print the table; 1 when a promised ratio over the fastest peer is missed."""
    seconds = {tool: statistics.median([one["seconds"] for one in runs]) for tool, runs in found.items()}
    fastest = min((value for tool, value in seconds.items() if tool in PACKAGES), default=None)
    print(f"{size / 1e6:.0f} MB of JSONL, {workers} workers, median of {len(next(iter(found.values())))} runs, imports excluded\n")
    print("| tool | s | MB/s | Mtok/s | peak MB | MB on disk | against the fastest peer |\n|---|---|---|---|---|---|---|")
    missed = 0
    for tool, runs in found.items():
        tokens, peak, stored = runs[0]["tokens"], max(one["peak"] for one in runs), runs[0]["stored"]
        ratio = fastest / seconds[tool] if fastest else 0.0
        missed += bool(fastest) and ratio < PROMISED.get(tool, 0)
        print(
            f"| {tool} | {seconds[tool]:.2f} | {size / 1e6 / seconds[tool]:.1f} | {tokens / 1e6 / seconds[tool]:.2f} | {peak / 1e6:.0f} | "
            f"{stored / 1e6:.1f} | {f'{ratio:.2f}x' if fastest else ''} |"
        )
    print("\ntokens: " + ", ".join(f"{tool} {runs[0]['tokens']:,}" for tool, runs in found.items()))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

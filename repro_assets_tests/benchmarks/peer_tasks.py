"""The same corpus to token shards with each tool, as its documentation does it. Runs inside the tool's own environment: only the standard
library is imported at the top. Called by `peers.py`: python peer_tasks.py TOOL CORPUS TOKENIZER OUT WORKERS; prints JSON.

Peers get the cheap way: text by string formatting, no template engine, no loss spans, no hashes, no duplicate check.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = 256


def text_of(row: dict[str, Any]) -> str:
    return "".join([f"<|{turn['role']}|>\n{turn['content'].strip()}<|end|>\n" for turn in row["messages"]])


def texts(path: Path) -> Iterator[list[str]]:
    held: list[str] = []
    with path.open("rb") as file:
        for line in file:
            held.append(text_of(json.loads(line)))
            if len(held) == BATCH:
                yield held
                held = []
    if held:
        yield held


def tokenizer_at(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def with_datasets(corpus: Path, tokenizer: str, out: Path, workers: int) -> int:
    import datasets

    datasets.disable_progress_bars()
    library = tokenizer_at(tokenizer)

    def tokens(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [text_of({"messages": messages}) for messages in batch["messages"]]
        return {"input_ids": [encoding.ids for encoding in library.encode_batch_fast(rows, add_special_tokens=False)]}

    files = sorted(str(path) for path in corpus.glob("*.jsonl"))
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    made = data.map(tokens, batched=True, batch_size=1000, num_proc=workers, remove_columns=data.column_names, features=features)
    made.save_to_disk(str(out / "saved"), num_proc=workers)
    return int(sum(len(row) for batch in made.data["input_ids"].chunks for row in [batch.values]))


def _adapt(_reader: Any, data: dict[str, Any], _path: str, _number: int) -> dict[str, Any]:
    return {"text": text_of(data), "id": data["id"]}


def with_datatrove(corpus: Path, tokenizer: str, out: Path, workers: int) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(corpus), glob_pattern="*.jsonl", adapter=_adapt),
        DocumentTokenizer(str(out / "tokens"), tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=False, batch_size=1000),
    ]
    files = len(list(corpus.glob("*.jsonl")))
    LocalPipelineExecutor(steps, tasks=files, workers=workers, logging_dir=str(out / "logs"), start_method="spawn").run()
    return sum(path.stat().st_size for path in (out / "tokens").rglob("*.ds")) // 2


_library: Any = None


def _lit_rows(path: str, tokenizer: str) -> Iterator[Any]:
    global _library
    import torch

    _library = _library or tokenizer_at(tokenizer)
    for rows in texts(Path(path)):
        for encoding in _library.encode_batch_fast(rows, add_special_tokens=False):
            yield torch.tensor(encoding.ids, dtype=torch.int32)


def with_litdata(corpus: Path, tokenizer: str, out: Path, workers: int) -> int:
    from functools import partial

    import litdata
    from litdata.streaming.item_loader import TokensLoader

    litdata.optimize(
        fn=partial(_lit_rows, tokenizer=tokenizer),
        inputs=sorted(str(path) for path in corpus.glob("*.jsonl")),
        output_dir=str(out / "lit"),
        num_workers=workers,
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
    )
    index = json.loads((out / "lit" / "index.json").read_text())
    return int(sum(chunk["dim"] for chunk in index["chunks"]))


def _mds(paths: list[str], tokenizer: str, out: str) -> int:
    import numpy as np
    from streaming import MDSWriter

    library, count = tokenizer_at(tokenizer), 0
    with MDSWriter(out=out, columns={"tokens": "ndarray:uint16"}) as writer:
        for path in paths:
            for rows in texts(Path(path)):
                for encoding in library.encode_batch_fast(rows, add_special_tokens=False):
                    ids = np.array(encoding.ids, dtype=np.uint16)
                    writer.write({"tokens": ids})
                    count += len(ids)
    return count


def with_streaming(corpus: Path, tokenizer: str, out: Path, workers: int) -> int:
    files = sorted(str(path) for path in corpus.glob("*.jsonl"))
    shares = [(files[worker::workers], tokenizer, str(out / f"mds-{worker}")) for worker in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        counts = pool.starmap(_mds, shares)
    from streaming.base.util import merge_index

    merge_index(str(out), keep_local=True)
    return sum(counts)


def _ours(engine: str) -> Callable[[Path, str, Path, int], int]:
    def run(corpus: Path, tokenizer: str, out: Path, workers: int) -> int:
        from repro_assets_tests.benchmarks.whole import shards_of

        return shards_of(corpus, Path(tokenizer).parent, out, workers, engine)

    return run


TOOLS = {
    "ours, tokenizers": _ours("tokenizers"),
    "ours, fastokens": _ours("fastokens"),
    "datasets": with_datasets,
    "datatrove": with_datatrove,
    "litdata": with_litdata,
    "streaming": with_streaming,
}


def warmed(name: str) -> None:
    """Import what the tool needs, so that start-up is nobody's cost."""
    module = {"datasets": "datasets", "datatrove": "datatrove.pipeline.tokens", "litdata": "litdata", "streaming": "streaming"}
    __import__(module.get(name, "repro_assets_tests.benchmarks.whole"))
    import tokenizers  # noqa: F401


if __name__ == "__main__":
    tool, corpus, tokenizer, out, workers = sys.argv[1:]
    warmed(tool)
    began = time.perf_counter()
    count = TOOLS[tool](Path(corpus), tokenizer, Path(out), int(workers))
    print("\n" + json.dumps({"seconds": time.perf_counter() - began, "tokens": count}))

"""A whole graph for tests: a repository, a Dagster instance and keys of its own on the session's servers, and small ticket data.

Fixtures that use it are in conftest.py; what is asserted belongs in the tests.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from repro_assets import importing, running
from repro_assets.bench import DEMO, Bench
from repro_assets.documents import Document
from repro_assets.shelf import Shelf
from resources.settings import Connections

RECIPE = """\
name: {name}
raw: {{include: ["tickets/**"]}}
base_model: {{path: {model}, license: Apache-2.0}}
records:
  sources:
    - match: "**/*.jsonl"
      shape: messages
      fields: {{messages: messages, id: id}}
      slices: {{intent: intent}}
  quarantine_limit: {quarantine}
  split: {{validation: 0.1}}
  target: 16
sharding: {{max_tokens: 128}}
validation: {{reproduce: 50, max_truncated: 0.5}}
training:
  seed: 7
  steps: {steps}
  row_tokens: 128
  micro_batches: 2
  learning_rate: 4.0e-3
  compute_dtype: float32
  checkpoint_every: 3
  validate_every: 3
  validation_rows: 2
  keep: 1
evaluation:
  suites: [{{name: small, path: {suite}, labels: [intent]}}]
  batch_size: 32
gates:
  gates: [{{name: overall, suite: small, margin: 0.2}}]
"""

TASK = """\
task: small_tickets
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 4}
metric_list:
  - metric: exact_match
metadata: {version: 1, chat_template: true}
"""


def tickets(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of the demo's shape, small and made by counting."""
    return [
        {
            "id": f"t{index:04d}",
            "messages": [
                {"role": "user", "content": f"ticket {index}: the {'invoice' if index % 2 else 'parcel'} number {index * 7} is wrong"},
                {"role": "assistant", "content": f"route: {'billing' if index % 2 else 'logistics'} | priority: low"},
            ],
            "intent": "invoice" if index % 2 else "delivery",
        }
        for index in range(start, start + count)
    ]


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def suite(folder: Path, items: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(TASK)
    rows = [
        {
            "id": f"i{n}",
            "prompt": f"item {n}: where is my parcel",
            "target": "route: logistics | priority: low",
            "intent": ("invoice", "delivery")[n % 2],
        }
        for n in range(items)
    ]
    (folder / "items.jsonl").write_bytes(jsonl(rows))
    return folder


@dataclass
class Graph:
    """One graph. `recipe(name, **changes)` writes a recipe file; `run` materializes through Dagster in this process."""

    connections: Connections
    folder: Path
    instance: dg.DagsterInstance
    monkeypatch: pytest.MonkeyPatch

    @classmethod
    def make(cls, connections: Connections, folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Graph":
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in connections.environment().items():
            monkeypatch.setenv(name, value)
        home = folder / "home"
        monkeypatch.setenv("REPRO_HOME", str(home))
        monkeypatch.setenv("REPRO_CACHE", str(home / "cache"))
        monkeypatch.setenv("DAGSTER_HOME", str(folder / "dagster"))
        (folder / "dagster").mkdir(exist_ok=True)
        (folder / "dagster" / "dagster.yaml").write_text(running.FALLBACK)
        suite(folder / "suite")
        made = cls(connections, folder, dg.DagsterInstance.from_config(str(folder / "dagster")), monkeypatch)
        made.bench().lake.client.ensure()
        return made

    def recipe(self, name: str = "small", text: str = RECIPE, **changes: Any) -> Path:
        model = changes.pop("model", DEMO.parent.parent / "demo" / "base_model")
        values = {"name": name, "model": model, "suite": self.folder / "suite", "quarantine": 0.05, "steps": 6, **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text(text.format(**values))
        return path

    def bench(self, recipe: Path | None = None) -> Bench:
        return Bench.outside_a_run(str(recipe) if recipe else "")

    def import_(self, files: Mapping[str, bytes], to: str = "tickets") -> str:
        """Snapshot key of one raw commit that brings `files`."""
        source = self.folder / "import"
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        bench = self.bench()
        return importing.import_files(bench.lake.client, bench.blobs.store, [source], to=to).key

    def run(self, key: str | None, select: Sequence[str] = (), recipe: Path | None = None, **options: Any) -> running.Ran:
        return running.materialize(self.instance, key=key, select=select, recipe=str(recipe or self.recipe()), **options)

    def document(self, key: str, asset: str, recipe: str = "small") -> Document[Any, Any]:
        bench = self.bench()
        shelf = Shelf(bench.lake.client, bench.blobs.store)
        found = shelf.read(self.head(key), key, recipe, asset)
        assert found is not None, f"{asset} of {key} was never made"
        return found

    def head(self, key: str) -> str:
        return self.bench().lake.client.head(f"snapshot-{key}")

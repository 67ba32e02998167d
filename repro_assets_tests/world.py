"""A small world for tests that need the graph: a recipe, a tiny base model and a suite in a folder, and one environment that leads to it.

Everything in it is real and small; only the data stages are fast. Servers come from the fixtures in conftest.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from repro_assets.demo import tickets
from repro_assets_tests.data.material import SPECIAL, TEMPLATE
from resources.settings import Connections

ROOT = Path(__file__).parents[1]
DATA = ("raw_snapshot", "records", "shards", "validation_report")
SUITE = ROOT / "repro_assets" / "demo" / "unit_suite"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "raw": {"include": ["tickets/**"]},
    "base_model": {"path": "model", "license": "Apache-2.0"},
    "records": {
        "sources": [
            {
                "match": "**",
                "shape": "messages",
                "fields": {"messages": "messages", "id": "id"},
                "slices": {"intent": "intent"},
                "license": "Apache-2.0",
            }
        ],
        "split": {"validation": 0.2},
        "target": 16,
    },
    "sharding": {"max_tokens": 1024},
    "validation": {"min_records": 10},
    "evaluation": {"suites": [{"name": "unit", "path": str(SUITE), "labels": ["intent"], "cluster": "cluster"}]},
    "gates": {"gates": [{"name": "overall", "suite": "unit", "margin": 0.5}]},
}


def write_model(folder: Path) -> Path:
    """A model whose tokenizer knows bytes, and whose weights nobody reads."""
    folder.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"model.embed_tokens.weight": np.zeros((len(vocabulary), 8), np.float32)}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "eos_token_id": 4, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "<pad>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("Apache License 2.0")
    return folder


def write_recipe(path: Path, **changes: Any) -> Path:
    """The tiny recipe; `changes` replace sections, or fields of a section that is a mapping."""
    tree = json.loads(json.dumps(RECIPE))
    for name, change in changes.items():
        tree[name] = {**tree[name], **change} if isinstance(change, dict) else change
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1))  # every JSON text is YAML
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Tickets of the demo, which are all different."""
    return tickets.snapshot("first")[start : start + count]


def jsonl(items: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


class World:
    """A folder with recipe, model and raw data, and the environment variables that lead to one repository."""

    def __init__(self, folder: Path, connections: Connections) -> None:
        self.folder, self.connections = folder, connections
        write_model(folder / "model")
        self.recipe = write_recipe(folder / "tiny.yaml")
        self.data = folder / "data"
        self.data.mkdir()
        self.environment = {
            **connections.environment(),
            "REPRO_RECIPE": str(self.recipe),
            "REPRO_ACTOR": "tester",
            "PYTHONWARNINGS": "ignore",
            "COLUMNS": "200",
        }

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @contextmanager
    def entered(self) -> Iterator["World"]:
        """This process sees the world's variables while the block runs."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield self
        finally:
            os.environ.clear()
            os.environ.update(before)

    def repro(self, *arguments: object, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own, as people start it."""
        return subprocess.run(
            [sys.executable, "-m", "repro_assets", *map(str, arguments)],
            env={**os.environ, **self.environment, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

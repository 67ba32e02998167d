"""What the data tests are made of: rows, raw files in memory, a base model's document, templates. Fixtures are in conftest.py."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from repro_assets.data import manifest, records
from repro_assets.documents import BaseModel, RawFile, RawSnapshot, Records, RecordsObserved
from repro_assets.recipe import BaseModelSection, EvaluationSection, GatesSection, Recipe, RecordsSection, Source
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import sha256

SPECIAL = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{{ m.content | trim }}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GSM8K = Path(__file__).parent / "gsm8k" / "train-400.jsonl"

CHAT = Source(match="**", shape="messages", fields={"id": "id"}, slices={"intent": "intent"})
PAIR = Source(match="**", shape="prompt_completion", fields={"prompt": "question", "completion": "answer"})


class Raw:
    """Raw files in memory: a snapshot and what opens its files."""

    def __init__(self, files: Mapping[str, bytes], store: FolderStore) -> None:
        self.files = dict(files)
        listed = [RawFile(path, sha256(data), len(data), manifest.format_of(path)) for path, data in self.files.items()]
        self.snapshot: RawSnapshot = manifest.build(listed, store)
        self.store = store

    def open(self, file: RawFile) -> BinaryIO:
        return io.BytesIO(self.files[file.path])

    def records(self, section: RecordsSection | Source = CHAT, prompts: bytes = b"", **how: Any) -> Records:
        return self.both(section, prompts, **how)[0]

    def both(
        self, section: RecordsSection | Source = CHAT, prompts: bytes = b"", previous: Any = None, workers: Any = None, **changed: object
    ) -> tuple[Records, RecordsObserved]:
        """Content and observed half. `changed`: fields of the section."""
        section = section if isinstance(section, RecordsSection) else RecordsSection(sources=(section,))
        section = msgspec.structs.replace(section, **changed)
        return records.build(self.snapshot, self.open, prompts, section, self.store, previous=previous, workers=workers)


def row(text: str, answer: str = "fine", key: str | None = None, intent: str = "refund") -> bytes:
    """One chat row as JSON, without a newline."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return msgspec.json.encode({"id": key or text, "messages": messages, "intent": intent})


def jsonl(*rows: bytes) -> bytes:
    return b"".join(line + b"\n" for line in rows)


def tokenizer_files(tokenizer_json: bytes, template: str = TEMPLATE) -> dict[str, bytes]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<pad>", "chat_template": None}
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": template.encode(),
    }


def base_model_of(store: FolderStore, tokenizer_json: bytes, template: str) -> BaseModel:
    files = {name: store.put_bytes(data) for name, data in tokenizer_files(tokenizer_json, template).items()}
    return BaseModel(
        model_files=files,
        architecture="LlamaForCausalLM",
        parameters=1,
        vocabulary=700,
        tokenizer=sha256(tokenizer_json),
        template=sha256(template.encode()),
        source={"kind": "folder"},
        license="Apache-2.0",
        floor={},
    )


def recipe_of(section: RecordsSection, **changed: object) -> Recipe:
    return Recipe(
        name="test",
        base_model=BaseModelSection(path="model"),
        records=section,
        evaluation=EvaluationSection(suites=()),
        gates=GatesSection(gates=()),
        **changed,  # type: ignore[arg-type]
    )

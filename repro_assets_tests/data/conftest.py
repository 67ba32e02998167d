"""Fixtures of the data tests: a folder store, a snapshot made from bytes, a small real tokenizer with a template, real gsm8k rows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from repro_assets.data import sharding
from repro_assets.documents import BaseModel
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.data.material import GSM8K, SPECIAL, TEMPLATE, Raw, base_model_of

# The first example of a test pays for imports, and test machines are shared: a deadline would measure neighbours.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True)
def no_codec_of_another_test() -> None:
    """Tests change what a codec finds when it is loaded."""
    sharding._kept.clear()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def raw(store: FolderStore) -> Callable[[Mapping[str, bytes]], Raw]:
    return lambda files: Raw(files, store)


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A byte-level BPE of 700 entries, trained on the shipped gsm8k rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


@pytest.fixture
def base_model(store: FolderStore, tokenizer_json: bytes) -> BaseModel:
    """A base model's document with real tokenizer files; its weights are not read by the data path."""
    return base_model_of(store, tokenizer_json, TEMPLATE)


@pytest.fixture(scope="session")
def gsm8k() -> bytes:
    """400 real rows of gsm8k's training set (MIT licence beside them)."""
    return GSM8K.read_bytes()

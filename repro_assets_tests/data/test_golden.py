"""The tiny run: the first records rebuilt from raw give the golden digest, and each planted fault is named with record and stage."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from repro_assets.data import golden, leaves, parts, sharding, tokenizing
from repro_assets.data.errors import RenderingError
from repro_assets.data.golden import Deviation, Vector
from repro_assets.data.lines import Message
from repro_assets.data.tokenizing import Codec, Tokens
from repro_assets.documents import BaseModel, Records, Shards, ShardsObserved
from repro_assets.recipe import Augmentation, RecordsSection, ShardingSection, Split
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import sha256
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

CLEANING = RecordsSection(sources=(CHAT,), split=Split(validation=0.2), target=8)
SHARDING = ShardingSection()


@dataclass
class World:
    """Two raw files, their records and shards, in a folder store."""

    raw: Raw
    records: Records
    shards: Shards
    observed: ShardsObserved
    model: BaseModel
    store: FolderStore
    cleaning: RecordsSection = CLEANING

    def stored(self, count: int) -> list[golden.Stored]:
        return golden.first(self.shards, self.observed, self.store, count)

    def path(self, codec: Any = None) -> golden.Path:
        codec = codec or tokenizing.load(self.store, self.model)
        return golden.Path(self.raw.snapshot, self.raw.open, self.records, self.cleaning, SHARDING, codec)

    def run(self, count: int, codec: Any = None) -> tuple[Vector, Vector, list[Deviation]]:
        """(golden, now, what came out differently)."""
        path, stored = self.path(codec), self.stored(count)
        found = path.again([item.record for item in stored], self.store)
        deviations = list(golden.deviations(stored, found, path, self.model, self.store))
        return golden.golden(stored), golden.now_vector(stored, found), deviations


def made(store: FolderStore, model: BaseModel, cleaning: RecordsSection = CLEANING, files: dict[str, bytes] | None = None) -> World:
    rows = [row(f"question  number {n}", f"answer {n}", key=f"k{n}") for n in range(60)]
    raw = Raw(files or {"a.jsonl": jsonl(*rows[:35]), "b.jsonl": jsonl(*rows[35:])}, store)
    records = raw.records(cleaning)
    shards, observed = sharding.build(records, model, SHARDING, store)
    return World(raw, records, shards, observed, model, store, cleaning)


@pytest.fixture
def world(store: FolderStore, base_model: BaseModel) -> World:
    return made(store, base_model)


def test_the_golden_is_the_digest_of_the_first_records_and_their_tokens(world: World) -> None:
    """S0.47: the formula, spelled out."""
    every = [
        bytes.fromhex(name) + leaves.token_digest(ids, spans)
        for _entry, leaf in sharding.stored_leaves(world.shards, world.observed, world.store)
        for name, ids, spans in zip(leaf.records, leaf.ids, leaf.spans, strict=True)
    ]
    expected = sha256(b"".join(every[:3]))
    assert golden.golden(world.stored(3)) == Vector(3, expected)
    assert golden.golden(world.stored(10_000)) == Vector(len(every), sha256(b"".join(every)))


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_same_code_gives_the_golden_again(world: World, count: int) -> None:
    """S0.45, S0.47: the first N examples through the whole path again, checksums compared with the saved ones."""
    expected, now, deviations = world.run(count)
    assert expected == now
    assert deviations == []
    assert expected.records == min(count, sum(world.shards.records.values()))


def test_only_the_leaves_of_the_first_records_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = FolderStore.get_bytes

    def counted(store: FolderStore, name: str) -> bytes:
        read.append(name)
        return get(store, name)

    monkeypatch.setattr(FolderStore, "get_bytes", counted)
    world.stored(1)
    assert read == [world.observed.stored[world.shards.leaves[0].sha256].sha256]


def test_copies_of_an_augmentation_are_made_again_too(store: FolderStore, base_model: BaseModel) -> None:
    cleaning = msgspec.structs.replace(CLEANING, augment=(Augmentation(kind="lowercase", share=1.0),))
    files = {"a.jsonl": jsonl(*(row(f"QUESTION {n}", f"Answer {n}", key=f"k{n}") for n in range(20)))}
    world = made(store, base_model, cleaning, files)
    assert sum(source.augmented for source in world.records.sources) > 0
    expected, now, deviations = world.run(1000)
    assert (expected, deviations) == (now, [])


# ---- planted faults


def only(deviations: list[Deviation]) -> Deviation:
    (found,) = deviations
    return found


def test_a_row_that_changed_in_raw_is_named_as_row(world: World) -> None:
    data = world.raw.files["a.jsonl"]
    world.raw.files["a.jsonl"] = data.replace(b'question  number 3"', b'question  number X"')
    expected, now, deviations = world.run(60)
    assert expected != now
    found = only(deviations)
    assert (found.stage, found.where) == ("row", "a.jsonl:4")
    assert found.detail.startswith("a.jsonl has SHA-256 ")
    assert "the manifest says" in found.detail


def test_a_row_that_cannot_be_read_any_more_is_named_as_row(world: World) -> None:
    data = world.raw.files["a.jsonl"]
    world.raw.files["a.jsonl"] = data.replace(b'{"id":"k3"', b'{"iX":"k3"')
    assert only(world.run(60)[2]).stage == "row"


def test_another_cleaning_is_named_with_message_and_character(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = parts.clean

    def other(messages: tuple[Message, ...], section: RecordsSection) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        messages, steps = clean(messages, section)
        if messages[0].content.endswith("number 5"):
            messages = (msgspec.structs.replace(messages[0], content=messages[0].content.replace("  ", " ")), *messages[1:])
        return messages, steps

    monkeypatch.setattr(parts, "clean", other)
    monkeypatch.setattr(parts, "untouched", lambda *_how: False)
    found = only(world.run(60)[2])
    assert (found.where, found.stage) == ("a.jsonl:6", "cleaning")
    assert found.detail == "message 1 (user): the texts differ from character 9 on"


class Altered:
    """A codec that does something else to one record."""

    def __init__(self, codec: Codec, change: Callable[[Tokens], Tokens], mark: str = "number 7") -> None:
        self.codec, self.change, self.mark = codec, change, mark

    def tokens(self, records: Any, max_tokens: int, train_on: str) -> list[Tokens]:
        found = self.codec.tokens(records, max_tokens, train_on)
        hit = [record.messages[0].content.endswith(self.mark) for record in records]
        return [self.change(tokens) if here else tokens for tokens, here in zip(found, hit, strict=True)]


def altered(world: World, change: Callable[[Tokens], Tokens]) -> Deviation:
    return only(world.run(60, Altered(tokenizing.load(world.store, world.model), change))[2])


def test_another_rendering_is_told_from_other_ids_of_the_same_text(world: World) -> None:
    codec = tokenizing.load(world.store, world.model)
    vocabulary = json.loads(world.store.get_bytes(world.model.model_files["tokenizer.json"].sha256))["model"]["vocab"]
    # The same word in single bytes: what another merge table would give.
    split = [vocabulary[letter] for letter in "answer"]

    def spelled(tokens: Tokens) -> Tokens:
        whole = codec.tokens([], 10, "assistant")
        assert whole == []
        ids = tokens.ids.tolist()
        at = next(index for index in range(len(ids)) if decoder.text(ids[index:]).startswith("answer"))
        end = next(index for index in range(at + 1, len(ids) + 1) if decoder.text(ids[at:index]) == "answer")
        return msgspec.structs.replace(tokens, ids=np.array([*ids[:at], *split, *ids[end:]], np.uint32))

    from repro_assets.data.decoding import Decoder

    decoder = Decoder(world.store, world.model)
    found = altered(world, spelled)
    assert (found.stage, found.where) == ("ids", "a.jsonl:8")
    assert found.detail.startswith("the same text has other ids from token ")
    found = altered(world, lambda tokens: msgspec.structs.replace(tokens, ids=np.append(tokens.ids, vocabulary["a"]).astype(np.uint32)))
    assert found.stage == "rendering"
    assert "the rendered texts differ from character" in found.detail
    found = altered(world, lambda tokens: msgspec.structs.replace(tokens, spans=tokens.spans + np.array([[0, -1]], np.int64)))
    assert found.stage == "rendering"
    assert found.detail.startswith("the trained spans [[")


def test_a_record_that_cannot_be_rendered_any_more_is_named(world: World) -> None:
    def refuse(_tokens: Tokens) -> Tokens:
        raise RenderingError("no template today")

    found = altered(world, refuse)
    assert (found.stage, found.detail) == ("rendering", "no template today")


def test_a_record_that_no_index_leads_to_is_named(world: World) -> None:
    index = {**world.records.index, "a.jsonl": world.store.put_bytes(b"")}
    world.records = msgspec.structs.replace(world.records, index=index)
    expected, now, deviations = world.run(1)
    assert expected != now
    assert only(deviations) == Deviation(world.stored(1)[0].record, "", "row", "no index leads to it")


def test_a_run_of_nothing_opens_no_file(world: World) -> None:
    world.raw.open = lambda file: pytest.fail("a raw file was opened")  # type: ignore[method-assign]
    assert world.path().again([], world.store) == {}
